"""Numbers that compare sets of samples: NumPy and SciPy, float64, on the host.

Alignment (distance to the teacher's sample from the same noise) is the primary measure of a
student; the Fréchet distance alone misleads, because samples that are sharper and less diverse than
the data can win it. Report diversity beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

Array = np.ndarray

SAMPLES_PER_FEATURE = 2
_BLOCK = 512  # rows of a distance matrix held at once


def _flat(x: ArrayLike, name: str) -> Array:
  """Returns samples (N, *axes), which must be finite, as float64 (N, D), and (N,) as (N, 1)."""
  x = np.asarray(x, np.float64)
  if x.ndim == 0 or x.size == 0:
    raise ValueError(f"{name}: expected a non-empty array (N, ...), got shape {x.shape}")
  x = x.reshape(len(x), -1)
  bad = int(np.sum(~np.isfinite(x).all(axis=1)))
  if bad:
    raise ValueError(
      f"{name}: {bad} of {len(x)} samples are not finite; a sampler that diverged has no score: "
      "check its parameters, or drop those samples and report how many"
    )
  return x


def alignment_errors(samples: ArrayLike, reference: ArrayLike) -> Array:
  """Root mean square error of each sample to the reference sample of the same noise.

  Args:
    samples: (N, *axes).
    reference: (N, *axes), row i from the noise and label of row i of `samples`.

  Returns:
    (N,), float64, in the units of the samples (the mean runs over all axes of a sample).

  Raises:
    ValueError: for different shapes or non-finite values.
  """
  if np.shape(samples) != np.shape(reference):
    raise ValueError(
      f"samples: expected the reference's shape {np.shape(reference)}, got {np.shape(samples)}; "
      "both must come from the same noise, row by row"
    )
  difference = _flat(samples, "samples") - _flat(reference, "reference")
  return np.sqrt(np.mean(difference**2, axis=1))


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean (F,), unbiased covariance (F, F) and number of samples of a set of features; float64."""

  mean: Array
  cov: Array
  count: int

  @classmethod
  def from_features(cls, features: ArrayLike) -> Moments:
    """Moments of `features`, (N, *axes) flattened to (N, F), N >= 2."""
    return _Centred(features, "features").moments()


class _Centred:
  """Features shifted to zero mean once: products of resamples lose no digits to an offset."""

  def __init__(self, features: ArrayLike, name: str):
    features = _flat(features, name)
    if len(features) < 2:
      raise ValueError(f"{name}: expected at least 2 samples for a covariance, got {len(features)}")
    self.shift = features.mean(axis=0)
    self.values = features - self.shift[None, :]

  def moments(self, weights: Array | None = None) -> Moments:
    """Moments with each row counted `weights` (N,) times (a sum of N), or once."""
    x, n = self.values, len(self.values)
    weighted = x if weights is None else x * weights[:, None]
    mean = weighted.sum(axis=0) / n
    cov = (weighted.T @ x - n * np.outer(mean, mean)) / (n - 1)
    return Moments(mean=self.shift + mean, cov=(cov + cov.T) / 2, count=n)


def frechet_distance(a: ArrayLike | Moments, b: ArrayLike | Moments) -> float:
  """Squared Fréchet distance of the Gaussians fitted to two sets of features.

      |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)

  The root is taken of the symmetric S_a^½ S_b S_a^½ by eigendecomposition, so singular covariances
  (a constant pixel) are fine. Both sets need `SAMPLES_PER_FEATURE` = 2 samples a feature. With
  N <= F a covariance is rank-deficient and the result measures N, not the samples; from there the
  upward bias falls as 1 / N, for two equal isotropic sets it is about (F + 5) / 4 · (1/N_a + 1/N_b)
  of the variance tr S: a quarter at N = 2 F, the most that can pass for a measurement, and 2 % at
  N = 25 F. Compare values of the same N only, and prefer N well above 10 F.

  Args:
    a: features (N, F) or their `Moments`.
    b: features (N, F) or their `Moments`.

  Returns:
    a float, >= 0, in squared units of the features (FID in the literature, for Inception features).

  Raises:
    ValueError: for different F, or fewer than 2 F samples.

  References:
    Heusel et al., arXiv:1706.08500, Eq. 6.
  """
  a = a if isinstance(a, Moments) else Moments.from_features(a)
  b = b if isinstance(b, Moments) else Moments.from_features(b)
  dim = len(a.mean)
  if dim != len(b.mean):
    raise ValueError(f"b: expected {dim} features as in a, got {len(b.mean)}")
  fewest = min(a.count, b.count)
  if fewest < SAMPLES_PER_FEATURE * dim:
    raise ValueError(
      f"expected at least {SAMPLES_PER_FEATURE * dim} samples for a Fréchet distance of {dim} "
      f"features, got {fewest} ({a.count} and {b.count}); draw more samples or use fewer features "
      "(such as a classifier's instead of pixels)"
    )
  values, vectors = np.linalg.eigh(a.cov)
  root = (vectors * np.sqrt(np.maximum(values, 0.0))[None, :]) @ vectors.T
  cross = np.linalg.eigvalsh(root @ b.cov @ root)
  distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov)
  distance -= 2.0 * np.sum(np.sqrt(np.maximum(cross, 0.0)))
  return float(max(distance, 0.0))  # rounding can leave -1e-9 for equal sets


class PairedEstimate(NamedTuple):
  """A metric of a candidate and of its baseline, their ratio, and the ratio's standard error."""

  value: float
  baseline_value: float
  ratio: float
  standard_error: float


def paired_bootstrap(
  metric_fn: Callable[[Moments, Moments], float],
  candidate: ArrayLike,
  baseline: ArrayLike,
  reference: ArrayLike | Moments,
  *,
  num_resamples: int = 100,
  seed: int = 0,
) -> PairedEstimate:
  """Ratio metric(candidate) / metric(baseline) and its standard error from paired resampling.

  Candidate and baseline come row by row from the same noise and are resampled with the same
  indices, so the luck of the noise cancels in the ratio. A reference given as features is resampled
  too (again once for both): the data set is itself a finite draw, and a claim that depends on which
  images it happens to hold should show that. Pass `Moments` to hold it fixed, when the claim is
  about exactly this reference. A resample costs four metrics of weighted moments: 50 of 2,000
  samples with 64 features take about a second, and the time grows as F³.

  The error is that of A - R B (delta method: resampling biases both Fréchet distances upwards,
  which would draw a resampled A* / B* to 1), split by resamples in antithetic pairs, weights 1 + d
  and 1 - d, into a part L odd in d and a part Q even in d. A plain bootstrap reports var L + var Q.
  But where a distance is largely sampling noise, as of a good teacher's few thousand samples, L
  already holds the square's variance twice, and repeated experiments have var L - var Q (the plain
  bootstrap is up to sqrt(3) too large). For a mean, Q = 0 and the two agree.

  Args:
    metric_fn: (moments of samples, moments of reference) -> float, such as `frechet_distance`.
    candidate: features (N, F).
    baseline: features (N, F), row i from the noise of row i of `candidate`.
    reference: features (M, F), or Moments.
    num_resamples: the error's own relative error is 1 / sqrt(2 num_resamples): 7 % for 100.
    seed: of the resampling.

  Raises:
    ValueError: the rows do not pair up, or the baseline's metric is 0.
  """
  a, b = _Centred(candidate, "candidate"), _Centred(baseline, "baseline")
  if a.values.shape != b.values.shape:
    raise ValueError(
      f"baseline: expected the candidate's shape {a.values.shape}, got {b.values.shape}; "
      "both must come from the same noise"
    )
  if num_resamples < 2:
    raise ValueError(f"num_resamples: expected at least 2, got {num_resamples}")
  if isinstance(reference, Moments):
    real, target = None, reference
  else:
    real = _Centred(reference, "reference")
    target = real.moments()
  value, baseline_value = metric_fn(a.moments(), target), metric_fn(b.moments(), target)
  ratio = value / _positive(baseline_value)

  def residual(weights: Array, real_weights: Array) -> float:
    against = target if real is None else real.moments(real_weights)
    return metric_fn(a.moments(weights), against) - ratio * metric_fn(b.moments(weights), against)

  rng = np.random.default_rng(seed)
  odd, even = np.empty(num_resamples), np.empty(num_resamples)
  for i in range(num_resamples):
    d = _half_deviations(rng, len(a.values))
    real_d = _half_deviations(rng, 0 if real is None else len(real.values))
    plus, minus = residual(1 + d, 1 + real_d), residual(1 - d, 1 - real_d)
    odd[i], even[i] = plus - minus, 2 * (plus + minus)
  # At half the size the odd part is half, the even part a quarter of a whole resample's.
  linear = odd.var(ddof=1)
  variance = max(linear - even.var(ddof=1), linear / 2)  # var L >= 2 var Q, but for their noise
  error = np.sqrt(variance) / baseline_value
  return PairedEstimate(float(value), float(baseline_value), float(ratio), float(error))


def ratio_of_means(candidate: ArrayLike, baseline: ArrayLike) -> PairedEstimate:
  """Ratio of two means over paired rows, such as of `alignment_errors`, and its standard error.

  The error is the delta method's std(c - R b) / (sqrt(N) mean(b)), the limit of `paired_bootstrap` of the means.

  Args:
    candidate: (N,), N >= 2.
    baseline: (N,), row i from the noise of row i of `candidate`.

  Raises:
    ValueError: for different shapes, or a baseline whose mean is 0.
  """
  c, b = _flat(candidate, "candidate"), _flat(baseline, "baseline")
  if c.shape != b.shape or c.shape[1] != 1 or len(c) < 2:
    raise ValueError(f"expected two equal shapes (N,), N >= 2, got {c.shape} and {b.shape}")
  value, baseline_value = float(c.mean()), float(b.mean())
  ratio = value / _positive(baseline_value)
  error = float(np.std(c - ratio * b, ddof=1)) / (np.sqrt(len(c)) * baseline_value)
  return PairedEstimate(value, baseline_value, ratio, float(error))


def _positive(baseline_value: float) -> float:
  if not baseline_value > 0:
    raise ValueError(f"baseline: expected a positive metric to divide by, got {baseline_value}")
  return baseline_value


def _half_deviations(rng: np.random.Generator, n: int) -> Array:
  """Half of (count of each of n rows in a resample of n with replacement) - 1; (n,)."""
  return (rng.multinomial(n, np.full(n, 1 / n)) - 1) / 2 if n else np.empty(0)


def _distances(a: Array, b: Array) -> Iterator[tuple[int, Array]]:
  """Euclidean distances of a (N, D) to b (M, D) in blocks: (first row, (rows, M))."""
  for start in range(0, len(a), _BLOCK):
    yield start, cdist(a[start : start + _BLOCK], b)


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1]: of the fakes that look real, and of the real data that the fakes cover."""

  precision: float
  recall: float


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 5) -> PrecisionRecall:
  """Improved precision and recall: shares of one set inside the other's k-nearest-neighbour balls.

  Two draws of one distribution score below 1 and both rise with the number of samples: compare
  values of the same sizes only.

  Args:
    real: features (N, F), N > k.
    fake: features (M, F), M > k.
    k: a ball reaches to the k-th neighbour in its own set.

  Raises:
    ValueError: for different F or too few samples.

  References:
    Kynkäänniemi et al., arXiv:1904.06991, Eqs. 1 and 2.
  """
  real, fake = _flat(real, "real"), _flat(fake, "fake")
  if real.shape[1] != fake.shape[1]:
    raise ValueError(f"fake: expected {real.shape[1]} features as in real, got {fake.shape[1]}")
  if not 1 <= k < min(len(real), len(fake)):
    raise ValueError(
      f"k: expected 1 <= k < {min(len(real), len(fake))} (the smaller set), got {k}; lower k or draw more samples"
    )
  real_radius, fake_radius = _ball_radii(real, k), _ball_radii(fake, k)
  precise, covered = 0, np.zeros(len(real), bool)
  for start, distance in _distances(fake, real):
    precise += int((distance <= real_radius[None, :]).any(axis=1).sum())
    covered |= (distance <= fake_radius[start : start + _BLOCK, None]).any(axis=0)
  return PrecisionRecall(precise / len(fake), float(covered.mean()))


def _ball_radii(x: Array, k: int) -> Array:
  """Distance of every row to its k-th nearest other row; (N,)."""
  radii = np.empty(len(x))
  for start, distance in _distances(x, x):
    # The index is k, not k - 1: every row is its own neighbour 0 at distance 0. The column is copied, because a view
    # would keep its block in memory, and all views the whole matrix.
    distance.partition(k, axis=1)
    radii[start : start + _BLOCK] = distance[:, k]
  return radii


def diversity(samples: ArrayLike, labels: ArrayLike) -> float:
  """Mean distance of two samples of one class, averaged over classes; 0 is a full collapse.

  The distance is the root mean square difference over a sample's axes (Euclidean / sqrt(D)):
  alignment's units, exact over all pairs. Divide by the teacher's or the data's value for a
  relative diversity.

  Args:
    samples: (N, *axes).
    labels: int (N,); all equal for data without classes.

  Raises:
    ValueError: lengths differ, or no class has two samples (a class with one sample has no pair and is left out).
  """
  samples, labels = _flat(samples, "samples"), np.asarray(labels)
  if labels.shape != (len(samples),):
    raise ValueError(f"labels: expected shape {(len(samples),)}, one per sample, got {labels.shape}")
  means = []
  for label in np.unique(labels):
    x = samples[labels == label]
    if len(x) > 1:
      total = sum(float(distance.sum()) for _, distance in _distances(x, x))
      means.append(total / (len(x) * (len(x) - 1) * np.sqrt(x.shape[1])))
  if not means:
    raise ValueError(f"labels: expected a class with at least two samples, got {len(samples)} single ones")
  return float(np.mean(means))


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
  """Share of equal entries of two integer arrays (N,), N >= 1."""
  predicted, labels = np.asarray(predicted), np.asarray(labels)
  if predicted.shape != labels.shape or predicted.ndim != 1 or predicted.size == 0:
    raise ValueError(f"expected two equal shapes (N,), got {predicted.shape} and {labels.shape}")
  return float(np.mean(predicted == labels))
