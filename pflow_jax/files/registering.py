"""Entries of the tables of things by name: datasets, networks, heads, objectives and families."""

from __future__ import annotations

from typing import Any


def redefines(thing: Any, other: Any) -> bool:
  """Returns whether a class or function is another one, or its definition that ran again, as a notebook's cell does.

  What this package defines is never another thing's second definition.

  Args:
    thing: class or function.
    other: that which may be the same.
  """
  if thing is other:
    return True
  place = _place(thing)
  return place is not None and place == _place(other)


def replaces(record: Any, key: Any, other: Any, other_key: Any) -> bool:
  """Returns whether a record equals another one, or takes its place: that of a class or function from outside.

  Args:
    record: new one.
    key: class or function that it is about.
    other: that which is known.
    other_key: class or function of that.
  """
  return record == other or (_place(key) is not None and redefines(key, other_key))


def enter(table: dict[str, Any], name: str, thing: Any, problem: str) -> None:
  """Enters a class or function in a table, in place of its own earlier definition.

  Args:
    table: by name.
    name: of the entry.
    thing: class or function.
    problem: beginning of the error's message.

  Raises:
    ValueError: another thing has that name.
  """
  if not redefines(thing, table.get(name, thing)):
    raise ValueError(f"{problem}; take another name")
  table[name] = thing


def _place(thing: Any) -> tuple[str, str] | None:
  """Returns module and name of a definition; None of one that has no name of its own, or is this package's."""
  module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
  if not module or not name or "<lambda>" in name or module.partition(".")[0] == __name__.partition(".")[0]:
    return None
  return module, name
