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
  """Returns `function(**values, **given)`.

  Args:
    function: the owner of the section.
    section: its name, with which messages begin, also those of errors that `function` raises.
    values: the section's keys; one whose value is None is not set.
    settings: the dataclass that names and annotates the keys of a `function` that takes any.
    **given: arguments that are no keys.

  Raises:
    ValueError: a key has another type than its argument, is unknown, or is missing.
  """
  where = f"config.{section}"
  parameters = inspect.signature(settings or function).parameters
  hidden = {*given, *(("parent", "name") if "parent" in parameters else ())}  # all Flax modules have these two
  values, takes_any = as_section(values, where), any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  known = {
    name: p.default is p.empty for name, p in parameters.items() if name not in hidden and p.kind is not p.VAR_KEYWORD
  }
  if not takes_any:  # a function that takes any key checks them itself
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
  """Returns the keys of a section, sections within it as dicts.

  Raises:
    ValueError: the value is no section.
  """
  if isinstance(values, ConfigDict):
    return values.to_dict()
  if not isinstance(values, Mapping):
    raise ValueError(f"{where}: expected a section, keys with their values, got {foreign.shown(values)}")
  return dict(values)


def check_sections(
  config: Mapping[str, Any], known: Sequence[str], required: Sequence[str] = (), *, where: str = "config"
) -> None:
  """Raises ValueError for a section that is unknown, is no section, or is required and missing.

  A section's `kind` has to be a string. `seed` is a number instead of a section, of JAX's range.
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
  """Raises ValueError for the first unknown key, with the nearest known one."""
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
