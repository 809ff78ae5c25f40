"""Batches: determinism, coverage, shards and exact resume, for each kind of records."""

import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
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
  return data.from_arrays("counting", x0, np.arange(N) % 3, class_names=("a", "b", "c"))


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
    assert a.keys() == b.keys() == {"x0", "label"}
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
    assert batch["label"].shape == (8,)
    assert batch["label"].dtype == np.int32
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
  labels = np.concatenate([b["label"] for b in batches])[: epochs * N]
  np.testing.assert_array_equal(labels, stream % 3)
  stream = stream.reshape(epochs, N)
  np.testing.assert_array_equal(np.sort(stream), np.broadcast_to(np.arange(N), (epochs, N)))
  assert len({epoch.tobytes() for epoch in stream}) == epochs


def test_array_batches_are_the_stream_of_rows():
  rows = np.concatenate([b["x0"][:, 0, 0, 0] for b in take(data.batches(array_set(), 8, seed=5), 9)])
  np.testing.assert_array_equal(rows, stream_rows(N, 5, 0, 72))


@each_set
@pytest.mark.parametrize("process_count", [2, 4])
def test_shards_concatenate_to_the_batch_of_one_process(make, process_count):
  whole = take(data.batches(make(), 12, seed=7), 5)
  shards = [
    take(data.batches(make(), 12, seed=7, process_index=i, process_count=process_count), 5)
    for i in range(process_count)
  ]
  together = [
    {name: np.concatenate([shard[name] for shard in parts]) for name in ("x0", "label")}
    for parts in zip(*shards, strict=True)
  ]
  assert shards[0][0]["x0"].shape[0] == 12 // process_count
  assert_same(together, whole)


@each_set
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 9])  # 20 records: batch 2 crosses into epoch 1
@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_from_a_saved_state_is_exact(make, taken, num_threads):
  iterator = data.batches(make(), 8, seed=3, num_threads=num_threads)
  take(iterator, taken)
  state = iterator.get_state()
  want = take(iterator, 6)
  fresh = data.batches(make(), 8, seed=3, num_threads=num_threads)
  take(fresh, 1)  # a used iterator must also come back
  fresh.set_state(state)
  assert_same(take(fresh, 6), want)


@each_set
def test_resume_through_an_orbax_manager(make, tmp_path):
  iterator = data.batches(make(), 8, seed=3)
  take(iterator, 2)
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    manager.wait_until_finished()
  want = take(iterator, 4)
  fresh = data.batches(make(), 8, seed=3)
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    manager.restore(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
  assert_same(take(fresh, 4), want)


def test_worker_processes_give_the_same_batches_and_resume():
  dataset = array_set()  # CountingSource lives in this module, which a worker cannot import
  want = take(data.batches(dataset, 8, seed=3), 5)
  iterator = data.batches(dataset, 8, seed=3, num_workers=1)
  got = take(iterator, 2)
  state = iterator.get_state()
  iterator.set_state(state)
  assert_same([*got, *take(iterator, 3)], want)
  iterator.close()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"process_count": 3}, "batch_size 8 does not divide over 3"),
    ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ({"process_index": -1}, "process_index=-1"),
    ({"seed": -1}, "seed must be in"),
    ({"seed": 2**32}, "seed must be in"),
    ({"num_threads": -1}, "must be >= 0"),
    ({"num_workers": -1}, "must be >= 0"),
    ({"batch_size": 0}, "batch_size 0"),
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
