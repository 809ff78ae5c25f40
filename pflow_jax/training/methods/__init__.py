"""Methods, one a file, by the settings of their objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pflow_jax.core.objectives import OBJECTIVES, settings_made_by
from pflow_jax.core.objectives.decoupled_mean_flow import DecoupledMeanFlow
from pflow_jax.core.objectives.flow_map import FlowMap
from pflow_jax.core.objectives.flow_matching import FlowMatching
from pflow_jax.core.objectives.free_flow import FreeFlow
from pflow_jax.core.objectives.imitation import Imitation
from pflow_jax.core.objectives.improved_mean_flow import ImprovedMeanFlow
from pflow_jax.files.registering import enter, redefines
from pflow_jax.training.methods.base import Method as Method
from pflow_jax.training.methods.decoupled_mean_flow import DecoupledMeanFlowMethod
from pflow_jax.training.methods.flow_map import FlowMapMethod
from pflow_jax.training.methods.flow_matching import FlowMatchingMethod
from pflow_jax.training.methods.free_flow import FreeFlowMethod
from pflow_jax.training.methods.imitation import ImitationMethod
from pflow_jax.training.methods.improved_mean_flow import ImprovedMeanFlowMethod

METHODS: dict[type, type[Method]] = {
  FlowMatching: FlowMatchingMethod,
  Imitation: ImitationMethod,
  FlowMap: FlowMapMethod,
  ImprovedMeanFlow: ImprovedMeanFlowMethod,
  DecoupledMeanFlow: DecoupledMeanFlowMethod,
  FreeFlow: FreeFlowMethod,
}


def register_objective(kind: str, make: Callable[..., Any], method: type[Method]) -> None:
  """Makes an objective known to configs.

  Args:
    kind: its name, as config.objective.kind.
    make: its settings, a dataclass with a class attribute `sections`: the sections of a config ("teacher", "adapters",
      ...) that it uses beside those of every run.
    method: the class that binds them to a network.

  Raises:
    ValueError: another objective has that name, or another method has its settings.
  """
  settings = settings_made_by(make)
  own = METHODS.get(settings, method)
  if not redefines(method, own):
    raise ValueError(
      f"there is a method of {settings.__name__} already, {own.__name__}; take settings of your own, such as a subclass"
    )
  enter(OBJECTIVES, kind, make, f"there is an objective {kind!r} already")
  METHODS[settings] = method
