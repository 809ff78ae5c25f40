"""The models that are converted, by their PyTorch classes and by our names, and the shapes of their parameters."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from pflow_jax.convert import dit, flux, qwen_image
from pflow_jax.convert.heads import policy_from_config
from pflow_jax.convert.table import Row, torch_shapes_of
from pflow_jax.convert.tensors import CONFIG
from pflow_jax.data import ArrayRecords, Dataset, Embedding
from pflow_jax.networks import make_network, module_defaults

MODULES: dict[str, ModuleType] = {"dit": dit, "flux": flux, "qwen_image": qwen_image}
# Attributes of our modules that a config takes from its data, and what is no attribute at all.
_FROM_DATA = ("channels", "num_classes", "sample_size", "out_channels")


@dataclasses.dataclass(frozen=True)
class Model:
  """A network that both sides have.

  Attributes:
    kind: as config.model.kind.   attributes: of its module, see the modules' `model_from_config`.
    policy: as the section of a config.
  """

  kind: str
  attributes: Mapping[str, Any]
  policy: Mapping[str, Any]

  @property
  def rows(self) -> tuple[Row, ...]:
    return MODULES[self.kind].rows(self.attributes, self.policy)

  @property
  def section(self) -> dict[str, Any]:
    """The section `model` of a config."""
    return {"kind": self.kind} | {key: value for key, value in self.attributes.items() if key not in _FROM_DATA}

  @property
  def torch_config(self) -> dict[str, Any]:
    """A config.json."""
    return MODULES[self.kind].config_from_model(self.attributes, self.policy)

  @property
  def learns_variance(self) -> bool:
    """Whether the PyTorch model has channels that are not wanted here."""
    return "out_channels" in self.attributes

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of our network's parameters by path, without making any."""
    network = make_network(self.section, self.policy, self._dataset())
    return flat_shapes(network.shapes(self._dataset()))

  def torch_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that make them, by name."""
    shapes = self.shapes()
    return {name: shape for row in self.rows for name, shape in torch_shapes_of(row, shapes[row.flax]).items()}

  def _dataset(self) -> Dataset:
    """A set of examples of the smallest shape that the network takes."""
    attributes = self.attributes
    embedding = None
    if "text_width" in attributes:
      embedding = Embedding((1,), attributes["text_width"], True, attributes.get("pooled_width") or 0)
    side, classes = attributes["patch_size"], attributes.get("num_classes", 0)
    records = ArrayRecords(np.zeros((0, 0)), np.zeros(0))
    shape = (side, side, attributes["channels"])
    return Dataset("none", shape, classes, (), records, embedding=embedding)


def read_config(source: pathlib.Path) -> dict[str, Any]:
  """The config.json of a model folder, or beside a file.

  Raises: ValueError if there is none, or its class is not known.
  """
  folder = source if source.is_dir() else source.parent
  known = [name for module in MODULES.values() for name in module.CLASS_NAMES]
  path = folder / CONFIG
  if not path.is_file():
    raise ValueError(
      f"{folder}: expected {CONFIG} with the class and the sizes of the model, as diffusers writes it; for π-Flow's "
      'teachers on ImageNet {"_class_name": "DiTTransformer2DModelMod"} is enough (with "num_timesteps": 1 for the one '
      "with REPA)"
    )
  try:
    config = json.loads(path.read_text())
    name = config.get("_class_name")
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{path}: expected a JSON object: {error}") from error
  if name not in known:
    raise ValueError(f"{path}: _class_name must be one of {known}, got {name!r}")
  return config


def model_of_torch(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Model:
  """The model that a config.json and the metadata of its files describe."""
  name = config["_class_name"]
  kind = next(kind for kind, module in MODULES.items() if name in module.CLASS_NAMES)
  policy = policy_from_config(MODULES[kind].CLASS_NAMES[name], config, metadata)
  attributes = MODULES[kind].model_from_config(config)
  if kind == "dit":
    attributes["sample_size"] = dit.sample_size(config)
  return Model(kind, attributes, policy)


def model_of_run(
  config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], data: Mapping[str, Any] | None = None
) -> Model:
  """The model that a run of ours trained.

  Args:
    config: of the run.   shapes: of the parameters in its checkpoint, by path; those of the output layers at least.
    data: what a DiT takes from its data and its parameters do not tell: "sample_size", and "num_classes" where they do
      not have the table of them.
  Raises: ValueError for a network that PyTorch has no class for.
  """
  section, policy = dict(config["model"]), dict(config["policy"])
  if section["kind"] not in MODULES:
    raise ValueError(
      f"config.model.kind: PyTorch has no class for {section['kind']!r}, expected one of {list(MODULES)}"
    )
  attributes = module_defaults(section) | {key: value for key, value in section.items() if key != "kind"}
  maps = policy.get("num_components", 8) if policy["kind"] in ("gmflow", "arc") else 1
  maps = policy.get("num_coefficients", 10) if policy["kind"] == "dx" else maps
  layer = "proj_out_means" if policy["kind"] in ("gmflow", "arc") else "proj_out"
  if f"head/{layer}/bias" not in shapes:
    raise ValueError(f"the checkpoint has no output layer {layer!r}, expected that of the policy {policy['kind']!r}")
  attributes["channels"] = shapes[f"head/{layer}/bias"][0] // (attributes["patch_size"] ** 2 * maps)
  if section["kind"] == "dit":
    attributes |= data or {}
    if "class_embed/embedding" in shapes:
      attributes["num_classes"] = shapes["class_embed/embedding"][0] - 1
  return Model(section["kind"], attributes, policy)


def flat_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Shapes of nested leaves by their "/"-joined paths."""
  return {"/".join(keys): tuple(leaf.shape) for keys, leaf in flatten_dict(tree).items()}
