"""What a family is: all that the package has to know of a published model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pflow_jax.families.encoders import Encoder
from pflow_jax.networks.registry import NetworkKind


@dataclasses.dataclass(frozen=True)
class Family:
  """A published model, by the name that its network has in a config.

  Attributes:
    name: of the network in a config, and of the prompts that are embedded for it.
    network: None where the family is a text encoder alone, whose vector takes the place of a class.
    names: module with the names of its weights in PyTorch: `CLASS_NAMES` (class in config.json -> kind of head),
      `FIELDS` (class -> schema of its config.json), `rows`, `model_from_config` and `config_from_model`, see
      `families.flux.names`. None where nothing is converted.
    encoder: its text encoders.
    autoencoders: classes in config.json -> (Flax module, module with the names of its weights).
    teacher: what its released models are sampled with, keys of `SampleSettings`, and the time "shift".
    students: the same of its released students, by kind of head: "nfe", "final_scale", "shift", and "temperature" where
      it is not 1.
  """

  name: str
  network: NetworkKind | None = None
  names: Any = None
  encoder: type[Encoder] | None = None
  autoencoders: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
  teacher: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  students: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
