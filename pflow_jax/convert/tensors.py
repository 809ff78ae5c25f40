"""Models' files by name: a folder that diffusers wrote, safetensors, state dicts.

A safetensors file is checked by the library that defines the format (length of the header, offsets that overlap or lie
outside) before anything in it is believed.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct

from pflow_jax.convert.pickled import open_pickled
from pflow_jax.convert.places import DTYPES, NEEDS_TORCH, Place, Tensors

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def open_tensors(path: str | os.PathLike, key: str = "") -> Tensors:
  """The tensors of a model folder (diffusers' names, in one file or in shards), a .safetensors or a .pth file.

  Args:
    key: of a .pth file, see `pickled.open_pickled`.
  Raises: ValueError for a file that is none, that is cut short, or that says what cannot be.
  """
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
