"""The hook by which work on single examples runs on a mesh: the only thing that the mathematics knows of devices.

A mesh of this package has the axes AXES. Code that runs on it is traced in its context, see `mesh.sharding.Layout`;
elsewhere `per_example` changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, PartitionSpec

F = TypeVar("F", bound=Callable)

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")  # the axes that split the batch


def axes_of(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a spec."""
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def per_example(function: F) -> F:
  """Returns `function` with each example on its own: under a mesh, a shard_map over the batch.

  Every leaf of its arguments and results has the batch as its leading axis. No device has to share this work with
  another. GSPMD cannot know that; the shard_map keeps it from moving any of it.
  """

  @functools.wraps(function)
  def run(*args):
    mesh = current_mesh()
    if mesh is None:
      return function(*args)
    spec = PartitionSpec(BATCH)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)(*args)

  return run  # type: ignore[return-value]


def traced_device_kind() -> str:
  """JAX's name of the devices that this is traced for: those of the mesh in whose context it is, else the default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device is not None else jax.devices()[0].device_kind


def current_mesh() -> AbstractMesh | None:
  """The mesh in whose context this is traced; None for a mesh of others, and inside of a shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if not mesh.empty and set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes else None
