"""Record of a family: all that the package has to know of a published model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pflow_jax.families.encoders import Encoder
from pflow_jax.families.names import NetworkNames, TorchNames
from pflow_jax.networks.heads import Head
from pflow_jax.networks.registry import NetworkKind


@dataclasses.dataclass(frozen=True)
class Family:
  """A published model, by the name that its network has in a config.

  Attributes:
    name: of the network in a config, and of the prompts that are embedded for it.
    network: None where the family is a text encoder alone, whose vector takes the place of a class.
    names: of its weights in PyTorch; None where nothing is converted.
    encoder: its text encoders.
    autoencoder: names of its autoencoder's weights; None where it makes pixels.
    side: pixels of a latent along each axis, of a picture of the published size.
    teacher: what its released models are sampled with, keys of `SampleSettings`, and the time "shift".
    students: the same of its released students, by head: "nfe", "final_scale", "shift", and "temperature" where it is
      not 1.
    formats: other names of its weights in PyTorch, by the name of the format.
    knows_empty: whether its released models were trained with the empty condition too, which then guides them.
  """

  name: str
  network: NetworkKind | None = None
  names: NetworkNames | None = None
  encoder: type[Encoder] | None = None
  autoencoder: TorchNames | None = None
  side: int = 128
  teacher: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  students: Mapping[type[Head], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  formats: Mapping[str, NetworkNames] = dataclasses.field(default_factory=dict)
  knows_empty: bool = True
