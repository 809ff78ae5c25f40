"""Checkpoints larger than the memory: written and read a layer at a time, by Orbax and the store below it.

The checkpoints are like those of `checkpoints.checkpoint.Checkpointer`, and the same functions restore them. Like that
module, this one knows Orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import pathlib
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict

from pflow_jax.checkpoints.checkpoint import UNFINISHED, Checkpointer, handlers_of, saved_part
from pflow_jax.checkpoints.steps import STATE, leaves_of, storage
from pflow_jax.files import foreign
from pflow_jax.files.folders import absolute, is_remote
from pflow_jax.mesh.sharding import Layout

PyTree = Any
Index = tuple[slice, ...]

CHUNK_BYTES = 8 * 2**20  # bytes that are written at once, beside the layer that they are a part of
TREE_BYTES = 100 * 2**20  # bytes of the tree of keys that are kept in memory
_INTERRUPTED = "interrupted"


class Leaf(Protocol):
  """An array that is made a layer at a time.

  Attributes:
    shape: of the whole array.
    dtype: of the whole array.
    stacked: whether its first axis is one of layers; if not, the only layer is the array.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  stacked: bool

  def layer(self, index: int | None) -> np.ndarray:
    """Makes layer `index`, None for the only one; in any memory order and dtype."""

  def read(self, index: Index) -> np.ndarray:
    """Reads a part of the array."""


@dataclasses.dataclass(eq=False)
class _Streamed:
  """A leaf as Orbax's machinery sees it, an array that has not been read."""

  leaf: Leaf
  chunk: tuple[int, ...]
  report: Callable[[int], None]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape

  @property
  def dtype(self) -> np.dtype:
    return self.leaf.dtype

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  async def write(self, store: ts.TensorStore, written: set[str], directory: epath.Path) -> None:
    """Writes the chunks that are not `written`, some at a time, reading every layer once."""
    leaf, chunk, slab = self.leaf, self.chunk, slab_shape(self.leaf, self.chunk)
    for first in range(0, leaf.shape[0] if leaf.stacked else 1, chunk[0] if leaf.stacked else 1):
      parts = [index for index in _grid(self.shape, slab) if not leaf.stacked or index[0].start == first]
      missing = [index for index in parts if not _keys(index, chunk) <= written]
      layers = self._layers(first) if missing else None
      for index in parts:
        if index in missing:
          part = _part(layers, leaf, index)  # an error of a leaf is no error of the storage
          with storage(directory):
            await store[index].write(part, can_reference_source_data_indefinitely=True)
        self.report(math.prod(s.stop - s.start for s in index) * self.dtype.itemsize)
      del layers

  def _layers(self, first: int) -> list[np.ndarray]:
    if not self.leaf.stacked:
      return [self.leaf.layer(None)]
    return [self.leaf.layer(i) for i in range(first, min(first + self.chunk[0], self.shape[0]))]


def _part(layers: list[np.ndarray] | None, leaf: Leaf, index: Index) -> np.ndarray:
  assert layers is not None
  rest = index[1:] if leaf.stacked else index
  parts = [np.asarray(layer[rest], leaf.dtype, order="C") for layer in layers]
  return np.stack(parts) if leaf.stacked else parts[0]


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
  """Every chunk of an array, in C order."""
  axes = [
    [slice(i, min(i + step, size)) for i in range(0, size, step)] for size, step in zip(shape, chunk, strict=True)
  ]
  return itertools.product(*axes)


def _keys(index: Index, chunk: tuple[int, ...]) -> set[str]:
  """Names, in a Zarr array, of the chunks of a part."""
  axes = [range(s.start // step, -(-s.stop // step)) for s, step in zip(index, chunk, strict=True)]
  return {".".join(map(str, numbers)) or "0" for numbers in itertools.product(*axes)}


def chunk_shape(leaf: Leaf, part: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the chunks of a leaf of which a device holds `part`: one layer of the part, or all layers of a small one.

  A chunk larger than CHUNK_BYTES is cut further, along the last axis that can be.
  """
  chunk = list(part)
  if leaf.stacked and _bytes(chunk, leaf) > CHUNK_BYTES:
    chunk[0] = 1
  axis = max((i for i, size in enumerate(chunk) if size > 1), default=0)
  while _bytes(chunk, leaf) > CHUNK_BYTES and chunk[axis] > 1:
    size = chunk[axis]
    chunk[axis] = size // next(divisor for divisor in range(2, size + 1) if size % divisor == 0)
  return tuple(chunk)


def slab_shape(leaf: Leaf, chunk: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the part that is written at once: a chunk, or as many neighbours in its layers as fit CHUNK_BYTES."""
  slab = list(chunk)
  for axis in reversed(range(1 if leaf.stacked else 0, len(slab))):
    room = CHUNK_BYTES // max(_bytes(slab, leaf), 1)
    slab[axis] = min(slab[axis] * max(room, 1), -(-leaf.shape[axis] // chunk[axis]) * chunk[axis])
  return tuple(slab)


def _bytes(shape: list[int], leaf: Leaf) -> int:
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize


class _Handler(ocp.type_handlers.NumpyHandler):
  """Writes leaves that are read while they are written, one at a time; to Orbax they are NumPy arrays.

  Attributes:
    error: the error that stopped the writing, as it was raised.
  """

  def __init__(self, directory: epath.Path, interrupted: pathlib.Path | None):
    super().__init__()
    self._folder, self._interrupted, self._context = directory, interrupted, _context()
    self.error: Exception | None = None

  async def serialize(self, values, infos, args=None):
    """Starts the writing of all leaves, see ocp.type_handlers.TypeHandler."""
    writing = self._write_leaves(values, infos)
    return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="pflow_jax.checkpoints.stream")]

  async def _write_leaves(self, leaves: Sequence[_Streamed], infos: Sequence[ocp.type_handlers.ParamInfo]) -> None:
    try:
      await infos[0].await_path_creation()
      if self._interrupted is not None:
        for folder in self._interrupted.glob(f"{STATE}*/ocdbt.process_*"):
          folder.rename(infos[0].parent_dir / folder.name)
        shutil.rmtree(self._interrupted)
      for leaf, info in zip(leaves, infos, strict=True):
        await info.await_path_creation()
        await self._write_leaf(leaf, info)
    except Exception as error:
      self.error = error
      raise

  async def _write_leaf(self, leaf: _Streamed, info: ocp.type_handlers.ParamInfo) -> None:
    layout = {"shape": leaf.shape, "chunks": leaf.chunk, "compressor": {"id": "zstd", "level": 1}}
    spec = _spec(info.parent_dir / "ocdbt.process_0", info.name) | {"metadata": layout, "dtype": leaf.dtype.name}
    with storage(self._folder):
      store = await ts.open(spec, create=True, open=True, context=self._context)
      written = {key.decode() for key in await store.kvstore.list()}  # type: ignore[union-attr]
    await leaf.write(store, written, self._folder)


def _spec(folder: epath.Path, name: str, driver: str = "zarr") -> dict[str, Any]:
  """TensorStore's specification of an array in a folder of Orbax's, whose one tree of keys has the chunks of all."""
  scheme, _, path = str(folder).rpartition("://")
  base = f"{scheme or 'file'}://{urllib.parse.quote(path)}/"
  # All chunks are written, those of zeros too: a missing one is an error and does not stand for zeros.
  whole = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
  tree = {"driver": "ocdbt", "base": base, "path": name, "cache_pool": "cache_pool#tree"}
  return {"driver": driver, "kvstore": tree} | whole


def _context() -> ts.Context:
  """Cache that arrays share that are open together: the nodes of the tree of their keys, and none of their data."""
  return ts.Context({"cache_pool#tree": {"total_bytes_limit": TREE_BYTES}})


class _StreamCheckpointer(Checkpointer):
  """A Checkpointer of trees of `_Streamed`."""

  def __init__(self, directory: str | epath.PathLike, handler: _Handler):
    super().__init__(directory, max_to_keep=None)
    self._handlers = handlers_of((_Streamed, handler))


def save_leaves(
  directory: str | epath.PathLike,
  state: Mapping[str, PyTree],
  *,
  step: int = 0,
  layout: Layout | None = None,
  resume: bool = False,
  report: Callable[[int], None] = lambda nbytes: None,
) -> None:
  """Saves nested dicts of leaves as the checkpoint of `step`, with at most a layer of a leaf in memory.

  In a job of several processes the devices hold the leaves in between, each process's devices its parts.

  Args:
    directory: as of a Checkpointer.
    state: such as {"params": leaves}.
    step: of the checkpoint.
    layout: the parts of its devices (it may be one without devices) are the chunks of the arrays on disk; None writes
      whole layers.
    resume: go on with the files of an interrupted call, which must have been of the same leaves and layout.
    report: called with the number of bytes written since its last call.

  Raises:
    Exception: any that reading a leaf raises. There is no checkpoint then. The written part waits for `resume`; after a
      ValueError, which another try would repeat, it is removed.
  """
  if jax.process_count() > 1:
    if layout is None:
      raise ValueError("expected a layout on the devices of all processes")
    arrays = {name: place_leaves(tree, layout) for name, tree in state.items()}
    with Checkpointer(directory) as checkpointer:
      checkpointer.save(step, arrays)
    return
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(state))
  if layout is None:
    parts = jax.tree.map(lambda leaf: leaf.shape, shapes)
  else:
    parts = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), shapes, layout.shardings(shapes))
  stream = lambda leaf, part: _Streamed(leaf, chunk_shape(leaf, tuple(part)), report)
  streamed = jax.tree.map(stream, dict(state), parts)
  handler = _Handler(absolute(directory), _set_aside(absolute(directory), step, resume))
  try:
    with _quiet(), _StreamCheckpointer(directory, handler) as checkpointer:
      checkpointer.save(step, streamed)
  except Exception as error:
    cause = handler.error or error
    if isinstance(cause, ValueError):
      _discard(absolute(directory), step)
    raise cause from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Context without Orbax's reports of an error, one from each of its threads: the error itself is raised."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(before)


def _unfinished(directory: epath.Path, step: int) -> tuple[epath.Path, epath.Path]:
  """Folders of an unfinished step: the one that Orbax writes, and the one it is moved to, out of Orbax's way."""
  return directory / f"{step}{UNFINISHED}", directory / f"{step}.{_INTERRUPTED}"


def _set_aside(directory: epath.Path, step: int, resume: bool) -> pathlib.Path | None:
  """Moves the files of an interrupted call away from Orbax, which would remove them; returns their place, or None."""
  left, aside = _unfinished(directory, step)
  if is_remote(directory):
    return None  # object stores cannot move folders
  if left.exists() and any(left.glob(f"{STATE}*/ocdbt.process_*")):
    if aside.exists():
      aside.rmtree()
    left.rename(aside)
  if not aside.exists():
    return None
  if resume:
    return pathlib.Path(aside)
  aside.rmtree()
  return None


def _discard(directory: epath.Path, step: int) -> None:
  """Removes the files of a step that will not be finished, and its folder if that has nothing else."""
  for left in _unfinished(directory, step):
    if left.exists():
      left.rmtree()
  if directory.exists() and not any(directory.iterdir()):
    directory.rmdir()


def place_leaves(leaves: PyTree, layout: Layout) -> PyTree:
  """Places nested leaves on the devices of a layout as global arrays; each process reads its devices' parts alone."""
  shardings = layout.shardings(leaves)

  def place(leaf: Leaf, sharding: Any) -> jax.Array:
    whole = lambda index: tuple(slice(*s.indices(size)) for s, size in zip(index, leaf.shape, strict=True))
    part = lambda index: np.asarray(leaf.read(whole(index)), leaf.dtype, order="C")
    return jax.make_array_from_callback(leaf.shape, sharding, part)

  return jax.tree.map(place, leaves, shardings)


@dataclasses.dataclass(frozen=True)
class Stored:
  """A leaf of a checkpoint, read in parts."""

  store: ts.TensorStore
  shape: tuple[int, ...]
  dtype: np.dtype
  folder: epath.Path

  @property
  def chunk(self) -> tuple[int, ...]:
    """Shape of the parts that are read as a whole."""
    return tuple(self.store.chunk_layout.read_chunk.shape)  # type: ignore[arg-type]

  def read(self, index: Index) -> np.ndarray:
    """Reads a part of the array."""
    with storage(self.folder):
      return self.store[index].read().result() if index else self.store.read().result()


def open_leaves(directory: str | epath.PathLike, *, which: str = "ema", step: int | None = None) -> dict[str, Stored]:
  """Opens the leaves of a checkpoint, by their "/"-joined paths, and reads none of them.

  Arguments and errors are those of `checkpoints.checkpoint.load_params`.
  """
  path, item = saved_part(directory, which, step)
  return _open(path, item[which], which)


def open_parts(path: epath.Path) -> dict[str, dict[str, Stored]]:
  """Opens all parts of the checkpoint of one step, like `open_leaves`, without a look at its checksums.

  Args:
    path: of the step, absolute.

  Returns:
    leaves by their paths, by the names of the parts. A part that is a single leaf has the path "".

  Raises:
    ValueError: a leaf cannot be opened.
    OSError: the storage may be at fault.
  """
  return {which: _open(path, item, which) for which, item in leaves_of(path).items()}


def _open(path: epath.Path, item: PyTree, which: str) -> dict[str, Stored]:
  folder = path / STATE
  driver = "zarr3" if foreign.read_json(str(folder / "_METADATA")).get("use_zarr3") else "zarr"
  leaves, context = {}, _context()
  for keys, leaf in flatten_dict({which: item}).items():
    with storage(folder):
      store = ts.open(_spec(folder, ".".join(keys), driver), open=True, context=context).result()
    leaves["/".join(keys[1:])] = Stored(store, tuple(leaf.shape), np.dtype(leaf.dtype), folder)
  return leaves
