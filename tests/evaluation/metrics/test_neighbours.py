"""Precision, recall, density and coverage against all pairs in float64."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pflow_jax.evaluation.metrics import neighbours, prdc, precision_recall
from pflow_jax.evaluation.metrics.rows import BLOCK
from tests.evaluation.metrics.sliced import Sliced


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_precision_and_recall_of_identical_and_disjoint_sets(rng):
  x = rng.normal(size=(700, 3))  # more rows than one block
  assert precision_recall(x, x) == (1.0, 1.0)
  assert precision_recall(x, x + 100.0) == (0.0, 0.0)


def test_precision_and_recall_tell_lost_modes_from_stray_samples(rng):
  modes = np.array([[0.0, 0.0], [50.0, 0.0]])
  real = modes[np.arange(1200) % 2] + rng.normal(size=(1200, 2))
  one_mode = rng.normal(size=(1100, 2))
  precision, recall = precision_recall(real, one_mode)
  assert precision > 0.9
  np.testing.assert_allclose(recall, 0.5, atol=0.03)
  swapped = precision_recall(one_mode, real)
  assert swapped == (recall, precision)


def test_precision_recall_uses_the_kth_neighbour_apart_from_itself():
  real = np.array([[0.0], [1.0], [3.0]])
  fake = np.array([[-1.5], [7.0], [7.5]])
  # k = 1: real balls have radii 1, 1, 2 (none holds -1.5); k = 2: 3, 2, 3, so 0's holds -1.5.
  assert precision_recall(real, fake, k=1).precision == 0
  np.testing.assert_allclose(precision_recall(real, fake, k=2).precision, 1 / 3)


def _all_pairs(real, fake, k):
  """All four from whole matrices of distances in float64."""
  real, fake = real.astype(np.float64), fake.astype(np.float64)
  real_radius, fake_radius = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake))
  distance = cdist(fake, real)
  balls = distance <= real_radius[None, :]
  recall = (distance <= fake_radius[:, None]).any(axis=0).mean()
  return balls.any(axis=1).mean(), recall, balls.sum(axis=1).mean() / k, balls.any(axis=0).mean()


def _clusters(rng):
  """Two clusters so far apart that float32 does not see distances within them."""
  x = 0.01 * rng.normal(size=(300, 6))
  x[150:] += 1e3
  return x


SETS = {
  "normal": lambda rng: (rng.normal(size=(300, 16)), 0.9 * rng.normal(size=(250, 16)) + 0.1),
  "far from 0": lambda rng: ((rng.normal(size=(300, 8)) + 1e4).astype(np.float32), rng.normal(size=(200, 8)) + 1e4),
  "clusters": lambda rng: (_clusters(rng), _clusters(rng)),
  "one mode": lambda rng: (rng.normal(size=(300, 8)), 1e-4 * rng.normal(size=(280, 8)) + 2),
  "doubles": lambda rng: (rng.normal(size=(260, 4)), rng.normal(size=(20, 4)).repeat(13, axis=0)),
  "half precision": lambda rng: rng.normal(size=(2, 260, 8)).astype(np.float16),
  "whole numbers": lambda rng: tuple(rng.integers(0, 4, size=(2, 260, 3))),  # most pairs lie on a border
  "shared": lambda rng: (x := rng.normal(size=(400, 12)).astype(np.float32), x[100:350]),
}


@pytest.mark.parametrize("block", [64, BLOCK])
@pytest.mark.parametrize("kind", SETS)
def test_results_are_those_of_all_pairs_in_float64(kind, block, rng, monkeypatch):
  monkeypatch.setattr(neighbours, "BLOCK", block)
  real, fake = SETS[kind](rng)
  for k in (1, 3):
    np.testing.assert_allclose(prdc(real, fake, k), _all_pairs(real, fake, k), atol=1e-12)


def test_float32_alone_would_not_do(rng, monkeypatch):
  """The sets above are hard: without bounds of the errors, their results are others."""
  real, fake = SETS["clusters"](rng)
  expected = _all_pairs(real, fake, 3)
  monkeypatch.setattr(neighbours, "_UNIT", 0.0)
  assert np.abs(np.subtract(prdc(real, fake, 3), expected)).max() > 0.02


@pytest.mark.parametrize("collapsed", [False, True])
def test_few_pairs_are_left_to_the_host(collapsed, rng, monkeypatch):
  """The bound is so tight that float32 settles nearly all pairs, of many features and of fakes of one mode too."""
  settled, original = [], neighbours._squared_distances
  monkeypatch.setattr(neighbours, "_squared_distances", lambda *a: settled.append(len(a[1])) or original(*a))
  real, fake = rng.normal(size=(2, 512, 1024)).astype(np.float32)
  fake = 10 + fake / 1000 if collapsed else fake
  got = prdc(real, fake, 3)
  np.testing.assert_allclose(got, _all_pairs(real, fake, 3), atol=1e-12)
  neighbours_looked_at = 2 * 512 * (3 + neighbours._SPARE)
  assert sum(settled) - neighbours_looked_at < 0.002 * 512**2


def test_density_and_coverage_of_a_line():
  real = np.array([[0.0], [1.0], [3.0], [100.0]])  # k = 1: radii 1, 1, 2, 97
  fake = np.array([[0.5], [1.0], [4.0], [-2.0]])  # inside 2, 3, 2 and 0 balls: (3, 2) reaches 1, and (100, 97) 3
  got = prdc(real, fake, k=1)
  np.testing.assert_allclose((got.density, got.coverage, got.precision), ((2 + 3 + 2) / 4, 1.0, 0.75))
  np.testing.assert_allclose(prdc(real, fake + 500, k=1), 0)


def test_precision_recall_reads_a_block_at_a_time(rng, monkeypatch):
  monkeypatch.setattr(neighbours, "BLOCK", 64)
  real, fake = rng.normal(size=(300, 4)), rng.normal(size=(200, 4))
  sliced = Sliced(real), Sliced(fake)
  assert precision_recall(*sliced) == precision_recall(real, fake)
  assert max(one.most for one in sliced) <= BLOCK


def test_precision_recall_refuses_bad_sizes(rng):
  x = rng.normal(size=(10, 3))
  with pytest.raises(ValueError, match="k: expected 1 <= k < 5"):
    precision_recall(x, x[:5], k=5)
  with pytest.raises(ValueError, match="expected 3 features"):
    precision_recall(x, x[:, :2])
  with pytest.raises(ValueError, match="real: expected features whose squares float32 holds, got some of 4e"):
    precision_recall(x * 1e19, x)
  with pytest.raises(ValueError, match="fake: 1 of samples 0 to 9 are not finite"):
    precision_recall(x, np.where(np.arange(10)[:, None] == 3, np.nan, x))
