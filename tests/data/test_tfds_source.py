"""A tiny tfds builder, prepared and read without TensorFlow."""

import io
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pflow_jax import data


class TinyColours(tfds.core.GeneratorBasedBuilder):
  """Grey level 10 i and label i % 3; wide images, with a centre 20 brighter than the rest."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    image = tfds.features.Image(shape=(None, None, 3))
    features = {
      "image": image,
      "thumbnail": tfds.features.Image(shape=(4, 4, 1)),
      "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
      "number": np.int64,
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(12), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for i in range(count):
      wide = np.full((6, 18, 3), 10 * i, np.uint8)
      wide[:, 6:12] += 20
      yield (
        i,
        {
          "image": _png(wide),
          "thumbnail": _png(np.full((4, 4), 10 * i, np.uint8)),
          "label": i % 3,
          "number": i,
        },
      )


def _png(pixels):
  # An array would need TensorFlow to be encoded.
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  buffer.seek(0)
  return buffer


PNG = _png(np.zeros((4, 4), np.uint8)).getvalue()


def prepare(data_dir, file_format):
  tfds.builder("tiny_colours", data_dir=str(data_dir), file_format=file_format).download_and_prepare()
  return str(data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return prepare(tmp_path_factory.mktemp("tfds"), "array_record")


def level(x0):
  return np.round((x0.mean(axis=(1, 2, 3)) + 1) * 127.5).astype(int)


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_images_are_cropped_and_resized(tmp_path, file_format):
  dataset = data.load("tfds:tiny_colours", data_dir=prepare(tmp_path, file_format), image_size=6)
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((6, 6, 3), 3, 12)
  assert dataset.class_names == ("a", "b", "c")
  x0, label = data.examples(dataset, 12)
  assert (x0.dtype, label.dtype) == (np.float32, np.int32)
  np.testing.assert_array_equal(np.sort(level(x0)), 10 * np.arange(12) + 20)  # the centre
  np.testing.assert_array_equal(label, (level(x0) - 20) // 10 % 3)
  assert "tensorflow" not in sys.modules


def test_an_unprepared_set_is_prepared_as_array_record(tmp_path):
  dataset = data.load("tfds:tiny_colours", data_dir=str(tmp_path), image_size=6)
  assert dataset.num_records == 12
  assert list(tmp_path.rglob("*.array_record*"))


def test_batches_cover_an_epoch_and_resume(data_dir):
  dataset = data.load("tfds:tiny_colours", data_dir=data_dir, image_size=6)
  iterator = data.batches(dataset, 4, seed=0)
  epoch = np.concatenate([level(next(iterator)["x0"]) for _ in range(3)])
  np.testing.assert_array_equal(np.sort(epoch), 10 * np.arange(12) + 20)
  state = iterator.get_state()
  want = next(iterator)
  fresh = data.batches(dataset, 4, seed=0)
  fresh.set_state(state)
  np.testing.assert_array_equal(next(fresh)["x0"], want["x0"])


def test_splits_and_features_can_be_chosen(data_dir):
  options = {"data_dir": data_dir, "image_key": "thumbnail"}
  dataset = data.load("tfds:tiny_colours", split="train[:5]", label_key=None, **options)
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((4, 4, 1), 0, 5)
  np.testing.assert_array_equal(data.examples(dataset, 5)[1], np.zeros(5))
  assert data.load("tfds:tiny_colours", split="test", **options).num_records == 5
  small = data.load("tfds:tiny_colours", image_size=2, **options)
  assert small.shape == data.examples(small, 1)[0].shape[1:] == (2, 2, 1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "give image_size="),
    ({"image_key": "picture"}, "no feature 'picture'; choose image_key= from .*thumbnail"),
    ({"image_key": "label"}, "expected \\(H, W, C\\) uint8 images in 'label'"),
    ({"image_size": 6, "label_key": "klass"}, "no feature 'klass'; choose label_key="),
    ({"image_size": 6, "label_key": "number"}, "'number' is not a class label"),
    ({"image_size": 6, "split": "trian"}, "trian"),
  ],
)
def test_bad_options_are_refused(data_dir, options, message):
  with pytest.raises(ValueError, match=message):
    data.load("tfds:tiny_colours", data_dir=data_dir, **options)


def test_an_unknown_set_names_the_nearest():
  with pytest.raises(ValueError, match="no data set 'tiny_colors'; the nearest .* tiny_colours"):
    data.load("tfds:tiny_colors")


@pytest.fixture
def damaged(data_dir, tmp_path):
  return as_foreign(data_dir, tmp_path / "copy")


def as_foreign(data_dir, target):
  """A copy of the prepared set under a name that no code knows, so that all of it is read from its files."""
  folder = target / "foreign" / "1.0.0"
  shutil.copytree(f"{data_dir}/tiny_colours/1.0.0", folder)
  for path in folder.iterdir():
    path.rename(folder / path.name.replace("tiny_colours", "foreign"))
  change(folder / "dataset_info.json", ('"tiny_colours"', '"foreign"'))
  return folder


def read(folder):
  dataset = data.load("tfds:foreign", data_dir=str(folder.parents[1]), image_size=6)
  return data.examples(dataset, 12)


def change(path, *edits):
  text = path.read_text()
  for old, new in edits:
    assert old in text
    text = text.replace(old, new)
  path.write_text(text)


def test_metadata_of_other_types_are_refused(damaged):
  for name, old, new in (
    ("dataset_info.json", '"12"', '"x"'),
    ("dataset_info.json", '"12"', '"1000000000000"'),
    ("dataset_info.json", '"1.0.0"', "7"),
    ("dataset_info.json", '"splits": [', '"splits": [3, '),
    ("dataset_info.json", '"train"', '"other"'),
    ("dataset_info.json", "{", "["),
    ("features.json", '"uint8"', '"uint9"'),
    ("features.json", '"-1"', '"x"'),
    ("features.json", "featuresDict", "image"),
    ("features.json", "features_dict.FeaturesDict", "nothing.Like"),
  ):
    path = damaged / name
    kept = path.read_text()
    change(path, (old, new))
    with pytest.raises(ValueError, match="tfds:|json|copy") as caught:
      read(damaged)
    assert "\n" not in str(caught.value), (old, new)
    path.write_text(kept)
  assert len(read(damaged)[0]) == 12


def test_classes_are_bounded(damaged):
  (damaged / "label.labels.txt").unlink()
  change(damaged / "features.json", ('"numClasses": "3"', '"numClasses": "1000000000"'))
  with pytest.raises(ValueError, match="expected 0 to 1,048,576 classes, got 1000000000"):
    read(damaged)


def test_no_module_is_imported_that_the_data_names(damaged):
  change(damaged / "features.json", ("tensorflow_datasets.core.features.image_feature.Image", "this.Image"))
  with pytest.raises(ValueError, match=r"features.json: 'this.Image' is not of tfds"):
    read(damaged)
  assert "this" not in sys.modules


def test_files_that_are_none_are_not_opened(damaged):
  for name in ("dataset_info.json", "features.json", "label.labels.txt", *(p.name for p in damaged.glob("*train*"))):
    (damaged / name).rename(damaged.parents[2] / "kept")
    os.mkfifo(damaged / name)
    with pytest.raises(ValueError, match="expected a file, this is a pipe"):
      read(damaged)
    (damaged.parents[2] / "kept").replace(damaged / name)


def test_damaged_shards_are_refused(damaged):
  (shard,) = damaged.glob("*train*")
  whole = shard.read_bytes()
  shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
  with pytest.raises(ValueError, match=r"tfds:foreign: record [0-9]+ cannot be read: Corrupted"):
    read(damaged)
  shard.write_bytes(whole[:100])
  with pytest.raises(ValueError, match="tfds:foreign: .*cannot be read"):
    read(damaged)


@pytest.mark.parametrize("key", ["image", "thumbnail"])
def test_images_of_formats_that_start_programs_are_not_decoded(tmp_path, monkeypatch, key):
  """Neither as the image that is wanted nor as another."""
  postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 18\n%%EndComments\n"
  monkeypatch.setattr(
    sys.modules[__name__],
    "_png",
    lambda pixels: io.BytesIO(postscript if pixels.ndim == (3 if key == "image" else 2) else PNG),
  )
  opened = []
  monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: opened.append(self))
  dataset = data.load("tfds:tiny_colours", data_dir=prepare(tmp_path, "parquet"), image_size=6)
  if key == "image":
    with pytest.raises(ValueError, match="cannot read the image of tfds:tiny_colours, record"):
      data.examples(dataset, 12)
  else:
    assert data.examples(dataset, 12)[0].shape == (12, 6, 6, 3)
  assert not opened


def test_worker_processes_can_read(data_dir):
  source = data.load("tfds:tiny_colours", data_dir=data_dir, image_size=6).records.source
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[3]["x0"], source[3]["x0"])


def test_tfrecord_is_refused(data_dir, monkeypatch):
  def refuse(self, split, **options):
    raise NotImplementedError("tfrecord")

  monkeypatch.setattr(TinyColours, "as_data_source", refuse)
  with pytest.raises(ValueError, match="need TensorFlow; give another data_dir"):
    data.load("tfds:tiny_colours", data_dir=data_dir, image_size=6)
