"""State dicts that PyTorch wrote (.pth, .pt, .bin), without running what a pickle may ask to run, or a program."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pflow_jax.files.foreign import in_bytes, may_pass, regular_file, shown
from pflow_jax.torch_io import unloaded
from pflow_jax.torch_io.places import DTYPES, NEEDS_TORCH, Place, Tensors, checked_names, placed
from pflow_jax.torch_io.unloaded import MAX_PICKLE, PICKLE

_MOST_KNOWN = 4096  # layouts of files that are remembered
ARGUMENTS, CHOSEN = "args of torch.save", "key of torch.save"  # in `Tensors.metadata`
_TOLD = ("ema", "state_dict", "model")  # state dicts of a training's checkpoint, the best first
# A value can be in many places of a pickle, so that what is written out of it needs bounds of its own.
_MOST_DICTS = 20_000  # of tensors in a file; an optimizer has one for each parameter
_DEPTH = 8  # of dicts within dicts that are looked at
_LONGEST = 200  # characters of a key that is looked at
_MOST_ARGUMENTS = 10**6  # characters of a training's arguments


def open_pickled(file: pathlib.Path, key: str = "") -> Tensors:
  """Opens the tensors of a state dict, or of a program of torch.jit.save, whose data stay in the file.

  Args:
    file: of torch.save, or of torch.jit.save.
    key: of the state dict in the file, "a.b" for one within another; by default the file itself, or the only dict of
      tensors in it, or, of several, "ema", "state_dict" or "model". A program has none.

  Returns:
    The tensors. Their metadata have CHOSEN, the key, where one of several state dicts was taken, and ARGUMENTS, the
    plain values of the arguments of a training as JSON, where the file has them in "args".

  Raises:
    ValueError: the pickle holds code, the file is none of PyTorch's, or there is no such key.
    ImportError: PyTorch is not there, which reads what torch.save writes from version 1.6 on.
  """
  regular_file(file)
  with _reading(file):
    if unloaded.is_old(file):
      found = _open_old(file, key)
    elif _check_archive(file):
      found = Tensors(unloaded.open_program(file))
      if key or not found.places:
        raise ValueError(f"{file}: expected {'no --key' if key else 'tensors'}, as a program of torch.jit.save")
    else:
      found = _open_saved(file, key)
    checked_names(file, found.places)
    return found


def _open_saved(file: pathlib.Path, key: str) -> Tensors:
  """Opens a file of torch.save; the pickle is read with weights_only, the data stay in the file.

  Nothing is mapped (`mmap=True`): a file that another process cuts short would end a program that reads a mapping of
  it. Nor is memory taken: weights_only lets a pickle call torch.Tensor(n, n), with which a file of a kilobyte may ask
  for gigabytes. FakeTensorMode and _checkpoint_offset are how PyTorch's tutorial on GPUDirect Storage gets at offsets.
  """
  try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
  except ImportError as error:
    raise ImportError(NEEDS_TORCH) from error
  arguments = torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")])
  with arguments, FakeTensorMode():  # shapes and offsets, no data
    loaded = torch.load(file, map_location="cpu", weights_only=True)
  size = file.stat().st_size
  found, metadata = _choose(file, loaded, key, torch.Tensor)
  places = {name: _place(file, size, name, tensor) for name, tensor in found.items()}
  return Tensors(places, metadata | _arguments(loaded))


def _open_old(file: pathlib.Path, key: str) -> Tensors:
  loaded, place = unloaded.load_old(file, functools.partial(_refusal, file))
  found, metadata = _choose(file, loaded, key, unloaded.View)
  return Tensors({name: place(name, view) for name, view in found.items()}, metadata)


class _Arguments:
  """Stands for argparse.Namespace, in which training scripts save their arguments: plain values alone are kept."""

  values: Mapping[str, Any] = {}

  def __setstate__(self, state: Any) -> None:
    self.values = dict(state) if isinstance(state, dict) else {}


def _arguments(loaded: Any) -> dict[str, str]:
  """Returns the plain values of the arguments in a checkpoint, as an entry of the metadata."""
  found = loaded.get("args") if isinstance(loaded, Mapping) else None
  values = found.values if isinstance(found, _Arguments) else found if isinstance(found, Mapping) else {}
  plain = {name: value for name, value in values.items() if isinstance(name, str) and _is_plain(value)}
  length = sum(len(name) + (len(value) if isinstance(value, str) else 1) for name, value in plain.items())
  return {ARGUMENTS: json.dumps(plain)} if plain and length <= _MOST_ARGUMENTS else {}


def _is_plain(value: Any) -> bool:
  if isinstance(value, int):  # bool too
    return abs(value) < 2**63
  return value is None or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


class PickledAlike:
  """Opens many files of torch.save, such as the records of a set, of which few are laid out in different ways.

  A file whose pickle and whose table of contents are those of one that was opened before has its tensors at the same
  places; `open_pickled` takes milliseconds for each of the others.
  """

  def __init__(self) -> None:
    self._known: dict[Any, Tensors] = {}

  def open(self, file: pathlib.Path) -> Tensors:
    """Opens a file; errors are those of `open_pickled`."""
    if not zipfile.is_zipfile(regular_file(file)):
      return open_pickled(file)
    with _reading(file), zipfile.ZipFile(file) as archive:
      entries = archive.infolist()
      # The folder in an archive is named as the file; where an entry's bytes begin depends on the length of its name.
      contents = tuple(
        (entry.filename.partition("/")[2], len(entry.filename), entry.header_offset, entry.file_size)
        for entry in entries
      )
      found = [entry for entry in entries if entry.filename.endswith(f"/{PICKLE}")]
      pickles = tuple(unloaded.stored(file, entry, MAX_PICKLE) for entry in found)
    layout = file.stat().st_size, contents, pickles
    known = self._known.get(layout)
    if known is None:
      known = open_pickled(file)
      if len(self._known) < _MOST_KNOWN:
        self._known[layout] = known
    return Tensors({name: dataclasses.replace(place, file=file) for name, place in known.places.items()})


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


def _check_archive(file: pathlib.Path) -> bool:
  """Returns whether an archive of PyTorch is of torch.jit.save.

  Raises:
    ValueError: it is another archive, or its pickle could take memory beyond its size.
  """
  if not zipfile.is_zipfile(file):
    raise ValueError(f"{file} is no file of torch.save or torch.jit.save, or it is cut short; bring it anew")
  with zipfile.ZipFile(file) as archive:
    entries = archive.infolist()
  names = [entry.filename.rpartition("/")[2] for entry in entries]
  if names.count(PICKLE) != 1 or len({entry.filename for entry in entries}) != len(entries):
    raise ValueError(f"{file}: expected an archive with one {PICKLE} and each name once; save it again")
  entry = entries[names.index(PICKLE)]
  root = entry.filename.removesuffix(PICKLE)
  is_program = any(other.filename == root + unloaded.PROGRAM for other in entries)
  # PyTorch compresses a program's code, which is not read.
  read = [other for other in entries if not is_program or unloaded.is_needed(other.filename, root)]
  if any(other.compress_type != zipfile.ZIP_STORED for other in read):
    raise ValueError(f"{file}: expected an archive without compression, as torch.save writes; save it again")
  if not entry.file_size == entry.compress_size <= MAX_PICKLE:
    raise ValueError(f"{file}: expected a pickle of at most {in_bytes(MAX_PICKLE)}; have its state dict saved alone")
  orders = [other for other, name in zip(entries, names, strict=True) if name == "byteorder" and other in read]
  if any(unloaded.stored(file, other, 8) != b"little" for other in orders):
    raise ValueError(f"{file}: expected numbers whose lowest byte is first; save it again on such a machine")
  if not is_program:
    for opcode, argument, _ in pickletools.genops(unloaded.stored(file, entry, MAX_PICKLE)):
      # torch allows bytearray(n), which takes n bytes of memory.
      if opcode.name == "GLOBAL" and str(argument).endswith("bytearray"):
        raise ValueError(_refusal(file, str(argument).replace(" ", ".")))
  return is_program


def _choose(file: pathlib.Path, loaded: Any, key: str, kind: type) -> tuple[Mapping[str, Any], dict[str, str]]:
  """Returns the dict of tensors, of type `kind`, that `key` names, or the only one, or the best, and what is CHOSEN."""
  found = dict(itertools.islice(_state_dicts(loaded, kind), _MOST_DICTS + 1))
  if len(found) > _MOST_DICTS:
    raise ValueError(f"{file}: expected at most {_MOST_DICTS:,} dicts of tensors; have its state dict saved alone")
  if not key and len(found) == 1:
    return next(iter(found.values())), {}
  if key in found:
    return found[key], {}
  if not key and (best := next((name for name in _TOLD if name in found), None)):
    return found[best], {CHOSEN: best}
  raise ValueError(
    f"{file}: expected --key for one of the state dicts in it, {shown(sorted(found), 300)}, got {shown(key)}"
    if found
    else f"{file}: expected a dict of tensors, or dicts of them, got {type(loaded).__name__}"
  )


def _state_dicts(loaded: Any, kind: type) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields paths and dicts with tensors in `loaded`, each dict once, whatever holds it: it may hold itself."""
  todo: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
  seen = set()
  while todo:
    path, value = todo.pop()
    if not isinstance(value, (Mapping, list, tuple)) or id(value) in seen:
      continue
    seen.add(id(value))
    value = value if isinstance(value, Mapping) else dict(enumerate(value))
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, kind)}
    if tensors and all(isinstance(name, str) for name in tensors):
      yield ".".join(path), tensors
    if len(path) < _DEPTH:
      named = ((str(key), inner) for key, inner in value.items() if isinstance(key, (str, int)))
      todo += [((*path, name), inner) for name, inner in named if len(name) <= _LONGEST]


def _place(file: pathlib.Path, size: int, name: str, tensor: Any) -> Place:
  storage, dtype = tensor.untyped_storage(), _dtype(file, name, tensor)
  if not hasattr(storage, "_checkpoint_offset"):
    raise ImportError("this version of torch does not tell where tensors lie in a file; `pip install 'torch>=2.7'`")
  start = storage._checkpoint_offset
  if start is None:
    raise ValueError(f"{file}: {shown(name)} has no data; save it from a device that has them")
  offset = start + tensor.storage_offset() * dtype.itemsize
  return placed(file, size, name, offset, tuple(tensor.shape), tuple(tensor.stride()), dtype)


def _dtype(file: pathlib.Path, name: str, tensor: Any) -> np.dtype:
  text = str(tensor.dtype).removeprefix("torch.")
  for dtype in DTYPES.values():
    if dtype.name == text:
      return dtype
  raise ValueError(
    f"{file}: {shown(name)} has the dtype {text}, expected one of {sorted(d.name for d in DTYPES.values())}"
  )
