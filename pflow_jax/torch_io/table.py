"""Tables of names: which PyTorch tensors make which Flax leaf, and how they are turned, both ways.

A model's table is a tuple of rows, read from left to right to import and from right to left to export. Tensors are
only transposed, reshaped, joined, copied and turned in sign, never computed with otherwise: there and back is exact to
the bit. Adapters of `networks.lora` have no rows of their own, see `lora_rows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pflow_jax.torch_io.check import listing

Params = dict[str, Any]
Shape = tuple[int, ...]
Read = Callable[[str], np.ndarray]

INDEX = "{i}"  # in a PyTorch name: the index on the leaf's leading axis, that of an nn.scan

# Axes of the PyTorch tensor in the order of the Flax leaf; None is as they are.
_AXES: dict[str, tuple[int, ...] | None] = {
  "same": None,
  "linear": (1, 0),  # (out, in) -> (in, out)
  "conv": (2, 3, 1, 0),  # OIHW -> HWIO
  "conv3d": (2, 3, 4, 1, 0),  # OIDHW -> DHWIO
  "patch": (2, 3, 1, 0),  # OIHW -> (H W I, O), a Dense layer on patches
  "swap": None,  # the halves of the last axis change places
  "swap_linear": (1, 0),  # (out, in) -> (in, out) and then as "swap"
  "channels2d": None,  # (C, 1, 1) -> (C,)
  "channels3d": None,  # (C, 1, 1, 1) -> (C,)
}
_ONES = {"channels2d": 2, "channels3d": 3}  # axes of length 1 that the leaf does not have


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf and the PyTorch tensors that make it.

  Attributes:
    torch: name of the tensor; "{i}" in it is the index on the leaf's leading axis. Several names are equal parts,
      joined along the leaf's last axis.
    flax: "/"-joined path of the leaf.
    layout: how a tensor is turned into the leaf (of one index, where there is one), see `_AXES`.
    tied: the names all hold the same tensor, which is the leaf; reading them refuses if they differ.
    patch_size: side of the patches, for layout "patch".
    take: (n, m): of every m elements of the leaf's last axis only the first n are wanted, as of an output layer with
      more channels than the network has; there is no way back, what is exported has n.
    negate: the leaf is the tensor with the other sign, as of an output layer whose velocity is x0 - eps.
  """

  torch: str | tuple[str, ...]
  flax: str
  layout: str = "same"
  tied: bool = False
  patch_size: int = 1
  take: tuple[int, int] | None = None
  negate: bool = False

  def __post_init__(self) -> None:
    if self.layout not in _AXES:
      raise ValueError(f"row {self.flax!r}: layout must be one of {sorted(_AXES)}, got {self.layout!r}")
    if len({INDEX in name for name in self.names}) != 1:
      raise ValueError(f"row {self.flax!r}: expected {INDEX} in all of its names or in none, got {self.names}")
    if self.take and self.joined > 1:
      raise ValueError(f"row {self.flax!r}: expected one name where only a part of the tensor is taken")

  @property
  def names(self) -> tuple[str, ...]:
    """The PyTorch names, with "{i}"."""
    return (self.torch,) if isinstance(self.torch, str) else self.torch

  @property
  def stacked(self) -> bool:
    """Returns whether it is of a leaf with a leading axis of layers."""
    return INDEX in self.names[0]

  @property
  def joined(self) -> int:
    """Parts that the leaf's last axis is made of."""
    return 1 if self.tied else len(self.names)

  def at(self, index: int | None) -> tuple[str, ...]:
    """The PyTorch names of layer `index`; None for a leaf without layers."""
    return tuple(name.replace(INDEX, str(index)) for name in self.names) if self.stacked else self.names


Table = Sequence[Row]


def dense(torch: str | tuple[str, ...], flax: str, bias: bool = True, layout: str = "linear") -> tuple[Row, ...]:
  """Returns the rows of a Linear layer.

  Args:
    torch: name of the layer in PyTorch, or names of several that are joined along the outputs.
    flax: path of the Dense layer, such as "head/proj_out".
    bias: whether it has one.
    layout: of the weight; "swap_linear" makes the bias "swap".
  """
  names = (torch,) if isinstance(torch, str) else torch

  def row(end: str, leaf: str, layout: str) -> Row:
    full = tuple(f"{name}.{end}" for name in names)
    return Row(full[0] if isinstance(torch, str) else full, f"{flax}/{leaf}", layout)

  rows = [row("weight", "kernel", layout)]
  if bias:
    rows.append(row("bias", "bias", "swap" if layout == "swap_linear" else "same"))
  return tuple(rows)


def conv(torch: str, flax: str, bias: bool = True, layout: str = "conv") -> tuple[Row, ...]:
  """Returns the rows of a convolution.

  Args:
    torch: name of the layer in PyTorch.
    flax: path of the Conv layer.
    bias: whether it has one.
    layout: of the weight; "conv3d" in three dimensions.
  """
  return dense(torch, flax, bias, layout)


def lora_rows(row: Row) -> tuple[Row, Row]:
  """Returns the rows of the adapter (lora_a, lora_b) beside the kernel of `row`, by the names of peft.

  Of a kernel that is joined from several tensors, each of these has the same A and its part of B.

  Raises:
    ValueError: the row is not a Linear layer's kernel.
  """
  if row.layout not in ("linear", "swap_linear") or not row.flax.endswith("/kernel") or row.take:
    raise ValueError(f"{row.flax}: expected the kernel of a Linear layer, whose adapters PyTorch can hold")
  stem = row.flax.removesuffix("/kernel")

  def names(letter: str) -> str | tuple[str, ...]:
    full = tuple(f"{name.removesuffix('.weight')}.lora_{letter}.weight" for name in row.names)
    return full[0] if isinstance(row.torch, str) else full

  several = not isinstance(row.torch, str)
  return (
    dataclasses.replace(row, torch=names("A"), flax=f"{stem}/lora_a", layout="linear", tied=several, negate=False),
    dataclasses.replace(row, torch=names("B"), flax=f"{stem}/lora_b"),
  )


def is_lora(name: str) -> bool:
  """Returns whether a PyTorch name or a Flax path is an adapter's."""
  return "lora" in name


def turn(row: Row, tensor: np.ndarray) -> np.ndarray:
  """Turns a PyTorch tensor into (its part of) one layer of the leaf; a view where that is possible."""
  axes = _AXES[row.layout]
  x = tensor if axes is None else tensor.transpose(axes)
  if row.layout == "patch":
    x = x.reshape(-1, x.shape[-1])
  if row.layout in _ONES:
    x = x.reshape(-1)
  if row.layout.startswith("swap"):
    x = np.roll(x, x.shape[-1] // 2, axis=-1)
  if row.take:
    kept, of = row.take
    x = x.reshape(*x.shape[:-1], -1, of)[..., :kept].reshape(*x.shape[:-1], -1)
  return -x if row.negate else x


def turn_back(row: Row, x: np.ndarray) -> np.ndarray:
  """Turns (a part of) one layer of the leaf into a PyTorch tensor; a view where that is possible."""
  axes = _AXES[row.layout]
  if row.layout.startswith("swap"):
    x = np.roll(x, x.shape[-1] // 2, axis=-1)
  if row.layout == "patch":
    x = x.reshape(row.patch_size, row.patch_size, -1, x.shape[-1])
  if row.layout in _ONES:
    x = x.reshape(-1, *(1,) * _ONES[row.layout])
  x = -x if row.negate else x
  return x if axes is None else x.transpose(np.argsort(axes))


def turn_shape_back(row: Row, shape: Shape) -> Shape:
  """Returns the shape of the tensor of which `turn` makes `shape`, with the channels that `take` would drop."""
  axes = _AXES[row.layout]
  if row.take:
    shape = (*shape[:-1], shape[-1] // row.take[0] * row.take[1])
  if row.layout == "patch":
    shape = (row.patch_size, row.patch_size, shape[0] // row.patch_size**2, shape[1])
  if row.layout in _ONES:
    shape = (*shape, *(1,) * _ONES[row.layout])
  return tuple(shape) if axes is None else tuple(shape[axis] for axis in np.argsort(axes))


def read_layer(row: Row, read: Read, index: int | None = None) -> np.ndarray:
  """Reads a layer of the leaf, or the leaf itself where it has no layers.

  Args:
    row: of the leaf.
    read: returns the tensor of a name.
    index: of the layer; None for a leaf without layers.

  Raises:
    ValueError: tied tensors differ.
  """
  names = row.at(index)
  if row.tied:
    first = turn(row, read(names[0]))
    for name in names[1:]:
      if not same_bits(turn(row, read(name)), first):
        raise ValueError(
          f"{name} differs from {names[0]}: expected the same tensor, which makes the one leaf {row.flax}; this "
          "network has one for all its layers, and cannot hold a model that has several"
        )
    return first
  if len(names) == 1:
    return turn(row, read(names[0]))
  return np.concatenate([turn(row, read(name)) for name in names], axis=-1)


def tensors_of_layer(row: Row, layer: np.ndarray, index: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) of layer `index` of the leaf, or of the leaf itself where it has no layers."""
  names = row.at(index)
  parts = [layer] * len(names) if row.tied or len(names) == 1 else np.split(layer, len(names), axis=-1)
  for name, part in zip(names, parts, strict=True):
    yield name, turn_back(row, part)


def torch_shapes_of(row: Row, shape: Shape, exported: bool = False) -> dict[str, Shape]:
  """Returns the shapes of all tensors of a leaf, by name.

  Args:
    row: of the leaf.
    shape: of the leaf.
    exported: of what is written, rather than of what is read: they differ where `take` drops channels.
  """
  if exported and row.take:
    row = dataclasses.replace(row, take=None)
  layers: Sequence[int | None] = range(shape[0]) if row.stacked else [None]
  rest = tuple(shape[1:]) if row.stacked else tuple(shape)
  one = turn_shape_back(row, rest if row.joined == 1 else (*rest[:-1], rest[-1] // row.joined))
  return {name: one for index in layers for name in row.at(index)}


def to_flax(table: Table, tensors: Mapping[str, np.ndarray]) -> Params:
  """Returns the nested leaves of `table` from tensors in memory; stacked leaves are as deep as there are names."""
  flat = {}
  for row in table:
    if row.stacked:
      depth = next(i for i in range(len(tensors) + 1) if row.at(i)[0] not in tensors)
      leaf = np.stack([read_layer(row, tensors.__getitem__, i) for i in range(depth)])
    else:
      leaf = np.asarray(read_layer(row, tensors.__getitem__), order="C")
    flat[tuple(row.flax.split("/"))] = leaf
  return unflatten_dict(flat)


def to_torch(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the tensors by name of all leaves of nested parameters in memory, adapters too; the way back of `to_flax`.

  Args:
    table: of names.
    params: nested parameters.

  Raises:
    ValueError: leaves have no row.
  """
  flat = {"/".join(keys): np.asarray(leaf) for keys, leaf in flatten_dict(params).items()}
  rows = rows_for(table, flat)
  tensors: dict[str, np.ndarray] = {}
  for path, leaf in flat.items():
    row = rows[path]
    for index in range(len(leaf)) if row.stacked else [None]:
      pairs = tensors_of_layer(row, leaf if index is None else leaf[index], index)
      tensors |= {name: np.asarray(tensor, order="C") for name, tensor in pairs}
  return tensors


def rows_for(table: Table, paths: Sequence[str] | Mapping[str, Any]) -> dict[str, Row]:
  """Returns the row of every leaf, those of adapters derived from their kernels'.

  Args:
    table: of names.
    paths: of the leaves.

  Raises:
    ValueError: paths have none. All are named.
  """
  rows = {row.flax: row for row in table}
  for path in list(paths):
    stem, _, leaf = path.rpartition("/")
    kernel = rows.get(f"{stem}/kernel")
    if leaf in ("lora_a", "lora_b") and kernel is not None:
      rows |= {row.flax: row for row in lora_rows(kernel)}
  unknown = [path for path in paths if path not in rows]
  if unknown:
    raise ValueError(f"no PyTorch tensor is known for {len(unknown)} parameters: {listing(unknown, list(rows))}")
  return {path: rows[path] for path in paths}


def strip_prefix(names: Sequence[str] | Mapping[str, Any], prefix: str = "transformer.") -> dict[str, str]:
  """Returns {name without the prefix: name}, where all names start with it; else they stay as they are."""
  strip = bool(names) and all(name.startswith(prefix) for name in names)
  return {name.removeprefix(prefix) if strip else name: name for name in names}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  """Returns whether two arrays hold the same bits; NaNs are equal to themselves."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  return np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def flat_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of nested leaves by their "/"-joined paths."""
  return {"/".join(keys): tuple(leaf.shape) for keys, leaf in flatten_dict(tree).items()}
