"""Latents in array_record shards: round trip, shapes without the data, and refusals."""

import json
import os
import pathlib
import pickle

import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.data.latents import INFO, write_latents

RNG = np.random.default_rng(0)
X0 = RNG.normal(size=(11, 4, 4, 2)).astype(np.float16)
LABEL = RNG.integers(0, 5, 11)


@pytest.fixture
def folder(tmp_path):
  path = str(tmp_path / "latents")
  batches = [(X0[:4], LABEL[:4]), (X0[4:], LABEL[4:])]
  assert write_latents(path, batches, num_classes=5, shard_size=4) == 11
  return path


def test_round_trip_over_shards(folder):
  dataset = data.load(f"latents:{folder}")
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((4, 4, 2), 5, 11)
  x0, label = data.examples(dataset, 11, seed=0)
  order = np.lexsort(x0.reshape(11, -1).T)
  expected = np.lexsort(X0.astype(np.float32).reshape(11, -1).T)
  np.testing.assert_array_equal(x0[order], X0[expected].astype(np.float32))
  np.testing.assert_array_equal(label[order], LABEL[expected])
  batch = next(data.batches(pickle.loads(pickle.dumps(dataset)), 4, seed=1, rows=np.array([1, 3])))
  assert batch["x0"].shape == (2, 4, 4, 2)


def test_texts_of_latents_can_be_the_condition(tmp_path, monkeypatch):
  from pflow_jax.conversion import cache as program
  from tests.encoders import StubEncoder

  monkeypatch.setattr(program, "load_encoder", lambda *args, **options: StubEncoder("minilm"))
  path, texts = str(tmp_path / "latents"), [f"text {i}" for i in range(11)]
  write_latents(path, [(X0, LABEL)], num_classes=5, class_names="abcde", texts=texts)
  program.cache(f"data:latents:{path}", "minilm", tmp_path / "names")
  dataset = data.load(f"latents:{path}", embeddings=str(tmp_path / "names"))
  assert (dataset.texts, dataset.num_classes, dataset.class_names) == (tuple(texts), 0, ())
  batch = dataset.records.take(np.array([7, 2]))
  np.testing.assert_array_equal(batch["x0"], X0[[7, 2]].astype(np.float32))
  want = np.stack([StubEncoder("minilm").one(texts[i])[1] for i in (7, 2)])
  np.testing.assert_array_equal(batch["cond"]["pooled"], want)


def test_shapes_are_known_without_the_data(tmp_path):
  dataset = data.load(f"latents:{tmp_path}/none", shape=(32, 32, 4), num_classes=1000)
  assert (dataset.shape, dataset.num_classes) == ((32, 32, 4), 1000)
  with pytest.raises(ValueError, match="there are no latents"):
    data.batches(dataset, 8, seed=0)
  with pytest.raises(ValueError, match="no info.json; write the latents, or give shape="):
    data.load(f"latents:{tmp_path}/none")


def test_refusals(folder, tmp_path):
  with pytest.raises(ValueError, match=r"has shape and num_classes \(\(4, 4, 2\), 5\), got \(\(8, 8, 2\), None\)"):
    data.load(f"latents:{folder}", shape=(8, 8, 2))
  with pytest.raises(ValueError, match="holds shards already"):
    write_latents(folder, [(X0, LABEL)], num_classes=5)
  with pytest.raises(ValueError, match="labels must lie in"):
    write_latents(str(tmp_path / "bad"), [(X0, LABEL + 5)], num_classes=5)
  with pytest.raises(ValueError, match="no records"):
    write_latents(str(tmp_path / "empty"), [], num_classes=5)
  with pytest.raises(ValueError, match="split"):
    data.load(f"latents:{folder}", split="all")
  with pytest.raises(ValueError, match="values that are not finite, or not in float16"):
    write_latents(str(tmp_path / "large"), [(X0.astype(np.float32) * 1e6, LABEL)], num_classes=5)


@pytest.mark.parametrize(
  ("info", "message"),
  [
    ({"shape": [4]}, "num_classes: field required"),
    ({"shape": [], "num_classes": 5}, "shape: .*at least 1 item"),
    ({"shape": [4, 0, 2], "num_classes": 5}, "shape.1: .*greater than 0, got 0"),
    ({"shape": ["4", 4.0, True], "num_classes": 5}, "shape.0: .*got '4'; shape.1: .*got 4.0; shape.2: .*got True"),
    ({"shape": [10**9] * 3, "num_classes": 5}, r"an example of shape \(1000000000, .*: takes .* of memory"),
    ({"shape": [4, 4, 2], "num_classes": 10**9}, "expected 0 to 1,048,576 classes, got 1000000000"),
    ({"shape": [4, 4, 2], "num_classes": 5, "num_records": 12}, "expected 12 records, got 11; copy them again"),
    ({"shape": [4, 4, 1], "num_classes": 5}, r"record [0-9]+ has 68 bytes, shape \(4, 4, 1\) has 36"),
    ({"shape": [4, 4, 2], "num_classes": 1}, r"record [0-9]+ has the label [1-4], which is not in \[0, 1\)"),
  ],
)
def test_a_folder_that_says_something_else_of_its_records_is_refused(folder, info, message):
  (pathlib.Path(folder) / INFO).write_text(json.dumps(info))
  with pytest.raises(ValueError, match=message):
    data.examples(data.load(f"latents:{folder}"), 11)


def test_shards_that_are_damaged_are_named_and_none_is_skipped(folder):
  shards = sorted(pathlib.Path(folder).glob("*.array_record"))
  whole = shards[1].read_bytes()

  def refused(message):
    with pytest.raises(ValueError, match=message) as caught:
      data.examples(data.load(f"latents:{folder}"), 11)
    assert "\n" not in str(caught.value)

  shards[1].write_bytes(whole[:-100])  # for the library it has no records
  refused(r"00001\.array_record cannot be read: ")
  shards[1].write_bytes(b"")
  refused(r"00001\.array_record cannot be read: .*at least 64KB")
  shards[1].write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
  refused(r"record [0-9]+ cannot be read: Corrupted Riegeli/records file")
  shards[1].unlink()
  refused("expected 11 records, got 7; copy them again")
  os.mkfifo(shards[1])
  refused("expected a file, this is a pipe")
  shards[1].unlink()
  shards[1].symlink_to("/dev/zero")
  refused("expected a file, this is a device")


def test_a_disk_that_fails_is_not_taken_for_a_damaged_file(folder, monkeypatch):
  dataset = data.load(f"latents:{folder}")
  assert dataset.num_records == 11

  def fail(row):
    raise RuntimeError("pread() failed: Input/output error; reading 00000.array_record")

  monkeypatch.setattr(dataset.records.source._records._records.__class__, "__getitem__", lambda self, row: fail(row))
  with pytest.raises(OSError, match=r"record [0-9]+ cannot be read: pread\(\) failed: Input/output error"):
    data.examples(dataset, 2)
