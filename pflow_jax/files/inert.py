"""Pickles read without running anything: a small machine of stacks knows the operations and no function or class.

Python's own unpickler looks up what a pickle names, and calls it. Here a name stays a name, and what a pickle wants to
have called is handed to the reader as a name with its arguments. An operation makes one value at most, of no more
memory than its bytes in the pickle and a few hundred more. A value can be in many places, so that what is written out
of it has no bound: a reader that does so bounds that.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from collections.abc import Callable
from typing import IO, Any

from pflow_jax.files.foreign import shown


@dataclasses.dataclass(frozen=True)
class Named:
  """A function or a class that a pickle names, which is not looked up.

  Attributes:
    name: with its module, "collections.OrderedDict".
  """

  name: str


@dataclasses.dataclass(eq=False, repr=False)
class Made:
  """An object that a pickle would make, and its state.

  Attributes:
    name: of its class.
    state: that the object would be given; most often its attributes by name.
    arguments: that the class would be called with.
  """

  name: str
  state: Any = None
  arguments: tuple[Any, ...] = ()


Make = Callable[[str, tuple[Any, ...]], Any]
"""Returns what stands for the value of a call or for a new object, by the name of its function or class."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_BYTES = frozenset(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"))
_VALUES = frozenset(  # the argument is the value
  (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
  )
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = frozenset((str, bytes, int, float, bool, type(None)))  # a dict's; C hashes nested ones without end
_MAX_KEY = 64  # values in a tuple that is a key
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")


def read_inert(
  data: bytes | IO[bytes],
  make: Make,
  persistent: Callable[[Any], Any] | None = None,
  held: Callable[[int, int], Any] | None = None,
  limit: int | None = None,
) -> tuple[Any, int]:
  """Reads the first pickle in `data`, of protocol 2 to 5.

  Args:
    data: bytes, or a stream, that begin with a pickle.
    make: returns what stands for an object that the pickle would make.
    persistent: returns what stands for something outside of the pickle, by its identity; None if there is nothing.
    held: returns what stands for a string of bytes, by where it begins in `data` and by its length; None keeps bytes.
    limit: the most operations that the pickle may have; None for as many as there are.

  Returns:
    the value, and the number of bytes that the pickle has.

  Raises:
    ValueError: the pickle is cut short, damaged or too long, or has operations of older protocols.
  """
  stream = io.BytesIO(data) if isinstance(data, bytes) else data
  machine = _Machine(make, persistent)
  for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
    if limit is not None and count > limit:
      raise ValueError(f"expected a pickle of at most {limit:,} operations")
    if opcode.name == "STOP":
      return machine.value(), stream.tell()
    if held is not None and opcode.name in _BYTES:
      length = len(argument)  # type: ignore[arg-type]
      argument = held(stream.tell() - length, length)
    machine.step(opcode.name, argument)
  raise ValueError("expected a pickle that ends")  # genops has raised


class _Machine:
  """A pickle's stack and its memory of values."""

  def __init__(self, make: Make, persistent: Callable[[Any], Any] | None):
    self._make, self._persistent = make, persistent
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # what lies under each mark
    self._memory: dict[int, Any] = {}

  def value(self) -> Any:
    """Returns the one value that is left at the end."""
    if len(self._stack) != 1 or self._below:
      raise ValueError(f"expected a pickle of one value, got {len(self._stack)}")
    return self._stack[0]

  def step(self, name: str, argument: Any) -> None:
    """Does one operation.

    Args:
      name: of the operation, as in the library pickletools.
      argument: that follows it in the pickle.

    Raises:
      ValueError: the operation is none of those known, or does not fit the stack.
    """
    if name in ("PROTO", "FRAME"):
      return
    if name in _VALUES:
      self._push(argument)
    elif name in _CONSTANTS:
      self._push(_CONSTANTS[name])
    elif name in _NEW:
      self._push(_NEW[name]())
    elif name in _PUT or name == "MEMOIZE":
      self._memory[len(self._memory) if name == "MEMOIZE" else argument] = self._top()
    elif name in _GET:
      if argument not in self._memory:
        raise ValueError(f"expected a value in place {argument} of the pickle's memory")
      self._push(self._memory[argument])
    elif name == "MARK":
      self._below.append(self._stack)
      self._stack = []
    elif name == "TUPLE":
      self._push(tuple(self._to_mark()))
    elif name in _TUPLES:
      self._push(tuple(self._pop(_TUPLES[name])))
    elif name in ("APPEND", "APPENDS", "ADDITEMS"):  # a set is a list of its members, which need no hash so
      values = self._pop(1) if name == "APPEND" else self._to_mark()
      self._top_as(list).extend(values)
    elif name in ("SETITEM", "SETITEMS"):
      values = self._pop(2) if name == "SETITEM" else self._to_mark()
      self._top_as(dict).update(zip(map(_key, values[::2]), values[1::2], strict=True))
    elif name == "GLOBAL":
      self._push(Named(argument.replace(" ", ".", 1)))
    elif name == "STACK_GLOBAL":
      module, attribute = self._pop(2)
      if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError(f"expected the name of a class, got {shown(attribute)}")
      self._push(Named(f"{module}.{attribute}"))
    elif name == "BINPERSID" and self._persistent is not None:
      self._push(self._persistent(*self._pop(1)))
    elif name in ("REDUCE", "NEWOBJ"):
      called, arguments = self._pop(2)
      if not isinstance(called, Named) or type(arguments) is not tuple:
        raise ValueError(f"expected a name and arguments to {name}, got {type(called).__name__}")
      self._push(self._make(called.name, arguments))
    elif name == "BUILD":
      (state,) = self._pop(1)
      if isinstance(made := self._top(), Made):
        made.state = state
      elif not isinstance(made, dict):  # an OrderedDict has attributes, of which nothing is needed
        raise ValueError(f"expected an object that has a state, got {type(made).__name__}")
    else:
      raise ValueError(f"expected operations of a pickle of plain values, got {shown(name)}")

  def _push(self, value: Any) -> None:
    self._stack.append(value)  # of the stack that there is now: making the value may have changed it

  def _top(self) -> Any:
    return self._pop(1, keep=True)[0]

  def _top_as(self, kind: type) -> Any:
    if type(top := self._top()) is not kind:
      raise ValueError(f"expected a {kind.__name__} to add to, got {type(top).__name__}")
    return top

  def _pop(self, count: int, keep: bool = False) -> list[Any]:
    if len(self._stack) < count:
      raise ValueError(f"expected {count} values on the pickle's stack, got {len(self._stack)}")
    values = self._stack[-count:]
    if not keep:
      del self._stack[-count:]
    return values

  def _to_mark(self) -> list[Any]:
    if not self._below:
      raise ValueError("expected a mark on the pickle's stack")
    values, self._stack = self._stack, self._below.pop()
    return values


def _key(value: Any) -> Any:
  """Returns a key of a dict whose hash takes few steps, and which few others share.

  Raises:
    ValueError: it is none of these: text, bytes, a number, None, or a short tuple of them.
  """
  parts = value if type(value) is tuple and len(value) <= _MAX_KEY else (value,)
  if not all(type(part) in _KEYS and (type(part) is not int or abs(part) < 2**63) for part in parts):
    raise ValueError(f"expected text, numbers or a flat tuple of them as a key of a dict, got a {type(value).__name__}")
  return value
