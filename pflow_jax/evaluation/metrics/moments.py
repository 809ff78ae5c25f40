"""Mean and covariance of features, streamed in float64, and the Fréchet distance of two sets of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.metrics.rows import Array, Rows
from pflow_jax.files.foreign import check_memory

SAMPLES_PER_FEATURE = 2
_ASYMMETRY = 1e-4  # of a covariance from a file, relative to its largest element; float32 sums have 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean (F,), unbiased covariance (F, F) and number of samples of a set of features; float64.

  Attributes:
    mean: (F,).
    cov: (F, F), the sum over samples divided by `count` - 1.
    count: number of samples; None where it is not known, as in most files of references.
  """

  mean: Array
  cov: Array
  count: int | None

  @classmethod
  def from_features(cls, features: ArrayLike) -> Moments:
    """Moments of `features`, (N, *axes) flattened to (N, F), N >= 2."""
    rows = Rows(features, "features")
    sums = MomentSums(rows.dim)
    sums.update(rows)
    return sums.moments()

  @classmethod
  def from_arrays(cls, mean: Any, cov: Any, count: int | None, *, name: str) -> Moments:
    """Checks moments that something else has computed.

    Args:
      mean: (F,).
      cov: (F, F).
      count: number of samples; None if it is not known.
      name: of the moments, in errors.

    Raises:
      ValueError: the shapes do not fit, a number is not finite, or `cov` is no covariance: not symmetric, or with a
        variance below 0 or a correlation above 1.
    """
    mean, cov = np.asarray(mean), np.asarray(cov)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or mean.dtype.kind != "f" or cov.dtype.kind != "f":
      got = f"{mean.dtype} {mean.shape} and {cov.dtype} {cov.shape}"
      raise ValueError(f"{name}: expected a mean (F,) and a covariance (F, F) of floating numbers, got {got}")
    check_memory(f"{name}: moments of {len(mean)} features", 5 * 8 * len(mean) ** 2, "use fewer features")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not np.isfinite(mean).all() or not np.isfinite(cov).all():
      raise ValueError(f"{name}: some of the moments are not finite; make the file anew")
    scale = float(np.abs(cov).max(initial=0.0))
    if np.abs(cov - cov.T).max(initial=0.0) > _ASYMMETRY * scale:
      raise ValueError(f"{name}: the covariance is not symmetric, so it is none; make the file anew")
    deviation = np.sqrt(np.maximum(np.diagonal(cov), 0.0))
    largest = deviation[:, None] * deviation[None, :] + _ASYMMETRY * scale
    if np.any(np.abs(cov) > largest):
      raise ValueError(f"{name}: the covariance has a variance below 0 or a correlation above 1; make the file anew")
    if count is not None and count < 2:
      raise ValueError(f"{name}: expected moments of at least 2 samples, got {count}")
    return cls(mean, (cov + cov.T) / 2, count)

  @functools.cached_property
  def root(self) -> Array:
    """The symmetric square root of `cov`, (F, F), which is kept; rounding's negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh(self.cov)
    return (vectors * np.sqrt(np.maximum(values, 0.0))[None, :]) @ vectors.T


class MomentSums:
  """Sums from which the moments of a stream of features follow; float64, on the host.

  Batches are added with `update` and other sums with `merge`; the order changes rounding alone, about 1e-15. The sums
  are of deviations from the running mean, so an offset of the features costs no digits.

      sums = MomentSums(2048)
      for features in batches:
        sums.update(features)
      sums.moments()

  Args:
    num_features: F.

  Attributes:
    count: number of samples so far.
    mean: their mean, (F,).
    scatter: sum of the outer products of their deviations from the mean, (F, F).

  Raises:
    ValueError: the machine has no memory for (F, F).
  """

  def __init__(self, num_features: int):
    check_memory(f"moments of {num_features} features", 4 * 8 * num_features**2, "use fewer features")
    self.count = 0
    self.mean = np.zeros(num_features)
    self.scatter = np.zeros((num_features, num_features))

  def update(self, features: ArrayLike | Rows) -> None:
    """Adds samples, (n, *axes) flattened to (n, F).

    Raises:
      ValueError: they have another number of features, or some that are not finite.
    """
    rows = features if isinstance(features, Rows) else Rows(features, "features")
    self._expect(rows.dim)
    for _, block in rows.blocks():
      x = block.astype(np.float64, copy=False)
      mean = x.mean(axis=0)
      self._add(len(x), mean, x - mean[None, :])

  def merge(self, other: MomentSums) -> None:
    """Adds the samples of other sums, of another process or shard."""
    self._expect(len(other.mean))
    if other.count:
      self._add(other.count, other.mean, np.empty((0, len(self.mean))))
      self.scatter += other.scatter

  def without(self, other: MomentSums) -> MomentSums:
    """Returns the sums of the samples that `other`, sums of a part of them, does not have."""
    self._expect(len(other.mean))
    left = MomentSums(len(self.mean))
    left.count = self.count - other.count
    if left.count < 1:
      raise ValueError(f"expected sums of a part of {self.count} samples, got those of {other.count}")
    left.mean = (self.count * self.mean - other.count * other.mean) / left.count
    apart = left.mean - other.mean
    left.scatter = self.scatter - other.scatter
    left.scatter -= left.count * other.count / self.count * np.outer(apart, apart)
    return left

  def moments(self) -> Moments:
    """Returns the moments so far.

    Raises:
      ValueError: there are fewer than 2 samples.
    """
    if self.count < 2:
      raise ValueError(f"features: expected at least 2 samples for a covariance, got {self.count}")
    return Moments(self.mean.copy(), (self.scatter + self.scatter.T) / (2 * (self.count - 1)), self.count)

  def _add(self, count: int, mean: Array, deviations: Array) -> None:
    """Adds `count` samples with this mean, whose `deviations` from it, (n, F), are yet to be summed."""
    total = self.count + count
    apart = mean - self.mean
    # What the two means are apart is like one more deviation: Chan et al. 1979, Eq. 1.5b.
    weight = np.sqrt(self.count * count / total)
    deviations = np.concatenate([deviations, (weight * apart)[None, :]])
    self.scatter += deviations.T @ deviations
    self.mean = self.mean + count / total * apart
    self.count = total

  def _expect(self, dim: int) -> None:
    if dim != len(self.mean):
      raise ValueError(f"features: expected {len(self.mean)} of a sample, as in those before, got {dim}")


def frechet_distance(a: ArrayLike | Moments, b: ArrayLike | Moments) -> float:
  """Squared Fréchet distance of the Gaussians fitted to two sets of features.

      |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)

  The root is taken of the symmetric S_b^½ S_a S_b^½ by eigendecomposition, so singular covariances
  (a constant pixel) are fine. S_b^½ is kept in `b`: of many sets that are compared with one reference, the reference
  is `b`.

  Both sets need `SAMPLES_PER_FEATURE` = 2 samples a feature, as far as their numbers are known. With
  N <= F a covariance is rank-deficient and the result measures N, not the samples; from there the
  upward bias falls as 1 / N, for two equal isotropic sets it is about (F + 5) / 4 · (1/N_a + 1/N_b)
  of the variance tr S: a quarter at N = 2 F, the most that can pass for a measurement, and 2 % at
  N = 25 F. Compare values of the same N only, and prefer N well above 10 F. A file of moments often does not say of how
  many samples they are, and those beside the 10,000 images of a published reference are of the whole training set: of
  `Moments` with the count None nothing is asked.

  Args:
    a: features (N, F) or their `Moments`.
    b: features (N, F) or their `Moments`.

  Returns:
    a float, >= 0, in squared units of the features (FID in the literature, for Inception features; sFID for those of
    Inception's spatial layer).

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
  counts = [moments.count for moments in (a, b) if moments.count is not None]
  if counts and min(counts) < SAMPLES_PER_FEATURE * dim:
    raise ValueError(
      f"expected at least {SAMPLES_PER_FEATURE * dim} samples for a Fréchet distance of {dim} "
      f"features, got {min(counts)} ({' and '.join(map(str, counts))}); draw more samples or use fewer features "
      "(such as a classifier's instead of pixels)"
    )
  cross = np.linalg.eigvalsh(b.root @ a.cov @ b.root)
  distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov)
  distance -= 2.0 * np.sum(np.sqrt(np.maximum(cross, 0.0)))
  return float(max(distance, 0.0))  # rounding can leave -1e-9 for equal sets
