"""Every key that a config may set, with its default: what the files in configs/ start from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from pflow_jax.core.objectives.adversarial import Adversarial
from pflow_jax.evaluation.evaluate import EvaluateSettings
from pflow_jax.mesh.sharding import MeshSettings
from pflow_jax.training import optim
from pflow_jax.training.experiment import FLOW_MAPS, OBJECTIVES, StartSettings
from pflow_jax.training.network import AdapterSettings
from pflow_jax.training.sample import SampleSettings
from pflow_jax.training.teachers import TeacherSettings
from pflow_jax.training.train import TrainSettings
from pflow_jax.training.workdir import UNSET_TYPES


def parse_variant(variant: str, variants: Sequence[str]) -> tuple[str, bool]:
  """Splits what follows the colon after a config's path: (one of `variants`, whether ",quicktest" follows it)."""
  name, *switches = variant.split(",")
  if name not in variants or switches not in ([], ["quicktest"]):
    raise ValueError(f"variant: expected one of {tuple(variants)}, perhaps with ',quicktest', got {variant!r}")
  return name, bool(switches)


def default_config(objective: str) -> ConfigDict:
  """A config with every key of every section but data, model and policy, which a config adds.

  The sections are locked: a misspelt key is an AttributeError that names the nearest.

  Args:
    objective: "flow_matching" for a teacher; for a student "imitation", "imitation_data_free", "ayf_emd", "ayf_lmd",
      "mean_flow" or "consistency".
  """
  if objective not in OBJECTIVES:
    raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, got {objective!r}")
  config = ConfigDict()
  config.seed = 0
  settings = OBJECTIVES[objective]
  # The settings of a flow map are an instance with the defaults of its kind.
  defaults = _defaults(settings) if inspect.isclass(settings) else dataclasses.asdict(settings())
  config.objective = {"kind": objective, **defaults}
  if objective != "flow_matching":
    config.teacher = _defaults(TeacherSettings)
    config.adapters = _defaults(AdapterSettings)
  config.start = _defaults(StartSettings)
  if objective in FLOW_MAPS:
    config.adversarial = _defaults(Adversarial) | {"weight": 0.0}
  config.optimizer = _defaults(optim.make_optimizer, but=("total_steps",))
  config.ema = _defaults(optim.make_ema_decay)
  config.train = _defaults(TrainSettings)
  config.sample = _defaults(SampleSettings)
  config.evaluate = _defaults(EvaluateSettings)
  config.mesh = _defaults(MeshSettings)
  for section in config.values():
    if isinstance(section, ConfigDict):
      section.lock()
  return config


def _defaults(owner: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
  """Keyword arguments of a function or dataclass with their defaults."""
  values = {}
  for name, parameter in inspect.signature(owner).parameters.items():
    if name not in but:
      default = None if parameter.default is inspect.Parameter.empty else parameter.default
      values[name] = config_dict.placeholder(UNSET_TYPES[name]) if default is None else default
  return values
