"""Data sets from arrays, and held-out parts."""

import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.data.dataset import split_rows


def test_uint8_is_scaled_to_the_unit_range():
  x0 = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1)
  batch = data.from_arrays(x0, name="pixels").records.take(np.arange(3))
  np.testing.assert_allclose(batch["x0"].ravel(), [-1.0, -0.6, 1.0], atol=1e-7)
  assert batch["x0"].dtype == np.float32


def test_a_set_without_labels_has_no_classes():
  dataset = data.from_arrays(np.zeros((4, 2)), name="points")
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((2,), 0, 4)
  np.testing.assert_array_equal(next(data.batches(dataset, 4, seed=0))["cond"], np.zeros(4))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"x0": np.zeros(3)}, "must be \\(n, \\*space, C\\)"),
    ({"x0": np.zeros((0, 2))}, "n >= 1"),
    ({"x0": np.zeros((3, 2), np.int64)}, "uint8 or floating, got int64"),
    ({"x0": np.full((3, 2), np.nan)}, "not finite"),
    ({"label": np.array([0, 1])}, "label must be 3 integers"),
    ({"label": np.array([0.0, 1.0, 1.0])}, "label must be 3 integers"),
    ({"label": np.array([0, 1, 2])}, "labels must lie in \\[0, 2\\).*got 0 to 2"),
    ({"x0": np.zeros((3, 0, 2))}, "sizes >= 1"),
    ({"x0": np.zeros((3, 2), complex)}, "uint8 or floating, got complex128"),
    ({"x0": np.full((3, 2), 1e300)}, "not finite"),
    ({"label": np.array([0, 1, 0], "m8[s]")}, "label must be 3 integers, got timedelta64"),
    ({"label": np.array([0, 1, -1])}, "labels must be at least 0, got -1"),
    ({"class_names": ("a", 3)}, "class_names must be words, got 3"),
    ({"class_names": ("a", "a")}, "class_names must differ, got 2 times 'a'"),
    ({"label": None}, "2 class_names without labels"),
    ({"texts": ("one",)}, "3 records need as many texts, got 1"),
  ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, message):
  defaults = {"x0": np.zeros((3, 2)), "label": np.array([0, 1, 0]), "class_names": ("a", "b")}
  with pytest.raises(ValueError, match=message):
    data.from_arrays(**{**defaults, **arguments}, name="mine")


@pytest.mark.parametrize(
  ("shape", "num_classes", "message"),
  [
    ((), 0, "shape must be"),
    ((4, 0), 0, "shape must be .* sizes >= 1, got \\(4, 0\\)"),
    ((10**9,) * 9, 0, "an example of shape .*: takes .* of memory, this machine has"),
    ((2,), 10**9, "expected 0 to 1,048,576 classes, got 1000000000"),
    ((2,), -1, "expected 0 to 1,048,576 classes, got -1"),
  ],
)
def test_a_set_that_no_machine_can_hold_is_refused(shape, num_classes, message):
  with pytest.raises(ValueError, match=message):
    data.Dataset("mine", shape, num_classes, (), data.GeneratedRecords(None))


def test_train_and_test_are_disjoint_complete_and_fixed():
  train, test = (split_rows("set", 100, split, 30) for split in ("train", "test"))
  assert len(test) == 30
  np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(100))
  np.testing.assert_array_equal(split_rows("set", 100, "test", 30), test)
  assert not np.array_equal(test, np.arange(70, 100))  # drawn, so that sorted classes are spread
  np.testing.assert_array_equal(split_rows("set", 100, "train", 0), np.arange(100))


@pytest.mark.parametrize(
  ("split", "held_out", "message"),
  [
    ("valid", 0, "'train' or 'test', got 'valid'"),
    ("test", 0, "nothing is held out"),
    ("train", 100, "held_out must be in"),
    ("train", -1, "held_out must be in"),
  ],
)
def test_bad_splits_are_refused(split, held_out, message):
  with pytest.raises(ValueError, match=message):
    split_rows("set", 100, split, held_out)
