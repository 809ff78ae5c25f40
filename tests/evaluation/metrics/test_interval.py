"""The interval of a Fréchet distance on draws from Gaussians whose distance is known."""

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import Moments, MomentSums, frechet_distance, frechet_interval


def _groups(x, count):
  groups = [MomentSums(x.shape[1]) for _ in range(count)]
  for i, group in enumerate(groups):
    group.update(x[i::count])
  return groups


def _repeated(rng, scale, shift, *, dim=8, n=400, groups=10, repeats=200):
  """Intervals of repeated draws from N(shift, scale²) to N(0, 1), and that distance."""
  reference = Moments(np.zeros(dim), np.eye(dim), None)
  draws = (scale * rng.normal(size=(n, dim)) + shift for _ in range(repeats))
  found = [frechet_interval(_groups(x, groups), reference) for x in draws]
  return {name: np.array([getattr(one, name) for one in found]) for name in found[0]._fields}, dim * (
    (scale - 1) ** 2 + shift**2
  )


@pytest.mark.parametrize(("scale", "shift", "groups"), [(1.2, 0.1, 20), (1.1, 0.0, 10), (1.0, 0.3, 10)])
def test_the_interval_holds_the_distance_as_often_as_it_says(scale, shift, groups):
  got, distance = _repeated(np.random.default_rng(0), scale, shift, groups=groups)
  holds = np.mean((got["low"] <= distance) & (distance <= got["high"]))
  assert 0.91 < holds < 0.99, "95 % of 200 draws, to 2.6 standard errors"
  for name in ("value", "unbiased"):
    np.testing.assert_allclose(got["standard_error"].mean(), got[name].std(), rtol=0.15)
  # The distance itself is far off: nearly all of its intervals would lie above.
  bias = got["value"].mean() - distance
  assert abs(got["unbiased"].mean() - distance) < 3 * got["unbiased"].std() / 200**0.5 + 0.02 * bias
  assert bias > 10 * got["value"].std() / 200**0.5


def test_the_error_is_too_large_by_a_root_of_two_for_equal_distributions():
  got, distance = _repeated(np.random.default_rng(1), 1.0, 0.0)
  assert distance == 0
  np.testing.assert_allclose(got["standard_error"].mean() / got["value"].std(), 2**0.5, rtol=0.15)
  assert np.mean((got["low"] <= 0) & (got["high"] >= 0)) > 0.97
  assert got["unbiased"].min() < 0


def test_groups_may_differ_in_size():
  rng = np.random.default_rng(2)
  reference, x = Moments(np.zeros(4), np.eye(4), None), rng.normal(size=(600, 4)) + 0.5
  parts = np.split(x, np.cumsum([20, 40, 90, 50, 60, 70, 30, 80, 100]))
  groups = [MomentSums(4) for _ in parts]
  for group, part in zip(groups, parts, strict=True):
    group.update(part)
  got, even = frechet_interval(groups, reference), frechet_interval(_groups(x, 10), reference)
  np.testing.assert_allclose(got.value, frechet_distance(x, reference), rtol=1e-9)
  np.testing.assert_allclose(got.unbiased, even.unbiased, rtol=0.02)
  np.testing.assert_allclose(got.standard_error, even.standard_error, rtol=0.5)
  assert got.low < got.unbiased < got.high
  narrow = frechet_interval(groups, reference, level=0.5)
  assert got.low < narrow.low < narrow.high < got.high


def test_too_few_groups_or_samples_are_refused():
  rng = np.random.default_rng(3)
  reference, x = Moments(np.zeros(4), np.eye(4), None), rng.normal(size=(9, 4))
  with pytest.raises(ValueError, match="expected 2 groups of samples or more and a level in"):
    frechet_interval(_groups(x, 1), reference)
  with pytest.raises(ValueError, match="got 3 and 1 without samples"):
    frechet_interval([*_groups(x, 3), MomentSums(4)], reference)
  with pytest.raises(ValueError, match="at least 8 samples"):
    frechet_interval(_groups(x, 3), reference)
