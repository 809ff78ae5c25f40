"""Latents in array_record shards: round trip, shapes without the data, and refusals."""

import json
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
  (tmp_path / "latents" / INFO).write_text(json.dumps({"shape": [4]}))
  with pytest.raises(ValueError, match=r"info.json cannot be read"):
    data.load(f"latents:{folder}")
