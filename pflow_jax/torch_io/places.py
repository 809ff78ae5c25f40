"""Tensors on disk by their places, read one at a time: nothing is mapped or kept."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from pflow_jax.files.foreign import in_bytes, shown

NEEDS_TORCH = "reading PyTorch's files needs `pip install 'pflow-jax[torch]'`"

MAX_NAME = 400  # characters of a tensor's name

_NAME = re.compile(rf"[\w.\-]{{1,{MAX_NAME}}}", re.ASCII)

# Names of dtypes in safetensors. The 4- and 6-bit ones have no whole number of bytes, and are left out.
DTYPES: dict[str, np.dtype] = {
  name: np.dtype(dtype)
  for name, dtype in {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    **{"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1"},
    "BOOL": "?",
  }.items()
}


@dataclasses.dataclass(frozen=True)
class Place:
  """Place of a tensor on disk.

  Attributes:
    file: that holds it.
    offset: of its first element in the file, in bytes.
    shape: of the tensor.
    dtype: of its elements.
    strides: in elements, for a tensor that does not lie in C order; None for one that does.
  """

  file: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype
  strides: tuple[int, ...] | None = None

  @property
  def nbytes(self) -> int:
    """Size of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize


def placed(
  file: pathlib.Path,
  end: int,
  name: str,
  offset: int,
  shape: tuple[int, ...],
  strides: tuple[int, ...],
  dtype: np.dtype,
) -> Place:
  """Returns the place of a tensor whose file may lie.

  Args:
    file: that holds it.
    end: of what may hold it, in bytes from the file's start.
    name: of the tensor, for errors.
    offset: of its first element in the file, in bytes.
    shape: of the tensor.
    strides: in elements.
    dtype: of its elements.

  Raises:
    ValueError: it cannot be there.
  """
  count = math.prod(shape)
  span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if count else 0
  inside = 0 <= offset <= offset + span * dtype.itemsize <= end and min(strides, default=0) >= 0
  if not inside or count * dtype.itemsize > end:  # more where elements share their bytes
    raise ValueError(f"{file}: the data of {shown(name)} cannot be in a file of {in_bytes(end)}; bring it anew")
  ordered = all(
    n == 1 or step == math.prod(shape[i + 1 :]) for i, (n, step) in enumerate(zip(shape, strides, strict=True))
  )
  return Place(file, offset, shape, dtype, None if ordered or not count else strides)


def checked_names(file: pathlib.Path, places: Mapping[str, Place]) -> Mapping[str, Place]:
  """Returns `places`, whose names go into messages and paths.

  Raises:
    ValueError: a name is no module's.
  """
  for name in places:
    if not _NAME.fullmatch(name):
      raise ValueError(f"{file}: expected names of tensors such as proj_out.weight, got {shown(name)}; bring it anew")
  return places


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Tensors by name, in one file or in several.

  Attributes:
    places: of the tensors.
    metadata: what the files say of themselves, such as "policy_config".
  """

  places: Mapping[str, Place]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: place.shape for name, place in self.places.items()}

  @property
  def nbytes(self) -> int:
    """Size of all tensors."""
    return sum(place.nbytes for place in self.places.values())

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Reads a tensor, or some of its rows, in C order unless its file has it otherwise.

    Args:
      name: of the tensor.
      rows: of its first axis.
    """
    place = self.places[name]
    if place.strides is not None:
      count = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))
      flat = _read(place.file, place.offset, count if math.prod(place.shape) else 0, place.dtype)
      strides = [stride * place.dtype.itemsize for stride in place.strides]
      return np.lib.stride_tricks.as_strided(flat, place.shape, strides)[rows]
    start, stop, _ = rows.indices(place.shape[0]) if place.shape else (0, 1, 1)
    row = math.prod(place.shape[1:])
    flat = _read(place.file, place.offset + start * row * place.dtype.itemsize, (stop - start) * row, place.dtype)
    return flat.reshape((stop - start, *place.shape[1:]) if place.shape else ())

  def renamed(self, names: Mapping[str, str]) -> Tensors:
    """Returns the same tensors by other names, {new: old}."""
    return dataclasses.replace(self, places={new: self.places[old] for new, old in names.items()})

  def without(self, names: Collection[str]) -> Tensors:
    """Returns these tensors but for some."""
    return dataclasses.replace(self, places={name: at for name, at in self.places.items() if name not in names})

  def identity(self) -> list[list[Any]]:
    """Returns paths, sizes and times of change, which tell these files from others without reading them."""
    files = sorted({place.file for place in self.places.values()})
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _read(file: pathlib.Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
  """Reads `count` elements from `offset` on; one buffer, no mapping."""
  flat = np.empty(count * dtype.itemsize, np.uint8)
  view, done = flat.data, 0
  with file.open("rb", buffering=0) as f:
    f.seek(offset)
    while done < len(flat):
      got = f.readinto(view[done:])
      if not got:
        raise ValueError(f"{file} ended while it was read; bring it anew")
      done += got
  return flat.view(dtype)
