"""Placement of arrays: the device mesh, the tables that shard parameters over it, and batches split over it.

The mesh has four axes. "slice" (pod slices, joined by a slow network), "data" and "fsdp" split the batch; "fsdp" also
splits parameters, which are gathered where they are used; "tensor" splits the work on one example. GSPMD does the rest,
except inside of `core.batches.per_example`.

Code that runs on a mesh is traced in its context (`Layout.context`). `per_example` and `constrain` act there and change
nothing elsewhere, so no code below the programs needs the mesh as an argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import linear_call
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pflow_jax.core.batches import AXES, BATCH, axes_of, current_mesh
from pflow_jax.mesh.partition import first_match, path_of

PyTree = Any
Rule = tuple[str, tuple[Any, ...]]
MIN_SIZE = 2**14
DATA_PARALLEL: Mapping[str, int] = {"data": -1}  # all devices split the batch


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
  """Returns the sizes of AXES over `count` devices.

  Args:
    sizes: of axes by name; -1 is the rest, 1 the default.
    count: number of devices.

  Raises:
    ValueError: an axis is unknown, or the product of the sizes is not `count`.
  """
  if not set(sizes) <= set(AXES) or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"expected sizes of at least 1, or -1 for the rest, of the axes {AXES}, got {dict(sizes)}")
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  known = math.prod(size for size in sizes.values() if size != -1)
  shape = tuple(count // known if size == -1 else size for size in sizes.values())
  if -1 in sizes.values() and math.prod(shape) != count:
    free = next(axis for axis, size in sizes.items() if size == -1)
    raise ValueError(
      f"config.mesh: expected sizes other than {free} that multiply to a divisor of the number of devices, {count}, "
      f"got {sizes}, which multiply to {known}; set config.mesh.fsdp, tensor or slice lower"
    )
  if math.prod(shape) != count:
    raise ValueError(
      f"config.mesh: expected sizes whose product is the number of devices, {count}, got {sizes}; set one of them to "
      "-1 for the rest"
    )
  return shape


def make_mesh(sizes: Mapping[str, int] = DATA_PARALLEL, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes a mesh of the axes AXES.

  Neighbours in a slice's mesh are neighbours in its network. Devices other than TPUs are dealt out in the order of
  their processes: for them JAX's slice is the machine that they are in.

  Args:
    sizes: see `mesh_shape`; by default all devices split the batch.
    devices: by default those of all processes.

  Raises:
    ValueError: the sizes do not fit the devices, or their slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = mesh_shape(sizes, len(devices))
  is_tpu = devices[0].platform == "tpu"
  slices = {getattr(device, "slice_index", None) for device in devices} if is_tpu else {None}
  if is_tpu and sizes.get("slice", 1) == 1 and len(slices) > 1:
    # The config of one slice runs on several as it is.
    shape = mesh_shape({**sizes, "slice": len(slices)}, len(devices))
  if is_tpu and shape[0] != len(slices):
    raise ValueError(f"config.mesh.slice: expected the number of slices, {len(slices)}, got {shape[0]}")
  if len(slices) > 1:
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]), (shape[0], 1, 1, 1), devices, allow_split_physical_axes=True
    )
  elif is_tpu:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and the placement of parameters on it.

  A rule is (pattern, spec). The pattern is a regular expression for the whole "/"-joined path of a parameter, or for
  the end of it from a "/" on: one row serves a parameter, its average, its moments and the teacher's frozen copy. The
  spec has an entry for each of the last dimensions: None, a mesh axis, or a tuple of axes. Dimensions before them, such
  as the depth of an nn.scan, stay whole; with () all do. The first row that matches decides.

  Attributes:
    mesh: an abstract one has no devices; shapes can be laid out on it, arrays cannot.
    rules: the table.
    min_size: leaves of fewer elements stay whole, whatever the table says.
  """

  mesh: Mesh | AbstractMesh
  rules: tuple[Rule, ...] = ()
  min_size: int = MIN_SIZE

  @property
  def batch(self) -> NamedSharding:
    """Sharding of arrays whose leading axis is the batch."""
    return NamedSharding(self.mesh, PartitionSpec(BATCH))

  @property
  def replicated(self) -> NamedSharding:
    """Sharding that keeps a whole copy on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch_parts(self) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(self.mesh.shape[axis] for axis in BATCH)

  @property
  def platform(self) -> str | None:
    """Kind of the devices, such as "tpu"; None without devices."""
    return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else None

  def context(self) -> contextlib.AbstractContextManager[Any]:
    """Context in which programs for the mesh are traced."""
    return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

  def shardings(self, tree: PyTree) -> PyTree:
    """Sharding of every leaf of a tree of parameters, or of trees like it such as moments (arrays or shapes).

    Raises:
      ValueError: no row covers a leaf, or a row does not fit its shape; the message names all of them.
    """
    problems: list[str] = []

    def place(keys, leaf):
      spec = self._spec(path_of(keys), tuple(leaf.shape), problems)
      return NamedSharding(self.mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    if problems:
      listing = "".join(f"\n  {problem}" for problem in dict.fromkeys(problems))
      raise ValueError(
        f"config.mesh: the table of shardings does not fit {len(problems)} arrays on the mesh "
        f"{dict(self.mesh.shape)}:{listing}\nchange config.mesh.fsdp or tensor, or put a row (pattern, spec) in "
        "config.mesh.rules; spec () keeps an array whole"
      )
    return shardings

  def _spec(self, path: str, shape: tuple[int, ...], problems: list[str]) -> tuple[Any, ...]:
    if not shape or math.prod(shape) < self.min_size:
      return ()
    row = first_match((f"(?:.*/)?(?:{pattern})" for pattern, _ in self.rules), path)
    if row is None:
      problems.append(f"{path} {shape}: no row covers it")
      return ()
    pattern, spec = self.rules[row]
    if len(spec) > len(shape):
      problems.append(f"{path} {shape}: row ({pattern!r}, {spec}) has {len(spec)} entries, too many")
      return ()
    full = (None,) * (len(shape) - len(spec)) + spec
    for size, entry in zip(shape, full, strict=True):
      parts = math.prod(self.mesh.shape[axis] for axis in axes_of(entry))
      if size % parts:
        problems.append(f"{path} {shape}: row ({pattern!r}, {spec}) splits {size} in {parts} parts, which do not fit")
        return ()
    return full

  def abstract(self, tree: PyTree) -> PyTree:
    """Shapes of a tree of parameters, with their shardings."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, self.shardings(tree))

  def place(self, tree: PyTree) -> PyTree:
    """Places parameters on the devices; of a host array, which every process has whole, a device gets its part."""

    def put(leaf, sharding):
      leaf = np.asarray(leaf)
      return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, self.shardings(tree))

  @functools.lru_cache(maxsize=8)  # noqa: B019 (of the few layouts of a program)
  def local_rows(self, size: int) -> np.ndarray:
    """Positions (n,), ascending, of the rows of a batch of `size` that this process's devices hold.

    Raises:
      ValueError: the batch does not split evenly.
    """
    if size % self.batch_parts:
      raise ValueError(
        f"expected a batch that {self.batch_parts} parts (mesh axes {', '.join(BATCH)}) divide, got {size}"
      )
    slices = self.batch.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in slices]))  # type: ignore[index]

  def shard_batch(self, batch: PyTree, size: int) -> PyTree:
    """Makes global arrays (size, ...) of a batch, of which each process has its `local_rows`, as NumPy.

    Raises:
      ValueError: the number of rows is another.
    """
    rows = self.local_rows(size)

    def put(keys, x):
      x = np.asarray(x)
      if x.shape[:1] != rows.shape:
        raise ValueError(f"{path_of(keys) or 'batch'}: expected {len(rows)} rows, got shape {x.shape}")
      part = lambda index: x[np.searchsorted(rows, np.arange(size)[index[0]])]
      return jax.make_array_from_callback((size, *x.shape[1:]), self.batch, part)

    return jax.tree_util.tree_map_with_path(put, batch)

  def spread(self, rows: Any) -> jax.Array:
    """Makes a global array, split along the leading axis, of rows that every process has whole; PRNG keys too."""
    return _global(rows, self.batch)

  def everywhere(self, x: Any) -> jax.Array:
    """Makes a global array with the whole of `x`, which every process has, on every device; PRNG keys too."""
    return _global(x, self.replicated)

  def described(self) -> str:
    """The mesh in words: "8 devices: data 4 x fsdp 2"."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
    return f"{self.mesh.size} device{'s' * (self.mesh.size > 1)}" + (f": {sizes}" if sizes else "")


def _global(x: Any, sharding: NamedSharding) -> jax.Array:
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_global(jax.random.key_data(x), sharding))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def make_layout(
  sizes: Mapping[str, int],
  rules: Sequence[Rule],
  devices: Sequence[Any] | int | None = None,
  *,
  min_size: int = MIN_SIZE,
) -> Layout:
  """Makes the layout of a mesh and a table.

  Args:
    sizes: of the mesh, see `make_mesh`.
    rules: see `Layout`.
    devices: by default those of all processes; a number of devices gives a layout on an abstract mesh.
    min_size: see `Layout`.
  """
  if isinstance(devices, int):
    shape = mesh_shape(sizes, devices)
    mesh: Mesh | AbstractMesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  else:
    mesh = make_mesh(sizes, devices)
  return Layout(mesh, tuple(rules), min_size)


def to_host(x: jax.Array) -> np.ndarray:
  """Fetches the whole of a global array, in every process."""
  return np.asarray(x if jax.process_count() == 1 else multihost_utils.process_allgather(x, tiled=True))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
  """Lays `x` out as `spec` says, an entry a dimension; outside of a mesh returns it as it is."""
  return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather(w: jax.Array, *spec: Any) -> jax.Array:
  """Gathers a parameter that lies as `spec` says over "fsdp"; "tensor" stays split.

  Its gradient is summed into the parts again. The constraint's own transpose would make it whole on every device.
  """
  mesh = current_mesh()
  if mesh is None:
    return w
  used = tuple("tensor" if "tensor" in axes_of(entry) else None for entry in spec)
  parts = [math.prod(mesh.shape[axis] for axis in axes_of(entry)) for entry in spec]
  if any(size % count for size, count in zip(w.shape, parts, strict=True)):
    return constrain(w, *used)  # too small to lie in parts
  return linear_call(lambda _, w: constrain(w, *used), lambda _, ct: constrain(ct, *spec), (), w)
