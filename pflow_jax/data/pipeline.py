"""Batches for training and examples for evaluation, from any data set."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from pflow_jax.data.dataset import Dataset
from pflow_jax.data.records import ENDLESS
from pflow_jax.files.foreign import check_memory, shown

MAX_READERS = 128  # threads, or processes


def batches(
  dataset: Dataset,
  batch_size: int,
  *,
  seed: int,
  start: int = 0,
  rows: np.ndarray | None = None,
  num_threads: int | None = None,
  num_workers: int = 0,
) -> grain.DatasetIterator:
  """Endless shuffled batches {"x0": (b, *space, C) float32, "cond": (b,) int32 labels}.

  Of a set of prompts, "cond" is a dict of arrays (b, ...), see `data.dataset.Embedding`, and there is no "x0" if the
  set holds prompts alone. All texts of a global batch have one length, see `data.prompts.buckets.BucketRecords`.

  Batch i depends on `seed` and i alone, so a run resumes exactly at any step, with any number of
  processes: nothing but the step has to be kept. Every record comes once an epoch, each epoch has
  its own shuffle, and a batch may run over from one epoch into the next, so no record is dropped
  and `batch_size` may exceed the set.

  Args:
    dataset: from `load` or `from_arrays`.
    batch_size: global batch size.
    seed: in [0, 2^32).
    start: batches to skip.
    rows: those of a global batch that this process reads, ascending, see
      `mesh.sharding.Layout.local_rows`; None is all of them.
    num_threads: threads that read ahead; 0 reads in the caller, None is the default, 0 in memory and 2 for files.
    num_workers: processes that read, each with its threads; 0 reads in this process.

  Raises:
    ValueError: for values out of range.
  """
  if batch_size < 1 or not 0 <= start < ENDLESS:
    raise ValueError(f"expected batch_size >= 1 and start >= 0, got {shown(batch_size)} and {shown(start)}.")
  check_examples(dataset, batch_size if rows is None else len(rows))
  rows = np.arange(batch_size) if rows is None else np.asarray(rows)
  if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or np.any(np.diff(rows) < 1):
    raise ValueError(f"rows: expected ascending positions in [0, {batch_size}), got {rows}.")
  _check_seed(seed)
  records = dataset.records
  threads = records.read_threads if num_threads is None else num_threads
  if not (0 <= threads <= MAX_READERS and 0 <= num_workers <= MAX_READERS):
    raise ValueError(
      f"num_threads and num_workers must be >= 0 and at most {MAX_READERS}, got {shown(threads)} and "
      f"{shown(num_workers)}."
    )
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  stream = records.batches(batch_size, seed, rows)[start:].to_iter_dataset(options)
  if num_workers > 0:
    _parse_absl_flags()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
  return iter(stream)


def examples(dataset: Dataset, n: int, seed: int = 0) -> tuple[Any, Any]:
  """`n` records without replacement, for evaluation: x0 (n, *space, C) float32, label (n,) int32.

  A set of prompts gives x0 or None, and a dict of arrays (n, ...) with text of the longest length. The records are the
  same for the same `seed`, whatever the batches. A generated set draws them from a stream of their own.

  Raises:
    ValueError: if the set has fewer than `n` records, for n < 1, or for more than the machine's memory holds.
  """
  _check_seed(seed)
  if n < 1:
    raise ValueError(f"expected n >= 1 examples, got {n}.")
  check_examples(dataset, n)
  count = dataset.num_records
  if count is not None and n > count:
    raise ValueError(
      f"asked for {n} examples without replacement, but {dataset.name} has {count} records; ask for {count} or fewer."
    )
  sample = dataset.records.sample(n, seed)
  return sample.get("x0"), sample["cond"]


def check_examples(dataset: Dataset, count: int) -> None:
  """Raises ValueError for more examples at a time than the machine's memory holds."""
  check_memory(f"{shown(count)} examples of {dataset.name}", count * dataset.example_bytes, "ask for fewer")


def _check_seed(seed: int) -> None:
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed must be in [0, 2^32), got {seed}.")


def _parse_absl_flags() -> None:
  # grain starts its worker processes with absl, which refuses while flags are unparsed. They are unparsed in a notebook
  # and in a program that does not use absl.app.
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
