"""From a Pillow image to pixels, and from pixels to [-1, 1]."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB"}


def to_unit(pixels: np.ndarray) -> np.ndarray:
  """Pixels 0 .. 255 -> float32 in [-1, 1], same shape."""
  return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def over_white(image: Image.Image) -> Image.Image:
  """The image with its transparency, if it has any, composited over white."""
  if not image.has_transparency_data:
    return image
  image = image.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
  """Centre crop to a square, resize, and convert.

  Args:
    image: any Pillow image; transparency is composited over white.
    size: side of the result in pixels.   channels: 1 (grey) or 3 (RGB).
  Returns: (size, size, channels), uint8.
  Raises: ValueError for 32-bit pixels, whose range is unknown.
  """
  if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
    image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
  if image.mode in ("I", "F"):
    raise ValueError(f"expected 8 or 16 bits a channel, got Pillow mode {image.mode!r}; convert it")
  image = over_white(image).convert(MODES[channels])
  if image.size != (size, size):
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(size, size, channels)


def check_image_options(name: str, image_size: int | None, channels: int) -> None:
  """Raises ValueError unless image_size >= 1 and channels is 1 or 3."""
  if image_size is None or image_size < 1:
    raise ValueError(f"{name}: its images have no one size; give image_size=<pixels>, e.g. 64 (got {image_size}).")
  if channels not in MODES:
    raise ValueError(f"{name}: channels must be 1 (grey) or 3 (RGB), got {channels}.")
