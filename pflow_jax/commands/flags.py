"""Flags derived from a function: a keyword argument is a flag, with its type and its words in the docstring."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
  from absl import flags

MAX_SEED = 2**32 - 1  # JAX takes 32 bits

Repeated = Annotated[list[str], "repeated"]
"""A flag that may be given several times; a list[str] is one flag with commas."""

Positional = Annotated[list[str], "positional"]
"""Words beside the flags, of which there is at least one."""

Count = Annotated[int, 1, None]
"""A number of at least 1."""

Seed = Annotated[int, 0, MAX_SEED]


def positional(function: Callable) -> str | None:
  """Returns the name of the argument that takes the words beside the flags, or None."""
  hints = typing.get_type_hints(function, include_extras=True)
  return next((name for name, hint in hints.items() if hint == Positional), None)


def define_flags(function: Callable, values: flags.FlagValues) -> None:
  """Makes a flag of every argument of `function` except `config` and words; those without a default are required."""
  from absl import flags

  words = words_of(function)
  hints = typing.get_type_hints(function, include_extras=True)
  for name, parameter in inspect.signature(function).parameters.items():
    if name in ("config", positional(function)):
      continue
    hint, notes = _plain(hints[name])
    needed = parameter.default is parameter.empty
    default = None if needed or parameter.default == () else parameter.default
    given: dict[str, Any] = {"flag_values": values, "required": needed}
    text = words.get(name, "")
    if typing.get_origin(hint) is Literal:
      flags.DEFINE_enum(name, default, list(typing.get_args(hint)), text, **given)
    elif hint is int:
      low, high = notes or (None, None)
      flags.DEFINE_integer(name, default, text, lower_bound=low, upper_bound=high, **given)
    elif typing.get_origin(hint) is list and "repeated" in notes:
      flags.DEFINE_multi_string(name, default or (None if needed else []), text, **given)
    elif typing.get_origin(hint) is list:
      flags.DEFINE_list(name, default, text, **given)
    else:
      define: Any = {bool: flags.DEFINE_bool, float: flags.DEFINE_float, str: flags.DEFINE_string}[hint]
      define(name, default, text, **given)


def call_with_flags(function: Callable, values: flags.FlagValues, words: Sequence[str] = ()) -> None:
  """Calls `function` with the values of its flags and of the config, and with the words beside them.

  Raises:
    ValueError: as the function raises it. Where it begins with names of arguments, these are written as flags.
  """
  own = positional(function)
  names = [name for name in inspect.signature(function).parameters if name != own]
  given = {name: values[name].value for name in names} | ({own: list(words)} if own else {})
  try:
    function(**given)
  except ValueError as error:
    told = as_flags(str(error), names)
    if type(error) is not ValueError or told == str(error):
      raise
    raise ValueError(told) from error


def as_flags(message: str, names: Collection[str]) -> str:
  """Writes the names of arguments that a message begins with, "height, width: ...", as flags.

  Args:
    message: of an error.
    names: the arguments that are flags.
  """
  found = re.match(r"\w+(?:, \w+)*(?=: )", message)
  if found is None or not set(found[0].split(", ")) <= set(names) - {"config"}:
    return message
  return ", ".join(f"--{name}" for name in found[0].split(", ")) + message[found.end() :]


def words_of(owner: Callable) -> dict[str, str]:
  """Reads the words for attributes or arguments from the docstring of a class or a function, by name."""
  found: dict[str, str] = {}
  for one in reversed(inspect.getmro(owner) if inspect.isclass(owner) else (owner,)):
    block = re.search(r"^(?:Attributes|Args):(.*?)(?:\n\S|\Z)", inspect.cleandoc(one.__doc__ or ""), re.M | re.S)
    # An entry starts on a line that is not indented further than the first, or three spaces after another.
    entries = re.split(r"\n {2}(?! )|(?<=\S) {3}(?=\w)", block[1]) if block else ()
    for entry in entries:
      names, colon, text = " ".join(entry.split()).partition(": ")
      if colon and re.fullmatch(r"\w+(, \w+)*", names):
        found |= dict.fromkeys(names.split(", "), text)
  return found


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
  """Returns an annotation without None and notes, and the notes."""
  notes: tuple[Any, ...] = ()
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
  if typing.get_origin(hint) is Annotated:
    hint, *rest = typing.get_args(hint)
    notes = tuple(rest)
  return hint, notes
