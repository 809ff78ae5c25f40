"""Pictures of images: rows that share their noise, and images above their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.figures.canvas import drawing
from pflow_jax.evaluation.figures.lettering import fitted, text_width
from pflow_jax.evaluation.figures.style import DPI, MUTED

Array = np.ndarray


def to_bytes(x: Array) -> Array:
  """Images of any shape in [-1, 1] (clipped; not finite becomes mid-grey) as uint8."""
  return np.rint((np.nan_to_num(np.clip(x, -1, 1), nan=0.0) + 1) * 127.5).astype(np.uint8)


def image_grid(
  rows: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
  column_labels: Sequence[str] | None = None,
  scale: int | None = None,
  columns: int | None = None,
) -> Any:
  """Labelled rows of images; column i of every row is meant to come from the same noise.

  Args:
    rows: label -> images (n, H, W, C) in [-1, 1] (clipped; not finite becomes mid-grey), C 1 or 3, one shape for all.
    title: above the rows.
    column_labels: n texts above the columns, such as the class; long ones get smaller letters and two lines, and
      are cut if they still do not fit.
    scale: pixels of the picture for each pixel of an image, nearest neighbour; by default images get about 96 wide.
    columns: images side by side, the others continue below; by default all.

  Raises:
    ValueError: for other shapes.
  """
  if not rows:
    raise ValueError("rows: expected at least one row of images, got none")
  images = {label: np.asarray(x, np.float32) for label, x in rows.items()}
  shape = next(iter(images.values())).shape
  for label, x in images.items():
    if x.ndim != 4 or x.shape != shape or x.shape[-1] not in (1, 3) or x.size == 0:
      raise ValueError(
        f"rows[{label!r}]: expected (n, H, W, 1 or 3), the same for all rows, got {x.shape} beside {shape}"
      )
  count, height, width = shape[:3]
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
  head = line + max((name.count("\n") for name in names), default=0) * line // 2
  between = head if column_labels is not None else 2 * gap  # blocks of all rows
  block, blocks = len(images) * cell_h - gap + between, -(-count // columns)
  canvas = np.full((blocks * block - between, columns * cell_w - gap, 3), 255, np.uint8)
  for i, x in enumerate(images.values()):
    x = to_bytes(x).repeat(scale, axis=1).repeat(scale, axis=2)
    for j in range(count):
      top, left = j // columns * block + i * cell_h, j % columns * cell_w
      canvas[top : top + height * scale, left : left + width * scale] = x[j]

  texts = [text_width(label) for label in images]
  margin = max(texts) + pad if any(images) else 0
  top = (line + pad // 2 if title else 0) + (head if column_labels is not None else 0)
  total_w = pad + margin + canvas.shape[1] + pad
  total_w = max(total_w, text_width(title, 11) + 2 * pad if title else 0)
  total_h = pad + top + canvas.shape[0] + pad
  with drawing(total_w / DPI, total_h / DPI) as figure:
    left, bottom = pad + margin, pad
    box = (left / total_w, bottom / total_h, canvas.shape[1] / total_w, canvas.shape[0] / total_h)
    axes = figure.add_axes(box)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for i, label in enumerate(list(images) * blocks):
      down = i // len(images) * block + i % len(images) * cell_h
      y = bottom + canvas.shape[0] - down - height * scale / 2
      figure.text((left - pad * 0.75) / total_w, y / total_h, label, ha="right", va="center", parse_math=False)
    for j, text in enumerate(names):
      x, y = left + j % columns * cell_w + width * scale / 2, canvas.shape[0] - j // columns * block + head * 0.45
      figure.text(
        x / total_w, (bottom + y) / total_h, text, size=size, ha="center", va="center", color=MUTED, parse_math=False
      )
    if title:
      figure.text(pad / total_w, 1 - (pad + line / 2) / total_h, title, va="center", fontsize=11, parse_math=False)
  return figure


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
  wrapped = [textwrap.fill(text, letters, max_lines=2, placeholder=" …", break_long_words=False) for text in captions]
  cell_w, cell_h = width + pad, height + pad + line * (1 + max(text.count("\n") for text in wrapped))
  total_w, total_h = pad + columns * cell_w, pad + -(-len(pixels) // columns) * cell_h
  canvas = np.full((total_h, total_w, 3), 255, np.uint8)
  corners = [(pad + i // columns * cell_h, pad + i % columns * cell_w) for i in range(len(pixels))]
  for (top, left), one in zip(corners, pixels, strict=True):
    canvas[top : top + height, left : left + width] = one
  with drawing(total_w / DPI, total_h / DPI) as figure:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for (top, left), text in zip(corners, wrapped, strict=True):
      x_text, y_text = (left + width / 2) / total_w, 1 - (top + height + line / 4) / total_h
      figure.text(x_text, y_text, text, ha="center", va="top", color=MUTED, parse_math=False)
  return figure
