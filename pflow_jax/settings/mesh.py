"""The section `mesh` of a config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from pflow_jax.core.batches import AXES, axes_of


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """The section `mesh` of a config.

  Attributes:
    slice: size of the axis over pod slices; on TPUs 1 is as many as there are. One of the four sizes may be -1, the
      devices that the others leave.
    data: size of the axis that splits the batch.
    fsdp: size of the axis that splits batch and parameters.
    tensor: size of the axis that splits the work on one example.
    rules: rows (pattern, spec) that come before the network's own table, see `Layout`.
    min_size: parameters of fewer elements are kept whole on every device.
  """

  slice: int = 1
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: tuple[tuple[str, tuple[Any, ...]], ...] = ()
  min_size: int = 2**14

  def __post_init__(self):
    sizes = self.sizes
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
      raise ValueError(f"expected sizes of at least 1, one of them perhaps -1 for the rest, got {sizes}")
    if self.min_size < 0:
      raise ValueError(f"min_size: expected at least 0, got {self.min_size}")
    for row in self.rules:
      if not (isinstance(row, Sequence) and len(row) == 2 and isinstance(row[0], str) and _is_spec(row[1])):
        raise ValueError(
          f"rules: expected rows (pattern, spec), a spec a tuple with None, one of {AXES} or a tuple of them for each "
          f"of the last dimensions, got {row!r}"
        )
      check_pattern(row[0])

  @property
  def sizes(self) -> dict[str, int]:
    """Sizes of the axes by name."""
    return {axis: getattr(self, axis) for axis in AXES}

  @property
  def table(self) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The rules, with axes that share a dimension as a tuple; a config file's JSON has them as a list."""
    plain = lambda entry: entry if entry is None or isinstance(entry, str) else tuple(entry)
    return tuple((pattern, tuple(plain(entry) for entry in spec)) for pattern, spec in self.rules)


def check_pattern(pattern: str) -> None:
  """Raises ValueError unless `pattern` is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"pattern {pattern!r}: expected a regular expression, got: {error}") from error


def _is_spec(spec: Any) -> bool:
  return (
    isinstance(spec, Sequence)
    and not isinstance(spec, str)
    and all(entry is None or isinstance(entry, (str, Sequence)) for entry in spec)
    and all(axis in AXES for entry in spec for axis in axes_of(entry))
  )
