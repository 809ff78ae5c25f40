"""Data sets told by their content: what makes a difference, and what does not."""

import dataclasses
import importlib
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data
from pflow_jax.data.tfds_source import TfdsSource
from tests.prompt_folders import write as write_prompts

MODULE = importlib.import_module("pflow_jax.data.fingerprint")


def rng(seed=0):
  return np.random.default_rng(seed)


def arrays(n=6, seed=0):
  return {"x0": rng(seed).integers(0, 256, (n, 8, 8, 1), np.uint8), "label": np.arange(n) % 3}


def write_npz(folder, **changes):
  folder.mkdir(parents=True)
  values = arrays() | {"class_names": np.array(["circle", "square", "star"])} | changes
  np.savez(folder / "mine.npz", **{name: value for name, value in values.items() if value is not None})
  return data.load(f"npz:{folder}/mine.npz")


def write_images(folder, seed=0, names=("0.png", "1.png")):
  pixels = rng(seed).integers(0, 256, (2, len(names), 8, 8, 3), np.uint8)
  for label, images in zip(("cat", "dog"), pixels, strict=True):
    (folder / label).mkdir(parents=True)
    for name, image in zip(names, images, strict=True):
      Image.fromarray(image).save(folder / label / name)
  return data.load(f"folder:{folder}", image_size=8)


def write_latents(folder, seed=0, n=5):
  x0 = rng(seed).normal(size=(n, 4, 4, 2)).astype(np.float16)
  data.write_latents(str(folder), [(x0, np.arange(n) % 2)], num_classes=2)
  return data.load(f"latents:{folder}")


def write_texts(folder, **changes):
  folder.parent.mkdir(parents=True, exist_ok=True)
  return data.load(f"prompts:{write_prompts(folder, **changes)}")


KINDS = {"npz": write_npz, "folder": write_images, "latents": write_latents, "prompts": write_texts}


@pytest.mark.parametrize("kind", KINDS)
def test_neither_path_nor_dates_matter(kind, tmp_path):
  first = data.fingerprint(KINDS[kind](tmp_path / "here" / "data"))
  shutil.copytree(tmp_path / "here", tmp_path / "there")
  for path in (tmp_path / "there").rglob("*"):
    os.utime(path, (1, 1))
  name = {"npz": "data/mine.npz"}.get(kind, "data")
  options = dict(image_size=8) if kind == "folder" else {}
  again = data.fingerprint(data.load(f"{kind}:{tmp_path / 'there' / name}", **options))
  assert again == first
  assert data.changes(first, again) == []


@pytest.mark.parametrize(
  ("kind", "change", "told"),
  [
    ("npz", dict(x0=arrays(seed=1)["x0"]), ["content"]),
    ("npz", dict(x0=arrays()["x0"][::-1]), ["content"]),  # the same records in another order
    ("npz", dict(label=np.array([1, 0, 2, 0, 1, 2])), ["labels"]),
    ("npz", dict(class_names=np.array(["circle", "star", "square"])), ["class_names"]),
    ("npz", arrays(n=7), ["content", "labels", "records"]),
    ("npz", dict(x0=arrays()["x0"].reshape(6, 4, 4, 4)), ["content", "shape"]),
    ("folder", dict(seed=1), ["content"]),
    ("folder", dict(names=("0.png", "2.png")), ["names"]),
    ("latents", dict(seed=1), ["content"]),
    ("latents", dict(n=4), ["content", "records"]),
    ("prompts", dict(prompts=["a", "bb", "a cat", "the dog", "two red cats", "a photo of the cat"]), ["content"]),
    (
      "prompts",
      dict(prompts=["aa", "bb", "a cat", "the dog", "two red cats", "a photo"]),
      ["content", "lengths", "null"],
    ),
    ("prompts", dict(null=False), ["null"]),
  ],
)
def test_what_was_exchanged_is_told(kind, change, told, tmp_path):
  before, now = (data.fingerprint(KINDS[kind](tmp_path / n / "d", **c)) for n, c in (("1", {}), ("2", change)))
  assert [line.partition(":")[0] for line in data.changes(before, now)] == told


def test_a_changed_pixel_of_a_large_array_is_found_among_those_that_are_read(monkeypatch):
  """Beyond MOST_BYTES rows are read from all over, the first and the last among them."""
  monkeypatch.setattr(MODULE, "MOST_BYTES", 2**10)
  x0 = np.zeros((1000, 8, 8, 1), np.uint8)
  first = data.fingerprint(data.from_arrays(x0, name="mine"))
  for row, changed in ((999, True), (0, True), (1, False)):
    other = x0.copy()
    other[row] = 1
    assert (data.fingerprint(data.from_arrays(other, name="mine")) != first) == changed, row


def test_a_set_without_end_and_records_of_a_kind_of_ones_own():
  board = data.fingerprint(data.load("checkerboard"))
  assert (board["shape"], board["records"]) == ([2], None)

  class Source:
    """Records of somebody else's."""

    def __init__(self, value):
      self.value = value

    def __len__(self):
      return 3

    def __getitem__(self, row):
      return {"x0": np.full((2, 2, 1), self.value + row, np.float32), "label": np.asarray(0, np.int32)}

  def of(value):
    return data.fingerprint(data.Dataset("own", (2, 2, 1), 0, (), data.SourceRecords(Source(value))))

  assert of(1.0) == of(1.0) != of(2.0)


def test_records_of_tfds_are_compared_before_they_are_decoded():
  """Their features may lie in another order, and decoders differ; nothing is decoded here."""

  class Stored:
    def __init__(self, records):
      self.data_source = records

    def __len__(self):
      return len(self.data_source)

    def __getitem__(self, row):
      raise AssertionError("decoded")

  def of(*records):
    source = TfdsSource("tfds:x", Stored(list(records)), {}, "image", "label", (8, 8, 1), 3)
    return data.fingerprint(data.Dataset("tfds:x", (8, 8, 1), 0, (), data.SourceRecords(source)))

  assert of(b"label=1,image=xyz") == of(b"image=xyz,label=1") != of(b"image=xyz,label=2")


def test_of_many_files_a_few_are_opened(tmp_path, monkeypatch):
  dataset = write_images(tmp_path / "d")
  source = dataset.records.source
  source.files = source.files * 1000
  opened = []
  monkeypatch.setattr(MODULE, "regular_file", lambda path: opened.append(path) or pathlib.Path(path))
  assert data.fingerprint(dataset)["records"] == len(source.files)
  assert len(opened) == MODULE.RECORDS


def test_a_description_is_the_set_without_its_records(tmp_path):
  for number, (kind, write) in enumerate(KINDS.items()):
    folder = tmp_path / str(number) / "data"
    dataset = write(folder)
    options = {"name": dataset.name} | ({"image_size": 8} if kind == "folder" else {})
    description = data.Description.of(dataset, options)
    known = description.dataset()
    for name in ("shape", "num_classes", "class_names", "has_x0", "lengths"):
      assert getattr(known, name) == getattr(dataset, name), name
    assert known.cond_shapes(2) == dataset.cond_shapes(2)
    want, got = (data.examples(one, 2)[0] for one in (dataset, known))
    np.testing.assert_array_equal(want, got)
    shutil.rmtree(folder)
    unread = description.dataset()
    with pytest.raises(ValueError, match="data"):
      data.examples(unread, 2)


def test_a_description_of_other_data_is_refused_when_they_are_read(tmp_path):
  dataset = write_npz(tmp_path / "d")
  wrong = dataclasses.replace(data.Description.of(dataset, {"name": dataset.name}), shape=(4, 4, 1))
  with pytest.raises(ValueError, match=r"expected the data of the run, of shape \(4, 4, 1\), got \(8, 8, 1\)"):
    data.examples(wrong.dataset(), 1)
  for changes in (dict(shape=()), dict(shape=(0, 1)), dict(num_classes=2), dict(num_classes=-1)):
    with pytest.raises(ValueError, match="expected a"):
      dataclasses.replace(data.Description.of(dataset, {}), **changes).dataset()
