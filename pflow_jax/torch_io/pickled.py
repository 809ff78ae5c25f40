"""State dicts that torch.save wrote (.pth, .pt, .bin), without running what a pickle may ask to run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pflow_jax.files.foreign import in_bytes, may_pass, regular_file, shown
from pflow_jax.torch_io.places import DTYPES, NEEDS_TORCH, Place, Tensors, checked_names

MAX_PICKLE = 4 * 2**20  # bytes of the pickle in a file, without the tensors' data: some 20,000 tensors
_PICKLE = "data.pkl"
_LENGTHS = 26  # where an entry's header has the lengths of its name and of what follows it, and then ends


def open_pickled(file: pathlib.Path, key: str = "") -> Tensors:
  """Opens the tensors of a state dict; the pickle is read with weights_only, the data stay in the file.

  Nothing is mapped (`mmap=True`): a file that another process cuts short would end a program that reads a mapping of
  it. Nor is memory taken: weights_only lets a pickle call torch.Tensor(n, n), with which a file of a kilobyte may ask
  for gigabytes. FakeTensorMode and _checkpoint_offset are how PyTorch's tutorial on GPUDirect Storage gets at offsets.

  Args:
    file: of torch.save.
    key: of the state dict in the file, "a.b" for one within another; by default the file itself, or the only dict of
      tensors in it.

  Raises:
    ValueError: the pickle holds code, the format is not torch.save's of version 1.6 on, or there is no such key.
    ImportError: PyTorch is not there.
  """
  try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
  except ImportError as error:
    raise ImportError(NEEDS_TORCH) from error
  size = regular_file(file).stat().st_size
  with _reading(file):
    _check_archive(file)
    with FakeTensorMode():  # shapes and offsets, no data
      loaded = torch.load(file, map_location="cpu", weights_only=True)
    found = _choose(file, loaded, key)
    return Tensors(checked_names(file, {name: _place(file, size, name, tensor) for name, tensor in found.items()}))


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
  """Turns what a damaged or hostile archive makes torch and Python raise, of a dozen types, into a ValueError."""
  try:
    yield
  except (ValueError, ImportError):
    raise
  except pickle.UnpicklingError as error:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    raise ValueError(_refusal(file, asked[1] if asked else "")) from error
  except Exception as error:
    if isinstance(error, OSError) and may_pass(error):
      raise
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"{file} cannot be read: {shown(reason, 200)}; bring it anew") from error


def _refusal(file: pathlib.Path, asked: str) -> str:
  call = f", a call of {shown(asked).strip(chr(39))}," if asked else ""
  return (
    f"{file} holds more than tensors{call} and was not loaded: such a file can run any code; have its state dict saved "
    "alone"
  )


def _check_archive(file: pathlib.Path) -> None:
  """Raises ValueError for another archive than torch.save's, or one whose pickle could take memory beyond its size."""
  if not zipfile.is_zipfile(file):
    raise ValueError(
      f"{file} is no file of torch.save, from 1.6 on, or it is cut short; bring it anew or save it again"
    )
  with zipfile.ZipFile(file) as archive:
    entries = archive.infolist()
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
      raise ValueError(f"{file}: expected an archive without compression, as torch.save writes; save it again")
    if names.count(_PICKLE) != 1 or len({entry.filename for entry in entries}) != len(entries):
      raise ValueError(f"{file}: expected an archive with one {_PICKLE} and each name once; save it again")
    entry = entries[names.index(_PICKLE)]
    if not entry.file_size == entry.compress_size <= MAX_PICKLE:
      raise ValueError(f"{file}: expected a pickle of at most {in_bytes(MAX_PICKLE)}; have its state dict saved alone")
    orders = [_stored(file, other, 8) for other, name in zip(entries, names, strict=True) if name == "byteorder"]
  if any(order != b"little" for order in orders):
    raise ValueError(f"{file}: expected numbers whose lowest byte is first; save it again on such a machine")
  for opcode, argument, _ in pickletools.genops(_stored(file, entry, MAX_PICKLE)):
    # torch allows bytearray(n), which takes n bytes of memory.
    if opcode.name == "GLOBAL" and str(argument).endswith("bytearray"):
      raise ValueError(_refusal(file, str(argument).replace(" ", ".")))


def _stored(file: pathlib.Path, entry: zipfile.ZipInfo, limit: int) -> bytes:
  """Returns the bytes of an entry, at most `limit`; its checksum, which torch need not write, is not looked at."""
  with file.open("rb") as f:
    f.seek(entry.header_offset + _LENGTHS)
    f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)
    return f.read(min(entry.file_size, limit))


def _choose(file: pathlib.Path, loaded: Any, key: str) -> Mapping[str, Any]:
  """Returns the dict of tensors that `key` names, or the only one."""
  found = dict(_state_dicts(loaded))
  if key in found:
    return found[key]
  if not key and len(found) == 1:
    return next(iter(found.values()))
  raise ValueError(
    f"{file}: expected --key for one of the state dicts in it, {shown(sorted(found), 300)}, got {shown(key)}"
    if found
    else f"{file}: expected a dict of tensors, or dicts of them, got {type(loaded).__name__}"
  )


def _state_dicts(loaded: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields paths and dicts with tensors in `loaded`, each dict once, whatever holds it: it may hold itself."""
  import torch

  todo, seen = [("", loaded)], set()
  while todo:
    path, value = todo.pop()
    if not isinstance(value, Mapping) or id(value) in seen:
      continue
    seen.add(id(value))
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
    if tensors and all(isinstance(name, str) for name in tensors):
      yield path, tensors
    todo += [(f"{path}.{name}" if path else str(name), inner) for name, inner in value.items()]


def _place(file: pathlib.Path, size: int, name: str, tensor: Any) -> Place:
  storage, itemsize = tensor.untyped_storage(), tensor.element_size()
  if not hasattr(storage, "_checkpoint_offset"):
    raise ImportError("this version of torch does not tell where tensors lie in a file; `pip install 'torch>=2.7'`")
  start = storage._checkpoint_offset
  if start is None:
    raise ValueError(f"{file}: {shown(name)} has no data; save it from a device that has them")
  offset = start + tensor.storage_offset() * itemsize
  shape, steps = tuple(tensor.shape), tuple(tensor.stride())
  span = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if tensor.numel() else 0
  inside = 0 <= offset <= offset + span * itemsize <= size and min(steps, default=0) >= 0
  if not inside or tensor.numel() * itemsize > size:  # more where elements share their bytes
    raise ValueError(f"{file}: the data of {shown(name)} cannot be in a file of {in_bytes(size)}; bring it anew")
  return Place(file, offset, shape, _dtype(file, name, tensor), None if tensor.is_contiguous() else steps)


def _dtype(file: pathlib.Path, name: str, tensor: Any) -> np.dtype:
  text = str(tensor.dtype).removeprefix("torch.")
  for dtype in DTYPES.values():
    if dtype.name == text:
      return dtype
  raise ValueError(
    f"{file}: {shown(name)} has the dtype {text}, expected one of {sorted(d.name for d in DTYPES.values())}"
  )
