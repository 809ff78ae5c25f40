"""Kinds of records, each able to give an endless grain data set of batches; `buckets` has a fourth.

The order of a run is one endless stream: epoch 0's shuffle of all records, then epoch 1's, and so
on. Global batch i is the stretch [i * B, (i + 1) * B) of the stream, so a batch may end one epoch
and begin the next, every record comes once an epoch, and B may be larger than the set. A process
reads those rows of each global batch that its devices hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import grain
import numpy as np
from grain.experimental import index_shuffle

from pflow_jax.data.pixels import to_unit

Record = dict[str, np.ndarray]
Batch = dict[str, Any]  # "x0", if there is any, and "cond": labels (n,) int32, or a dict of arrays (n, ...)

# Batches in an "endless" data set: more than any run takes, and their positions fit int64.
ENDLESS = 2**40
# Keys `examples` away from the shuffles of epochs (and the points of batches) below it.
_EXAMPLES_KEY = 2**63


class Records(Protocol):
  """Interface of records, as `batches` and `examples` use it."""

  @property
  def num_records(self) -> int | None:
    """Records in an epoch, or None if they are generated without end."""

  @property
  def read_threads(self) -> int:
    """Threads that read best by default; 0 reads in the caller."""

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    """Endless grain data set whose element i is the `rows` (n,) of global batch i."""

  def sample(self, n: int, seed: int) -> Batch:
    """`n` records without replacement."""


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
  """Records in memory: x0 (n, *space, C) uint8 in [0, 255] or float32; label (n,) int32.

  With `embeddings`, arrays (n, ...) by name, those are the condition in place of the label. A grain
  element is a whole batch: grain costs tens of microseconds an element, many times the price of
  indexing an array.
  """

  x0: np.ndarray = dataclasses.field(repr=False)
  label: np.ndarray = dataclasses.field(repr=False)
  embeddings: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
  read_threads: int = 0

  @property
  def num_records(self) -> int:
    return len(self.x0)

  def take(self, rows: np.ndarray) -> Batch:
    """Returns the batch of these rows."""
    x0 = self.x0[rows]
    cond = {name: values[rows] for name, values in self.embeddings.items()} or self.label[rows]
    return {"x0": to_unit(x0) if x0.dtype == np.uint8 else x0, "cond": cond}

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    def batch(i: int) -> Batch:
      return self.take(stream_rows(len(self.x0), seed, i * batch_size + rows))

    return grain.MapDataset.range(ENDLESS).map(batch)

  def sample(self, n: int, seed: int) -> Batch:
    return self.take(sample_rows(len(self.x0), n, seed))


@dataclasses.dataclass(frozen=True)
class GeneratedRecords:
  """Records made on demand: `generate(n, rng)` gives x0 (n, *space, C) float32; no classes."""

  generate: Callable[[int, np.random.Generator], np.ndarray]
  read_threads: int = 0

  @property
  def num_records(self) -> None:
    return None

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    def batch(i: int) -> Batch:
      # Every process makes the global batch and keeps its part, so that all agree with one process.
      return self._make(batch_size, seed, i, rows)

    return grain.MapDataset.range(ENDLESS).map(batch)

  def sample(self, n: int, seed: int) -> Batch:
    return self._make(n, seed, _EXAMPLES_KEY, np.arange(n))

  def _make(self, n: int, seed: int, key: int, part: np.ndarray) -> Batch:
    words = np.array([seed, key], np.uint64)
    x0 = self.generate(n, np.random.Generator(np.random.Philox(key=words)))[part]
    return {"x0": x0, "cond": np.zeros(len(x0), np.int32)}


@dataclasses.dataclass(frozen=True)
class AugmentedRecords:
  """Records that are changed at random each time they are read, see `data.dataset.augment`."""

  records: Records
  change: Callable[[np.ndarray, np.random.Generator], np.ndarray]

  @property
  def num_records(self) -> int | None:
    return self.records.num_records

  @property
  def read_threads(self) -> int:
    return self.records.read_threads

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    def changed(i: int, batch: Batch) -> Batch:
      return self._changed(batch, seed, [i * batch_size + int(row) for row in rows])

    return self.records.batches(batch_size, seed, rows).map_with_index(changed)

  def sample(self, n: int, seed: int) -> Batch:
    return self._changed(self.records.sample(n, seed), seed, [_EXAMPLES_KEY + i for i in range(n)])

  def _changed(self, batch: Batch, seed: int, positions: list[int]) -> Batch:
    # An example's numbers depend on its place in the stream alone, so every process draws those of its own rows.
    generators = [np.random.default_rng([seed, position]) for position in positions]
    x0 = [np.asarray(self.change(*pair), np.float32) for pair in zip(batch["x0"], generators, strict=True)]
    if shapes := {x.shape for x in x0} - {x0[0].shape}:
      raise ValueError(f"augment: change must give one shape, got {x0[0].shape} and {shapes.pop()}.")
    return {**batch, "x0": np.stack(x0)}


class Draws(NamedTuple):
  """Random numbers of examples: those of one depend on the seed and its place in the run alone.

  Attributes:
    seed: of the run.
    positions: places of the examples in the stream, (n,) uint64.
  """

  seed: int
  positions: np.ndarray

  def streams(self) -> Iterator[np.random.Philox]:
    """Yields random bits for each example: always the same object, at the beginning of another stream."""
    # A new object takes 15 microseconds, another key one.
    bits = np.random.Philox(key=np.array([self.seed, 0], np.uint64))
    state = bits.state
    for position in self.positions:
      state["state"]["key"][1] = position
      bits.state = state
      yield bits


class RecordSource(Protocol):
  """Random access to records {"x0": (*space, C) float32, "label": () int32}."""

  def __len__(self) -> int: ...

  def __getitem__(self, row: SupportsIndex) -> Record: ...


@runtime_checkable
class BatchSource(RecordSource, Protocol):
  """A `RecordSource` that reads many records together, and may draw what is random in them."""

  def batch(self, rows: np.ndarray, draws: Draws | None = None) -> Batch:
    """Returns the batch of these rows; without `draws` as they are when nothing is random."""


@dataclasses.dataclass(frozen=True)
class SourceRecords:
  """Records read from a `RecordSource`: files, array_record, parquet."""

  source: RecordSource
  read_threads: int = 2

  @property
  def num_records(self) -> int:
    return len(self.source)

  def take(self, rows: np.ndarray, draws: Draws | None = None) -> Batch:
    """Returns the batch of these rows; without `draws` as they are when nothing is random."""
    if isinstance(self.source, BatchSource):
      return self.source.batch(rows, draws)
    records = [self.source[int(row)] for row in rows]
    return {"x0": np.stack([r["x0"] for r in records]), "cond": np.stack([r["label"] for r in records])}

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    count = len(self.source)

    def batch(i: int) -> Batch:
      positions = i * batch_size + rows
      return self.take(_grain_rows(count, seed, positions), Draws(seed, positions.astype(np.uint64)))

    return grain.MapDataset.range(ENDLESS).map(batch)

  def sample(self, n: int, seed: int) -> Batch:
    positions = np.uint64(_EXAMPLES_KEY) + np.arange(n, dtype=np.uint64)
    return self.take(sample_rows(len(self.source), n, seed), Draws(seed, positions))


def stream_rows(n: int, seed: int, positions: np.ndarray) -> np.ndarray:
  """Records, int64 (count,), at ascending `positions` (count,) of the stream of shuffled epochs of `n` records."""
  epochs, offsets = np.divmod(positions, n)
  parts = [_permutation(n, seed, int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
  return np.concatenate(parts)


def _grain_rows(n: int, seed: int, positions: np.ndarray) -> np.ndarray:
  """Records, int64 (count,), at `positions` (count,) of `grain.MapDataset.range(n).seed(seed).shuffle().repeat()`.

  The order of `n` records is not kept in memory. The function behind that data set takes a third of its time, which
  all threads that read share.
  """
  own = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])  # of an operation that follows `seed` at once
  epochs, offsets = np.divmod(positions, n)
  pairs = zip(offsets.tolist(), ((own + epochs) % 2**32).tolist(), strict=True)
  return np.array([index_shuffle(row, max_index=n - 1, seed=key, rounds=4) for row, key in pairs], np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
  rows = np.random.default_rng([seed, epoch]).permutation(n)
  rows.flags.writeable = False  # shared by every caller of this cache
  return rows


def sample_rows(count: int, n: int, seed: int) -> np.ndarray:
  """Draws `n` of `count` rows without replacement, int64.

  Raises:
    ValueError: there are fewer.
  """
  if n > count:
    raise ValueError(
      f"asked for {n} examples without replacement of a set of {count} records; ask for {count} or fewer."
    )
  return np.random.default_rng([seed, _EXAMPLES_KEY]).choice(count, n, replace=False)
