"""Tensors on disk by name, read one at a time: where each lies in which file, and nothing mapped or kept.

A safetensors file is checked by the library that defines the format (length of the header, offsets that overlap or lie
outside) before anything in it is believed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
NEEDS_TORCH = "reading PyTorch's files needs `pip install 'pflow-jax[torch]'`"

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
  """Where a tensor lies.

  Attributes:
    offset: of its first element in the file, in bytes.
    strides: in elements, for a tensor that does not lie in C order; None for one that does.
  """

  file: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype
  strides: tuple[int, ...] | None = None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Tensors by name, in one file or in several.

  Attributes:
    metadata: what the files say of themselves, such as "policy_config".
  """

  places: Mapping[str, Place]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: place.shape for name, place in self.places.items()}

  @property
  def nbytes(self) -> int:
    return sum(place.nbytes for place in self.places.values())

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """A tensor, or some of its rows (of the first axis), in C order unless its file has it otherwise."""
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
    """The same tensors by other names, {new: old}."""
    return dataclasses.replace(self, places={new: self.places[old] for new, old in names.items()})

  def identity(self) -> list[list[Any]]:
    """What tells these files from others, without reading them: paths, sizes and times of change."""
    files = sorted({place.file for place in self.places.values()})
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def open_tensors(path: str | os.PathLike, key: str = "") -> Tensors:
  """The tensors of a model folder (diffusers' names, in one file or in shards), a .safetensors or a .pth file.

  Args:
    key: of a .pth file, see `pickled.open_pickled`.
  Raises: ValueError for a file that is none, that is cut short, or that says what cannot be.
  """
  from pflow_jax.convert.pickled import open_pickled

  path = pathlib.Path(path)
  if path.is_dir():
    return _open_folder(path, key)
  if not path.is_file():
    raise ValueError(f"there is no file or folder {path}")
  if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
    return open_pickled(path, key)
  if path.suffix != ".safetensors":
    raise ValueError(f"{path}: expected a folder, or a file .safetensors, .pth, .pt, .bin or .ckpt")
  return open_safetensors(path)


def _open_folder(folder: pathlib.Path, key: str) -> Tensors:
  if (folder / INDEX).is_file():
    return _open_shards(folder)
  found = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
  found = found or [folder / "diffusion_pytorch_model.bin"]
  if len(found) != 1 or not found[0].is_file():
    raise ValueError(
      f"{folder}: expected {WEIGHTS}, or shards with {INDEX}, got {sorted(p.name for p in folder.iterdir())}; give the "
      "folder of the transformer, or a file"
    )
  return open_tensors(found[0], key)


def _open_shards(folder: pathlib.Path) -> Tensors:
  """The files that the index of a folder names, each of which must be in the folder itself."""
  index = folder / INDEX
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if pathlib.PurePath(name).name != name or "\\" in name]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index}: expected JSON with the entry weight_map, {{tensor: file}}: {error}") from error
  if outside:
    raise ValueError(f"{index}: expected names of files in this folder, got {outside}; do not trust this folder")
  missing = [name for name in files if not (folder / name).is_file()]
  if missing:
    raise ValueError(f"{index} names files that are not there: {missing}; bring them, or the folder anew")
  shards = {name: open_safetensors(folder / name) for name in files}
  lost = [name for name, file in weight_map.items() if name not in shards[file].places]
  extra = [name for file, shard in shards.items() for name in shard.places if weight_map.get(name) != file]
  if lost or extra:
    raise ValueError(
      f"{index} does not fit its files: {len(lost)} tensors are not where it says, such as {lost[:3]}, and it does not "
      f"know {len(extra)}, such as {extra[:3]}; bring the folder anew"
    )
  places = {name: shards[file].places[name] for name, file in weight_map.items()}
  metadata: dict[str, str] = {}
  for shard in shards.values():
    metadata |= shard.metadata
  return Tensors(places, metadata)


def open_safetensors(file: pathlib.Path) -> Tensors:
  """The tensors of one safetensors file."""
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError as error:
    raise ImportError(NEEDS_TORCH) from error
  try:
    with safe_open(file, "np") as checked:  # maps the file, of which nothing but the header is touched
      metadata = checked.metadata() or {}
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{file} is no intact safetensors file: {error}; bring it anew") from error
  with file.open("rb") as f:
    (length,) = struct.unpack("<Q", f.read(8))
    header = json.loads(f.read(length))
  header.pop("__metadata__", None)
  unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
  if unknown:
    raise ValueError(f"{file}: expected dtypes among {sorted(DTYPES)}, got {unknown}")
  places = {
    name: Place(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
    for name, entry in header.items()
  }
  return Tensors(places, metadata)


def _read(file: pathlib.Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
  """`count` elements from `offset` on; one buffer, no mapping."""
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
