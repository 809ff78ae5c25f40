"""Meshes, tables of shardings, where rows land, and the messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pflow_jax.core.batches import AXES, per_example
from pflow_jax.mesh.sharding import Layout, constrain, make_layout, make_mesh
from pflow_jax.settings.mesh import MeshSettings

TABLE = ((".*/kernel", ("fsdp", "tensor")), (".*/bias", ()))


def layout(rules=TABLE, min_size=0, **sizes):
  return make_layout(sizes, rules, min_size=min_size)


def shapes(**arrays):
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in arrays.items()}


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ({}, (1, 8, 1, 1)),
    (dict(data=8), (1, 8, 1, 1)),
    (dict(data=1, fsdp=-1), (1, 1, 8, 1)),
    (dict(data=-1, fsdp=2, tensor=2), (1, 2, 2, 2)),
    (dict(slice=2, data=-1, fsdp=2), (2, 2, 2, 1)),
  ],
)
def test_make_mesh(sizes, expected):
  mesh = make_mesh(MeshSettings(**sizes).sizes)
  assert tuple(mesh.shape.items()) == tuple(zip(AXES, expected, strict=True))
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert list(mesh.devices.ravel()) == jax.devices()


def test_machines_are_no_slices_where_there_is_no_tpu():
  """JAX numbers the machines of GPUs and CPUs as slices; a mesh may lie across them in any shape."""

  class Device(Chip):
    platform = "gpu"

  devices = [Device(i) for i in range(8)]
  assert dict(make_mesh(dict(fsdp=8), devices).shape)["fsdp"] == 8
  assert dict(make_mesh(dict(slice=2, data=-1), devices).shape)["slice"] == 2


def test_make_mesh_over_some_devices():
  devices = jax.devices()[2:4]
  assert list(make_mesh(devices=devices).devices.ravel()) == devices


class Chip:
  """A device of a pod of several slices, as far as a mesh looks at it."""

  platform, process_index = "tpu", 0

  def __init__(self, i):
    self.id, self.slice_index, self.device_kind, self.coords = i, i // 4, "TPU v5 lite", (i % 2, i % 4 // 2, 0)


def test_slices_of_a_pod_are_the_slices_of_the_mesh():
  chips = [Chip(i) for i in (4, 0, 5, 1, 6, 2, 7, 3)]
  mesh = make_mesh(dict(slice=2, fsdp=-1), chips)
  assert [{chip.slice_index for chip in part.ravel()} for part in mesh.devices] == [{0}, {1}]
  assert dict(make_mesh(dict(data=-1, fsdp=2), chips).shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
  with pytest.raises(ValueError, match="mesh.slice: expected the number of slices, 2, got 4"):
    make_mesh(dict(slice=4, data=-1), chips)


def test_a_rest_that_is_none_names_the_others():
  with pytest.raises(ValueError, match="sizes other than data that multiply to a divisor .* 8, .* multiply to 3"):
    make_mesh(dict(data=-1, fsdp=3))


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=16)])
def test_refuses_sizes_that_do_not_fit(sizes):
  with pytest.raises(ValueError, match="product is the number of devices, 8, got .*'data': "):
    make_mesh(sizes)


@pytest.mark.parametrize("sizes", [dict(fdsp=8), dict(fsdp=0), dict(data=-2)])
def test_axes_and_sizes_that_are_none_are_refused(sizes):
  with pytest.raises(ValueError, match="expected sizes of at least 1, .* of the axes .*'fsdp'"):
    make_mesh(sizes)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(data=0), "at least 1"),
    (dict(data=-1, fsdp=-1), "one of them perhaps -1"),
    (dict(min_size=-1), "min_size"),
    (dict(rules=(("a",),)), "expected rows"),
    (dict(rules=(("a", ("model",)),)), "expected rows"),
    (dict(rules=(("a", "fsdp"),)), "expected rows"),
    (dict(rules=(("[", ()),)), "expected a regular expression"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    MeshSettings(**settings)


def test_one_row_serves_a_parameter_and_all_that_goes_with_it():
  tree = {"params": {"dense": shapes(kernel=(16, 4), bias=(4,))}, "mu": {"dense": shapes(kernel=(16, 4), bias=(4,))}}
  got = layout(fsdp=4, tensor=2).shardings(tree)
  for part in ("params", "mu"):
    assert got[part]["dense"]["kernel"].spec == P("fsdp", "tensor")
    assert got[part]["dense"]["bias"].is_fully_replicated
  scanned = layout(fsdp=4, tensor=2).shardings({"blocks": shapes(kernel=(3, 16, 4))})
  assert scanned["blocks"]["kernel"].spec == P(None, "fsdp", "tensor"), "the depth stays whole"


def test_the_first_row_and_the_config_s_come_first():
  own = MeshSettings(rules=[["b/kernel", [None, "fsdp"]]])
  tree = {"a": shapes(kernel=(8, 8)), "b": shapes(kernel=(8, 8))}
  got = layout((*own.table, *TABLE), fsdp=8).shardings(tree)
  assert (got["a"]["kernel"].spec, got["b"]["kernel"].spec) == (P("fsdp", "tensor"), P(None, "fsdp"))


def test_small_arrays_and_scalars_stay_whole_without_a_row():
  tree = {"a": shapes(kernel=(8, 8), small=(3, 3)), "count": jax.ShapeDtypeStruct((), jnp.int32)}
  got = layout(fsdp=8, min_size=10).shardings(tree)
  assert not got["a"]["kernel"].is_fully_replicated
  assert got["a"]["small"].is_fully_replicated
  assert layout(fsdp=8).shardings({"count": tree["count"]})["count"].is_fully_replicated


def test_what_no_row_covers_or_fits_is_named_all_at_once():
  tree = {"a": shapes(kernel=(12, 4), scale=(4,)), "b": shapes(kernel=(4,))}
  with pytest.raises(ValueError, match="fit 3 arrays") as error:
    layout(fsdp=8).shardings(tree)
  text = str(error.value)
  assert "a/kernel (12, 4): row ('.*/kernel', ('fsdp', 'tensor')) splits 12 in 8 parts" in text
  assert "a/scale (4,): no row covers it" in text
  assert "b/kernel (4,): row ('.*/kernel', ('fsdp', 'tensor')) has 2 entries, too many" in text
  assert "config.mesh.rules" in text


def test_place_gives_each_device_its_part():
  kernel = np.arange(32, dtype=np.float32).reshape(8, 4)
  placed = layout(fsdp=4, tensor=2).place({"a": {"kernel": kernel}})["a"]["kernel"]
  assert [s.data.shape for s in placed.addressable_shards] == [(2, 2)] * 8
  np.testing.assert_array_equal(placed, kernel)
  again = layout(fsdp=8).place({"a": {"kernel": placed}})["a"]["kernel"]
  assert [s.data.shape for s in again.addressable_shards] == [(1, 4)] * 8


def test_rows_are_split_over_all_devices():
  batch = {"x0": np.arange(48, dtype=np.float32).reshape(16, 3), "label": np.arange(16, dtype="i4")}
  for sizes, rows in ((dict(data=8), 2), (dict(data=2, fsdp=2, tensor=2), 4), (dict(slice=2, fsdp=4), 2)):
    at = layout(**sizes)
    np.testing.assert_array_equal(at.local_rows(16), np.arange(16))
    got = at.shard_batch(batch, 16)
    jax.tree.map(np.testing.assert_array_equal, got, batch)
    assert got["label"].dtype == jnp.int32
    for x in jax.tree.leaves(got):
      assert x.sharding == at.batch
      assert [s.data.shape[0] for s in x.addressable_shards] == [rows] * 8


def test_a_process_has_the_rows_of_its_devices(monkeypatch):
  """Devices that a pod's mesh deals out in turn: the rows of a process need not be neighbours."""
  devices = jax.devices()
  at = Layout(make_mesh(devices=devices))
  mine = {devices[1]: (slice(2, 4),), devices[6]: (slice(12, 14),)}
  monkeypatch.setattr(type(at.batch), "addressable_devices_indices_map", lambda self, shape: mine)
  np.testing.assert_array_equal(at.local_rows(16), [2, 3, 12, 13])


def test_batches_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="8 parts .* divide, got 12"):
    layout(data=8).local_rows(12)
  with pytest.raises(ValueError, match="label: expected 16 rows, got shape \\(12,\\)"):
    layout(data=8).shard_batch({"label": np.ones(12)}, 16)


def test_spread_takes_keys_too():
  at, keys = layout(data=8), jax.random.split(jax.random.key(0), 16)
  got = at.spread(keys)
  assert [s.data.shape for s in got.addressable_shards] == [(2,)] * 8
  np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(keys))


def test_per_example_is_a_shard_map_on_a_mesh_and_nothing_elsewhere():
  x = jnp.arange(32.0).reshape(16, 2)
  function = per_example(lambda x, y: {"sum": x + y[:, None]})
  plain = jax.make_jaxpr(function)(x, x[:, 0])
  assert "shard_map" not in str(plain)
  at = layout(data=2, fsdp=2, tensor=2)
  with at.context():
    assert "shard_map" in str(jax.make_jaxpr(function)(x, x[:, 0]))
    got = jax.jit(function)(at.spread(x), at.spread(x[:, 0]))["sum"]
  assert got.sharding.spec == P(("slice", "data", "fsdp"))
  np.testing.assert_array_equal(got, x + x[:, :1])


def test_constrain_lays_out_on_a_mesh_and_is_nothing_elsewhere():
  x = jnp.zeros((8, 4))
  assert constrain(x, "fsdp", None) is x
  at = layout(fsdp=8)
  with at.context():
    got = jax.jit(lambda x: constrain(x, None, None))(at.spread(x))
  assert got.is_fully_replicated


def test_described():
  assert layout(data=4, fsdp=2).described() == "8 devices: data 4 x fsdp 2"
