"""From a Pillow image to pixels, and from pixels to [-1, 1]."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from pflow_jax.files.foreign import check_memory, open_image, shown

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


def to_pixels(image: Image.Image, size: int | tuple[int, int], channels: int) -> np.ndarray:
  """Cuts around the middle to the shape of `size`, resizes, and converts.

  Args:
    image: any Pillow image; of several frames the first is taken, and transparency is composited over white.
    size: height and width of the result in pixels, or the side of a square.
    channels: 1 (grey) or 3 (RGB).

  Returns:
    (height, width, channels), uint8.

  Raises:
    ValueError: for 32-bit pixels, whose range is unknown.
  """
  if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
    image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
  if image.mode in ("I", "F"):
    raise ValueError(f"expected 8 or 16 bits a channel, got Pillow mode {image.mode!r}; convert it")
  image = over_white(image).convert(MODES[channels])
  height, width = (size, size) if isinstance(size, int) else size
  if image.size != (width, height):
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(height, width, channels)


def read_pixels(path: str | os.PathLike, size: int | tuple[int, int], channels: int) -> np.ndarray:
  """Returns the pixels of an image file, turned upright, see `to_pixels`.

  Raises:
    ValueError: the file, which the message names, is broken.
  """
  with open_image(path) as image:
    try:
      upright = ImageOps.exif_transpose(image)
    except Exception:  # EXIF data may be broken; an error in the pixels is raised again below
      upright = image
    return to_pixels(upright, size, channels)


def check_image_options(name: str, image_size: int | None, channels: int) -> None:
  """Raises ValueError unless image_size >= 1, such images fit the machine's memory, and channels is 1 or 3."""
  if image_size is None or image_size < 1:
    raise ValueError(f"{name}: its images have no one size; give image_size=<pixels>, e.g. 64 (got {image_size}).")
  if channels not in MODES:
    raise ValueError(f"{name}: channels must be 1 (grey) or 3 (RGB), got {shown(channels)}.")
  check_memory(f"{name}: image_size={shown(image_size)}", 5 * channels * image_size**2, "give fewer pixels")
