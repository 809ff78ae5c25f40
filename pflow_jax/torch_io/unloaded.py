"""Tensors in files that are read without PyTorch: of torch.jit.save, and of torch.save before version 1.6.

torch.load(weights_only=True) refuses the first, and tells no places of tensors in the second.

An archive of torch.jit.save holds a program beside the tensors, which is not looked at. A file that torch.save wrote
before version 1.6 is pickles and then the numbers, one storage after the other. Both have their tensors' names, shapes
and places in a pickle that `files.inert` reads.

References:
  torch/csrc/jit/serialization/pickler.cpp and torch/serialization.py of PyTorch.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

from pflow_jax.files.foreign import decoding, shown
from pflow_jax.files.inert import Made, Named, read_inert
from pflow_jax.torch_io.places import MAX_NAME, Place, placed

MAX_PICKLE = 4 * 2**20  # bytes of the pickle in a file, without the tensors' data: some 20,000 tensors
PICKLE, PROGRAM = "data.pkl", "constants.pkl"  # the second is there beside a program

_MAX_ENTRIES = 2**17  # names in all modules, once for each place that a module's names are in
_MAX_DESCRIPTION = 4096  # bytes of a pickle that describes one storage
_HEADER, _LENGTHS = 30, 26  # bytes of an entry's header, and where in it are the lengths of what follows it
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch.save began a file with
MAGIC_PICKLE = b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
_DTYPES: dict[str, np.dtype] = {
  f"torch.{name}Storage": np.dtype(dtype)
  for name, dtype in {
    **{"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16},
    **{"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"},
  }.items()
}


@dataclasses.dataclass(frozen=True)
class Storage:
  """Numbers that tensors are views of.

  Attributes:
    key: its name in the file.
    dtype: of the numbers.
    count: of the numbers.
  """

  key: str
  dtype: np.dtype
  count: int


@dataclasses.dataclass(frozen=True)
class View:
  """A tensor, as a pickle describes it.

  Attributes:
    storage: that it is a view of.
    offset: of its first element in the storage, in elements.
    shape: of the tensor.
    strides: in elements.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def at(self, file: pathlib.Path, size: int, name: str, start: int) -> Place:
    """Returns its place.

    Args:
      file: that holds it.
      size: of the file, in bytes.
      name: of the tensor, for errors.
      start: of its storage in the file, in bytes.

    Raises:
      ValueError: it reaches beyond its storage or the file.
    """
    offset = start + self.offset * self.storage.dtype.itemsize
    end = start + self.storage.count * self.storage.dtype.itemsize
    return placed(file, min(size, end), name, offset, self.shape, self.strides, self.storage.dtype)


def open_program(file: pathlib.Path) -> dict[str, Place]:
  """Returns the places of the tensors in an archive of torch.jit.save, by the names of a state dict.

  Args:
    file: an archive whose names are each there once, and in which those that `is_needed` are not compressed.

  Raises:
    ValueError: it is damaged.
  """
  size = file.stat().st_size
  with zipfile.ZipFile(file) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
  root = next(name for name in entries if name.rpartition("/")[2] == PICKLE).removesuffix(PICKLE)
  with decoding(file):
    value, _ = read_inert(stored(file, entries[root + PICKLE], MAX_PICKLE), inert_tensor, _storage)
    views = views_within(value, _attributes)
  places = {}
  for name, view in views.items():
    entry = entries.get(f"{root}data/{view.storage.key}")
    if entry is None or entry.file_size < view.storage.count * view.storage.dtype.itemsize:
      raise ValueError(f"{file}: the data of {shown(name)} are missing or cut short; bring it anew")
    places[name] = view.at(file, size, name, data_offset(file, entry))
  return places


def is_needed(name: str, root: str) -> bool:
  """Returns whether an entry of an archive has tensors or says where they are, rather than a program.

  Args:
    name: of the entry.
    root: folder of the archive with all entries, and "/".
  """
  return name in (root + PICKLE, root + "byteorder") or name.startswith(f"{root}data/")


def stored(file: pathlib.Path, entry: zipfile.ZipInfo, limit: int) -> bytes:
  """Returns the bytes of an entry, at most `limit`; its checksum, which torch need not write, is not looked at."""
  with file.open("rb") as f:
    f.seek(data_offset(file, entry))
    return f.read(min(entry.file_size, limit))


def data_offset(file: pathlib.Path, entry: zipfile.ZipInfo) -> int:
  """Returns where in the file the bytes of an entry begin."""
  with file.open("rb") as f:
    f.seek(entry.header_offset + _LENGTHS)
    return entry.header_offset + _HEADER + sum(struct.unpack("<HH", f.read(4)))


def is_old(file: pathlib.Path) -> bool:
  """Returns whether torch.save wrote a file before version 1.6, or as it did before."""
  with file.open("rb") as f:
    return f.read(len(MAGIC_PICKLE)) == MAGIC_PICKLE


def load_old(file: pathlib.Path, refusal: Callable[[str], str]) -> tuple[Any, Callable[[str, View], Place]]:
  """Reads what torch.save wrote before version 1.6, of which tensors are `View`s.

  Args:
    file: for which `is_old` holds.
    refusal: returns words for an error, by the name of what a pickle asks to be called.

  Returns:
    the object, and a function that places one of its tensors, of a name.

  Raises:
    ValueError: it holds more than tensors, or is damaged.
  """
  size = file.stat().st_size
  with file.open("rb") as f, decoding(file):
    loaded, asked, starts = _old_stream(f, MAX_PICKLE)
  if asked:
    raise ValueError(refusal(asked[0]))

  def place(name: str, view: View) -> Place:
    if view.storage.key not in starts:
      raise ValueError(f"{file}: {shown(name)} has no data; save it from a device that has them")
    return view.at(file, size, name, starts[view.storage.key])

  return loaded, place


def load_old_storage(f: IO[bytes], start: int, length: int) -> tuple[Storage, int]:
  """Reads a storage that torch.save wrote alone, as it did before version 1.6, within a file of other things.

  Args:
    f: the file.
    start: where in the file it begins.
    length: bytes that it has.

  Returns:
    the storage, and where in the file its numbers begin.

  Raises:
    ValueError: it holds more than a storage, or is damaged.
  """
  f.seek(start)
  loaded, asked, starts = _old_stream(f, min(length, _MAX_DESCRIPTION))
  if asked or not isinstance(loaded, Storage) or loaded.key not in starts:
    raise ValueError(f"expected numbers alone, got {shown(asked[0] if asked else type(loaded).__name__)}")
  if starts[loaded.key] + loaded.count * loaded.dtype.itemsize > start + length:
    raise ValueError(f"storage {shown(loaded.key)} has fewer bytes than it says")
  return loaded, starts[loaded.key]


def _old_stream(f: IO[bytes], limit: int) -> tuple[Any, list[str], dict[str, int]]:
  """Reads what torch.save wrote from where `f` stands, in pickles of at most `limit` bytes.

  Returns:
    the object, names of what its pickle asks to be called, and where in `f` the numbers of each storage begin, by key.
  """
  storages, asked = dict[str, Storage](), list[str]()

  def make(name: str, arguments: tuple[Any, ...]) -> Any:
    value = inert_tensor(name, arguments)
    if isinstance(value, Made):
      asked.append(name)
    return value

  def storage(identity: Any) -> Storage:
    found = _storage(identity)
    if storages.setdefault(found.key, found) != found:
      raise ValueError(f"storage {shown(found.key)} is described in two ways")
    return found

  def following() -> Any:
    start = f.tell()
    value, length = read_inert(f.read(limit), make, storage)
    f.seek(start + length)
    return value

  magic, protocol, system, loaded, keys = (following() for _ in range(5))
  if (magic, protocol) != (_MAGIC, _PROTOCOL) or not isinstance(system, dict) or not isinstance(keys, list):
    raise ValueError("expected a file of torch.save")
  if system.get("little_endian") is not True:
    raise ValueError("expected numbers whose lowest byte is first")
  starts: dict[str, int] = {}
  for key in keys:
    (count,) = struct.unpack("<q", f.read(8))
    if type(key) is not str or key not in storages or count != storages[key].count:
      raise ValueError(f"storage {shown(key)} has another size than its tensors")
    starts[key] = f.tell()
    f.seek(count * storages[key].dtype.itemsize, os.SEEK_CUR)
  return loaded, asked, starts


def inert_tensor(name: str, arguments: tuple[Any, ...]) -> Any:
  """Stands in for what a pickle of PyTorch calls: tensors become views, everything else what it is made of."""
  if name == "torch._utils._rebuild_tensor_v2":
    return _view(*arguments[:4])
  if name == "torch._utils._rebuild_parameter":
    return arguments[0]
  if name == "collections.OrderedDict" and not arguments:
    return {}
  return Made(name, arguments=arguments)


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
  sizes = _sizes(shape) and _sizes(strides) and _sizes((offset,))
  if not (isinstance(storage, Storage) and sizes and len(shape) == len(strides)):
    raise ValueError("a tensor is described by other than a storage, an offset, a shape and strides")
  return View(storage, offset, shape, strides)


def _sizes(values: Any) -> bool:
  """Returns whether it is a tuple of at most as many whole numbers as an array has axes."""
  return type(values) is tuple and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _storage(identity: Any) -> Storage:
  if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
    raise ValueError("expected the storage of a tensor outside of the pickle")
  kind, key, _, count, *view = identity[1:]
  if not isinstance(kind, Named) or kind.name not in _DTYPES:
    raise ValueError(f"expected a storage of one of {sorted(_DTYPES)}, got {shown(getattr(kind, 'name', ''))}")
  if type(key) is not str or type(count) is not int or count < 0 or view not in ([], [None]):
    raise ValueError("a storage is described by other than its type, its key and its number of elements")
  return Storage(key, _DTYPES[kind.name], count)


def views_within(module: Any, entries: Callable[[Made], Iterable[tuple[Any, Any]]]) -> dict[str, View]:
  """Returns the tensors of a module and of the modules in it, each module once, by the names of a state dict.

  Args:
    module: the outermost; anything but an object has no tensors.
    entries: returns names and values within a module, of which tensors and objects are looked at.

  Raises:
    ValueError: a name is no text or too long, or there are too many.
  """
  found: dict[str, View] = {}
  todo, seen, count = [("", module)], set[int](), 0
  while todo:
    path, one = todo.pop()
    if not isinstance(one, Made) or id(one) in seen:
      continue
    seen.add(id(one))
    for name, inner in entries(one):
      count += 1
      if count > _MAX_ENTRIES:
        raise ValueError(f"expected at most {_MAX_ENTRIES:,} names of tensors and modules")
      if not isinstance(inner, (View, Made)):
        continue
      if type(name) is not str or len(path) + len(name) > MAX_NAME:
        raise ValueError(
          f"expected names of tensors of at most {MAX_NAME} characters, got {shown(name)} in {shown(path)}"
        )
      if isinstance(inner, View):
        found[path + name] = inner
      else:
        todo.append((f"{path}{name}.", inner))
  return found


def _attributes(module: Made) -> Iterable[tuple[Any, Any]]:
  return module.state.items() if isinstance(module.state, Mapping) else ()
