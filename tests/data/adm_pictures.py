"""Pictures of odd sizes and modes, without loss, whose crops by ADM's code are in golden/adm_center_crop.npz."""

import io

import numpy as np
from PIL import Image

# Width and height, and the side that the picture is cut to: halved not at all, once, up to four times, and enlarged.
SIZES = {
  "square": (32, 32, 32),
  "wide": (53, 37, 16),
  "tall": (37, 53, 16),
  "twice": (32, 45, 16),
  "just_below_twice": (31, 45, 16),
  "odd_halves": (135, 301, 16),
  "large": (333, 257, 16),
  "smaller": (11, 7, 16),
  "one_pixel": (1, 5, 8),
  "half": (25, 50, 24),  # 25 x 1.5 is rounded to the even
}


def pixels(width, height, channels=3):
  """Noise on a gradient, which every step of a resampling changes."""
  rng = np.random.default_rng(width * 1000 + height)
  ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
  return (ramp + rng.integers(0, 56, (height, width, channels))).astype(np.uint8)


def with_palette(width, height):
  """An image of 16 colours, whose palette no version of Pillow chooses."""
  image = Image.fromarray((pixels(width, height, 1)[..., 0] // 16).astype(np.uint8), "P")
  image.putpalette(np.random.default_rng(0).integers(0, 256, 48).tolist())
  return image


def encoded(image, ending="PNG", **options):
  """Bytes of a file."""
  buffer = io.BytesIO()
  image.save(buffer, ending, **options)
  return buffer.getvalue()


def PICTURES():
  """Files and sizes by name."""
  found = {name: (encoded(Image.fromarray(pixels(*size))), side) for name, (*size, side) in SIZES.items()}
  image = Image.fromarray(pixels(53, 37))
  turned = Image.Exif()
  turned[0x0112] = 6
  clear = Image.fromarray(pixels(53, 37, 4), "RGBA")
  files = {
    "grey": encoded(image.convert("L")),
    "grey_alpha": encoded(clear.convert("LA")),
    "black_and_white": encoded(image.convert("1")),
    "palette": encoded(with_palette(53, 37)),
    "palette_transparent": encoded(with_palette(53, 37), transparency=3),
    "alpha": encoded(clear),
    "cmyk": encoded(image.convert("CMYK"), "TIFF"),
    "exif_turned": encoded(image, exif=turned),
    "frames": encoded(with_palette(53, 37), "GIF", save_all=True, append_images=[with_palette(37, 53)]),
  }
  return found | {name: (content, 16) for name, content in files.items()}
