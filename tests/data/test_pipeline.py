"""Batches: determinism, coverage, parts of them and where they start, for each kind of records."""

import dataclasses
import itertools

import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.data.records import stream_rows

N = 20


class CountingSource:
  """Records whose value tells their row."""

  def __len__(self):
    return N

  def __getitem__(self, row):
    return {"x0": np.full((2, 2, 1), row, np.float32), "label": np.asarray(row % 3, np.int32)}


def array_set():
  x0 = np.arange(N, dtype=np.float32).reshape(N, 1, 1, 1) * np.ones((1, 2, 2, 1), np.float32)
  return data.from_arrays(x0, np.arange(N) % 3, class_names=("a", "b", "c"), name="counting")


def source_set():
  return data.Dataset("counting", (2, 2, 1), 3, ("a", "b", "c"), data.SourceRecords(CountingSource()))


SETS = {
  "arrays": array_set,
  "source": source_set,
  "points": lambda: data.load("checkerboard"),
}
FINITE = ("arrays", "source")
each_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS.keys())
each_finite_set = pytest.mark.parametrize("make", [SETS[k] for k in FINITE], ids=FINITE)


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_same(got, want):
  assert len(got) == len(want) > 0
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys() == {"x0", "cond"}
    for name in a:
      assert a[name].dtype == b[name].dtype
      assert a[name].tobytes() == b[name].tobytes()


@each_set
def test_shapes_types_and_determinism(make):
  dataset = make()
  first = take(data.batches(dataset, 8, seed=1), 6)
  for batch in first:
    assert batch["x0"].shape == (8, *dataset.shape)
    assert batch["x0"].dtype == np.float32
    assert batch["cond"].shape == (8,)
    assert batch["cond"].dtype == np.int32
  assert_same(take(data.batches(make(), 8, seed=1), 6), first)
  other = take(data.batches(dataset, 8, seed=2), 6)
  assert not np.array_equal(other[0]["x0"], first[0]["x0"])
  assert not np.array_equal(first[0]["x0"], first[1]["x0"])


@each_finite_set
@pytest.mark.parametrize("batch_size", [1, 5, 8, 48])
def test_every_record_once_an_epoch_whatever_the_batch_size(make, batch_size):
  epochs = 4
  batches = take(data.batches(make(), batch_size, seed=0), -(-epochs * N // batch_size))
  stream = np.concatenate([b["x0"][:, 0, 0, 0] for b in batches])[: epochs * N]
  labels = np.concatenate([b["cond"] for b in batches])[: epochs * N]
  np.testing.assert_array_equal(labels, stream % 3)
  stream = stream.reshape(epochs, N)
  np.testing.assert_array_equal(np.sort(stream), np.broadcast_to(np.arange(N), (epochs, N)))
  assert len({epoch.tobytes() for epoch in stream}) == epochs


def test_array_batches_are_the_stream_of_rows():
  rows = np.concatenate([b["x0"][:, 0, 0, 0] for b in take(data.batches(array_set(), 8, seed=5), 9)])
  np.testing.assert_array_equal(rows, stream_rows(N, 5, np.arange(72)))


@each_set
@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3], [4, 5, 10, 11], list(range(12))])
def test_a_process_reads_its_rows_of_every_batch(make, rows):
  whole = take(data.batches(make(), 12, seed=7), 5)
  part = take(data.batches(make(), 12, seed=7, rows=np.array(rows)), 5)
  assert_same(part, [{name: values[rows] for name, values in batch.items()} for batch in whole])


@each_set
@pytest.mark.parametrize("start", [0, 1, 2, 3, 9])  # 20 records: batch 2 crosses into epoch 1
@pytest.mark.parametrize("num_threads", [0, 2])
def test_any_batch_can_be_the_first(make, start, num_threads):
  whole = take(data.batches(make(), 8, seed=3), start + 6)
  assert_same(take(data.batches(make(), 8, seed=3, start=start, num_threads=num_threads), 6), whole[start:])


def test_worker_processes_give_the_same_batches():
  dataset = array_set()  # CountingSource lives in this module, which a worker cannot import
  want = take(data.batches(dataset, 8, seed=3), 5)
  iterator = data.batches(dataset, 8, seed=3, start=2, num_workers=1)
  assert_same(take(iterator, 3), want[2:])
  iterator.close()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rows": [3, 8]}, "rows: expected ascending positions in \\[0, 8\\)"),
    ({"rows": [1, 0]}, "rows: expected ascending"),
    ({"rows": []}, "rows: expected ascending"),
    ({"start": -1}, "start >= 0, got 8 and -1"),
    ({"seed": -1}, "seed must be in"),
    ({"seed": 2**32}, "seed must be in"),
    ({"num_threads": -1}, "must be >= 0"),
    ({"num_workers": -1}, "must be >= 0"),
    ({"num_workers": 10**6}, "at most 128, got 0 and 1000000"),
    ({"num_threads": 10**9}, "at most 128, got 1000000000 and 0"),
    ({"batch_size": 0}, "batch_size >= 1"),
    ({"batch_size": 10**15}, "1000000000000000 examples of counting: takes .* of memory, this machine has .*ask for"),
    ({"start": 2**40}, "got 8 and 1099511627776"),
  ],
)
def test_bad_arguments_are_refused(options, message):
  options = {"seed": 0, "batch_size": 8, **options}
  with pytest.raises(ValueError, match=message):
    data.batches(array_set(), **options)


@each_finite_set
def test_examples_are_without_replacement_and_repeat(make):
  x0, label = data.examples(make(), N, seed=0)
  assert x0.dtype == np.float32
  assert label.dtype == np.int32
  np.testing.assert_array_equal(np.sort(x0[:, 0, 0, 0]), np.arange(N))
  np.testing.assert_array_equal(label, x0[:, 0, 0, 0] % 3)
  np.testing.assert_array_equal(data.examples(make(), N, seed=0)[0], x0)
  assert not np.array_equal(data.examples(make(), N, seed=1)[0], x0)
  assert len(np.unique(data.examples(make(), 7)[0][:, 0, 0, 0])) == 7


def test_examples_of_points_are_a_stream_of_their_own():
  points = data.load("checkerboard")
  x0, label = data.examples(points, 64, seed=0)
  assert x0.shape == (64, 2)
  assert x0.dtype == np.float32
  np.testing.assert_array_equal(label, np.zeros(64))
  np.testing.assert_array_equal(data.examples(points, 64, seed=0)[0], x0)
  assert not np.array_equal(data.examples(points, 64, seed=1)[0], x0)
  assert not np.array_equal(next(data.batches(points, 64, seed=0))["x0"], x0)


def test_examples_refuse_more_than_there_are():
  with pytest.raises(ValueError, match=r"asked for 21 examples .* has 20 records"):
    data.examples(array_set(), N + 1)
  with pytest.raises(ValueError, match="n >= 1"):
    data.examples(array_set(), 0)
  texts = data.load("synthetic_prompts", shape=(2, 2, 1), text=(512, 4096), pooled=8, num_records=1)
  many = dataclasses.replace(texts, records=data.GeneratedRecords(None))
  with pytest.raises(ValueError, match="1000000 examples of synthetic_prompts: takes 3.815 TiB of memory"):
    data.examples(many, 10**6)
