"""Prompts of many lengths in batches of one length each.

A record belongs to the shortest bucket that its text fits into, or to the longest one, which cuts it. Each bucket has
an endless stream of its own, epoch after epoch, as in `records`; records that do not fill a batch at the end of an
epoch begin the bucket's next batch, so none is lost and none is padded further than its bucket. After e epochs a bucket
of n records has given floor(e n / B) batches of B; an epoch's batches of all buckets come in a shuffled order. So batch
i is found without the ones before it, and all processes agree on its bucket. A bucket of fewer records than a batch
repeats them within one, every B / n epochs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, SupportsIndex

import grain
import numpy as np

from pflow_jax.data.records import ENDLESS, Batch, Record, sample_rows


class TextSource(Protocol):
  """Random access to records {"text": (l, D), "pooled": (P,), "x0": (*space, C)}, or some of these."""

  def __len__(self) -> int: ...

  def __getitem__(self, row: SupportsIndex) -> Record: ...

  @property
  def text_lengths(self) -> np.ndarray:
    """l of every record, (n,) integers, known without reading them."""


@dataclasses.dataclass(frozen=True)
class BucketRecords:
  """Records with texts of different lengths.

  Attributes:
    source: reads the records.
    buckets: lengths, ascending, or empty for records without text.
    masked: whether batches have a mask.
    read_threads: threads that read by default.
  """

  source: TextSource
  buckets: tuple[int, ...]
  masked: bool
  read_threads: int = 4  # a batch of long texts is large, and two a thread are read ahead

  @property
  def num_records(self) -> int:
    return len(self.source)

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    members = self._members()
    schedule = Schedule(tuple(map(len, members)), batch_size, seed)
    # With one seed for all, buckets of one size would be shuffled alike.
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(len(members))]
    streams = {
      bucket: grain.MapDataset.range(len(members[bucket])).seed(seeds[bucket]).shuffle().repeat()
      for bucket in range(len(members))
      if len(members[bucket])
    }

    def batch(i: int) -> Batch:
      bucket, number = schedule(i)
      places = [streams[bucket][int(position)] for position in number * batch_size + rows]
      records = [self.source[int(row)] for row in members[bucket][places]]
      return stacked(records, self.buckets[bucket] if self.buckets else None, self.masked)

    return grain.MapDataset.range(ENDLESS).map(batch)

  def sample(self, n: int, seed: int) -> Batch:
    records = [self.source[int(row)] for row in sample_rows(len(self.source), n, seed)]
    return stacked(records, self.buckets[-1] if self.buckets else None, self.masked)

  def _members(self) -> list[np.ndarray]:
    """Rows of every bucket; of one bucket where there are no texts."""
    lengths = self.source.text_lengths
    bucket = np.minimum(np.searchsorted(self.buckets, lengths), max(len(self.buckets) - 1, 0))
    return [np.flatnonzero(bucket == number) for number in range(max(len(self.buckets), 1))]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The bucket of batch i, and the batch's number in it: `schedule(i)` -> (bucket, number).

  Attributes:
    counts: records of every bucket.
    batch_size: global batch size.
    seed: of the order of an epoch's batches.
  """

  counts: tuple[int, ...]
  batch_size: int
  seed: int

  def __call__(self, i: int) -> tuple[int, int]:
    # Rounded down in every bucket, so that there are at most as many batches as the records of all would fill.
    epoch = i * self.batch_size // sum(self.counts)
    while sum(self.before(epoch + 1)) <= i:
      epoch += 1
    buckets, numbers = _order(self, epoch)
    place = i - sum(self.before(epoch))
    return int(buckets[place]), int(numbers[place])

  def before(self, epoch: int) -> list[int]:
    """Batches of every bucket before `epoch`."""
    return [epoch * count // self.batch_size for count in self.counts]


@functools.lru_cache(maxsize=4)
def _order(schedule: Schedule, epoch: int) -> tuple[np.ndarray, np.ndarray]:
  """Buckets of the batches of an epoch in their order, and their numbers within their buckets."""
  first, last = schedule.before(epoch), schedule.before(epoch + 1)
  buckets = np.repeat(np.arange(len(first)), np.subtract(last, first))
  numbers = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
  # Within a bucket the numbers are sorted again: its batches come in the order of its stream.
  buckets = np.random.default_rng([schedule.seed, epoch]).permutation(buckets)
  result = np.empty_like(numbers)
  result[np.argsort(buckets, kind="stable")] = numbers
  return buckets, result


def stacked(records: list[Record], length: int | None, masked: bool) -> Batch:
  """A batch of records, their texts padded with zeros or cut to `length`."""
  cond: dict[str, Any] = {}
  if length is not None:
    texts = [record["text"][:length] for record in records]
    cond["text"] = np.zeros((len(records), length, texts[0].shape[-1]), texts[0].dtype)
    for row, text in zip(cond["text"], texts, strict=True):
      row[: len(text)] = text
    if masked:
      cond["mask"] = np.arange(length) < np.array([[len(text)] for text in texts])
  if "pooled" in records[0]:
    cond["pooled"] = np.stack([record["pooled"] for record in records])
  batch: Batch = {"cond": cond}
  if "x0" in records[0]:
    batch["x0"] = np.stack([record["x0"] for record in records])
  return batch
