"""Networks pickled by NVIDIA's module torch_utils.persistence (.pkl), EDM2's say, read without running what they hold.

Such a file has the source of its classes in it, which Python's own unpickler runs. Here no name in it is looked up: an
object stays what it is made of, see `files.inert`, and a tensor is a place in the file.

References:
  torch_utils/persistence.py of github.com/NVlabs/edm2, commit 4bf8162.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, TypeVar

from pflow_jax.files.foreign import decoding, in_bytes, regular_file, shown
from pflow_jax.files.inert import Made, Named, read_inert
from pflow_jax.torch_io.pickled import CHOSEN
from pflow_jax.torch_io.places import Place, Tensors, checked_names
from pflow_jax.torch_io.unloaded import Storage, View, inert_tensor, load_old_storage, views_within

PERSISTENT = "network of torch_utils.persistence"
"""In `Tensors.metadata`: class, arguments and companions of a network, as JSON."""

MAX_DESCRIPTION = 8 * 2**20  # bytes of a file that are no tensors'; the largest published one has 2 MB
MAX_OPERATIONS = 2**21  # of a pickle, of which each may make a value; a tensor with its module takes some 150
MAX_TOLD = 10**6  # characters that are told of a file in `Tensors.metadata`; each value counts as _VALUE more
_VALUE = 10
_CUT = "…"  # stands where more is not told
_WHOLE = 2**20  # bytes that are read at once; longer strings of bytes are passed over
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_LOAD = "torch.storage._load_from_bytes"
_DICTS = ("dnnlib.util.EasyDict",)
_TOLD = "ema"  # the network of a snapshot
_DEPTH = 4  # of lists within arguments

_T = TypeVar("_T")


def open_persistent(file: pathlib.Path, key: str = "") -> Tensors:
  """Opens the tensors of a pickled network, whose data stay in the file.

  Args:
    file: a pickle of a dict with networks in it, or of a network.
    key: of the network in the dict; by default "ema", or the only one.

  Returns:
    The tensors, by the names of a state dict. Their metadata have PERSISTENT, and CHOSEN, the key, where one of several
    networks was taken.

  Raises:
    ValueError: there is no such network, or the file is damaged.
  """
  regular_file(file)
  starts: dict[str, int] = {}
  storages: dict[int, Storage] = {}
  with file.open("rb") as pickled, file.open("rb") as stored, decoding(f"{file} cannot be read"):
    size = file.stat().st_size

    def make(name: str, arguments: tuple[Any, ...]) -> Any:
      if name in _DICTS and not arguments:
        return {}
      if name == _LOAD and len(arguments) == 1 and isinstance(arguments[0], _Held):
        at = arguments[0]
        if at.start not in storages:  # a pickle can ask for one string again and again
          storage, start = load_old_storage(stored, at.start, at.length)
          storages[at.start] = Storage(f"{start}", storage.dtype, storage.count)
          starts[storages[at.start].key] = start
        return storages[at.start]
      return inert_tensor(name, arguments)

    stream = _Bounded(pickled, size)
    loaded, _ = read_inert(stream, make, held=stream.held, limit=MAX_OPERATIONS)  # type: ignore[arg-type]
    network, others, chosen = _choose(loaded, key)
    views = views_within(network, _entries)
    about = _Description().all_of(network, others)
  places: dict[str, Place] = {name: view.at(file, size, name, starts[view.storage.key]) for name, view in views.items()}
  metadata = {PERSISTENT: json.dumps(about)} | ({CHOSEN: chosen} if chosen is not None else {})
  return Tensors(checked_names(file, places), metadata)


class _Held:
  """A string of bytes that stays in the file.

  Attributes:
    start: where it begins.
    length: bytes that it has.
  """

  def __init__(self, start: int, length: int):
    self.start, self.length = start, length


class _Skipped:
  """Stands for bytes that were passed over."""

  def __init__(self, length: int):
    self._length = length

  def __len__(self) -> int:
    return self._length


class _Bounded:
  """A stream of a file that keeps no more of it than MAX_DESCRIPTION, and passes long strings over.

  Args:
    file: to be read.
    size: of the file, in bytes.
  """

  def __init__(self, file: IO[bytes], size: int):
    self._file, self._size, self._left = file, size, MAX_DESCRIPTION

  def tell(self) -> int:
    """Returns where the stream stands."""
    return self._file.tell()

  def read(self, count: int) -> Any:
    """Reads `count` bytes; more than _WHOLE are passed over."""
    if not 0 <= count <= self._size - self._file.tell():
      raise ValueError(f"expected {count} more bytes, it is cut short or damaged")
    if count > _WHOLE:
      self._file.seek(count, 1)
      return _Skipped(count)
    return self._counted(self._file.read(count))

  def readline(self) -> bytes:
    """Reads to the end of a line."""
    return self._counted(self._file.readline(_WHOLE))

  def held(self, start: int, length: int) -> _Held:
    """Returns what stands for a string of bytes that was just read, which does not count: it stays in the file."""
    self._left += length if length <= _WHOLE else 0
    return _Held(start, length)

  def _counted(self, data: bytes) -> bytes:
    self._left -= len(data)
    if self._left < 0:
      raise ValueError(f"expected at most {in_bytes(MAX_DESCRIPTION)} beside its tensors")
    return data


def _choose(loaded: Any, key: str) -> tuple[Made, dict[str, Made], str | None]:
  """Returns a network, the other objects beside it, and its key where there are several networks."""
  if _is_network(loaded) and not key:
    return loaded, {}, None
  found = {name: one for name, one in loaded.items() if isinstance(name, str)} if isinstance(loaded, dict) else {}
  made = {name: one for name, one in found.items() if isinstance(one, Made) and _meta(one)}
  networks = [name for name, one in made.items() if _is_network(one)]
  chosen = key or (_TOLD if _TOLD in networks else networks[0] if len(networks) == 1 else None)
  if chosen not in networks:
    raise ValueError(
      f"expected a network{f' {shown(key)}' if key else ''} with tensors, as torch_utils.persistence pickles it, got "
      f"{shown(networks, 200)} among {shown(list(found), 200)}" + ("; give --key" if len(networks) > 1 else "")
    )
  others = {name: one for name, one in made.items() if name not in networks}
  return made[chosen], others, chosen if len(networks) > 1 else None


def _is_network(value: Any) -> bool:
  return isinstance(value, Made) and bool(_meta(value)) and isinstance(_state(value).get("_modules"), dict)


def _meta(made: Made) -> Mapping[str, Any]:
  """Returns what `persistence` keeps of an object; nothing for any other object."""
  is_one = made.name == _PERSISTENT and len(made.arguments) == 1 and isinstance(made.arguments[0], dict)
  return made.arguments[0] if is_one else {}


def _state(made: Made) -> Mapping[Any, Any]:
  """Returns the attributes of an object, persistent or not."""
  state = _meta(made).get("state") or made.state
  return state if isinstance(state, dict) else {}


def _entries(module: Made) -> Iterator[tuple[Any, Any]]:
  """Yields parameters, buffers and modules of a module, by name."""
  state = _state(module)
  for group, kind in (("_parameters", View), ("_buffers", View), ("_modules", Made)):
    values = state.get(group)
    for name, value in values.items() if isinstance(values, dict) else ():
      yield name, value if isinstance(value, kind) else None


class _Description:
  """Tells objects as JSON, up to MAX_TOLD: a small pickle can have one value in many places."""

  def __init__(self) -> None:
    self._left = MAX_TOLD

  def all_of(self, network: Made, others: Mapping[str, Made]) -> dict[str, Any]:
    """Returns what is told of a network and of the objects beside it, by name."""
    told = self._object(network)
    return told | {"others": {self._plain(name): self._object(one) for name, one in self._some(others.items())}}

  def _object(self, made: Made) -> dict[str, Any]:
    """Returns class and arguments of a persistent object, as far as they are plain values."""
    meta, state = _meta(made), _state(made)
    kwargs, args = state.get("_init_kwargs"), state.get("_init_args")
    named = {}
    for name, value in self._some(kwargs.items() if isinstance(kwargs, dict) else ()):
      key, told = self._plain(name), self._plain(value)
      if isinstance(name, str):
        named[key] = told
    return {
      "class": self._plain(meta.get("class_name")),
      "positional": len(args) if isinstance(args, (tuple, list)) else 0,
      "arguments": named,
    }

  def _plain(self, value: Any, depth: int = _DEPTH) -> Any:
    """Returns a plain value as JSON has it, text in place of any other."""
    value = value.name if isinstance(value, Named) else value
    if isinstance(value, (int, float)) and not abs(value) < 2**63:  # nor a float that is no number
      value = shown(value)
    self._left -= _VALUE + (len(value) if isinstance(value, str) else 0)
    if self._left < 0:
      return _CUT
    if value is None or isinstance(value, (int, float, str)):
      return value
    if isinstance(value, (list, tuple)) and depth:
      return [self._plain(inner, depth - 1) for inner in self._some(value)]
    return type(value).__name__

  def _some(self, values: Iterable[_T]) -> Iterator[_T]:
    """Yields values until one was cut off."""
    for value in values:
      if self._left < 0:
        return
      yield value
