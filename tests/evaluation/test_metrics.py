"""Metrics against closed forms, analytic errors and each other."""

import tracemalloc

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import (
  Moments,
  _Centred,
  accuracy,
  alignment_errors,
  diversity,
  frechet_distance,
  paired_bootstrap,
  precision_recall,
  ratio_of_means,
)


def _whitened(rng, n, dim):
  """(n, dim) with mean 0 and covariance 1 to rounding, so that closed forms hold as closely."""
  x = rng.normal(size=(n, dim))
  x -= x.mean(axis=0)[None, :]
  return x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_alignment_errors_are_those_of_pairs():
  reference = np.zeros((2, 2, 2, 1))
  samples = reference.copy()
  samples[0] = 3.0  # RMSE 3
  samples[1, 0, 0] = 2.0  # one axis of four off by 2: RMSE 1
  np.testing.assert_allclose(alignment_errors(samples, reference), [3.0, 1.0])
  assert not np.any(alignment_errors(samples, samples))


def test_alignment_refuses_unpaired_and_diverged_samples():
  with pytest.raises(ValueError, match="same noise"):
    alignment_errors(np.zeros((3, 2)), np.zeros((4, 2)))
  with pytest.raises(ValueError, match="1 of 3 samples are not finite"):
    alignment_errors(np.array([[0.0], [np.nan], [1.0]]), np.zeros((3, 1)))


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


def test_weighted_moments_are_those_of_repeated_rows(rng):
  x, counts = rng.normal(size=(50, 3)) + 4, rng.multinomial(50, np.full(50, 1 / 50))
  got, expected = _Centred(x, "x").moments(counts), Moments.from_features(x.repeat(counts, axis=0))
  np.testing.assert_allclose(got.mean, expected.mean)
  np.testing.assert_allclose(got.cov, expected.cov)


def _mean(a, _):
  return a.mean[0]


def test_bootstrap_of_means_agrees_with_the_analytic_error(rng):
  noise = rng.gamma(4.0, size=2000)
  candidate, baseline = noise + 0.3 * rng.normal(size=2000), 2 * noise + 5
  fixed = Moments.from_features(noise)
  got = paired_bootstrap(_mean, candidate, baseline, fixed, num_resamples=1500)
  expected = ratio_of_means(candidate, baseline)
  np.testing.assert_allclose(got[:3], expected[:3], rtol=1e-12)
  np.testing.assert_allclose(got.standard_error, expected.standard_error, rtol=0.06)
  # Pairing is what makes the error small: shuffled rows share no noise.
  shuffled = ratio_of_means(rng.permutation(candidate), baseline)
  assert expected.standard_error < 0.8 * shuffled.standard_error


def test_ratio_of_means_error_is_the_spread_of_repeated_experiments(rng):
  results = []
  for _ in range(400):
    noise = rng.gamma(4.0, size=200)
    results.append(ratio_of_means(noise + 0.5 * rng.normal(size=200), 1 + noise**1.2))
  spread = np.std([r.ratio for r in results])
  np.testing.assert_allclose(np.mean([r.standard_error for r in results]), spread, rtol=0.12)


def _experiment(rng, n, dim=8):
  """Features of a real set, of a candidate and of a baseline; the latter two from one noise."""
  real, noise = rng.normal(size=(n, dim)), rng.normal(size=(n, dim))
  candidate = 0.6 * noise + 0.2 + 0.05 * rng.normal(size=(n, dim))
  return candidate, 0.7 * noise + 0.1, real


@pytest.mark.parametrize("resample_reference", [True, False])
def test_bootstrap_error_of_a_frechet_ratio_is_the_spread_of_repeated_experiments(rng, resample_reference):
  real = rng.normal(size=(300, 8))
  results = []
  for _ in range(100):
    candidate, baseline, drawn = _experiment(rng, 300)
    reference = drawn if resample_reference else Moments.from_features(real)
    results.append(paired_bootstrap(frechet_distance, candidate, baseline, reference, num_resamples=25))
  spread = np.std([r.ratio for r in results], ddof=1)
  np.testing.assert_allclose(np.mean([r.standard_error for r in results]), spread, rtol=0.25)


def test_bootstrap_error_is_not_inflated_where_the_distance_is_mostly_sampling_noise(rng):
  results = []
  for _ in range(60):
    real, noise = rng.normal(size=(2, 200, 12))
    candidate = 0.95 * noise + 0.2 * rng.normal(size=(200, 12))
    results.append(paired_bootstrap(frechet_distance, candidate, noise, real, num_resamples=20))
  spread = np.std([r.ratio for r in results], ddof=1)
  # The plain bootstrap of A - R B is 1.6 to 1.9 times the spread here.
  assert 0.7 < np.mean([r.standard_error for r in results]) / spread < 1.35


def test_bootstrap_error_shrinks_with_the_root_of_the_samples(rng):
  errors = [
    paired_bootstrap(frechet_distance, *_experiment(rng, n), num_resamples=200).standard_error for n in (400, 6400)
  ]
  np.testing.assert_allclose(errors[0] / errors[1], 4.0, rtol=0.3)


def test_bootstrap_reports_the_metrics_and_repeats_with_its_seed(rng):
  candidate, baseline, real = _experiment(rng, 200)
  result = paired_bootstrap(frechet_distance, candidate, baseline, real, num_resamples=10)
  assert result.value == frechet_distance(candidate, real)
  assert result.baseline_value == frechet_distance(baseline, real)
  np.testing.assert_allclose(result.ratio, result.value / result.baseline_value)
  same = paired_bootstrap(frechet_distance, candidate, baseline, real, num_resamples=10)
  other = paired_bootstrap(frechet_distance, candidate, baseline, real, num_resamples=10, seed=1)
  assert same == result
  assert other.standard_error != result.standard_error
  equal = paired_bootstrap(frechet_distance, candidate, candidate, real, num_resamples=10)
  assert equal.ratio == 1
  assert equal.standard_error == 0


def test_bootstrap_refuses_unpaired_rows_and_a_zero_baseline(rng):
  candidate, baseline, real = _experiment(rng, 100)
  with pytest.raises(ValueError, match="same noise"):
    paired_bootstrap(frechet_distance, candidate, baseline[:-1], real)
  with pytest.raises(ValueError, match="num_resamples"):
    paired_bootstrap(frechet_distance, candidate, baseline, real, num_resamples=1)
  with pytest.raises(ValueError, match="positive metric"):
    paired_bootstrap(_mean, candidate, np.zeros_like(baseline), real)
  with pytest.raises(ValueError, match="two equal shapes"):
    ratio_of_means(candidate, baseline)


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


def test_precision_recall_holds_a_block_of_distances_at_a_time(rng):
  real, fake = rng.normal(size=(4_000, 2)), rng.normal(size=(3_000, 2))
  tracemalloc.start()
  try:
    precision_recall(real, fake)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  block = 512 * 4_000 * 8
  assert peak < 3 * block < 4_000 * 4_000 * 8 / 2


def test_precision_recall_refuses_bad_sizes(rng):
  x = rng.normal(size=(10, 3))
  with pytest.raises(ValueError, match="k: expected 1 <= k < 5"):
    precision_recall(x, x[:5], k=5)
  with pytest.raises(ValueError, match="expected 3 features"):
    precision_recall(x, x[:, :2])


def test_diversity_is_the_mean_rms_distance_of_pairs_within_a_class():
  samples = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
  labels = np.array([0, 0, 0, 1, 1, 2])
  first = (5 + 5 + 10) / 3 / np.sqrt(2)
  np.testing.assert_allclose(diversity(samples, labels), (first + 1.0) / 2)
  assert diversity(np.ones((4, 8, 8, 1)), np.zeros(4, int)) == 0


def test_diversity_of_more_than_one_block(rng):
  x = rng.normal(size=(1500, 64))
  # RMS distance of two unit Gaussians: sqrt(2) (1 - 1 / (4 D)).
  expected = np.sqrt(2) * (1 - 1 / 256)
  np.testing.assert_allclose(diversity(x, np.zeros(1500, int)), expected, rtol=2e-3)


def test_diversity_refuses_single_samples_and_wrong_labels():
  with pytest.raises(ValueError, match="at least two samples"):
    diversity(np.zeros((3, 2)), np.arange(3))
  with pytest.raises(ValueError, match="one per sample"):
    diversity(np.zeros((3, 2)), np.zeros(2, int))


def test_accuracy():
  assert accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
  with pytest.raises(ValueError, match="equal shapes"):
    accuracy([1, 2], [1])
