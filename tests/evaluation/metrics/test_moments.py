"""Moments against NumPy's, the Fréchet distance against closed forms."""

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import Moments, MomentSums, frechet_distance
from pflow_jax.evaluation.metrics.rows import BLOCK
from pflow_jax.files import foreign
from tests.evaluation.metrics.sliced import Sliced


def _whitened(rng, n, dim):
  """(n, dim) with mean 0 and covariance 1 to rounding, so that closed forms hold as closely."""
  x = rng.normal(size=(n, dim))
  x -= x.mean(axis=0)[None, :]
  return x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_frechet_distance_in_one_dimension(rng):
  x = _whitened(rng, 500, 1)
  # (2 - -1)² + (3 - .5)²
  np.testing.assert_allclose(frechet_distance(3 * x + 2, -0.5 * x - 1), 9 + 6.25, rtol=1e-12)


def test_frechet_distance_of_correlated_gaussians_with_known_root(rng):
  # S_b = M S_a M with M symmetric positive: tr (S_a S_b)^½ = tr(S_a M), from optimal transport.
  dim = 6
  a = rng.normal(size=(dim, dim))
  m = rng.normal(size=(dim, dim))
  m = m @ m.T + np.eye(dim)
  x = _whitened(rng, 400, dim) @ a.T
  cov = a @ a.T
  shift = np.arange(dim) * 1.0
  expected = shift @ shift + np.trace(cov + m @ cov @ m - 2 * cov @ m)
  np.testing.assert_allclose(frechet_distance(x, x @ m + shift[None, :]), expected, rtol=1e-9)


def test_frechet_distance_is_symmetric_and_zero_for_equal_and_degenerate_sets(rng):
  a, b = rng.normal(size=(300, 5)), rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
  np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-10)
  a[:, 2] = -1.0  # a pixel that is always black
  assert frechet_distance(a, a) < 1e-6
  a[:, 1], a[:, 3] = a[:, 0] + a[:, 4], a[:, 0] - a[:, 4]  # rounding leaves eigenvalues below 0
  assert frechet_distance(a, a) < 1e-6
  assert frechet_distance(b, a) > 0


def test_frechet_distance_survives_a_large_offset(rng):
  a, b = rng.normal(size=(300, 4)), 1.5 * rng.normal(size=(300, 4)) + 0.3
  expected = frechet_distance(a, b)
  np.testing.assert_allclose(frechet_distance(a + 1e6, b + 1e6), expected, rtol=1e-7)


def test_frechet_distance_upward_bias_is_as_documented(rng):
  dim, n = 16, 16 * 25
  distances = [frechet_distance(rng.normal(size=(n, dim)), rng.normal(size=(n, dim))) for _ in range(40)]
  expected = (dim + 5) / 4 * (2 / n) * dim
  np.testing.assert_allclose(np.mean(distances), expected, rtol=0.06)


def test_frechet_distance_refuses_too_few_samples_and_different_features(rng):
  x = rng.normal(size=(100, 10))
  frechet_distance(x[:20], x)
  with pytest.raises(ValueError, match="at least 20 samples .* got 19 .*draw more samples"):
    frechet_distance(x[:19], x)
  with pytest.raises(ValueError, match="expected 10 features"):
    frechet_distance(x, x[:, :9])


def test_moments_are_numpys(rng):
  x = rng.normal(size=(50, 2, 3))
  moments = Moments.from_features(x)
  np.testing.assert_allclose(moments.mean, x.reshape(50, 6).mean(axis=0))
  np.testing.assert_allclose(moments.cov, np.cov(x.reshape(50, 6), rowvar=False))
  assert moments.count == 50
  with pytest.raises(ValueError, match="at least 2 samples"):
    Moments.from_features(x[:1])


def _sums(features):
  sums = MomentSums(features.shape[1])
  sums.update(features)
  return sums


def test_streamed_and_merged_moments_are_those_of_all_features(rng):
  x = (rng.normal(size=(1000, 24)) @ rng.normal(size=(24, 24)) + 300).astype(np.float32)  # far from 0
  sums = MomentSums(24)
  for batch in np.split(x[:600], [1, 2, 40, 41, 333]):
    sums.update(batch)
  other = _sums(x[600:])
  other.merge(MomentSums(24))  # of no samples
  other.merge(sums)
  expected = x.astype(np.float64)
  for moments in (other.moments(), Moments.from_features(x)):
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, expected.mean(axis=0), rtol=1e-13)
    cov = np.cov(expected, rowvar=False)
    np.testing.assert_allclose(moments.cov, cov, rtol=0, atol=1e-12 * np.abs(cov).max())
    np.testing.assert_array_equal(moments.cov, moments.cov.T)


def test_a_part_of_sums_can_be_taken_out_again(rng):
  x = rng.normal(size=(500, 6)) + 50
  x[:100] += 3
  every = _sums(x)
  left, expected = every.without(_sums(x[:100])).moments(), Moments.from_features(x[100:])
  assert left.count == 400
  np.testing.assert_allclose(left.mean, expected.mean, rtol=1e-13)
  np.testing.assert_allclose(left.cov, expected.cov, atol=1e-11)
  assert every.count == 500
  with pytest.raises(ValueError, match="sums of a part of 500 samples, got those of 500"):
    every.without(every)


def test_features_are_read_a_block_at_a_time(rng, tmp_path):
  x = rng.normal(size=(2 * BLOCK + 100, 3)).astype(np.float32)
  expected = Moments.from_features(x)
  sliced = Sliced(x)
  np.testing.assert_array_equal(Moments.from_features(sliced).cov, expected.cov)
  assert sliced.most == BLOCK
  mapped = np.memmap(tmp_path / "features", np.float32, "w+", shape=x.shape)
  mapped[:] = x
  np.testing.assert_array_equal(Moments.from_features(mapped).cov, expected.cov)


def test_sums_refuse_what_is_no_number_of_theirs():
  sums = MomentSums(2)
  with pytest.raises(ValueError, match="expected 2 of a sample, as in those before, got 3"):
    sums.update(np.zeros((4, 3)))
  with pytest.raises(ValueError, match="1 of samples 0 to 2 are not finite"):
    sums.update(np.array([[0.0, 1.0], [np.inf, 0.0], [0.0, 0.0]]))
  with pytest.raises(ValueError, match="expected real numbers, got complex128"):
    sums.update(np.zeros((4, 2), complex))
  with pytest.raises(ValueError, match="at least 2 samples for a covariance, got 0"):
    sums.moments()


def test_moments_that_memory_does_not_hold_are_refused(monkeypatch):
  monkeypatch.setattr(foreign, "machine_memory", lambda: 2**30)
  with pytest.raises(ValueError, match="moments of 196608 features: takes 1.125 TiB .* use fewer features"):
    MomentSums(196_608)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      dict(mean=np.zeros(3)),
      r"expected a mean \(F,\) and a covariance \(F, F\) of floating numbers, got float64 \(3,\)",
    ),
    (dict(cov=np.zeros((2, 2), int)), "of floating numbers, got float64 .* and int64"),
    (dict(mean=np.array([0.0, np.nan])), "some of the moments are not finite"),
    (dict(cov=np.array([[1.0, 0.5], [0.4, 1.0]])), "the covariance is not symmetric"),
    (dict(cov=np.array([[1.0, 0.0], [0.0, -0.1]])), "a variance below 0 or a correlation above 1"),
    (dict(cov=np.array([[1.0, 1.1], [1.1, 1.0]])), "a variance below 0 or a correlation above 1"),
    (dict(count=1), "expected moments of at least 2 samples, got 1"),
  ],
)
def test_moments_from_elsewhere_are_checked(change, message):
  good = dict(mean=np.zeros(2), cov=np.array([[1.0, 0.9], [0.9, 1.0]]), count=None, name="a.npz")
  assert Moments.from_arrays(**good).count is None
  with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
    Moments.from_arrays(**good | change)


def test_a_count_that_is_not_known_is_not_asked_for(rng):
  x = rng.normal(size=(100, 10))
  few = Moments.from_features(x[:15])
  assert frechet_distance(x, Moments(few.mean, few.cov, None)) > 0
  with pytest.raises(ValueError, match=r"got 19 \(19\)"):
    frechet_distance(x[:19], Moments(few.mean, few.cov, None))


def test_the_root_of_a_reference_is_taken_once(rng, monkeypatch):
  reference, x = Moments.from_features(rng.normal(size=(50, 4))), rng.normal(size=(60, 4))
  first, calls = frechet_distance(x, reference), []
  monkeypatch.setattr(np.linalg, "eigh", lambda a: calls.append(a))
  assert frechet_distance(x, reference) == first
  assert not calls
