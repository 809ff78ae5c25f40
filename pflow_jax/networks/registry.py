"""Networks by the names that a config gives them, with their description for the rest of the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn

from pflow_jax.files.registering import replaces
from pflow_jax.mesh.partition import first_match
from pflow_jax.networks import discriminator, edm2, heads, layers, lora
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.edm2 import EDM2UNet, normalize_weights
from pflow_jax.networks.mlp import MLP

Rule = tuple[str, tuple[Any, ...]]
FROM_DATA = ("channels", "num_classes", "pooled_width", "head")  # attributes that the data and the head decide


@dataclasses.dataclass(frozen=True)
class NetworkKind:
  """A network that a config can name.

  Attributes:
    module: its class; the options of a config are its attributes.
    sharding: rows (pattern, spec) for its own parameters, see `mesh.sharding.Layout`.
    conditions: kinds of its condition: "classes", "pooled" (a vector a text) or "text" (tokens).
    layout: order of the rows of its output layer, see `networks.heads`.
    has_head: whether a head is its output layer; other networks make a velocity by themselves.
    project: projection to apply to the parameters after each update, or None.
  """

  module: type[nn.Module]
  sharding: tuple[Rule, ...] = layers.SHARDING
  conditions: tuple[str, ...] = ("classes",)
  layout: str = "dit"
  has_head: bool = True
  project: Callable[[Any], Any] | None = None

  @property
  def defaults(self) -> dict[str, Any]:
    """Defaults of the attributes that determine the network; neither data nor dtype are among them."""
    hidden = ("parent", "name", "channels", "num_classes", "dtype", "head")
    return {name: value for name, value in self._defaults() if name not in hidden}

  def _defaults(self) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(self.module):  # type: ignore[arg-type]
      if field.default is not dataclasses.MISSING:
        yield field.name, field.default

  def of_data(self, name: str, dataset_name: str, channels: int, num_classes: int, cond: Any) -> dict[str, Any]:
    """Attributes of the module that its data decide.

    Args:
      name: of the network, for errors.
      dataset_name: for errors.
      channels: of the data.
      num_classes: of the data.
      cond: shapes of a condition.

    Raises:
      ValueError: the network cannot be conditioned on `cond`.
    """
    attributes: dict[str, Any] = {"channels": channels}
    if "classes" in self.conditions:
      attributes["num_classes"] = num_classes
    if not isinstance(cond, Mapping):
      if "classes" in self.conditions:
        return attributes
      raise ValueError(f"config.model.kind: {name!r} is conditioned on texts, the data set {dataset_name} has none")
    if "text" in self.conditions:
      return attributes
    if "pooled" not in self.conditions:
      raise ValueError(f"config.model.kind: {name!r} is conditioned on classes, the data set {dataset_name} has texts")
    if "pooled" not in cond:
      raise ValueError(
        f"config.model.kind: {name!r} is conditioned on one vector a text, {dataset_name} has {sorted(cond)}; write it "
        "with `pflow cache --model minilm`"
      )
    return attributes | {"pooled_width": cond["pooled"].shape[-1]}


NETWORKS: dict[str, NetworkKind] = {
  "dit": NetworkKind(DiT, conditions=("classes", "pooled")),
  "edm2": NetworkKind(EDM2UNet, (*edm2.SHARDING, *layers.SHARDING), has_head=False, project=normalize_weights),
  "mlp": NetworkKind(MLP),
}
"""Networks of this room; families, and users, add theirs with `register_network`."""


def register_network(name: str, kind: NetworkKind) -> None:
  """Makes a network known to configs.

  Args:
    name: value of config.model.kind.
    kind: the network.

  Raises:
    ValueError: another network has that name, or this package's own network has it with another description.
  """
  own = NETWORKS.get(name, kind)
  if not replaces(kind, kind.module, own, own.module):
    raise ValueError(f"there is a network {name!r} already, {own.module.__name__}; take another name")
  NETWORKS[name] = kind


def network_kind(name: Any) -> NetworkKind:
  """Returns the network of a name.

  Raises:
    ValueError: there is no network of that name.
  """
  if not isinstance(name, str) or name not in NETWORKS:
    raise ValueError(f"config.model.kind: expected one of {sorted(NETWORKS)}, got {name!r}")
  return NETWORKS[name]


def options_of(module: nn.Module) -> tuple[str, dict[str, Any]]:
  """Returns the name of a network in a config, and its options.

  Args:
    module: of a registered network.

  Raises:
    ValueError: the network is not registered.
  """
  names = [name for name, kind in NETWORKS.items() if kind.module is type(module)]
  if not names:
    known = sorted(kind.module.__name__ for kind in NETWORKS.values())
    raise ValueError(
      f"expected a network of {known}, got {type(module).__name__}; make another one known by register_network"
    )
  return names[0], heads.attributes_of(module, FROM_DATA)


def sharding_rules(kind: str) -> tuple[Rule, ...]:
  """Placement of the parameters on a mesh in a run of the network `kind`: the first row that matches decides.

  Rows of other networks, such as a smaller teacher's, come last, without those that take every parameter: one that no
  row of its own network covers is to be refused.

  Args:
    kind: name of the run's network.
  """
  shared = (*discriminator.SHARDING, *heads.SHARDING, *lora.SHARDING)
  own = NETWORKS[kind].sharding if kind in NETWORKS else ()
  others = (row for name, other in NETWORKS.items() if name != kind for row in other.sharding if not _takes_all(row))
  return tuple(dict.fromkeys((*shared, *own, *others)))


def _takes_all(row: Rule) -> bool:
  return first_match((f"(?:.*/)?(?:{row[0]})",), "?/?") is not None  # no parameter has such a name
