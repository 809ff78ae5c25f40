"""Small pictures for notebooks."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

COLUMNS = 16
SIDE = 64  # pixels of an image at most; a small one grows by whole pixels
_BINS, _RANGE = 160, 2.5  # of a picture of points: pixels a side, and the largest coordinate in it


def sheet(x0: np.ndarray) -> Image.Image:
  """Draws examples on one picture: images side by side, points by their density.

  Args:
    x0: (n, H, W, 1 or 3) in [-1, 1], clipped, or (n, 2).
  """
  if x0.ndim == 2:
    count = np.histogram2d(-x0[:, 1], x0[:, 0], _BINS, [[-_RANGE, _RANGE]] * 2)[0]
    return Image.fromarray(np.uint8(255 - 255 * np.minimum(count / max(np.quantile(count, 0.98), 1), 1)))
  pixels = np.rint((np.clip(np.nan_to_num(x0), -1, 1) + 1) * 127.5).astype(np.uint8)
  pixels = pixels[:, :: -(-x0.shape[1] // SIDE), :: -(-x0.shape[2] // SIDE)]
  n, height, width, channels = pixels.shape
  columns, scale = min(n, COLUMNS), max(1, SIDE // max(height, width))
  rows = -(-n // columns)
  canvas = np.full((rows * columns, height * scale + 2, width * scale + 2, channels), 255, np.uint8)
  canvas[:n, :-2, :-2] = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  canvas = canvas.reshape(rows, columns, *canvas.shape[1:]).swapaxes(1, 2)
  canvas = canvas.reshape(rows * canvas.shape[1], -1, channels)
  return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png_of(image: Image.Image) -> bytes:
  """Returns a picture as a PNG file."""
  file = io.BytesIO()
  image.save(file, format="PNG")
  return file.getvalue()


def as_html(text: str, png: bytes | None = None, width: int | None = None) -> str:
  """Returns a line of text and a picture, perhaps so many pixels wide, as HTML for a notebook; either may be empty."""
  line = f"<code>{html.escape(text)}</code>" if text else ""
  size = f' width="{width}"' if width else ""
  image = (
    "" if png is None else f'{line and "<br>"}<img{size} src="data:image/png;base64,{base64.b64encode(png).decode()}">'
  )
  return f"<div>{line}{image}</div>"
