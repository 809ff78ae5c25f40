"""What a notebook shows of data: a line, and a picture where examples are at hand and can be seen."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data
from pflow_jax.data import Description, Embedding
from pflow_jax.data.pictures import as_html, sheet


def shown(dataset):
  """The picture of a data set, or None."""
  found = re.search(r'base64,([^"]+)"', dataset._repr_html_())
  return found and np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))


def arrays(*shape, **options):
  return data.from_arrays(np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape), **options)


@pytest.mark.parametrize(
  ("dataset", "line", "size"),
  [
    (arrays(40, 8, 8, 1, label=np.arange(40) % 3), "Dataset(arrays, 40 images of 8 x 8 x 1, 3 classes)", (132, 1056)),
    (arrays(3, 300, 200, 3), "Dataset(arrays, 3 images of 300 x 200 x 3)", (62, 156, 3)),
    (arrays(5, 8, 8, 16), "Dataset(arrays, 5 latents of 8 x 8 x 16)", None),
    (arrays(500, 2), "Dataset(arrays, 500 points of 2)", (160, 160)),
    (data.load("checkerboard"), "Dataset(checkerboard, endless points of 2)", (160, 160)),
  ],
)
def test_a_set_is_a_line_and_a_picture(dataset, line, size):
  assert repr(dataset) == line
  picture = shown(dataset)
  assert (picture is None) == (size is None)
  if size:
    assert picture.shape == size
    assert picture.std() > 10


def test_what_would_have_to_be_read_first_is_not():
  digits = data.load("digits")
  described = Description.of(digits, digits.options).dataset()
  assert repr(described) == "Dataset(digits, images of 8 x 8 x 1, 10 classes)"
  assert shown(described) is None
  assert described.num_records == 1797
  assert shown(described) is not None, "it has been read now"


def test_no_value_prints_arrays():
  assert "array" not in repr(data.load("digits").records)
  assert "array" not in repr(Embedding(lengths=(4,), text_width=8, null={"text": np.zeros((4, 8))}))


def test_files_that_are_gone_leave_the_line(tmp_path):
  for i in range(3):
    Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
  folder = data.load(f"folder:{tmp_path}", image_size=8)
  assert shown(folder) is not None
  for path in tmp_path.iterdir():
    path.unlink()
  assert shown(folder) is None


def test_numbers_that_are_no_colours_and_names_that_are_html():
  assert sheet(np.full((1, 4, 4, 1), np.nan, np.float32)).getextrema() == (128, 255)
  assert "&lt;b&gt;" in as_html("<b>")
