"""Texts from users in a figure: their width, and their fit to a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pflow_jax.evaluation.figures.style import DPI, FONT

SMALLEST_FONT = 5.5  # points
MAX_LETTERS = 100  # letters of a text that are drawn


def text_width(text: str, size: float = FONT) -> int:
  """Width in pixels of a line of text in the default font."""
  from matplotlib.font_manager import FontProperties
  from matplotlib.textpath import text_to_path

  if not text.strip():
    return 0
  width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(family="sans-serif", size=size), False)
  return round(width * DPI / 72)


def _plain(text: Any) -> str:
  """Returns a text with a question mark for every letter that cannot be printed."""
  return "".join(letter if letter.isprintable() else "?" for letter in str(text)[:MAX_LETTERS])


def _halved(text: str) -> str:
  """Returns a text on two lines, cut at the space that is nearest to its middle; on one if it has none."""
  spaces = [i for i, letter in enumerate(text) if letter == " "]
  middle = min(spaces, key=lambda i: abs(i - len(text) / 2), default=None)
  return text if middle is None else f"{text[:middle]}\n{text[middle + 1 :]}"


def fitted(labels: Sequence[Any], width: int) -> tuple[list[str], float]:
  """Fits labels to columns of `width` pixels, on one or two lines; returns them and the size of their letters."""
  texts = [_plain(label) for label in labels]
  if max(map(text_width, texts), default=0) > width:
    texts = [_halved(text) for text in texts]
  widest = max((text_width(line) for text in texts for line in text.split("\n")), default=0)
  size = min(FONT, max(SMALLEST_FONT, FONT * width / max(widest, 1)))

  def cut(line: str) -> str:
    if text_width(line, size) <= width + 1:  # rounded
      return line
    while line and text_width(f"{line}…", size) > width:
      line = line[:-1]
    return f"{line}…"

  return ["\n".join(map(cut, text.split("\n"))) for text in texts], size
