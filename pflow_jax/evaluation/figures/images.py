"""Pictures of images: rows that share their noise, and images above their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.figures.canvas import drawing
from pflow_jax.evaluation.figures.lettering import fitted, text_width, wrapped
from pflow_jax.evaluation.figures.palette import MUTED
from pflow_jax.evaluation.figures.style import DPI

Array = np.ndarray


def to_bytes(x: Array) -> Array:
  """Images of any shape in [-1, 1] (clipped; not finite becomes mid-grey) as uint8, rounded as ADM does."""
  return np.minimum(np.nan_to_num(np.clip(x, -1, 1), nan=0.0) * 127.5 + 128, 255).astype(np.uint8)


def image_grid(
  rows: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
  caption: str | None = None,
  column_labels: Sequence[str] | None = None,
  notes: Mapping[str, str] | None = None,
  notes_title: str = "",
  scale: int | None = None,
  columns: int | None = None,
) -> Any:
  """Labelled rows of images; column i of every row is meant to come from the same noise.

  Args:
    rows: label -> images (n, H, W, C) in [-1, 1] (clipped; not finite becomes mid-grey), C 1 or 3, one shape for all.
    title: above the rows.
    caption: lines below the title, smaller; they say what is to be seen.
    column_labels: n texts above the columns, such as the class; long ones get smaller letters and more lines.
    notes: label -> text on the right of that row, such as its error.
    notes_title: above the notes.
    scale: pixels of the picture for each pixel of an image, nearest neighbour; by default images get about 96 wide.
    columns: images side by side, the others continue below; by default all.

  Raises:
    ValueError: for other shapes.
  """
  images = _checked(rows)
  count, height, width = next(iter(images.values())).shape[:3]
  if column_labels is not None and len(column_labels) != count:
    raise ValueError(f"column_labels: expected {count}, one per column, got {len(column_labels)}")
  scale = scale or max(1, round(96 / width))
  if scale < 1:
    raise ValueError(f"scale: expected a whole number >= 1, got {scale}")

  columns = min(columns or count, count)
  gap = max(4, width * scale // 16)
  cell_h, cell_w = height * scale + gap, width * scale + gap
  # The figure is laid out in whole pixels, so that every pixel of an image is a sharp square.
  pad, line = 24, 40
  names, size = fitted(column_labels or (), width * scale)
  lines = [name.count("\n") for name in (*names, notes_title if notes else "")]
  labelled = column_labels is not None or bool(notes and notes_title)
  head = (line + max(lines) * line * 5 // 8) if labelled else 0
  between = head or 2 * gap  # blocks of all rows
  block, blocks = len(images) * cell_h - gap + between, -(-count // columns)
  canvas = np.full((blocks * block - between, columns * cell_w - gap, 3), 255, np.uint8)
  for i, x in enumerate(images.values()):
    x = to_bytes(x).repeat(scale, axis=1).repeat(scale, axis=2)
    for j in range(count):
      top, left = j // columns * block + i * cell_h, j % columns * cell_w
      canvas[top : top + height * scale, left : left + width * scale] = x[j]

  margin = max(map(text_width, images)) + pad if any(images) else 0
  beside = [*(notes or {}).values(), *(notes_title.split("\n") if notes else ())]
  right = max(map(text_width, beside)) + pad if beside else 0
  inner = max(margin + canvas.shape[1] + right, text_width(title or "", 11), 600 if caption else 0)
  told = [part for text in (caption or "").split("\n") for part in wrapped(text, inner, 8).split("\n") if part]
  above = (line + pad // 2 if title else 0) + (len(told) * line * 3 // 4 + pad // 2 if told else 0)
  total_w = inner + 2 * pad
  total_h = pad + above + head + canvas.shape[0] + pad
  with drawing(total_w / DPI, total_h / DPI) as figure:
    left, bottom = pad + margin, pad
    box = (left / total_w, bottom / total_h, canvas.shape[1] / total_w, canvas.shape[0] / total_h)
    axes = figure.add_axes(box)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()

    def write(x: float, y: float, text: str, **options: Any) -> None:
      """Writes at pixels from the lower left."""
      options = dict(va="center", parse_math=False) | options
      figure.text(x / total_w, y / total_h, text, **options)

    edge = left + canvas.shape[1] + pad * 0.75
    for i, label in enumerate(list(images) * blocks):
      down = i // len(images) * block + i % len(images) * cell_h
      y = bottom + canvas.shape[0] - down - height * scale / 2
      write(left - pad * 0.75, y, label, ha="right")
      if notes and label in notes:
        write(edge, y, notes[label])
    for j, text in enumerate(names):
      x, y = left + j % columns * cell_w + width * scale / 2, canvas.shape[0] - j // columns * block + pad / 4
      write(x, bottom + y, text, size=size, ha="center", va="bottom", color=MUTED)
    for j in range(blocks if notes else 0):
      y = bottom + canvas.shape[0] - j * block + pad / 4
      write(edge, y, notes_title, va="bottom", color=MUTED, linespacing=1.1)
    y = total_h - pad - line / 2
    if title:
      write(pad, y, title, fontsize=11)
      y -= line + pad / 2
    for text in told:
      write(pad, y, text, fontsize=8, color=MUTED)
      y -= line * 3 / 4
  return figure


def visible(x: ArrayLike) -> Array:
  """Returns the channels of images that can be shown; of latents (n, H, W, C) the first, which show their outlines."""
  x = np.asarray(x)
  return x if x.shape[-1] in (1, 3) else x[..., :3] if x.shape[-1] > 3 else x[..., :1]


def _checked(rows: Mapping[str, ArrayLike]) -> dict[str, Array]:
  """Returns rows of images as float32; a ValueError says that they are none, or not of one shape."""
  if not rows:
    raise ValueError("rows: expected at least one row of images, got none")
  images = {label: np.asarray(x, np.float32) for label, x in rows.items()}
  shape = next(iter(images.values())).shape
  for label, x in images.items():
    if x.ndim != 4 or x.shape != shape or x.shape[-1] not in (1, 3) or x.size == 0:
      raise ValueError(
        f"rows[{label!r}]: expected (n, H, W, 1 or 3), the same for all rows, got {x.shape} beside {shape}"
      )
  return images


def captioned_images(images: ArrayLike, captions: Sequence[str], *, columns: int = 4, side: int = 256) -> Any:
  """Images in reading order, each above its caption, of two lines at most.

  Args:
    images: (n, H, W, C) in [-1, 1] (clipped; not finite becomes mid-grey), C 1 or 3.
    captions: n texts.
    columns: images a row.
    side: pixels of an image's longer side; smaller images grow by whole pixels (nearest neighbour), larger ones shrink.

  Raises:
    ValueError: for other shapes.
  """
  import textwrap

  from PIL import Image

  x = np.asarray(images, np.float32)
  if x.ndim != 4 or x.shape[-1] not in (1, 3) or x.size == 0:
    raise ValueError(f"images: expected (n, H, W, 1 or 3), got {x.shape}")
  if len(captions) != len(x):
    raise ValueError(f"captions: expected {len(x)}, one per image, got {len(captions)}")
  pixels = to_bytes(x).repeat(3 // x.shape[-1], axis=-1)
  longest = max(x.shape[1:3])
  if longest > side:
    size = tuple(max(1, round(n * side / longest)) for n in (x.shape[2], x.shape[1]))
    pixels = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.LANCZOS)) for one in pixels])
  else:
    pixels = pixels.repeat(side // longest, axis=1).repeat(side // longest, axis=2)

  height, width = pixels.shape[1:3]
  pad, line = 24, 32
  columns = min(columns, len(pixels))
  letters = max(1, int(width / (text_width("n" * 20) / 20)))
  texts = [textwrap.fill(text, letters, max_lines=2, placeholder=" …", break_long_words=False) for text in captions]
  cell_w, cell_h = width + pad, height + pad + line * (1 + max(text.count("\n") for text in texts))
  total_w, total_h = pad + columns * cell_w, pad + -(-len(pixels) // columns) * cell_h
  canvas = np.full((total_h, total_w, 3), 255, np.uint8)
  corners = [(pad + i // columns * cell_h, pad + i % columns * cell_w) for i in range(len(pixels))]
  for (top, left), one in zip(corners, pixels, strict=True):
    canvas[top : top + height, left : left + width] = one
  with drawing(total_w / DPI, total_h / DPI) as figure:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for (top, left), text in zip(corners, texts, strict=True):
      x_text, y_text = (left + width / 2) / total_w, 1 - (top + height + line / 4) / total_h
      figure.text(x_text, y_text, text, ha="center", va="top", color=MUTED, parse_math=False)
  return figure
