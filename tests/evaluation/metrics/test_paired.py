"""Errors of ratios against analytic ones and the spread of repeated experiments."""

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import Moments, frechet_distance, paired_bootstrap, ratio_of_means
from pflow_jax.evaluation.metrics.paired import _Centred


@pytest.fixture
def rng():
  return np.random.default_rng(0)


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
  np.testing.assert_allclose(result.value, frechet_distance(candidate, real), rtol=1e-10)
  np.testing.assert_allclose(result.baseline_value, frechet_distance(baseline, real), rtol=1e-10)
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
