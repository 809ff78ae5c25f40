"""Crop, resize, transparency and channels."""

import numpy as np
import pytest
from PIL import Image

from pflow_jax.data.pixels import to_pixels


def test_transparency_is_composited_over_white():
  pixels = np.zeros((1, 3, 4), np.uint8)
  pixels[0, :, 0] = 200  # red, transparent, half and opaque
  pixels[0, :, 3] = [0, 128, 255]
  image = Image.fromarray(np.repeat(pixels, 3, axis=0))
  got = to_pixels(image, 3, 3)[0].astype(int)
  np.testing.assert_allclose(got, [[255, 255, 255], [227, 127, 127], [200, 0, 0]], atol=1)


def test_the_crop_is_central():
  pixels = np.zeros((4, 12), np.uint8)
  pixels[:, 4:8] = 255
  np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), 4, 1), np.full((4, 4, 1), 255))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
def test_every_mode_converts(mode, channels):
  got = to_pixels(Image.new("RGB", (5, 7), "white").convert(mode), 4, channels)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, np.full((4, 4, channels), 255))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
  values = np.array([[0, 32768], [257, 65535]], np.uint16)
  Image.fromarray(values).save(tmp_path / "deep.png")
  got = to_pixels(Image.open(tmp_path / "deep.png"), 2, 1)[..., 0]
  np.testing.assert_array_equal(got, [[0, 127], [1, 255]])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
  with pytest.raises(ValueError, match=f"got Pillow mode '{mode}'"):
    to_pixels(Image.new(mode, (2, 2)), 2, 1)
