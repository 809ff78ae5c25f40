"""The models that are converted, by their PyTorch classes and by our names, and the shapes of their parameters."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pflow_jax.data import ArrayRecords, Dataset, Embedding
from pflow_jax.families.metadata import FlowMapStated, head_of_config
from pflow_jax.families.names import NetworkNames, Source
from pflow_jax.families.registry import FAMILIES, network_kind
from pflow_jax.files import foreign
from pflow_jax.networks.heads import Head
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.torch_io.check import listing
from pflow_jax.torch_io.fields import check_sizes, read_fields
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.table import Row, flat_shapes, is_lora, torch_shapes_of
from pflow_jax.torch_io.tensors import CONFIG
from pflow_jax.training.network import head_class, make_network

# Attributes of our modules that a config takes from its data, and what is no attribute at all.
_FROM_DATA = ("channels", "num_classes", "sample_size", "out_channels", "per_block")
DIFFUSERS = "diffusers"  # the format that is written by default


@dataclasses.dataclass(frozen=True)
class Model:
  """A network that both sides have.

  Attributes:
    kind: as config.model.kind.
    attributes: of its module, see the modules' `model_from_config`.
    head: its output layer.
    names: of its weights in PyTorch.
    inputs: of the network beside state, time and condition: "s" of a flow map, and "guidance" of one that was trained
      for several strengths.
  """

  kind: str
  attributes: Mapping[str, Any]
  head: Choice
  names: NetworkNames
  inputs: tuple[str, ...] = ()

  @property
  def output(self) -> Head:
    """Its output layer as a module, without the sizes of the network."""
    return head_class(self.head)(**self.head.options)

  @property
  def rows(self) -> tuple[Row, ...]:
    """Names of all parameters."""
    return (*self.names.rows(self.attributes, self.output), *self.branches)

  @property
  def branches(self) -> tuple[Row, ...]:
    """Names of the parameters that a flow map has and its teacher has not."""
    return self.names.branch_rows(self.attributes, self.inputs)

  @property
  def options(self) -> dict[str, Any]:
    """Options of the network in a run's settings."""
    return {key: value for key, value in self.attributes.items() if key not in _FROM_DATA}

  @property
  def torch_config(self) -> dict[str, Any]:
    """A config.json."""
    config = self.names.config_from_model(self.attributes, self.output)
    return config | {"_class_name": self.names.flow_map_class} if self.inputs else config

  @property
  def constants(self) -> dict[str, np.ndarray]:
    """Tensors of PyTorch's class that no parameter makes, by name."""
    return self.names.constants(self.attributes)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of our network's parameters by path, without making any."""
    network = make_network(Choice(self.kind, self.options), self.head, self._dataset())
    return flat_shapes(network.shapes(self._dataset(), **{name: jnp.ones((1,)) for name in self.inputs}))

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
    side, classes = self.names.smallest_side(attributes), attributes.get("num_classes", 0)
    records = ArrayRecords(np.zeros((0, 0)), np.zeros(0))
    shape = (side, side, attributes["channels"])
    return Dataset("none", shape, classes, (), records, embedding=embedding)


def read_config(source: pathlib.Path) -> dict[str, Any]:
  """Reads the config.json of a model; returns an empty one where there is none.

  Args:
    source: folder of the model, or a file with config.json beside it.

  Raises:
    ValueError: its class is not known.
  """
  path = (source if source.is_dir() else source.parent) / CONFIG
  if not path.exists():
    return {}
  config = foreign.read_json(path)
  if "_class_name" in config and config["_class_name"] not in list(_classes()):
    raise ValueError(
      f"{path}: _class_name must be one of {list(_classes())}, got {foreign.shown(config['_class_name'])}"
    )
  return config


def recognise(source: Source) -> Source:
  """Returns a source with a whole config.json, and with no tensors but those of the model.

  Args:
    source: files of a model; of a published DiT they need no config.json.

  Raises:
    ValueError: they are of no known model, or do not tell enough of it.
  """
  for family in FAMILIES.values():
    for names in filter(None, (family.names, *family.formats.values())):
      found = names.recognise(source)
      if found is not None:
        return found
  raise ValueError(
    f"{source.file}: expected {CONFIG} beside the weights, with the class and the sizes of the model, as diffusers "
    "writes it; without one only files of DiT, SiT, REPA and π-Flow's release on ImageNet are known by their tensors, "
    f"and these are {listing(source.tensors.places, ())}"
  )


def model_of_torch(config: Mapping[str, Any], metadata: Mapping[str, str], tensors: Tensors | None = None) -> Model:
  """Returns the model that a config.json and the metadata of its files describe.

  Args:
    config: a config.json.
    metadata: of the files.
    tensors: in those files, which bound its sizes; those of an adapter are its teacher's.

  Raises:
    ValueError: this package's network does not do what the config says, or its tensors cannot have such sizes.
  """
  name = config["_class_name"]
  kind, names = _classes()[name]
  schema = names.schema(name)
  full = read_fields(config, schema)
  head = head_of_config(names.classes[name], full | {"_class_name": name}, metadata)
  owner = head_class(head)
  attributes = names.model_from_config(config, owner(**head.options))
  if "sample_size" in full:
    attributes["sample_size"] = full["sample_size"]
  if tensors is not None:
    of_head = [field.name for field in dataclasses.fields(owner.torch_schema())]
    check_sizes(full, schema, tensors, of_head if any(map(is_lora, tensors.places)) else None)
  inputs: tuple[str, ...] = ()
  if name == names.flow_map_class:
    inputs = ("s",) if FlowMapStated.read(metadata).guidance is None else ("s", "guidance")
  return Model(kind, attributes, head, names, inputs)


def model_of_run(
  settings: Settings,
  shapes: Mapping[str, tuple[int, ...]],
  data: Mapping[str, Any] | None = None,
  format: str = DIFFUSERS,
) -> Model:
  """Returns the model that a run of ours trained.

  Args:
    settings: of the run.
    shapes: of the parameters in its checkpoint, by path; those of the output layers at least.
    data: what a DiT takes from its data and its parameters do not tell: "sample_size", and "num_classes" where they do
      not have the table of them.
    format: of the names in PyTorch, DIFFUSERS or one of those of its family.

  Raises:
    ValueError: PyTorch has no class for the network, or no such format.
  """
  kind, head = settings.model.kind, settings.head
  if kind not in _converted():
    raise ValueError(f"config.model.kind: PyTorch has no class for {kind!r}, expected one of {list(_converted())}")
  formats = {DIFFUSERS: _converted()[kind], **FAMILIES[kind].formats}
  if format not in formats:
    raise ValueError(f"format: expected one of {list(formats)} for a {kind}, got {format!r}")
  attributes = {**network_kind(kind).defaults, **settings.model.options}
  missing = [name for name in _required(kind) if attributes.get(name) is None]
  if missing:
    raise ValueError(f"config.model: {', '.join(missing)} must be set")
  patch = attributes.get("patch_size", 1)
  made = head_class(head)(channels=1, patch_size=patch, **head.options)
  sizes = formats[format].sizes(shapes, made, patch)
  attributes["channels"] = sizes["channels"]
  if "classes" in network_kind(kind).conditions:
    attributes |= {**(data or {}), **sizes}
    if attributes.get("num_classes") is None:
      raise ValueError(
        "config.data.num_classes: PyTorch's DiT is conditioned on classes, and neither the run's config nor its "
        "checkpoint tells how many there are; set it, unless the run is conditioned on texts"
      )
  return Model(kind, attributes, head, formats[format], _inputs_of(shapes))


def _inputs_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
  """Returns the inputs of a network, see `Model`, by its parameters: those for them always train."""
  branches = {path.partition("/")[0] for path in shapes}
  if "length_embed" not in branches:
    return ()
  return ("s", "guidance") if "guidance_embed" in branches else ("s",)


def _converted() -> dict[str, NetworkNames]:
  """Returns the names in PyTorch of the families that have some."""
  return {name: family.names for name, family in FAMILIES.items() if family.names is not None}


def _classes() -> dict[str, tuple[str, NetworkNames]]:
  """Returns the network and the names of every class in PyTorch."""
  return {
    name: (kind, names)
    for kind, family in FAMILIES.items()
    for names in filter(None, (family.names, *family.formats.values()))
    for name in names.classes
  }


def _required(kind: str) -> list[str]:
  """Attributes of a network that a config must have."""
  given = ("channels", "num_classes", "head", "parent", "name")
  fields = dataclasses.fields(network_kind(kind).module)  # type: ignore[arg-type]
  return [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in given]


def classes_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
  """Classes of a network by the shapes of its parameters, if the table of them is among these."""
  for path, beside in (("class_embed/embedding", 1), ("class_embed/mp_kernel", 0)):
    if len(table := shapes.get(path, ())) == 2:
      return table[0] - beside
  return None
