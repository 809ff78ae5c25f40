"""The sections of a config: each is the keyword arguments of one function or class, its owner."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def call(function: Callable, section: str, values: Mapping[str, Any], **given: Any) -> Any:
  """`function(**values, **given)`; a key that it does not take, or needs and does not get, is a ValueError.

  A key whose value is None is one that is not set. What the function itself refuses is named after the section.
  """
  known = {
    name: p.default is p.empty
    for name, p in inspect.signature(function).parameters.items()
    if name not in given and name not in ("parent", "name") and p.kind is not p.VAR_KEYWORD
  }
  refuse_unknown(values, list(known), f"config.{section}")
  values = {key: value for key, value in values.items() if value is not None}
  missing = [name for name, required in known.items() if required and name not in values]
  if missing:
    raise ValueError(f"config.{section}: {', '.join(missing)} must be set")
  for key, value in values.items():
    if isinstance(value, float) and math.isnan(value):
      raise ValueError(f"config.{section}.{key}: expected a number, got {value}")
  try:
    return function(**values, **given)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    if str(error).startswith("config."):
      raise
    raise ValueError(f"config.{section}: {error}") from error


def refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
  """Raises ValueError for the first key that is not known, with the nearest that is."""
  for key in values:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"{where} has no key {key!r}{hint} (it takes: {', '.join(sorted(known))})")


def choose(table: Mapping[str, Any], section: str, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The entry that `kind` names, and the other keys."""
  rest = dict(values)
  kind = rest.pop("kind", None)
  if kind not in table:
    raise ValueError(f"config.{section}.kind: expected one of {sorted(table)}, got {kind!r}")
  return table[kind], rest
