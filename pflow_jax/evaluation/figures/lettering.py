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
  text = str(text)
  shown = text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS - 1]}…"
  return "".join(letter if letter.isprintable() else "?" for letter in shown)


def fitted(labels: Sequence[Any], width: int) -> tuple[list[str], float]:
  """Fits labels to columns of `width` pixels: smaller letters for long words, then lines, of which there may be many.

  Returns:
    The labels, whole up to MAX_LETTERS, and the size of their letters.
  """
  texts = [_plain(label) for label in labels]
  widest = max((text_width(word) for text in texts for word in text.split()), default=0)
  size = min(FONT, max(SMALLEST_FONT, FONT * width / max(widest, 1)))
  return [wrapped(text, width, size) for text in texts], size


def wrapped(text: str, width: int, size: float = FONT) -> str:
  """Breaks a text into lines of at most `width` pixels, between words, and within a word that is longer than a line."""
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".lstrip()
    if text_width(longer, size) <= width + 1:  # rounded
      lines[-1] = longer
      continue
    lines.append("")
    for letter in word:
      if lines[-1] and text_width(lines[-1] + letter, size) > width + 1:
        lines.append("")
      lines[-1] += letter
  return "\n".join(line for line in lines if line)
