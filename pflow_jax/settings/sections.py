"""The sections of a config: each is the keyword arguments of one function or class, its owner."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import pydantic
from ml_collections import ConfigDict

from pflow_jax.files import foreign
from pflow_jax.files.nearest import did_you_mean


def call(
  function: Callable, section: str, values: Mapping[str, Any], *, settings: Callable | None = None, **given: Any
) -> Any:
  """`function(**values, **given)`, where a key of another type than that of its argument is a ValueError.

  So is a key that it does not take, or needs and does not get. A key whose value is None is one that is not set. What
  the function itself refuses is named after the section.

  Args:
    settings: what names and annotates the keys, where that is not `function` itself, which takes any.
  """
  where = f"config.{section}"
  parameters = inspect.signature(settings or function).parameters
  hidden = {*given, *(("parent", "name") if "parent" in parameters else ())}  # which all networks have
  values, takes_any = as_section(values, where), any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  known = {
    name: p.default is p.empty for name, p in parameters.items() if name not in hidden and p.kind is not p.VAR_KEYWORD
  }
  if not takes_any:  # which looks at the others itself
    refuse_unknown(values, list(known), where)
  values = {key: value for key, value in values.items() if value is not None}
  missing = [name for name, required in known.items() if required and name not in values]
  if missing:
    raise ValueError(f"{where}: {', '.join(missing)} must be set")
  values = foreign.check_arguments(settings or function, values, where=where)
  try:
    return function(**values, **given)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    if str(error).startswith("config."):
      raise
    raise ValueError(f"{where}: {error}") from error


def as_section(values: Any, where: str) -> dict[str, Any]:
  """The keys of a section, sections within it as dicts; a ValueError that names it where it is none."""
  if isinstance(values, ConfigDict):
    return values.to_dict()
  if not isinstance(values, Mapping):
    raise ValueError(f"{where}: expected a section, keys with their values, got {foreign.shown(values)}")
  return dict(values)


def check_sections(
  config: Mapping[str, Any], known: Sequence[str], required: Sequence[str] = (), *, where: str = "config"
) -> None:
  """Raises ValueError for a section that is not known, is none, or is required and not there.

  A section's `kind` is a string. `seed`, which is no section, is a number that JAX takes for one.
  """
  refuse_unknown(config, known, where)
  for name, values in config.items():
    if name == "seed":
      foreign.check_type(values, Annotated[int, pydantic.Field(ge=0, lt=2**32)], where=f"{where}.seed")
    elif values is not None or name not in required:
      kind = as_section(values, f"{where}.{name}").get("kind")
      foreign.check_type(kind, str | None, where=f"{where}.{name}.kind")
  missing = [name for name in required if config.get(name) is None]
  if missing:
    raise ValueError(f"{where}: the sections {missing} must be set")


def refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
  """Raises ValueError for the first key that is not known, with the nearest that is."""
  for key in values:
    if key not in known:
      raise ValueError(f"{where} has no key {key!r}{did_you_mean(key, known)} (it takes: {', '.join(sorted(known))})")


def choose(table: Mapping[str, Any], section: str, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The entry that `kind` names, and the other keys."""
  rest = as_section(values, f"config.{section}")
  kind = rest.pop("kind", None)
  if not isinstance(kind, str) or kind not in table:
    raise ValueError(f"config.{section}.kind: expected one of {sorted(table)}, got {foreign.shown(kind)}")
  return table[kind], rest
