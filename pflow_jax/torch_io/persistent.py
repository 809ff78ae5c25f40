"""Networks pickled by NVIDIA's module torch_utils.persistence (.pkl), EDM2's say, read without running what they hold.

Such a file has the source of its classes in it, which Python's own unpickler runs. Here no name in it is looked up: an
object stays what it is made of, see `files.inert`, and a tensor is a place in the file.

References:
  torch_utils/persistence.py of github.com/NVlabs/edm2, commit 4bf8162.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import IO, Any

from pflow_jax.files.foreign import decoding, in_bytes, regular_file, shown
from pflow_jax.files.inert import Made, read_inert
from pflow_jax.torch_io.pickled import CHOSEN
from pflow_jax.torch_io.places import Place, Tensors, checked_names
from pflow_jax.torch_io.unloaded import Storage, View, inert_tensor, load_old_storage

PERSISTENT = "network of torch_utils.persistence"
"""In `Tensors.metadata`: class, arguments and companions of a network, as JSON."""

MAX_DESCRIPTION = 64 * 2**20  # bytes of a file that are no tensors'; the largest published one has 2 MB
_WHOLE = 2**20  # bytes that are read at once; longer strings of bytes are passed over
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_LOAD = "torch.storage._load_from_bytes"
_DICTS = ("dnnlib.util.EasyDict",)
_TOLD = "ema"  # the network of a snapshot
_DEPTH = 4  # of lists within arguments


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
  with file.open("rb") as pickled, file.open("rb") as stored, decoding(f"{file} cannot be read"):
    size = file.stat().st_size

    def make(name: str, arguments: tuple[Any, ...]) -> Any:
      if name in _DICTS and not arguments:
        return {}
      if name == _LOAD and len(arguments) == 1 and isinstance(arguments[0], _Held):
        at = arguments[0]
        storage, start = load_old_storage(stored, at.start, at.length)
        one = Storage(f"{start}", storage.dtype, storage.count)
        starts[one.key] = start
        return one
      return inert_tensor(name, arguments)

    loaded, _ = read_inert(_Bounded(pickled, size), make, held=_Held)  # type: ignore[arg-type]
    network, others, chosen = _choose(loaded, key)
    views = _views(network)
  places: dict[str, Place] = {name: view.at(file, size, name, starts[view.storage.key]) for name, view in views.items()}
  about = _described(network) | {"others": {name: _described(one) for name, one in others.items()}}
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
  """A stream of a file that reads no more of it than MAX_DESCRIPTION, and passes long strings over.

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


def _views(network: Made) -> dict[str, View]:
  """Returns the parameters and buffers of a module and of those within, by the names of a state dict."""
  found: dict[str, View] = {}
  todo, seen = [("", network)], set[int]()
  while todo:
    path, module = todo.pop()
    if not isinstance(module, Made) or id(module) in seen:
      continue
    seen.add(id(module))
    state = _state(module)
    groups = {name: state.get(name) for name in ("_parameters", "_buffers", "_modules")}
    for group, values in groups.items():
      for name, value in values.items() if isinstance(values, dict) else ():
        if group == "_modules":
          todo.append((f"{path}{name}.", value))
        elif isinstance(value, View):
          found[f"{path}{name}"] = value
  return found


def _described(made: Made) -> dict[str, Any]:
  """Returns class and arguments of a persistent object, as far as they are plain values."""
  meta, state = _meta(made), _state(made)
  kwargs, args = state.get("_init_kwargs"), state.get("_init_args")
  named = {name: _plain(value) for name, value in kwargs.items()} if isinstance(kwargs, dict) else {}
  return {
    "class": _plain(meta.get("class_name")),
    "positional": len(args) if isinstance(args, (tuple, list)) else 0,
    "arguments": {name: value for name, value in named.items() if isinstance(name, str)},
  }


def _plain(value: Any, depth: int = _DEPTH) -> Any:
  """Returns a plain value as JSON has it, text in place of any other."""
  if value is None or isinstance(value, (bool, str)):
    return value
  if isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 2**63:
    return value
  if isinstance(value, (list, tuple)) and depth:
    return [_plain(inner, depth - 1) for inner in value]
  return shown(value)
