"""Parts of the files in configs/: every key with its default, and variants by their names."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pflow_jax.core.objectives import OBJECTIVES, PRETRAINED, defaults_of, settings_of
from pflow_jax.settings.renamed import renewed_kind
from pflow_jax.settings.tree import OWNERS, unset


def default_config(objective: str) -> ConfigDict:
  """A config with every key of every section but data, model and head, which a config adds.

  The sections are locked: a misspelt key is an AttributeError that names the nearest.

  Args:
    objective: "flow_matching" for a teacher; for a student "imitation", "ayf_emd", "ayf_lmd", "mean_flow" or
      "consistency".

  Raises:
    ValueError: there is no such objective.
  """
  kind, changes = renewed_kind(objective)
  known = sorted(name for name in OBJECTIVES if name != PRETRAINED)
  if kind not in known:
    raise ValueError(f"objective: expected one of {known}, got {objective!r}")
  settings: Any = settings_of(kind)
  config = ConfigDict({"seed": 0, "objective": {"kind": kind, **_typed(settings, defaults_of(kind) | changes)}})
  own = {name for other in OBJECTIVES for name in settings_of(other).sections}  # only some objectives have them
  for name, owner in OWNERS.items():
    if name in settings.sections or name not in own:
      config[name] = _typed(owner, {field.name: _default(field) for field in dataclasses.fields(owner)})
  if "adversarial" in config:
    config.adversarial.weight = 0.0
  for section in config.values():
    if isinstance(section, ConfigDict):
      section.lock()
  return config


def pick(
  variant: str, variants: Mapping[str, Callable[[], ConfigDict]], quicktest: Callable[[ConfigDict], None]
) -> ConfigDict:
  """Returns the config of a variant, the name after the colon of a config file's path.

  Args:
    variant: one of the names in `variants`; ",quicktest" after it shrinks the run to a smoke test.
    variants: functions that return a config, by name.
    quicktest: shrinks a config.

  Raises:
    ValueError: there is no such variant.
  """
  name, *switches = variant.split(",")
  if name not in variants or switches not in ([], ["quicktest"]):
    raise ValueError(f"variant: expected one of {tuple(variants)}, perhaps with ',quicktest', got {variant!r}")
  config = variants[name]()
  if switches:
    quicktest(config)
  return config


def _typed(owner: Any, values: Mapping[str, Any]) -> dict[str, Any]:
  hints = typing.get_type_hints(owner)
  return {name: unset(hints[name]) if value is None else value for name, value in values.items()}


def _default(field: dataclasses.Field) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return None if field.default is dataclasses.MISSING else field.default
