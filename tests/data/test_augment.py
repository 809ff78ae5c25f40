"""Data sets whose examples are changed when they are read."""

import dataclasses

import numpy as np
import pytest

from pflow_jax import data

X0 = np.arange(6 * 4 * 4, dtype=np.float32).reshape(6, 4, 4, 1)


def cut(x0, rng):
  top, left = rng.integers(0, 3, 2)
  return x0[top : top + 2, left : left + 2]


def take(dataset, count, size=4, **options):
  stream = data.batches(dataset, size, seed=3, **options)
  return [next(stream) for _ in range(count)]


def test_every_reading_is_another_cut_of_its_example():
  dataset = data.augment(data.from_arrays(X0, np.arange(6)), cut)
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((2, 2, 1), 6, 6)
  seen = {}
  for batch in take(dataset, 9):
    for x0, label in zip(batch["x0"], batch["cond"], strict=True):
      corner = x0[0, 0, 0] - 16 * label
      assert corner % 4 <= 2
      assert corner // 4 <= 2
      np.testing.assert_array_equal(x0.ravel() - x0[0, 0, 0], [0, 1, 4, 5])
      seen.setdefault(int(label), set()).add(float(corner))
  assert all(len(corners) > 1 for corners in seen.values())


def test_a_run_resumes_and_processes_agree():
  dataset = data.augment(data.from_arrays(X0), cut)
  whole = [batch["x0"] for batch in take(dataset, 3)]
  np.testing.assert_array_equal(take(dataset, 1, start=2)[0]["x0"], whole[2])
  part = take(dataset, 3, rows=np.array([1, 3]))
  np.testing.assert_array_equal([batch["x0"] for batch in part], [x0[[1, 3]] for x0 in whole])


def test_examples_are_changed_and_the_same_each_time():
  dataset = data.augment(data.from_arrays(X0), cut)
  x0, _ = data.examples(dataset, 4)
  assert x0.shape == (4, 2, 2, 1)
  np.testing.assert_array_equal(x0, data.examples(dataset, 4)[0])


def test_its_fingerprint_is_that_of_the_examples():
  """What code does to them differs between machines by rounding."""
  dataset = data.from_arrays(X0)
  one, other = (data.augment(dataset, lambda x0, rng, by=by: x0 + by) for by in (0, 1))
  assert data.fingerprint(one) == data.fingerprint(other)
  assert data.fingerprint(one) != data.fingerprint(data.augment(data.from_arrays(X0[::-1]), cut))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x0, rng: x0.ravel(), r"of a shape \(\*space, C\), as \(4, 4, 1\); got shape \(16,\)"),
    (lambda x0, rng: x0 * np.nan, "not finite"),
  ],
)
def test_what_gives_no_examples_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    data.augment(data.from_arrays(X0), change)


@pytest.mark.parametrize("arguments", [("digits", cut), (data.from_arrays(X0), None)])
def test_what_is_no_set_or_no_function_is_refused(arguments):
  with pytest.raises(ValueError, match="expected what load or from_arrays returns, and a function"):
    data.augment(*arguments)


def test_shapes_that_differ_are_refused():
  dataset = data.augment(data.from_arrays(X0), lambda x0, rng: x0[: int(x0.max()) % 3 + 1])
  with pytest.raises(ValueError, match="change must give one shape"):
    take(dataset, 3)


def test_prompts_alone_are_refused():
  with pytest.raises(ValueError, match="has prompts alone"):
    data.augment(dataclasses.replace(data.from_arrays(X0), has_x0=False), cut)
