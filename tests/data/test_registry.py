"""Names and options of `load`."""

import pytest

from pflow_jax import data


@pytest.mark.parametrize(
  ("name", "nearest"),
  [
    ("digit", "digits"),
    ("mnist", "mnist5k"),
    ("emojis", "emoji"),
    ("checkboard", "checkerboard"),
    ("tdfs:mnist", "tfds:<name>"),
    ("folders:/tmp", "folder:<path>"),
  ],
)
def test_an_unknown_name_names_the_nearest_and_all(name, nearest):
  with pytest.raises(ValueError, match=f"no data set '{name}'; did you mean '{nearest}'") as error:
    data.load(name)
  for known in ("digits", "mnist5k", "emoji", "checkerboard", "synthetic", "tfds:", "folder:"):
    assert known in str(error.value)


@pytest.mark.parametrize("name", ["tfds:", "folder:", "tfds", "folder"])
def test_an_open_source_needs_its_name(name):
  with pytest.raises(ValueError, match=f"expected {name.rstrip(':')}:<.*>, got '{name}'"):
    data.load(name)


@pytest.mark.parametrize(
  ("name", "option", "nearest"),
  [
    ("digits", "heldout", "held_out"),
    ("emoji", "image_size", "size"),
    ("synthetic", "classes", "num_classes"),
    ("folder:/nowhere", "size", "image_size"),
    ("tfds:nothing", "dir", "data_dir"),
  ],
)
def test_an_unknown_option_names_the_nearest(name, option, nearest):
  with pytest.raises(ValueError, match=f"no option '{option}'; did you mean '{nearest}'"):
    data.load(name, **{option: 1})


def test_a_source_without_options_says_so():
  with pytest.raises(ValueError, match=r"checkerboard has no option 'scale'\. .* are: none"):
    data.load("checkerboard", scale=2)


def test_the_split_is_no_option():
  with pytest.raises(ValueError, match=r"The options are: held_out\."):
    data.load("digits", path="x")
