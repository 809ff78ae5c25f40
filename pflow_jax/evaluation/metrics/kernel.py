"""Kernel distance of two sets of features, KID in the literature: unbiased at any number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.evaluation.metrics.rows import Array, Rows, Samples, same_features

_BLOCK = 2048  # rows whose kernels are held at once


class KernelDistance(NamedTuple):
  """Mean of the distances of subsets, and their standard deviation (of the subsets, not of the mean)."""

  mean: float
  deviation: float


def kernel_distance(
  real: Samples, fake: Samples, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
  """Squared maximum mean discrepancy (MMD²) of random subsets, in the kernel (x·y / F + 1)³.

  Unlike a Fréchet distance it has no bias, and may fall below 0. Subsets are drawn as torch-fidelity does, whose first
  input is the fakes and whose second the real data: the same seed gives the same subsets, and its number to rounding.

  Args:
    real: features (N, F), N >= subset_size.
    fake: features (M, F), M >= subset_size.
    num_subsets: subsets that are drawn.
    subset_size: samples of both sets in a subset, drawn without replacement.
    seed: of the subsets; 2020 is torch-fidelity's.

  Raises:
    ValueError: for different F or too few samples.

  References:
    Bińkowski et al., arXiv:1801.01401, Sec. 4.
  """
  real_rows, fake_rows = _pair(real, fake)
  fewest = min(len(real_rows), len(fake_rows))
  if not 2 <= subset_size <= fewest or num_subsets < 1:
    raise ValueError(
      f"num_subsets, subset_size: expected at least 1 subset of 2 to {fewest} samples, got {num_subsets} of "
      f"{subset_size}; draw more samples"
    )
  rng = np.random.RandomState(seed)  # NumPy's old generator, for the sake of torch-fidelity's subsets
  distances = []
  for _ in range(num_subsets):
    x = fake_rows.take(rng.choice(len(fake_rows), subset_size, replace=False))
    y = real_rows.take(rng.choice(len(real_rows), subset_size, replace=False))
    distances.append(_mmd(Rows(y, "real"), Rows(x, "fake")))
  return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def whole_kernel_distance(real: Samples, fake: Samples) -> float:
  """The distance of `kernel_distance` of all samples: the same expectation, the least variance, and (N + M)² products.

  Args:
    real: features (N, F), N >= 2.
    fake: features (M, F), M >= 2.

  Raises:
    ValueError: for different F or too few samples.
  """
  real_rows, fake_rows = _pair(real, fake)
  if min(len(real_rows), len(fake_rows)) < 2:
    raise ValueError(f"expected at least 2 samples of both sets, got {len(real_rows)} and {len(fake_rows)}")
  return _mmd(real_rows, fake_rows)


def _pair(real: Samples, fake: Samples) -> tuple[Rows, Rows]:
  real_rows, fake_rows = Rows(real, "real"), Rows(fake, "fake")
  same_features(real_rows, fake_rows, "fake")
  return real_rows, fake_rows


def _mmd(real: Rows, fake: Rows) -> float:
  """Unbiased MMD²: pairs of a sample with itself are left out."""
  cross = _total(real, fake) / (len(real) * len(fake))
  return _mean_of_others(real) + _mean_of_others(fake) - 2.0 * cross


def _mean_of_others(x: Rows) -> float:
  """Mean kernel of pairs of different rows."""
  own = sum(float(_kernel(_square_norms(block) / x.dim).sum()) for _, block in x.blocks())
  return (_total(x, x) - own) / (len(x) * (len(x) - 1))


def _total(x: Rows, y: Rows) -> float:
  """Sum of the kernels of all pairs of a row of x and a row of y."""
  total = 0.0
  for i, rows in _on_device(x):
    for j, columns in _on_device(y, i if x is y else 0):
      both = 2.0 if x is y and j > i else 1.0  # the kernel is symmetric
      total += both * float(np.asarray(_row_sums(rows, columns)).sum(dtype=np.float64))
  return total


def _on_device(x: Rows, start: int = 0) -> Iterator[tuple[int, Any]]:
  """Yields rows from `start` on in blocks of one shape, in float32: (first row, block)."""
  size = min(_BLOCK, 1 << (len(x) - 1).bit_length())
  for first, block in x.blocks(size, start):
    filled = np.zeros((size, x.dim), np.float32)
    filled[: len(block)] = block
    yield first, jax.device_put(filled)


@jax.jit
def _row_sums(rows: Any, columns: Any) -> Any:
  """Sums of the kernels of every row with all columns; rows of zeros add none."""
  product = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
  return _kernel(product / rows.shape[1]).sum(axis=1)


def _kernel(product: Any) -> Any:
  """(product + 1)³ - 1: a constant that all kernels lack cancels in MMD²."""
  return product * (3 + product * (3 + product))


def _square_norms(block: Array) -> Array:
  return np.einsum("ij,ij->i", block, block, dtype=np.float64)
