"""Former names of config keys and their present ones: old runs, old files and old flags are understood."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

SECTIONS = {"policy": "head"}
"""Sections by their former names."""

_DATA_FREE = "imitation_data_free"


def renewed(config: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
  """Returns a config, nested or not, with the present names.

  Args:
    config: sections by name; it stays as it is.
    quiet: whether to leave out the warning, as for a finished run, whose config is not edited.

  Raises:
    ValueError: a section is there under both names.
  """
  new: dict[str, Any] = {}
  for name, values in config.items():
    now = SECTIONS.get(name, name)
    if now in new or (now != name and now in config):
      raise ValueError(f"config.{name} is config.{now} now, and both are given; take one of them out")
    if now != name and not quiet:
      logger.warning("config.%s is called config.%s now; please rename it", name, now)
    new[now] = values
  objective = new.get("objective")
  if isinstance(objective, Mapping) and objective.get("kind") == _DATA_FREE:
    if not quiet:
      logger.warning("config.objective.kind=%r is kind='imitation' with data_free=True now", _DATA_FREE)
    new["objective"] = {**objective, "kind": "imitation", "data_free": True}
  return new


def renewed_kind(kind: str) -> tuple[str, dict[str, Any]]:
  """Returns an objective's kind by its present name, and the settings that its former name stood for."""
  return ("imitation", {"data_free": True}) if kind == _DATA_FREE else (kind, {})


def renewed_flag(argument: str) -> str:
  """Returns a command-line argument --config.SECTION.KEY with the section's present name."""
  for old, now in SECTIONS.items():
    for dashes in ("--", "-"):
      if argument.startswith(f"{dashes}config.{old}."):
        logger.warning("--config.%s is called --config.%s now", old, now)
        return argument.replace(f"config.{old}.", f"config.{now}.", 1)
  return argument
