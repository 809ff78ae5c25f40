"""State dicts that torch.save wrote (.pth, .pt, .bin), without running what a pickle may ask to run."""

from __future__ import annotations

import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pflow_jax.convert.places import DTYPES, NEEDS_TORCH, Place, Tensors


def open_pickled(file: pathlib.Path, key: str = "") -> Tensors:
  """The tensors of a state dict; the pickle is read with weights_only, the data stay in the file.

  Args:
    key: of the state dict in the file, "a.b" for one within another; by default the file itself, or the only dict of
      tensors in it.
  Raises: ValueError for a pickle with code, another format than torch.save's of version 1.6 on, or a key that is none.
  """
  try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
  except ImportError as error:
    raise ImportError(NEEDS_TORCH) from error
  if not zipfile.is_zipfile(file):
    raise ValueError(
      f"{file} is no file of torch.save, from 1.6 on, or it is cut short; bring it anew or save it again"
    )
  with zipfile.ZipFile(file) as archive:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
      raise ValueError(f"{file}: expected an archive without compression, as torch.save writes; save it again")
  try:
    with FakeTensorMode():  # shapes and offsets, no data
      loaded = torch.load(file, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    call = f", a call of {asked[1]}," if asked else ""
    raise ValueError(
      f"{file} holds more than tensors{call} and was not loaded: such a file can run any code; have its state dict "
      "saved alone"
    ) from error
  except (RuntimeError, EOFError, KeyError) as error:
    raise ValueError(f"{file} cannot be read: {error}; bring it anew") from error
  size = file.stat().st_size
  places = {name: _place(file, size, name, tensor) for name, tensor in _choose(file, loaded, key).items()}
  return Tensors(places)


def _choose(file: pathlib.Path, loaded: Any, key: str) -> Mapping[str, Any]:
  """The dict of tensors that `key` names, or the only one."""
  found = dict(_state_dicts(loaded, ""))
  if key in found:
    return found[key]
  if not key and len(found) == 1:
    return next(iter(found.values()))
  raise ValueError(
    f"{file}: expected --key for one of the state dicts in it, {sorted(found)}, got {key!r}"
    if found
    else f"{file}: expected a dict of tensors, or dicts of them, got {type(loaded).__name__}"
  )


def _state_dicts(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
  import torch

  if not isinstance(value, Mapping):
    return
  tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
  if tensors and all(isinstance(name, str) for name in tensors):
    yield path, tensors
  for name, inner in value.items():
    yield from _state_dicts(inner, f"{path}.{name}" if path else str(name))


def _place(file: pathlib.Path, size: int, name: str, tensor: Any) -> Place:
  itemsize, start = tensor.element_size(), getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
  if start is None:
    raise ImportError("this version of torch does not tell where tensors lie in a file; `pip install 'torch>=2.7'`")
  offset = start + tensor.storage_offset() * itemsize
  shape = tuple(tensor.shape)
  strides = None if tensor.is_contiguous() else tuple(tensor.stride())
  span = 1 + sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True)) if tensor.numel() else 0
  if not 0 <= offset <= offset + span * itemsize <= size:
    raise ValueError(f"{file}: the data of {name} lie outside of the file; bring it anew")
  return Place(file, offset, shape, _dtype(file, name, tensor), strides)


def _dtype(file: pathlib.Path, name: str, tensor: Any) -> np.dtype:
  text = str(tensor.dtype).removeprefix("torch.")
  for dtype in DTYPES.values():
    if dtype.name == text:
      return dtype
  raise ValueError(f"{file}: {name} has the dtype {text}, expected one of {sorted(d.name for d in DTYPES.values())}")
