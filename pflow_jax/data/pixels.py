"""From a Pillow image to pixels, and from pixels to [-1, 1]."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pflow_jax.files.foreign import available_formats, check_memory, open_image, shown

MODES = {1: "L", 3: "RGB"}
Crop = Literal["fit", "adm"]
"""Ways from a picture to a square: `to_pixels`, which looks upright at what is transparent over white, or
`center_crop`, with which the published figures on ImageNet are measured."""


def to_unit(pixels: np.ndarray) -> np.ndarray:
  """Pixels 0 .. 255 -> float32 in [-1, 1], same shape."""
  return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def image_endings() -> frozenset[str]:
  """Returns the endings of names, with their dots, of the files that are taken for images."""
  formats = available_formats()
  return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


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
  image = over_white(_of_8_bits(image)).convert(MODES[channels])
  height, width = (size, size) if isinstance(size, int) else size
  if image.size != (width, height):
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(height, width, channels)


def center_crop(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
  """Scales the short side to `size` and cuts a square out of the middle, as ADM does and its followers.

  Both sides are halved by averages of 2 x 2 pixels while the short one is at least twice the size, then scaled by
  Pillow's bicubic filter. As there, grey becomes three equal channels, CMYK Pillow's plain RGB; transparency is dropped
  with the colours under it kept, and the orientation in EXIF data is not looked at.

  Args:
    image: any Pillow image; of several frames the first is taken.
    size: side in pixels.
    channels: 1 (grey) or 3 (RGB).

  Returns:
    (size, size, channels), uint8.

  Raises:
    ValueError: for 32-bit pixels, whose range is unknown, or a strip that would be scaled to more than Pillow's limit.

  References:
    ADM, arXiv:2105.05233; center_crop_arr of github openai/guided-diffusion.
  """
  image = _of_8_bits(image).convert(MODES[channels])
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  width, height = (round(side * scale) for side in image.size)
  if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
    raise ValueError(f"expected at most {Image.MAX_IMAGE_PIXELS:,} pixels when scaled, got {width} x {height}")
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, channels)


def _of_8_bits(image: Image.Image) -> Image.Image:
  """Returns an image of 16 bits as one of 8, which Pillow would clip, and any other as it is.

  Raises:
    ValueError: for 32-bit pixels, whose range is unknown.
  """
  if image.mode.startswith("I;16"):
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
  if image.mode in ("I", "F"):
    raise ValueError(f"expected 8 or 16 bits a channel, got Pillow mode {image.mode!r}; convert it")
  return image


def read_pixels(
  source: str | os.PathLike | bytes,
  size: int | tuple[int, int],
  channels: int,
  crop: Crop = "fit",
  *,
  name: str = "",
) -> np.ndarray:
  """Returns the pixels of an image file, (height, width, channels), uint8.

  Args:
    source: the file, or its bytes.
    size: height and width of the result in pixels, or the side of a square.
    channels: 1 (grey) or 3 (RGB).
    crop: "fit" turns it upright, see `to_pixels`; "adm" is `center_crop`, to a square.
    name: of bytes, for errors.

  Raises:
    ValueError: the file, which the message names, is broken.
  """
  with open_image(source, name) as image:
    if crop == "adm":
      assert isinstance(size, int)
      return center_crop(image, size, channels)
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
