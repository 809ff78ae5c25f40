"""The image sets that come with Python packages."""

import numpy as np
import pytest

from pflow_jax import data


def whole(dataset):
  return dataset.records.take(np.arange(dataset.num_records))


def test_digits():
  from sklearn.datasets import load_digits

  dataset = data.load("digits")
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((8, 8, 1), 10, 1797)
  assert dataset.class_names == tuple("0123456789")
  batch = whole(dataset)
  reference = load_digits()
  np.testing.assert_array_equal((batch["x0"][..., 0] + 1) * 8, reference.images)
  np.testing.assert_array_equal(batch["cond"], reference.target)
  assert (batch["x0"].min(), batch["x0"].max()) == (-1.0, 1.0)


def test_mnist5k():
  dataset = data.load("mnist5k")
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((28, 28, 1), 10, 5000)
  batch = whole(dataset)
  np.testing.assert_array_equal(np.bincount(batch["cond"]), np.full(10, 500))
  assert (batch["x0"].min(), batch["x0"].max()) == (-1.0, 1.0)


def test_held_out_images_are_not_trained_on():
  everything = data.load("digits")
  train = data.load("digits", held_out=300)
  test = data.load("digits", split="test", held_out=300)
  assert (train.num_records, test.num_records) == (1497, 300)
  parts = np.concatenate([train.records.x0, test.records.x0])
  order, reference = (sorted(x0.tobytes() for x0 in rows) for rows in (parts, everything.records.x0))
  assert order == reference
  assert np.all(np.bincount(test.records.label, minlength=10) > 10)


@pytest.mark.parametrize("shape", [(2,), (5, 4, 3), (2, 4, 4, 6)])
def test_synthetic_has_any_shape(shape):
  dataset = data.load("synthetic", shape=list(shape), num_classes=7, num_records=70)
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == (shape, 7, 70)
  batch = next(data.batches(dataset, 64, seed=0))
  assert batch["x0"].shape == (64, *shape)
  assert -1 <= batch["x0"].min() < -0.8
  assert 0.8 < batch["x0"].max() <= 1
  assert set(batch["cond"]) == set(range(7))


def test_synthetic_splits_differ_and_repeat():
  train = data.load("synthetic").records.x0
  np.testing.assert_array_equal(data.load("synthetic").records.x0, train)
  assert not np.array_equal(data.load("synthetic", split="test").records.x0, train)
  assert data.load("synthetic", num_classes=0).num_classes == 0


@pytest.mark.parametrize(
  "options",
  [
    {"shape": ()},
    {"shape": (0, 2)},
    {"num_classes": -1},
    {"num_records": 0},
    {"split": "valid"},
    {"num_records": 10**9},
    {"shape": (10**9, 10**9)},
    {"num_classes": 10**9},
  ],
)
def test_synthetic_refuses_bad_sizes(options):
  with pytest.raises(ValueError, match="synthetic"):
    data.load("synthetic", **options)
