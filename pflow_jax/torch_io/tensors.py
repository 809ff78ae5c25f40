"""Models' files by name: a folder that diffusers wrote, safetensors, state dicts.

A safetensors file is checked by the library that defines the format (length of the header, offsets that overlap or lie
outside) before anything in it is believed.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from typing import Any

from pflow_jax.files.foreign import MAX_JSON, in_bytes, is_there, parse_json, read_json, regular_file, shown
from pflow_jax.torch_io.persistent import open_persistent
from pflow_jax.torch_io.pickled import open_pickled
from pflow_jax.torch_io.places import DTYPES, NEEDS_TORCH, Place, Tensors, checked_names

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
PERSISTENT = ".pkl"  # of a network that carries its classes
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class _Index:
  """The index of a folder with several files."""

  weight_map: dict[str, str]


def open_tensors(path: str | os.PathLike, key: str = "") -> Tensors:
  """Opens the tensors of a model, without reading them.

  Args:
    path: folder with diffusers' names, in one file or in shards; or a .safetensors, a .pth or a .pkl file.
    key: of a .pth or a .pkl file, see `torch_io.pickled.open_pickled` and `torch_io.persistent.open_persistent`.

  Raises:
    ValueError: the file is none, is cut short, or says what cannot be.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _open_folder(path, key)
  if not path.exists():
    raise ValueError(f"there is no file or folder {path}")
  if path.suffix in PICKLED:
    return open_pickled(path, key)
  if path.suffix == PERSISTENT:
    return open_persistent(path, key)
  if path.suffix != ".safetensors":
    raise ValueError(f"{path}: expected a folder, or a file .safetensors, .pth, .pt, .bin, .ckpt or .pkl")
  return open_safetensors(path)


def _open_folder(folder: pathlib.Path, key: str) -> Tensors:
  if (folder / INDEX).exists():
    return _open_shards(folder)
  found = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else sorted(folder.glob("*.safetensors"))
  found = found or [folder / "diffusion_pytorch_model.bin"]
  if len(found) != 1 or not found[0].exists():
    names = sorted(path.name for path in folder.iterdir())
    raise ValueError(
      f"{folder}: expected {WEIGHTS}, or shards with {INDEX}, got {shown(names, 300)}; give the folder of the "
      "transformer, or a file"
    )
  return open_tensors(found[0], key)


def _open_shards(folder: pathlib.Path) -> Tensors:
  """Opens the files that the index of a folder names, each of which must be in the folder itself.

  A file may be a link, as in the caches of model hubs.
  """
  index = folder / INDEX
  weight_map = read_json(index, _Index).weight_map
  files = sorted(set(weight_map.values()))
  outside = [name for name in files if pathlib.PurePath(name).name != name or "\\" in name or "\0" in name]
  if outside:
    raise ValueError(
      f"{index}: expected names of files in this folder, got {shown(outside, 300)}; do not trust this folder"
    )
  missing = [name for name in files if not is_there(folder / name)]
  if missing:
    raise ValueError(f"{index} names files that are not there: {shown(missing, 300)}; bring them, or the folder anew")
  shards = {name: open_safetensors(folder / name) for name in files}
  lost = [name for name, file in weight_map.items() if name not in shards[file].places]
  extra = [name for file, shard in shards.items() for name in shard.places if weight_map.get(name) != file]
  if lost or extra:
    raise ValueError(
      f"{index} does not fit its files: {len(lost)} tensors are not where it says, such as {shown(lost[:3], 300)}, and "
      f"it does not know {len(extra)}, such as {shown(extra[:3], 300)}; bring the folder anew"
    )
  places = {name: shards[file].places[name] for name, file in weight_map.items()}
  metadata: dict[str, str] = {}
  for shard in shards.values():
    metadata |= shard.metadata
  return Tensors(places, metadata)


def open_safetensors(file: pathlib.Path) -> Tensors:
  """Opens the tensors of one safetensors file."""
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError as error:
    raise ImportError(NEEDS_TORCH) from error
  size = regular_file(file).stat().st_size
  with file.open("rb") as f:
    head = f.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 0 < length <= min(size - 8, MAX_JSON):
      raise ValueError(
        f"{file} is no intact safetensors file: expected a header of up to {in_bytes(MAX_JSON)} in it, its length says "
        f"{in_bytes(length)}; bring it anew"
      )
    text = f.read(length)
  try:
    with safe_open(file, "np") as checked:  # maps the file, of which nothing but the header is touched
      metadata = checked.metadata() or {}
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{file} is no intact safetensors file: {shown(str(error), 200)}; bring it anew") from error
  header = parse_json(text, dict[str, dict[str, Any]], where=f"{file}, its header")
  header.pop(_METADATA, None)
  unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
  if unknown:
    raise ValueError(f"{file}: expected dtypes among {sorted(DTYPES)}, got {shown(unknown, 300)}")
  places = {
    name: Place(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
    for name, entry in header.items()
  }
  return Tensors(checked_names(file, places), metadata)
