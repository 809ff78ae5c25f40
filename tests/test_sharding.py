"""Mesh shapes, where rows land, and the messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pflow_jax.sharding import batch_sharding, make_mesh, replicated, shard_batch


@pytest.mark.parametrize("data", [-1, 8])
def test_make_mesh(data):
  mesh = make_mesh(data)
  assert dict(mesh.shape) == {"data": 8}
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_make_mesh_over_some_devices():
  devices = jax.devices()[2:4]
  assert list(make_mesh(devices=devices).devices.ravel()) == devices


@pytest.mark.parametrize("data", [0, 3, 16])
def test_refuses_sizes_that_do_not_fit(data):
  with pytest.raises(ValueError, match=f"number of devices, 8.*got {data}"):
    make_mesh(data)


def test_rows_are_split_over_all_devices():
  mesh = make_mesh()
  batch = {"x0": np.arange(48, dtype=np.float32).reshape(16, 3), "label": np.arange(16, dtype="i4")}
  got = shard_batch(batch, mesh)
  jax.tree.map(np.testing.assert_array_equal, got, batch)
  assert got["label"].dtype == jnp.int32
  for x in jax.tree.leaves(got):
    assert x.sharding == batch_sharding(mesh)
    assert [s.data.shape[0] for s in x.addressable_shards] == [2] * 8


def test_replicated():
  x = jax.device_put(np.ones((3,)), replicated(make_mesh()))
  assert [s.data.shape for s in x.addressable_shards] == [(3,)] * 8


@pytest.mark.parametrize("value", [np.ones((12, 2)), np.float32(1)])
def test_rows_that_do_not_divide_are_named(value):
  with pytest.raises(ValueError, match="label.*8 devices divide.*multiple of 8"):
    shard_batch({"x0": np.ones((16, 2)), "label": value}, make_mesh())
