"""Distances within a set of samples and to its reference, and the accuracy of their classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from pflow_jax.evaluation.metrics.rows import Array, flat

_BLOCK = 512  # rows of a distance matrix held at once


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
  difference = flat(samples, "samples") - flat(reference, "reference")
  return np.sqrt(np.mean(difference**2, axis=1))


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
  samples, labels = flat(samples, "samples"), np.asarray(labels)
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


def _distances(a: Array, b: Array) -> Iterator[tuple[int, Array]]:
  """Euclidean distances of a (N, D) to b (M, D) in blocks: (first row, (rows, M))."""
  for start in range(0, len(a), _BLOCK):
    yield start, cdist(a[start : start + _BLOCK], b)
