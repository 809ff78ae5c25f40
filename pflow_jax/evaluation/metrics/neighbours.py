"""Precision, recall, density and coverage: nearest neighbours, in blocks on the accelerator.

Squared distances are products of matrices in float32, of features whose mean is moved to 0, and each comes with a bound
of its error that holds whatever the order of summation. What the bound leaves open, a few pairs in 100,000, is settled
on the host in float64: results are those of float64 throughout. No more than two blocks of rows and the distances
between them are in memory at once, so features may be an np.memmap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.evaluation.metrics.rows import BLOCK, Array, Rows, Samples, same_features

_SPARE = 8  # neighbours beyond the k-th that are looked at in float64 with it
_PAIRS = 2048  # whose differences are held at once
_UNIT = 2.0**-24  # of rounding in float32
_LARGEST = 1e18  # of a row's norm; the squares of larger ones overflow float32


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1]: of the fakes that look real, and of the real data that the fakes cover."""

  precision: float
  recall: float


class PRDC(NamedTuple):
  """Precision, recall, density and coverage of a set of fakes.

  Attributes:
    precision: share of the fakes inside the ball of a real sample.
    recall: share of the real samples inside the ball of a fake.
    density: real balls that a fake is inside, over k; 1 on average for fakes like the real ones, it has no upper limit.
    coverage: share of the real balls that hold a fake.
  """

  precision: float
  recall: float
  density: float
  coverage: float


def precision_recall(real: Samples, fake: Samples, k: int = 5) -> PrecisionRecall:
  """Improved precision and recall: shares of one set inside the other's k-nearest-neighbour balls.

  Arguments, errors and sources are those of `prdc`.
  """
  return PrecisionRecall(*prdc(real, fake, k)[:2])


def prdc(real: Samples, fake: Samples, k: int = 5) -> PRDC:
  """Precision, recall, density and coverage from the balls around samples to their k-th nearest neighbours.

  Balls are closed: what lies on the border is inside. Two draws of one distribution score below 1 in precision, recall
  and coverage, and these rise with the number of samples: compare values of the same sizes and the same k only. ADM's
  protocol has k = 3 and 10,000 real samples. Its own program computes distances in half precision, where more lies on
  borders: of 3,000 samples of 2048 features with 24 degrees of freedom it had .937 and .374, not .933 and .358. Naeem
  et al. take k = 5 and as many real samples as fakes.

  Args:
    real: features (N, F), N > k.
    fake: features (M, F), M > k.
    k: a ball reaches to the k-th neighbour in its own set.

  Raises:
    ValueError: for different F or too few samples.

  References:
    Kynkäänniemi et al., arXiv:1904.06991, Eqs. 1 and 2 (precision, recall).
    Naeem et al., arXiv:2002.09797, Eqs. 4 and 5 (density, coverage).
  """
  real_rows, fake_rows = Rows(real, "real"), Rows(fake, "fake")
  same_features(real_rows, fake_rows, "fake")
  fewest = min(len(real_rows), len(fake_rows))
  if not 1 <= k < fewest:
    raise ValueError(f"k: expected 1 <= k < {fewest} (the smaller set), got {k}; lower k or draw more samples")
  reals = _Set(real_rows, _mean(real_rows), "real")
  real_radii = _squared_radii(reals, k)
  # Around its own mean, so that distances within a set of one mode, far from the real one, are not small beside norms.
  fake_radii = _squared_radii(_Set(fake_rows, _mean(fake_rows), "fake"), k)
  fakes = _Set(fake_rows, reals.centre, "fake")

  balls = np.zeros(len(fakes), np.int64)  # of real samples, that a fake is inside
  recalled, covered = np.zeros(len(reals), bool), np.zeros(len(reals), bool)
  for i, rows in fakes.blocks():
    row_limits = _padded(fake_radii, i, fakes.block)
    for j, columns in reals.blocks():
      column_limits = _padded(real_radii, j, reals.block)
      held, holds, inside, open_pairs, is_open = _compare(rows, columns, row_limits, column_limits, fakes.error)
      balls[i : i + fakes.block] += np.asarray(held)[: len(balls) - i]
      covered[j : j + reals.block] |= np.asarray(holds)[: len(covered) - j]
      recalled[j : j + reals.block] |= np.asarray(inside)[: len(recalled) - j]
      if is_open:
        fake_at, real_at = _pairs(open_pairs, i, j)
        distance = _squared_distances(fakes, fake_at, reals, real_at)
        within = distance <= real_radii[real_at]
        np.add.at(balls, fake_at[within], 1)
        covered[real_at[within]] = True
        recalled[real_at[distance <= fake_radii[fake_at]]] = True
  shares = (np.mean(balls > 0), np.mean(recalled), np.mean(balls) / k, np.mean(covered))
  return PRDC(*map(float, shares))


class _Block(NamedTuple):
  """Rows on the device: centred (B, F), squared norms (B,), the first row's number, and how many of B there are."""

  x: Any
  norms: Any
  first: Any
  count: Any


class _Set:
  """A set of rows as blocks of one shape around a centre.

  Args:
    rows: of the set.
    centre: (F,) float32, subtracted from every row.
    name: of the set, in errors.

  Attributes:
    rows: of the set.
    centre: see above.
    block: rows of a block, the last of which is filled up with zeros.
    error: bound of the error of a squared distance, in units of the sum of both rows' squared norms.
  """

  def __init__(self, rows: Rows, centre: Array, name: str):
    self.rows, self.centre = rows, centre
    self.block = min(BLOCK, max(8, 1 << (len(rows) - 1).bit_length()))
    # A sum of F products in float32 is off by F u |a| |b| at most in any order (Higham 2002, Eq. 3.5; u = _UNIT), and
    # twice that by F u (|a|² + |b|²). Rows, norms, limits and the sums are rounded: less than 16 u. It is doubled for a
    # TPU, which makes a product in float32 of six in bfloat16.
    self.error = np.float32(2 * (rows.dim + 16) * _UNIT)
    largest = 0.0
    for _, block in self._centred():
      largest = max(largest, float(np.abs(block).max()) * rows.dim**0.5)
    if largest > _LARGEST:
      raise ValueError(f"{name}: expected features whose squares float32 holds, got some of {largest:.1g}; scale them")

  def __len__(self) -> int:
    return len(self.rows)

  def blocks(self) -> Iterator[tuple[int, _Block]]:
    """Yields all rows in blocks on the device: (first row, block)."""
    for start, x in self._centred():
      yield start, self._on_device(start, x)

  def chosen(self, rows: Array) -> _Block:
    """Returns a block of some rows (n,), n <= `block`, on the device."""
    return self._on_device(0, self.rows.take(rows) - self.centre[None, :])

  def _centred(self) -> Iterator[tuple[int, Array]]:
    for start, x in self.rows.blocks(self.block):
      # One rounding of the difference: the centre is a number of float32 itself.
      yield start, x - self.centre[None, :]

  def _on_device(self, first: int, x: Array) -> _Block:
    values = np.zeros((self.block, self.rows.dim), np.float32)
    values[: len(x)] = x
    norms = np.einsum("ij,ij->i", values, values, dtype=np.float64).astype(np.float32)
    return _Block(*jax.device_put((values, norms, np.int32(first), np.int32(len(x)))))


def _mean(rows: Rows) -> Array:
  """The mean row, rounded to float32, (F,); any point near the rows does."""
  total = sum(block.sum(axis=0, dtype=np.float64) for _, block in rows.blocks())
  return np.asarray(total / len(rows)).astype(np.float32)


def _squared_radii(of: _Set, k: int) -> Array:
  """Squared distance of every row to its k-th nearest other row; (N,), float64."""
  count = len(of)
  kept = min(k + _SPARE, count - 1)
  radii = np.empty(count)
  again = []
  for i, rows in of.blocks():
    lows = jnp.full((of.block, kept), jnp.inf, jnp.float32)
    nearest = jnp.zeros((of.block, kept), jnp.int32)
    for _, columns in of.blocks():
      lows, nearest = _nearer(lows, nearest, rows, columns, of.error)
    size = min(of.block, count - i)
    at = np.arange(i, i + size).repeat(kept)
    distance = _squared_distances(of, at, of, np.asarray(nearest)[:size].ravel()).reshape(size, kept)
    distance.partition(k - 1, axis=1)
    radii[i : i + size] = distance[:, k - 1]
    if kept < count - 1:
      # No row that was left out is nearer than the last low bound, nor than 0.
      left_out = np.maximum(np.asarray(lows)[:size, -1].astype(np.float64), 0.0)
      again += (i + np.flatnonzero(radii[i : i + size] > left_out)).tolist()
  for start in range(0, len(again), of.block):
    which = np.array(again[start : start + of.block])
    radii[which] = _radii_of(of, which, radii[which], k)
  return radii


def _radii_of(of: _Set, which: Array, at_most: Array, k: int) -> Array:
  """The squared radii of some rows (n,), n <= block, in float64 from all rows that may be as near as `at_most` (n,)."""
  rows = of.chosen(which)
  limits = _padded(at_most, 0, of.block)
  nearest = np.full((len(which), k), np.inf)
  for j, columns in of.blocks():
    row_at, column_at = _pairs(_possible(rows, columns, limits, of.error), 0, j)
    keep = which[row_at] != column_at
    row_at, column_at = row_at[keep], column_at[keep]
    distance = _squared_distances(of, which[row_at], of, column_at)
    for row, end in zip(*np.unique(row_at, return_counts=True), strict=True):
      candidates, distance = np.concatenate([nearest[row], distance[:end]]), distance[end:]
      nearest[row] = np.partition(candidates, k - 1)[:k]
  return nearest.max(axis=1)


@jax.jit
def _nearer(lows: Any, nearest: Any, rows: _Block, columns: _Block, error: Any) -> tuple[Any, Any]:
  """Low bounds (B, kept) of the distances to the nearest other rows, and which they are, with more columns seen."""
  squared, bound = _squared(rows, columns, error)
  row_at, column_at = _numbers(rows)[:, None], _numbers(columns)[None, :]
  is_other = _is_there(rows, columns) & (row_at != column_at)
  low = jnp.where(is_other, squared - bound, jnp.inf)
  column_at = jnp.broadcast_to(column_at, low.shape)
  low, column_at = jnp.concatenate([lows, low], axis=1), jnp.concatenate([nearest, column_at], axis=1)
  negative, place = jax.lax.top_k(-low, lows.shape[1])
  return -negative, jnp.take_along_axis(column_at, place, axis=1)


@jax.jit
def _possible(rows: _Block, columns: _Block, row_limits: Any, error: Any) -> Any:
  """Pairs that may be as near as the row's limit, as bits."""
  squared, bound = _squared(rows, columns, error)
  return _bits(_is_there(rows, columns) & (squared - bound <= row_limits[:, None]))


@jax.jit
def _compare(rows: _Block, columns: _Block, row_limits: Any, column_limits: Any, error: Any) -> tuple[Any, ...]:
  """Compares the distances of two blocks with the limits of the balls around rows and columns.

  Returns:
    The number of columns' balls that a row is inside, for every row.
    Whether a column's ball holds a row, for every column.
    Whether a column is inside a row's ball, for every column.
    The pairs that are in none of these, because a limit is too near, as bits.
    Whether there is such a pair.
  """
  squared, bound = _squared(rows, columns, error)
  row_limits, column_limits = row_limits[:, None], column_limits[None, :]
  is_there = _is_there(rows, columns)
  is_open = (jnp.abs(squared - row_limits) <= bound) | (jnp.abs(squared - column_limits) <= bound)
  settled = is_there & ~is_open
  held, inside = settled & (squared <= column_limits), settled & (squared <= row_limits)
  is_open &= is_there
  return held.sum(axis=1, dtype=jnp.int32), held.any(axis=0), inside.any(axis=0), _bits(is_open), is_open.any()


def _squared(rows: _Block, columns: _Block, error: Any) -> tuple[Any, Any]:
  """Squared distances of two blocks, (B, B'), and bounds of their errors."""
  products = jnp.matmul(rows.x, columns.x.T, precision=jax.lax.Precision.HIGHEST)
  norms = rows.norms[:, None] + columns.norms[None, :]
  return norms - 2 * products, error * norms


def _numbers(block: _Block) -> Any:
  return block.first + jnp.arange(block.x.shape[0], dtype=jnp.int32)


def _is_there(rows: _Block, columns: _Block) -> Any:
  """Returns the pairs, (B, B') of bool, of which neither row is what fills a block up."""
  row, column = (jnp.arange(block.x.shape[0], dtype=jnp.int32) < block.count for block in (rows, columns))
  return row[:, None] & column[None, :]


def _bits(pairs: Any) -> Any:
  """Packs (B, B') of bool in bytes, an eighth of what has to come to the host."""
  return jnp.packbits(pairs, axis=1)


def _pairs(bits: Any, first_row: int, first_column: int) -> tuple[Array, Array]:
  """The numbers of the rows and of the columns of the pairs in `bits`, in the order of the rows."""
  row, column = np.nonzero(np.unpackbits(np.asarray(bits), axis=1))
  return row + first_row, column + first_column


def _squared_distances(a: _Set, a_at: Array, b: _Set, b_at: Array) -> Array:
  """Squared distances of rows of `a` to rows of `b`, pair by pair, in float64; (n,)."""
  distance = np.empty(len(a_at))
  for start in range(0, len(a_at), _PAIRS):
    part = slice(start, start + _PAIRS)
    apart = np.subtract(a.rows.take(a_at[part]), b.rows.take(b_at[part]), dtype=np.float64)
    distance[part] = np.square(apart, out=apart).sum(axis=1)
  return distance


def _padded(limits: Array, start: int, size: int) -> Array:
  """`size` limits from `start` on, as float32, with zeros after the last."""
  part = limits[start : start + size].astype(np.float32)
  return np.pad(part, (0, size - len(part)))
