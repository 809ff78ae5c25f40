"""Class folders of images, good and broken."""

import os

import numpy as np
import pytest
from PIL import Image, features

from pflow_jax import data

AVIF = bool(features.check("avif"))
COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0)}


@pytest.fixture
def root(tmp_path):
  """Six images a class: cats red and dogs green, of different sizes, one in a subfolder."""
  for name, colour in COLOURS.items():
    (tmp_path / name / "more").mkdir(parents=True)
    for index in range(6):
      folder = tmp_path / name / "more" if index == 5 else tmp_path / name
      Image.new("RGB", (20 + index, 24), colour).save(folder / f"{index}.png")
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


def test_a_folder_that_is_not_there_is_known_by_its_promises(root, tmp_path):
  """A run is planned without its pictures; asked for one, the folder is missed, and one with other classes refused."""
  given = {"image_size": 8, "num_classes": 2}
  there = data.load(f"folder:{root}", **given)
  absent = data.load(f"folder:{tmp_path / 'elsewhere'}", **given)
  assert (absent.shape, absent.num_classes) == (there.shape, there.num_classes) == ((8, 8, 3), 2)
  assert repr(absent).endswith("images of 8 x 8 x 3, 2 classes)")
  for ask in (
    lambda: absent.num_records,
    lambda: next(data.batches(absent, 2, seed=0)),
    lambda: data.examples(absent, 1),
  ):
    with pytest.raises(
      ValueError, match=r"elsewhere: there is no such folder; say where it is with --config\.data\.name"
    ):
      ask()
  with pytest.raises(ValueError, match="expected 3 class folders, got 2"):
    data.load(f"folder:{root}", image_size=8, num_classes=3)
  with pytest.raises(ValueError, match="elsewhere: .*give a folder"):
    data.load(f"folder:{tmp_path / 'elsewhere'}", image_size=8)


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


def test_bad_folders_are_refused(root):
  with pytest.raises(
    ValueError, match="there is no such folder; give a folder with one subfolder a class, or of images"
  ):
    data.load(f"folder:{root}/nowhere", image_size=8)
  with pytest.raises(ValueError, match="expected a folder, this is a file"):
    data.load(f"folder:{root}/cat/0.png", image_size=8)
  (root / "empty").mkdir()
  with pytest.raises(ValueError, match=r"1 class folder\(s\) without images: empty; remove them or add some"):
    data.load(f"folder:{root}", image_size=8)
  with pytest.raises(ValueError, match=r"there are no images, in class folders or without; images end with .*\.png"):
    data.load(f"folder:{root}/empty", image_size=8)


def test_images_without_class_folders_are_a_set_without_classes(root):
  dataset = data.load(f"folder:{root}/cat/more", image_size=8)
  assert (dataset.num_classes, dataset.class_names, dataset.num_records) == (0, (), 1)
  batch = next(data.batches(dataset, 2, seed=0))
  np.testing.assert_array_equal(batch["cond"], [0, 0])
  np.testing.assert_allclose(batch["x0"][0, 0, 0], [1, -1, -1])
  with pytest.raises(ValueError, match="got 5, such as '0.png', beside the folders more; move them"):
    data.load(f"folder:{root}/cat", image_size=8)


def test_what_is_left_out_is_said_once(root):
  for name in ("cat/a.heic", "cat/b.HEIC", "dog/more/c.heic", "dog/README", "cat/notes.txt", "labels.csv"):
    (root / name).write_bytes(b"x")
  (root / "dog" / "loop").symlink_to("..")
  Image.new("RGB", (9, 9), COLOURS["dog"]).save(root / "dog" / "x.webp")
  told = r"3 \.heic, 2 without an ending, 1 \.csv, 1 \.txt are no images that are read; they are left out; .*convert"
  with pytest.warns(UserWarning, match=told) as seen:
    dataset = data.load(f"folder:{root}", image_size=8)
  assert len(seen) == 1
  assert seen[0].filename == __file__
  assert dataset.num_records == 13
  (root / "bird").mkdir()
  (root / "bird" / "a.heic").touch()
  with pytest.raises(ValueError, match=r"without images: bird; .* 4 \.heic.* are no images that are read; .*convert"):
    data.load(f"folder:{root}", image_size=8)


def test_every_format_that_pillow_decodes_here_is_read(tmp_path):
  for ending in [ending for ending in ("avif", "bmp", "gif", "jpg", "png", "tif", "webp") if ending != "avif" or AVIF]:
    Image.new("RGB", (9, 9), "red").save(tmp_path / f"a.{ending}")
  dataset = data.load(f"folder:{tmp_path}", image_size=4)
  assert dataset.num_records == 6 + AVIF
  x0, _ = data.examples(dataset, dataset.num_records)
  np.testing.assert_allclose(x0[:, 2, 2], np.broadcast_to([1.0, -1, -1], (len(x0), 3)), atol=0.05)


def test_pipes_and_loops_are_not_opened(root):
  os.mkfifo(root / "cat" / "pipe.png")
  (root / "dog" / "loop.png").symlink_to("loop.png")
  (root / "dog" / "zero.png").symlink_to("/dev/zero")
  (root / "dog" / "folder.png").symlink_to(root / "cat")
  with pytest.raises(ValueError, match="4 of 16 images are unreadable") as caught:
    data.load(f"folder:{root}", image_size=8)
  for told in ("pipe.png: expected a file, this is a pipe", "loop.png", "this is a device", "this is a folder"):
    assert told in str(caught.value)
  dataset = data.load(f"folder:{root}", image_size=8, check=False)
  with pytest.raises(ValueError, match="pipe|loop|device|folder"):
    data.examples(dataset, 16)
  (root / "self").symlink_to(root)
  with pytest.raises(ValueError, match="'self' is a link to the folder that it is in; remove it"):
    data.load(f"folder:{root}", image_size=8)


def test_a_class_may_be_a_link_and_folders_be_deep(root):
  deep = root.joinpath(".elsewhere", *["deeper"] * 100)
  deep.mkdir(parents=True)
  Image.new("RGB", (9, 9)).save(deep / "a.png")
  (root / "owl").symlink_to(root / ".elsewhere")
  (root / "cat" / "linked").symlink_to(root / "cat")  # not followed
  dataset = data.load(f"folder:{root}", image_size=8)
  assert (dataset.class_names, dataset.num_records) == (("cat", "dog", "owl"), 13)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "give image_size="),
    ({"image_size": 0}, "got 0"),
    ({"image_size": 10**9}, "image_size=1000000000: takes .* of memory, this machine has"),
    ({"channels": 4}, "channels must be"),
  ],
)
def test_bad_options_are_refused(root, options, message):
  if "channels" in options:
    options["image_size"] = 8
  with pytest.raises(ValueError, match=message):
    data.load(f"folder:{root}", **options)
