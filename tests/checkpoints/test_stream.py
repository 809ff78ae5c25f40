"""Checkpoints written a layer at a time: restored like any other, in chunks of a mesh's parts, resumed after a stop."""

import dataclasses
import logging

import jax
import ml_dtypes
import numpy as np
import pytest

from pflow_jax.checkpoints import stream as checkpoint_stream
from pflow_jax.checkpoints.checkpoint import Checkpointer, load_params
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.checkpoints.stream import chunk_shape, open_leaves, place_leaves, save_leaves, slab_shape
from pflow_jax.mesh.sharding import make_layout


@dataclasses.dataclass
class ArrayLeaf:
  """A leaf of an array in memory, which notes what was asked for and may fail."""

  array: np.ndarray
  stacked: bool
  fails_at: int = -1
  error: Exception = dataclasses.field(default_factory=lambda: OSError("this tensor cannot be read"))
  layers: list = dataclasses.field(default_factory=list)
  parts: list = dataclasses.field(default_factory=list)

  @property
  def shape(self):
    return self.array.shape

  @property
  def dtype(self):
    return self.array.dtype

  def layer(self, index):
    if index == self.fails_at:
      raise self.error
    self.layers.append(index)
    return self.array if index is None else self.array[index].T.copy().T  # in another memory order

  def read(self, index):
    self.parts.append(index)
    return self.array[index]


def leaves(fails_at=-1):
  rng = np.random.default_rng(0)

  def make(dtype, *shape):
    return np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * int(np.prod(shape))), dtype).reshape(shape)

  return {
    "blocks": {
      "kernel": ArrayLeaf(make(ml_dtypes.bfloat16, 3, 8, 16), True),
      "other": ArrayLeaf(make(np.float32, 3, 8, 16), True, fails_at),
    },
    "out": ArrayLeaf(make(ml_dtypes.float8_e4m3fn, 8, 6), False),
    "scale": ArrayLeaf(np.asarray(np.float32(3)), False),
  }


def assert_same(params, tree):
  for (path, got), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True):
    assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape), path
    assert np.asarray(got).tobytes() == leaf.array.tobytes(), path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(checkpoint_stream, "CHUNK_BYTES", 128)


LAYOUT = ((".*/kernel|.*/other|out", ("fsdp", "tensor")),)
MESH = dict(fsdp=4, tensor=2)


def test_it_is_a_checkpoint_like_any_other(tmp_path):
  tree, reported = leaves(), []
  save_leaves(tmp_path, {"params": tree, "ema": {"out": tree["out"]}}, step=5, report=reported.append)
  assert newest_step(tmp_path) == 5
  assert_same(load_params(tmp_path, which="params"), tree)
  assert_same(load_params(tmp_path), {"out": tree["out"]})
  assert sum(reported) == sum(leaf.array.nbytes for leaf in [*jax.tree.leaves(tree), tree["out"]])
  assert tree["blocks"]["kernel"].layers == [0, 1, 2]
  with Checkpointer(tmp_path) as checkpointer:
    state = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)}
    state["ema"] = {"out": state["params"]["out"]}
    assert_same(checkpointer.restore(state)[0]["params"], tree)


def test_leaves_are_read_in_parts(tmp_path):
  tree = leaves()
  save_leaves(tmp_path, {"params": tree})
  stored = open_leaves(tmp_path, which="params")
  assert list(stored) == ["blocks/kernel", "blocks/other", "out", "scale"]
  kernel = stored["blocks/kernel"]
  assert (kernel.shape, kernel.dtype, kernel.chunk[0]) == ((3, 8, 16), ml_dtypes.bfloat16, 1)
  part = (slice(1, 2), slice(2, 5), slice(0, 7))
  assert kernel.read(part).tobytes() == tree["blocks"]["kernel"].array[part].tobytes()
  assert stored["scale"].read(()) == 3
  with pytest.raises(ValueError, match="which must be one of"):
    open_leaves(tmp_path, which="ema")


@pytest.mark.parametrize("devices", [None, 8])
def test_chunks_are_the_parts_of_a_mesh(tmp_path, devices):
  """With devices, and without any: an abstract mesh of 8."""
  layout = make_layout(MESH, LAYOUT, devices, min_size=2)
  tree = leaves()
  tree.pop("scale")
  save_leaves(tmp_path, {"params": tree}, layout=layout)
  stored = open_leaves(tmp_path, which="params")
  assert stored["blocks/other"].chunk == (1, 2, 8)
  assert stored["out"].chunk == (2, 3)
  assert_same(load_params(tmp_path, which="params"), tree)
  if devices is None:
    placed = load_params(tmp_path, which="params", layout=layout)
    assert_same(placed, tree)
    assert placed["out"].sharding.shard_shape((8, 6)) == (2, 3)


def test_devices_are_given_their_parts_and_no_more_is_read():
  layout = make_layout(MESH, LAYOUT, min_size=2)
  tree = leaves()
  tree.pop("scale")
  placed = place_leaves(tree, layout)
  assert_same(placed, tree)
  for leaf, array in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
    assert {tuple(s.stop - s.start for s in index) for index in leaf.parts} == {array.sharding.shard_shape(leaf.shape)}
    assert leaf.layers == []


def test_a_failure_leaves_no_checkpoint_and_is_said_once(tmp_path, caplog):
  with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="this tensor cannot be read"):
    save_leaves(tmp_path, {"params": leaves(fails_at=1)})
  assert newest_step(tmp_path) is None
  assert not caplog.records


def test_what_was_written_is_not_read_again(tmp_path):
  with pytest.raises(OSError, match="cannot be read"):
    save_leaves(tmp_path, {"params": leaves(fails_at=1)})
  tree = leaves()
  save_leaves(tmp_path, {"params": tree}, resume=True)
  assert tree["blocks"]["kernel"].layers == []
  assert tree["blocks"]["other"].layers == [1, 2]
  assert_same(load_params(tmp_path, which="params"), tree)
  assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_without_resume_all_is_written_anew(tmp_path):
  with pytest.raises(OSError, match="cannot be read"):
    save_leaves(tmp_path, {"params": leaves(fails_at=1)})
  tree = leaves()
  tree["blocks"]["kernel"].array = tree["blocks"]["kernel"].array[:, ::-1]
  save_leaves(tmp_path, {"params": tree})
  assert_same(load_params(tmp_path, which="params"), tree)
  assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_of_what_is_refused_nothing_is_left(tmp_path):
  """What an earlier call wrote neither: the leaves are wrong."""
  with pytest.raises(OSError, match="cannot be read"):
    save_leaves(tmp_path / "run", {"params": leaves(fails_at=2)})
  assert (tmp_path / "run").exists()
  wrong = leaves(fails_at=2)
  wrong["blocks"]["other"].error = ValueError("two that differ")
  with pytest.raises(ValueError, match="two that differ"):
    save_leaves(tmp_path / "run", {"params": wrong}, resume=True)
  assert not (tmp_path / "run").exists()


def test_sizes_of_what_is_written_at_once():
  leaf = lambda stacked, *shape: ArrayLeaf(np.zeros(shape, np.float32), stacked)
  assert chunk_shape(leaf(True, 3, 2, 4), (3, 2, 4)) == (3, 2, 4)  # 96 bytes: all layers
  assert chunk_shape(leaf(True, 3, 4, 6), (3, 4, 6)) == (1, 4, 6)  # 96 bytes a layer
  assert chunk_shape(leaf(True, 3, 4, 30), (3, 4, 30)) == (1, 4, 5)  # 480 bytes, cut along the last axis
  assert chunk_shape(leaf(False, 1000), (1000,)) == (25,)
  assert slab_shape(leaf(True, 3, 4, 30), (1, 4, 5)) == (1, 4, 5)
  assert slab_shape(leaf(True, 3, 16, 8), (1, 2, 2)) == (1, 4, 8)  # 128 bytes
  assert slab_shape(leaf(False, 8, 8), (8, 8)) == (8, 8)
