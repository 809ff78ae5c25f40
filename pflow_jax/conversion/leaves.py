"""Parameters of ours made from tensors in files, and tensors made from the leaves of a checkpoint, a part at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax.checkpoints.stream import Index, Stored
from pflow_jax.networks.layers import CONSTANTS
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.shards import Planned
from pflow_jax.torch_io.table import Row, read_layer, torch_shapes_of, turn, turn_back


@dataclasses.dataclass(frozen=True)
class TensorLeaf:
  """A leaf made of tensors in files; a `checkpoints.stream.Leaf`.

  Attributes:
    row: of the leaf.
    tensors: in the files.
    shape: of the leaf.
    dtype: of the leaf.
    absent: layers that the files do not have, which are zeros.
  """

  row: Row
  tensors: Tensors
  shape: tuple[int, ...]
  dtype: np.dtype
  absent: frozenset[int] = frozenset()

  @property
  def stacked(self) -> bool:
    """Returns whether it has a leading axis of layers."""
    return self.row.stacked

  def layer(self, index: int | None) -> np.ndarray:
    """Layer `index`, None for a leaf without layers; a view of what was read where that is possible."""
    if index in self.absent:
      return np.zeros(self.shape[1:], self.dtype)
    return read_layer(self.row, self.tensors.read, index)

  def read(self, index: Index) -> np.ndarray:
    """A part of the leaf; of Linear layers no more is read than rows of tensors that are needed."""
    if not self.stacked:
      return self._part(None, index)
    return np.stack([self._part(i, index[1:]) for i in range(index[0].start, index[0].stop)])

  def _part(self, layer: int | None, index: Index) -> np.ndarray:
    if self.row.layout != "linear" or self.row.tied or self.row.take or layer in self.absent:
      return self.layer(layer)[index]
    columns, names = index[-1], self.row.at(layer)
    size = self.shape[-1] // len(names)
    parts = []
    for i, name in enumerate(names):
      start, stop = max(columns.start - i * size, 0), min(columns.stop - i * size, size)
      if start < stop:
        parts.append(turn(self.row, self.tensors.read(name, slice(start, stop)))[index[0]])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def dtype_of(row: Row, names: Sequence[str], tensors: Tensors, wanted: np.dtype | None) -> np.dtype:
  """Returns the dtype of a leaf.

  Args:
    row: of the leaf.
    names: of its tensors.
    tensors: in the files.
    wanted: of floating leaves; None is the tensors'.

  Raises:
    ValueError: they have several and none is wanted.
  """
  found = {tensors.places[name].dtype for name in names}
  is_constant = re.fullmatch(CONSTANTS, row.flax) is not None
  if wanted is not None and not is_constant and all(_is_float(dtype) for dtype in found):
    return wanted
  if len(found) > 1:
    raise ValueError(
      f"{row.flax}: its tensors, {names[0]} and others, have the dtypes {sorted(map(str, found))}; give --dtype"
    )
  return found.pop()


def _is_float(dtype: np.dtype) -> bool:
  return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Origin of a tensor: part `part` of `parts` along the last axis of a layer of a leaf."""

  path: str
  layer: int | None
  part: int
  parts: int


class Exporter:
  """Tensors by name, made of the leaves of a checkpoint.

  Args:
    leaves: of the checkpoint, by path.
    rows: of the leaves, by path.
    dtype: of the tensors; None is the leaves'.
    scale: of leaves, by path, where it is not 1.
    unused: layers, (path, index), that are left out.
    constants: tensors that no leaf has, by name.
  """

  def __init__(
    self,
    leaves: Mapping[str, Stored],
    rows: Mapping[str, Row],
    dtype: np.dtype | None = None,
    scale: Mapping[str, float] | None = None,
    unused: Collection[tuple[str, int]] = (),
    constants: Mapping[str, np.ndarray] | None = None,
  ):
    self._leaves, self._rows, self._scale, self._constants = leaves, rows, scale or {}, constants or {}
    self._pieces: dict[str, _Piece] = {}
    self.planned: list[Planned] = []
    self._held: dict[Any, np.ndarray] = {}
    for path, leaf in leaves.items():
      row = rows[path]
      shapes = torch_shapes_of(row, leaf.shape, exported=True)
      layers: Sequence[int | None] = range(leaf.shape[0]) if row.stacked else [None]
      for layer in layers:
        if (path, layer) in unused:
          continue
        for i, name in enumerate(row.at(layer)):
          self._pieces[name] = _Piece(path, layer, 0 if row.tied else i, row.joined)
          self.planned.append(Planned(name, shapes[name], dtype or leaf.dtype))
    self.planned += [Planned(name, value.shape, dtype or value.dtype) for name, value in self._constants.items()]

  def tensor(self, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor in C order, made in one buffer beside a chunk of the checkpoint."""
    if name in self._constants:
      return np.asarray(self._constants[name], dtype, order="C")
    piece = self._pieces[name]
    row, leaf, scale = self._rows[piece.path], self._leaves[piece.path], self._scale.get(piece.path, 1)
    size = leaf.shape[-1] // piece.parts if leaf.shape else 0
    start = piece.part * size
    if row.layout != "linear":
      return np.asarray(turn_back(row, self._columns(piece, start, start + size)), dtype, order="C")
    out = np.empty((size, leaf.shape[-2]), dtype)
    step = leaf.chunk[-1]
    while start < (piece.part + 1) * size:
      stop = min((start // step + 1) * step, (piece.part + 1) * size)
      columns = self._columns(piece, start, stop)
      columns = -columns if row.negate else columns
      first = start - piece.part * size
      out[first : first + stop - start] = (columns if scale == 1 else columns.astype(np.float32) * scale).T
      start = stop
    return out

  def _columns(self, piece: _Piece, start: int, stop: int) -> np.ndarray:
    """Columns (of the last axis) of one layer."""
    leaf = self._leaves[piece.path]
    if not leaf.shape:
      return leaf.read(())
    rest = (*(slice(0, size) for size in leaf.shape[:-1]), slice(start, stop))
    if piece.layer is None:
      return leaf.read(rest)
    first = piece.layer // leaf.chunk[0] * leaf.chunk[0]
    if leaf.chunk[0] == 1:
      return leaf.read((slice(first, first + 1), *rest[1:]))[0]
    # The layers of a chunk are read together anyway: they are kept for the tensors that come next.
    block, part = (piece.path, first), (start, stop)
    if any(key[0] != block for key in self._held):
      self._held.clear()
    if (block, part) not in self._held:
      last = min(first + leaf.chunk[0], leaf.shape[0])
      self._held[block, part] = leaf.read((slice(first, last), *rest[1:]))
    return self._held[block, part][piece.layer - first]
