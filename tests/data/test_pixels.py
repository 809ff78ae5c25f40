"""Crop, resize, transparency and channels."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from pflow_jax.data.pixels import center_crop, read_pixels, to_pixels
from tests.data.adm_pictures import PICTURES, encoded


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


def test_a_picture_is_cut_to_a_shape_before_it_is_scaled():
  """A strip of one pixel would else become 1,024 times as long."""
  strip = Image.new("RGB", (100_000, 1), "red")
  np.testing.assert_array_equal(to_pixels(strip, (64, 96), 3), np.broadcast_to([255, 0, 0], (64, 96, 3)))
  pixels = np.zeros((4, 12), np.uint8)
  pixels[:, 3:9] = 255
  np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), (4, 6), 1), np.full((4, 6, 1), 255))


def test_a_file_is_turned_upright_and_its_first_frame_read(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  wide = Image.fromarray(np.array([[0, 0, 255, 255]] * 2, np.uint8))
  wide.save(tmp_path / "a.png", exif=exif)
  np.testing.assert_array_equal(read_pixels(tmp_path / "a.png", (4, 2), 1)[:, 0, 0], [0, 0, 255, 255])
  wide.save(tmp_path / "b.png", exif=b"Exif\0\0garbage that is no table")
  np.testing.assert_array_equal(read_pixels(tmp_path / "b.png", (2, 4), 1)[0, :, 0], [0, 0, 255, 255])
  frames = [Image.new("L", (2, 2), shade) for shade in (200, 0, 100)]
  frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(read_pixels(tmp_path / "c.gif", 2, 1), np.full((2, 2, 1), 200))


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    b"\x89PNG\r\n\x1a\n" + b"\xff" * 50,
    b"II*\0" + b"\xff" * 50,
    b"GIF89a" + b"\xff" * 50,
    b"RIFF\xff\xff\xff\xffWEBPVP8X",
  ],
)
def test_bytes_that_are_no_picture_end_in_a_sentence(tmp_path, content, monkeypatch):
  monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: pytest.fail("PostScript was opened"))
  (tmp_path / "x.png").write_bytes(content)
  with pytest.raises(ValueError, match=r"cannot read the image .*x\.png: ") as caught:
    read_pixels(tmp_path / "x.png", 4, 3)
  assert "\n" not in str(caught.value)


def test_what_is_cut_short_is_refused(tmp_path):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  for ending in ("png", "jpg", "gif", "tif", "webp", "bmp"):
    path = tmp_path / f"a.{ending}"
    image.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match="cannot read the image"):
      read_pixels(path, 4, 3)


@pytest.mark.parametrize("name", PICTURES())
def test_the_crop_of_adm_is_that_of_its_code(golden, name):
  """To the bit: grey, palette, CMYK become RGB, transparency is dropped, EXIF's orientation is not looked at."""
  content, size = PICTURES()[name]
  np.testing.assert_array_equal(read_pixels(content, size, 3, "adm"), golden("adm_center_crop")[name])


def test_the_crop_of_adm_differs_from_ours_where_it_says_so():
  content, size = PICTURES()["exif_turned"]
  assert np.abs(read_pixels(content, size, 3).astype(int) - read_pixels(content, size, 3, "adm")).mean() > 10
  grey = read_pixels(*PICTURES()["grey"], 1, "adm")
  np.testing.assert_array_equal(np.repeat(grey, 3, axis=2), read_pixels(*PICTURES()["grey"], 3, "adm"))


def test_16_bits_are_scaled_where_adm_would_clip_them():
  deep = Image.fromarray(np.full((9, 9), 128 * 257, np.uint16))
  np.testing.assert_array_equal(read_pixels(encoded(deep), 4, 3, "adm"), np.full((4, 4, 3), 128))
  with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got Pillow mode 'F'"):
    center_crop(Image.new("F", (4, 4)), 2)


def test_a_strip_that_would_be_scaled_to_gigabytes_is_refused():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with pytest.raises(ValueError, match=r"expected at most [\d,]+ pixels when scaled, got 256 x 5120000"):
      read_pixels(encoded(Image.new("L", (1, 20000))), 256, 3, "adm")


def test_bytes_that_are_cut_short_are_named():
  whole = encoded(Image.new("RGB", (64, 64), "red"))
  with pytest.raises(ValueError, match="cannot read the image n01/7: .*(truncated|broken)"):
    read_pixels(whole[: len(whole) // 2], 16, 3, "adm", name="n01/7")
  with pytest.raises(ValueError, match=r"cannot read the image n01/7: expected one of"):
    read_pixels(io.BytesIO(b"not a picture").getvalue(), 16, 3, "adm", name="n01/7")
