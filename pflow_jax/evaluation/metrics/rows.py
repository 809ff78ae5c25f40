"""Features as rows that are checked and read in blocks, wherever they lie."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray

BLOCK = 4096  # rows that are read at once: 67 MB of 2048 features in float64


def flat(x: ArrayLike, name: str) -> Array:
  """Returns samples (N, *axes), which must be finite, as float64 (N, D), and (N,) as (N, 1)."""
  x = np.asarray(x, np.float64)
  if x.ndim == 0 or x.size == 0:
    raise ValueError(f"{name}: expected a non-empty array (N, ...), got shape {x.shape}")
  x = x.reshape(len(x), -1)
  _check_finite(x, f"of {len(x)} samples", name)
  return x


class Rows:
  """Samples (N, *axes) as N rows of D numbers, float64 where they are of 64 bits and float32 elsewhere.

  They are an array, in memory or in a file (np.memmap), or anything with a shape that is sliced by rows.

  Args:
    x: the samples.
    name: of the samples, in errors.

  Attributes:
    dim: numbers in a row.

  Raises:
    ValueError: there is no number in them, or a block that is read has some that are not finite.
  """

  def __init__(self, x: Any, name: str):
    x = x if hasattr(x, "shape") else np.asarray(x)
    shape = tuple(x.shape)
    if not shape or 0 in shape:
      raise ValueError(f"{name}: expected a non-empty array (N, ...), got shape {shape}")
    self._x, self._name, self._count = x, name, shape[0]
    self.dim = int(np.prod(shape[1:]))

  def __len__(self) -> int:
    return self._count

  def block(self, start: int, end: int) -> Array:
    """Returns rows [start, end); (n, D)."""
    x = self._numbers(self._x[start:end])
    _check_finite(x, f"of samples {start} to {start + len(x) - 1}", self._name)
    return x

  def blocks(self, size: int = BLOCK, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Array]]:
    """Yields rows [start, end) in their order, by default all, `size` at a time: (first row, rows)."""
    end = self._count if end is None else end
    for first in range(start, end, size):
      yield first, self.block(first, min(first + size, end))

  def take(self, rows: Array) -> Array:
    """Returns the rows (n,) of these numbers, in any order; (n, D)."""
    if isinstance(self._x, np.ndarray):
      return self._numbers(self._x[rows])
    # What is not an array of NumPy may take no list of rows.
    return np.concatenate([self._numbers(self._x[row : row + 1]) for row in rows.tolist()])

  def _numbers(self, x: Any) -> Array:
    x = np.asarray(x)
    if x.dtype.kind in "cSUOMmV" and x.dtype.name != "bfloat16":  # NumPy calls the kind of bfloat16 V
      raise ValueError(f"{self._name}: expected real numbers, got {x.dtype}")
    dtype = np.float64 if x.dtype.itemsize == 8 else np.float32
    return x.reshape(len(x), self.dim).astype(dtype, copy=False)


class Joined:
  """Features of several parts, such as files of shards that are mapped, as one set of rows; nothing is copied.

  All metrics of features take it.

  Args:
    parts: arrays (n, *axes), in their order.

  Attributes:
    shape: (N, *axes).

  Raises:
    ValueError: there is none, or their axes differ.
  """

  def __init__(self, parts: Sequence[Any]):
    axes = {tuple(part.shape[1:]) for part in parts}
    if len(axes) != 1:
      raise ValueError(f"expected parts (n, *axes) of the same axes, got {sorted(axes) or 'none'}")
    self._parts = parts
    self._starts = np.cumsum([0, *(part.shape[0] for part in parts)]).tolist()
    self.shape = (self._starts[-1], *axes.pop())

  def __getitem__(self, rows: slice) -> Array:
    start, end, step = rows.indices(self.shape[0])
    if step != 1:
      raise ValueError(f"expected rows one after another, got every {step}")
    pieces: list[Array] = []
    # The last part that begins there or before.
    i = bisect.bisect_right(self._starts, start, hi=len(self._parts)) - 1
    while i < len(self._parts) and (not pieces or self._starts[i] < end):
      first = self._starts[i]
      pieces.append(np.asarray(self._parts[i][max(start - first, 0) : max(end - first, 0)]))
      i += 1
    return np.concatenate(pieces)


Samples = ArrayLike | Joined
"""Rows for metrics of features: an array, in memory or in a file, or parts of one."""


def same_features(a: Rows, b: Rows, name: str) -> None:
  """Raises ValueError, about `name`, unless rows of `b` are as long as those of `a`."""
  if a.dim != b.dim:
    raise ValueError(f"{name}: expected {a.dim} features as in the other set, got {b.dim}")


def _check_finite(x: Array, which: str, name: str) -> None:
  bad = int(np.sum(~np.isfinite(x).all(axis=1)))
  if bad:
    raise ValueError(
      f"{name}: {bad} {which} are not finite; a sampler that diverged has no score: "
      "check its parameters, or drop those samples and report how many"
    )
