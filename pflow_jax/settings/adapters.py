"""The section `adapters` of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Row of a table: an adapter for every Dense layer whose path, such as "blocks/mlp_in", matches.

  Attributes:
    pattern: regular expression for the whole "/"-joined path.
    rank: columns of A and rows of B.
    alpha: the update A B is scaled by alpha / rank; None means rank, a scale of 1.
    dropout: share of the adapter's inputs that training drops.
  """

  pattern: str
  rank: int
  alpha: float | None = None
  dropout: float = 0.0

  def __post_init__(self) -> None:
    if self.rank < 1:
      raise ValueError(f"adapter {self.pattern!r}: expected rank >= 1, got {self.rank}")
    if self.alpha is not None and self.alpha <= 0:
      raise ValueError(f"adapter {self.pattern!r}: expected alpha > 0, or None for the rank, got {self.alpha}")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"adapter {self.pattern!r}: expected dropout in [0, 1), got {self.dropout}")

  @property
  def scale(self) -> float:
    """Factor on A B."""
    return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
  """The section `adapters` of a config: low-rank adapters on a frozen teacher; without rows everything trains.

  Attributes:
    table: rows (pattern, rank, alpha, dropout) or shorter, see `networks.lora.Adapter`.
    train: patterns of the teacher's parameters that train in full beside the adapters and the output layers ("head"),
      which always do.
  """

  table: tuple[tuple[Any, ...], ...] = ()
  train: tuple[str, ...] = ("final_norm/.*",)

  def __post_init__(self):
    if not all(isinstance(row, Sequence) and not isinstance(row, str) and 2 <= len(row) <= 4 for row in self.table):
      raise ValueError(
        f"table: expected rows (pattern, rank, alpha, dropout), the last two optional, got {self.table!r}; quote "
        "patterns within quotes on the shell"
      )

  @property
  def rows(self) -> tuple[Adapter, ...]:
    """Rows of the table as `Adapter`."""
    return tuple(Adapter(*row) for row in self.table)
