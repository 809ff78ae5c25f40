"""Buckets of texts: one length a batch, nothing lost, batch i from (seed, i) alone, and fast for millions."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.data.dataset import Embedding
from pflow_jax.data.prompts.buckets import BucketRecords, Schedule, stacked

N, BUCKETS = 50, (4, 8, 16)
LENGTHS = np.random.default_rng(0).permutation([2, 4] * 10 + [5, 6, 8] * 7 + [9, 16, 20] * 3)


class CountingSource:
  """Records whose values tell their row, without reading lengths from them."""

  text_lengths = LENGTHS

  def __len__(self):
    return N

  def __getitem__(self, row):
    return {"text": np.full((LENGTHS[row], 3), row + 1, ml_dtypes.bfloat16), "pooled": np.full(2, row, np.float32)}


def text_set(buckets=BUCKETS, masked=True):
  records = BucketRecords(CountingSource(), buckets, masked)
  return data.Dataset("counting", (2, 2, 1), 0, (), records, embedding=Embedding(buckets, 3, masked, 2), has_x0=False)


def take(dataset, batch_size, n, **options):
  return list(itertools.islice(data.batches(dataset, batch_size, **{"seed": 3, **options}), n))


def rows_of(batch):
  return batch["cond"]["pooled"][:, 0].astype(int)


def bucket_of(rows):
  return np.minimum(np.searchsorted(BUCKETS, LENGTHS[rows]), len(BUCKETS) - 1)


def assert_same(got, want):
  assert got.keys() == want.keys() == {"cond"}
  for name, values in want["cond"].items():
    np.testing.assert_array_equal(got["cond"][name], values)


def test_a_batch_is_of_one_bucket_and_padded_to_its_length():
  seen = set()
  dataset = text_set()
  for batch in take(dataset, 8, 24):
    cond, rows = batch["cond"], rows_of(batch)
    length = data.text_length(cond)
    seen.add(length)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in cond.items()} == {
      name: (leaf.shape, leaf.dtype) for name, leaf in dataset.cond_shapes(8, length).items()
    }
    assert (np.array(BUCKETS)[bucket_of(rows)] == length).all()
    tokens = np.minimum(LENGTHS[rows], length)
    np.testing.assert_array_equal(cond["mask"], np.arange(length) < tokens[:, None])
    want = np.where(cond["mask"], rows[:, None] + 1, 0)[..., None] * np.ones(3)
    np.testing.assert_array_equal(cond["text"].astype(np.float64), want)
  assert seen == set(BUCKETS)


@pytest.mark.parametrize("batch_size", [1, 4, 8, 60])
def test_every_record_comes_once_an_epoch_of_its_bucket(batch_size):
  epochs = 6
  counts = np.bincount(bucket_of(np.arange(N)))
  full = epochs * counts // batch_size  # batches of each bucket in so many epochs
  batches = take(text_set(), batch_size, int(full.sum()))
  for bucket, (count, number) in enumerate(zip(counts, full, strict=True)):
    rows = [rows_of(batch) for batch in batches if bucket_of(rows_of(batch)[0]) == bucket]
    assert len(rows) == number
    stream = np.concatenate([*rows, np.zeros(0, int)])
    whole = len(stream) // count
    parts = stream[: whole * count].reshape(whole, count)
    want = np.flatnonzero(bucket_of(np.arange(N)) == bucket)
    np.testing.assert_array_equal(np.sort(parts), np.broadcast_to(want, parts.shape))
    assert len({part.tobytes() for part in parts}) == whole
    rest = stream[whole * count :]
    assert len(set(rest)) == len(rest)
    assert number * batch_size > epochs * count - batch_size, "less than a batch is left for later"


def test_the_order_of_buckets_is_shuffled_and_differs_by_epoch_and_seed():
  schedule = Schedule((400, 300, 100), 10, 0)
  order = np.array([schedule(i)[0] for i in range(160)]).reshape(2, 80)
  for epoch in order:
    np.testing.assert_array_equal(np.bincount(epoch), [40, 30, 10])
    assert np.count_nonzero(np.diff(epoch)) > 30
  assert (order[0] != order[1]).any()
  assert [Schedule((400, 300, 100), 10, 1)(i)[0] for i in range(80)] != order[0].tolist()


def test_the_schedule_counts_every_bucket_up():
  schedule = Schedule((7, 0, 23, 1), 6, 0)
  following = [0] * 4
  for i in range(500):
    bucket, number = schedule(i)
    assert number == following[bucket]
    following[bucket] += 1
  assert following[1] == 0
  assert following[3] > 10


@pytest.mark.parametrize("rows", [[0], [3, 4, 7], list(range(8))])
def test_a_process_reads_its_rows_of_every_batch(rows):
  for whole, part in zip(take(text_set(), 8, 9), take(text_set(), 8, 9, rows=np.array(rows)), strict=True):
    assert_same(part, {"cond": {name: values[rows] for name, values in whole["cond"].items()}})


@pytest.mark.parametrize("start", [1, 7, 30])
def test_any_batch_can_be_the_first(start):
  whole = take(text_set(), 8, start + 3)
  for got, want in zip(take(text_set(), 8, 3, start=start), whole[start:], strict=True):
    assert_same(got, want)
  assert (rows_of(take(text_set(), 8, 1, seed=4)[0]) != rows_of(whole[0])).any()


def test_examples_are_of_the_longest_text():
  x0, cond = data.examples(text_set(), N, seed=0)
  assert x0 is None
  assert cond["text"].shape == text_set().cond_shapes(N)["text"].shape == (N, 16, 3)
  np.testing.assert_array_equal(np.sort(cond["pooled"][:, 0]), np.arange(N))


def test_without_text_there_is_one_bucket():
  batch = stacked([{"pooled": np.ones(2)}, {"pooled": np.zeros(2)}], None, masked=False)
  assert batch["cond"].keys() == {"pooled"}

  class Source(CountingSource):
    text_lengths = np.zeros(N, np.int32)

  records = BucketRecords(Source(), (), masked=False)
  rows = np.concatenate([rows_of(records.batches(10, 0, np.arange(10))[i]) for i in range(5)])
  np.testing.assert_array_equal(np.sort(rows), np.arange(N))


def test_millions_are_planned_without_reading_them():
  class Source:
    text_lengths = np.random.default_rng(0).integers(1, 400, 3_000_000)
    read = 0

    def __len__(self):
      return 3_000_000

    def __getitem__(self, row):
      self.read += 1
      return {"text": np.ones((self.text_lengths[row], 1))}

  source = Source()
  batches = BucketRecords(source, (64, 128, 256, 512), masked=True).batches(256, 0, np.arange(8))
  for i in (0, 11_000, 12_000, 10**6):
    assert batches[i]["cond"]["text"].shape[0] == 8
  assert source.read == 32
