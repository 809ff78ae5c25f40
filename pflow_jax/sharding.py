"""Device mesh, and batches laid out over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

AXIS = "data"


def make_mesh(data: int = -1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """Mesh with the one axis "data", which splits the batch, over `devices` (default: all of them).

  Args:
    data: size of the axis; -1 takes all devices.
  Raises: ValueError if the size is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if data not in (-1, len(devices)):
    raise ValueError(
      f"config.mesh.data: expected the number of devices, {len(devices)}, or -1 for all of them, got {data}"
    )
  return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """Global arrays over `mesh` from each process's NumPy rows, split along the leading axis.

  Args:
    batch: pytree of arrays (B_local, ...), the same B_local in every process.
  Returns: the same tree of jax.Array (B_local * processes, ...), dtypes kept.
  Raises: ValueError if a process's rows do not divide among its devices.
  """
  sharding = batch_sharding(mesh)
  devices = len(mesh.local_devices)

  def place(path, x):
    x = np.asarray(x)
    rows = x.shape[0] if x.ndim else None
    if rows is None or rows % devices:
      name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
      raise ValueError(
        f"{name}: expected a leading batch axis that {devices} devices divide, got shape "
        f"{x.shape}; use a batch size per process that is a multiple of {devices}, or fewer devices"
      )
    return jax.make_array_from_process_local_data(sharding, x)

  return jax.tree_util.tree_map_with_path(place, batch)
