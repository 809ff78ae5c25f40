"""Class folders of images, good and broken."""

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0)}


@pytest.fixture
def root(tmp_path):
  """Six images a class: cats red and dogs green, of different sizes, one in a subfolder."""
  for name, colour in COLOURS.items():
    (tmp_path / name / "more").mkdir(parents=True)
    for index in range(6):
      folder = tmp_path / name / "more" if index == 5 else tmp_path / name
      Image.new("RGB", (20 + index, 24), colour).save(folder / f"{index}.png")
  (tmp_path / "cat" / "notes.txt").write_text("not an image")
  (tmp_path / "cat" / "._0.png").write_bytes(b"left by another system")
  (tmp_path / ".hidden").mkdir()
  return tmp_path


def test_images_and_classes(root):
  dataset = data.load(f"folder:{root}", image_size=8)
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((8, 8, 3), 2, 12)
  assert dataset.class_names == ("cat", "dog")
  batch = next(data.batches(dataset, 12, seed=0))
  np.testing.assert_array_equal(np.bincount(batch["cond"]), [6, 6])
  colours = np.array(list(COLOURS.values()), np.float32) / 127.5 - 1
  want = np.broadcast_to(colours[batch["cond"]][:, None, None, :], (12, 8, 8, 3))
  np.testing.assert_allclose(batch["x0"], want, atol=1e-6)


def test_grey_and_held_out(root):
  options = {"image_size": 8, "channels": 1, "held_out": 4}
  train = data.load(f"folder:{root}", **options)
  test = data.load(f"folder:{root}", split="test", **options)
  assert (train.shape, train.num_records, test.num_records) == ((8, 8, 1), 8, 4)
  assert not set(train.records.source.files) & set(test.records.source.files)


def break_files(root):
  (root / "cat" / "1.png").write_bytes(b"not a png")
  whole = (root / "dog" / "2.png").read_bytes()
  (root / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])  # opens, but does not decode


def test_unreadable_files_are_reported_together(root):
  break_files(root)
  with pytest.raises(ValueError, match=r"2 of 12 images are unreadable") as error:
    data.load(f"folder:{root}", image_size=8)
  assert "cat/1.png" in str(error.value)
  assert "dog/2.png" in str(error.value)
  assert "allow_unreadable=True" in str(error.value)


def test_a_long_report_is_cut(root):
  for index in range(15):
    (root / "cat" / f"broken{index:02d}.jpg").write_bytes(b"")
  with pytest.raises(ValueError, match=r"15 of 27 images .* and 5 more\.") as error:
    data.load(f"folder:{root}", image_size=8)
  assert "broken09" in str(error.value)
  assert "broken10" not in str(error.value)


def test_unreadable_files_are_skipped_if_allowed(root):
  break_files(root)
  with pytest.warns(UserWarning, match="2 of 12 images are unreadable.*They are skipped") as seen:
    dataset = data.load(f"folder:{root}", image_size=8, allow_unreadable=True)
  assert seen[0].filename == __file__
  assert dataset.num_records == 10
  next(data.batches(dataset, 30, seed=0))


def test_nothing_readable_is_an_error_even_if_allowed(root):
  for path in root.rglob("*.png"):
    path.write_bytes(b"")
  with pytest.raises(ValueError, match="None is left"):
    data.load(f"folder:{root}", image_size=8, allow_unreadable=True)


def test_without_the_check_a_broken_file_is_named_when_read(root):
  break_files(root)
  dataset = data.load(f"folder:{root}", image_size=8, check=False)
  with pytest.raises(ValueError, match=r"cannot read the image .*(1|2)\.png"):
    next(data.batches(dataset, 12, seed=0, num_threads=0))


def test_bad_folders_are_refused(root, tmp_path):
  with pytest.raises(ValueError, match="is no folder"):
    data.load(f"folder:{root}/nowhere", image_size=8)
  with pytest.raises(ValueError, match="no class folders"):
    data.load(f"folder:{root}/cat/more", image_size=8)
  (root / "empty").mkdir()
  with pytest.raises(ValueError, match=r"1 class folder\(s\) without images: empty"):
    data.load(f"folder:{root}", image_size=8)


@pytest.mark.parametrize(
  ("options", "message"),
  [({}, "give image_size="), ({"image_size": 0}, "got 0"), ({"channels": 4}, "channels must be")],
)
def test_bad_options_are_refused(root, options, message):
  if "channels" in options:
    options["image_size"] = 8
  with pytest.raises(ValueError, match=message):
    data.load(f"folder:{root}", **options)
