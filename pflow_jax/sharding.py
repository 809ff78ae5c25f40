"""Device mesh, and batches laid out over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """Mesh with axes ("data", "fsdp") over `devices` (default: all of them).

  Both axes split the batch; "fsdp" is for parameters too.

  Args:
    data: size of the data axis; -1 takes what is left.
    fsdp: size of the axis that parameters may be sharded over.
  Raises: ValueError if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if fsdp < 1 or (data < 1 and data != -1):
    raise ValueError(f"expected fsdp >= 1 and data >= 1 or -1, got data={data}, fsdp={fsdp}")
  if data == -1:
    data = len(devices) // fsdp
  if data * fsdp != len(devices):
    raise ValueError(
      f"data * fsdp must be the number of devices, {len(devices)}: got data={data}, fsdp={fsdp}; "
      "set data=-1 and an fsdp that divides it, or pass the devices to use"
    )
  return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(AXES))


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
