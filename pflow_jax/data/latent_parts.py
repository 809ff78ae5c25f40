"""A shard of latents as it is written, and its description, by which it is known without reading it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pydantic

from pflow_jax.data.latents import LABEL, Info

Floats = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over latents, a number a channel, of which mean and standard deviation follow.

  Attributes:
    count: numbers that were added, of one channel.
    sums: of x0, or of the means of moments.
    squares: of these squared.
    variances: of moments: sums of the variances.
  """

  count: int = 0
  sums: Floats = ()
  squares: Floats = ()
  variances: Floats = ()

  def __add__(self, other: Totals) -> Totals:
    if not self.count:
      return other
    if not other.count:
      return self
    plus = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
    return Totals(
      self.count + other.count,
      plus(self.sums, other.sums),
      plus(self.squares, other.squares),
      plus(self.variances, other.variances),
    )

  @classmethod
  def of(cls, info: Info, values: np.ndarray) -> Totals:
    """Sums over stored values (n, views, parts, *space, C)."""
    wide, axes = values.astype(np.float64), tuple(range(values.ndim - 2))  # without the axis of parts
    first = wide[:, :, 0]
    sums, squares = first.sum(axes), np.square(first).sum(axes)
    variances = np.square(wide[:, :, 1]).sum(axes) if info.moments else np.zeros_like(sums)
    count = first.size // first.shape[-1]
    return cls(count, tuple(sums.tolist()), tuple(squares.tolist()), tuple(variances.tolist()))

  def measured(self, info: Info) -> tuple[Floats, Floats]:
    """Mean and standard deviation of x0, one a channel."""
    mean = np.array(self.sums) / self.count
    var = np.maximum(np.array(self.squares) / self.count - mean**2, 0) + np.array(self.variances) / self.count
    std = np.sqrt(var)
    if info.moments:
      mean, std = (mean - info.shift) * info.scale, std * np.abs(info.scale)
    return tuple(mean.tolist()), tuple(std.tolist())


@dataclasses.dataclass(frozen=True)
class Part:
  """A shard's file: what is known of it without reading it.

  Attributes:
    records: of the shard, which is no file if there are none.
    unreadable: rows of its pictures that could not be read, and why.
    contents: rows of some that could, and digests of their bytes.
    totals: over its records.
  """

  records: pydantic.NonNegativeInt
  unreadable: tuple[tuple[int, str], ...] = ()
  contents: tuple[tuple[int, str], ...] = ()
  totals: Totals = Totals()


class Shard:
  """A shard that is being written."""

  def __init__(self, info: Info, write: Any):
    self._info, self._write = info, write
    self._records, self._totals = 0, Totals()
    self._unreadable: list[tuple[int, str]] = []
    self._contents: list[tuple[int, str]] = []

  def add(self, values: np.ndarray, label: np.ndarray) -> None:
    """Writes records.

    Args:
      values: (n, views, parts, *space, C), float16.
      label: (n,) integers.

    Raises:
      ValueError: shapes or labels do not fit, or values are not finite.
    """
    info = self._info
    if values.shape[1:] != info.stored or label.shape != values.shape[:1]:
      raise ValueError(f"expected values (n, {info.stored}) and label (n,), got {values.shape} and {label.shape}.")
    check_values(values, label, info.num_classes)
    if len(values):
      self._totals += Totals.of(info, values)
    for one, number in zip(values, np.asarray(label, LABEL), strict=True):
      self._write(number.tobytes() + one.tobytes())
    self._records += len(values)

  def leave_out(self, row: int, reason: str) -> None:
    """Notes a picture that could not be read."""
    self._unreadable.append((row, reason))

  def note(self, row: int, content: str) -> None:
    """Notes the digest of a picture, by which another run knows it."""
    self._contents.append((row, content))

  @property
  def part(self) -> Part:
    """Its description."""
    return Part(self._records, tuple(self._unreadable), tuple(self._contents), self._totals)


def check_values(values: np.ndarray, label: np.ndarray, num_classes: int) -> None:
  """Raises ValueError for values that are not finite, and labels that are not in [0, num_classes)."""
  if label.dtype.kind not in "iu" or np.any((label < 0) | (label >= max(num_classes, 1))):
    got = f"{label.dtype}, {label.min()} to {label.max()}"
    raise ValueError(f"labels must lie in [0, {max(num_classes, 1)}), integers, got {got}.")
  if not np.isfinite(values).all():
    raise ValueError("x0 holds values that are not finite, or not in float16; scale or remove them.")
