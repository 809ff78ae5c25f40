"""Objectives of students and teachers, by the names that a config gives the kinds."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any

from pflow_jax.core.objectives.decoupled_mean_flow import DecoupledMeanFlow
from pflow_jax.core.objectives.flow_map import ayf_emd, ayf_lmd, consistency, mean_flow
from pflow_jax.core.objectives.flow_matching import FlowMatching
from pflow_jax.core.objectives.free_flow import FreeFlow
from pflow_jax.core.objectives.imitation import Imitation
from pflow_jax.core.objectives.improved_mean_flow import ImprovedMeanFlow

PRETRAINED = "pretrained"  # kind of a model that was converted, not trained here

OBJECTIVES: dict[str, Callable[..., Any]] = {
  "flow_matching": FlowMatching,
  "imitation": Imitation,
  "ayf_emd": ayf_emd,
  "ayf_lmd": ayf_lmd,
  "mean_flow": mean_flow,
  "consistency": consistency,
  "improved_mean_flow": ImprovedMeanFlow,
  "decoupled_mean_flow": DecoupledMeanFlow,
  "free_flow": FreeFlow,
  PRETRAINED: FlowMatching,
}
"""Makers of an objective's settings, with the defaults of its kind, by name."""


def settings_of(kind: str) -> Any:
  """Returns the dataclass whose fields are the settings of a kind."""
  return settings_made_by(OBJECTIVES[kind])


def settings_made_by(make: Callable[..., Any]) -> Any:
  """Returns the dataclass of the settings that `make` returns: itself, or the annotation of what it returns."""
  return make if inspect.isclass(make) else typing.get_type_hints(make)["return"]


def defaults_of(kind: str) -> dict[str, Any]:
  """Returns the settings of a kind with its defaults."""
  return {field.name: getattr(made, field.name) for made in [OBJECTIVES[kind]()] for field in dataclasses.fields(made)}


def kind_of(objective: Any) -> str:
  """Finds the name of the kind whose defaults are nearest to these settings.

  Raises:
    ValueError: the settings belong to no objective.
  """
  kinds = [kind for kind in OBJECTIVES if settings_of(kind) is type(objective) and kind != PRETRAINED]
  if not kinds:
    raise ValueError(
      f"objective: expected settings such as FlowMatching(), Imitation() or ayf_emd(), got {objective!r}; make others "
      "known by register_objective"
    )
  return min(kinds, key=lambda kind: sum(getattr(objective, k) != v for k, v in defaults_of(kind).items()))
