"""Names of a module's weights and settings in PyTorch's files; a family has one table for each of its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flax import linen as nn

from pflow_jax.networks.heads import HEADS, Head, VelocityHead, head_options_of
from pflow_jax.torch_io.fields import joined, read_fields, schema_of
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.table import Row

TEACHER = VelocityHead()
Shape = tuple[int, ...]
# Attributes that say nothing of which network it is.
_HIDDEN = ("head", "dtype", "residual_dtype", "remat", "attention", "scan_unroll")


@dataclasses.dataclass(frozen=True)
class Source:
  """Files of a model, and what is known of them.

  Attributes:
    tensors: of the model.
    config: content of its config.json; empty where there is none.
    file: where it is, for errors.
    published: name by which it may be known, of its file or of its folder.
    convention: name of the convention of its time and its velocity, where the user gave one.
    has_base: whether a teacher of ours is given too, which knows that convention.
    notes: on what was assumed and left out.
  """

  tensors: Tensors
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  file: str = ""
  published: str = ""
  convention: str | None = None
  has_base: bool = False
  notes: tuple[str, ...] = ()

  def noted(self, note: str, **fields: Any) -> Source:
    """Returns this source with one more note.

    Args:
      note: a sentence.
      fields: of config.json, that it is about.
    """
    return dataclasses.replace(self, config={**self.config, **fields}, notes=(*self.notes, note))


class TorchNames:
  """Names of the weights of a module without a head, such as an autoencoder.

  A subclass has at least `module`, `class_names` and `body`. Unless it says otherwise, the fields of config.json are
  the attributes of the module.
  """

  module: ClassVar[type[nn.Module]]
  """The Flax module."""

  class_names: ClassVar[tuple[str, ...]]
  """Its classes in PyTorch, "_class_name" in config.json; the first is written."""

  def body(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
    """Returns the table of names of the module's own parameters.

    Args:
      model: attributes of the module.
    """
    raise NotImplementedError

  def rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
    """Returns the table of names of all parameters.

    Args:
      model: attributes of the module.
    """
    return self.body(model)

  def schema(self, name: str) -> type:
    """Returns the dataclass of the fields of config.json.

    Args:
      name: one of the classes in PyTorch.
    """
    del name
    return self._own

  def model_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes of the module.

    Args:
      config: a config.json.

    Raises:
      ValueError: it has fields that the module does not have, all of which are named.
    """
    return read_fields(config, self.schema(self.class_names[0]), self.class_names[0])

  def config_from_model(self, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json, the way back of `model_from_config`.

    Args:
      model: attributes of the module.

    Raises:
      ValueError: PyTorch's class does not have them.
    """
    name = self.class_names[0]
    return {"_class_name": name} | {field: model[field] for field in _names(self.schema(name)) if field in model}

  @property
  def _own(self) -> type:
    module: Any = self.module
    return schema_of(module, _HIDDEN)

  def current_name(self, name: str) -> str:
    """Returns today's name of a tensor that an old file may hold under another.

    Args:
      name: of the tensor in a file.
    """
    return name


class NetworkNames(TorchNames):
  """Names of the weights of a network, whose head brings its own.

  `class_names` are those of a teacher.
  """

  output: ClassVar[str] = "proj_out"
  """Name of the layer that makes a velocity."""

  backbone: ClassVar[str] = ""
  """End, after the prefix, of the names of students' classes; by default the first of `class_names`."""

  irregular: ClassVar[Mapping[str, str]] = {}
  """Classes of students that are named otherwise, by `torch_prefix`."""

  flow_map_class: ClassVar[str | None] = None
  """Class of its flow maps, by a name of this package's own; None where the branches of a flow map have no names."""

  @property
  def classes(self) -> dict[str, str]:
    """Classes in PyTorch and the kinds of their heads, of all heads that are known."""
    found: dict[str, str] = {}
    for kind, head in HEADS.items():
      if head.torch_prefix is not None:
        found |= dict.fromkeys(self._class_names(head.torch_prefix), kind)
    if self.flow_map_class is not None:
      found[self.flow_map_class] = "velocity"
    return found

  def _class_names(self, prefix: str) -> tuple[str, ...]:
    if not prefix:
      return self.class_names
    return (self.irregular.get(prefix, prefix + (self.backbone or self.class_names[0])),)

  def class_of(self, head: Head) -> str:
    """Returns the class in PyTorch that is written.

    Args:
      head: of the network.

    Raises:
      ValueError: there is none.
    """
    found = () if head.torch_prefix is None else self._class_names(head.torch_prefix)
    if not found:
      known = sorted(set(self.classes.values()))
      raise ValueError(f"config.head.kind: no PyTorch class has {head_options_of(head)[0]!r}, only {known}")
    return found[0]

  def rows(self, model: Mapping[str, Any], head: Head = TEACHER) -> tuple[Row, ...]:
    """Returns the table of names of all parameters.

    Args:
      model: attributes of the network.
      head: its head, of which the sizes do not matter.
    """
    return (*self.body(model), *head.torch_rows(self.output))

  def branch_rows(self, model: Mapping[str, Any], inputs: Sequence[str]) -> tuple[Row, ...]:
    """Returns the table of names of the branches that a flow map has and its teacher has not.

    Args:
      model: attributes of the network.
      inputs: of the network beside state, time and condition: "s", and "guidance" of one for several strengths.

    Raises:
      ValueError: they have no names.
    """
    if inputs:
      raise ValueError(
        f"{self.class_names[0]}: expected a teacher or a policy, got a flow map, whose branches have no "
        "names in PyTorch; draw its samples with `pflow sample`"
      )
    return ()

  def schema(self, name: str) -> type:
    of_head = HEADS[self.classes[name]].torch_schema()
    if shared := sorted(set(_names(self._own)) & set(_names(of_head))):
      raise ValueError(f"{name}: expected fields of config.json in the network or in its head, got {shared} in both")
    return joined(self._own, of_head)

  def model_from_config(self, config: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    """Returns the attributes of the network.

    Args:
      config: a config.json, with "_class_name".
      head: of the network that it describes.

    Raises:
      ValueError: it has fields that the network does not have, all of which are named.
    """
    full = read_fields(config, self.schema(config["_class_name"]))
    return {name: full[name] for name in _names(self._own)}

  def config_from_model(self, model: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    """Returns a config.json, the way back of `model_from_config`.

    Args:
      model: attributes of the network.
      head: its head.

    Raises:
      ValueError: PyTorch has no class for them.
    """
    own = {name: model[name] for name in _names(self._own) if name in model}
    return {"_class_name": self.class_of(head), **own, **head.torch_fields()}

  def recognise(self, source: Source) -> Source | None:
    """Returns a source with a whole config.json, and without tensors that the network does not need.

    Args:
      source: files of any model.

    Returns:
      The same, or None where it is no model of these names.

    Raises:
      ValueError: it is one, and is damaged, or cannot be used, or does not tell enough.
    """
    name = source.config.get("_class_name")
    if name not in self.classes:
      return None
    if source.convention is not None:
      raise ValueError(f"convention: only the files of a DiT leave it open, this is a {name}; leave it out")
    return source

  def sizes(self, shapes: Mapping[str, Shape], head: Head, patch_size: int) -> dict[str, int]:
    """Returns what the parameters of a run tell of its data: "channels", and "num_classes" if they tell.

    Args:
      shapes: of the parameters, by path.
      head: of the network, for one channel.
      patch_size: of the network.

    Raises:
      ValueError: there is no output layer.
    """
    bias = shapes.get(f"head/{head.velocity_layer}/bias", ())
    if len(bias) != 1:
      raise ValueError(
        f"the checkpoint has no output layer {head.velocity_layer!r}, expected that of the head "
        f"{head_options_of(head)[0]!r}"
      )
    table = shapes.get("class_embed/embedding", ())
    told = {"num_classes": table[0] - 1} if len(table) == 2 else {}
    return {"channels": bias[0] // (patch_size**2 * head.maps), **told}

  def smallest_side(self, model: Mapping[str, Any]) -> int:
    """Returns the side of the smallest input that the network takes.

    Args:
      model: attributes of the network.
    """
    return model.get("patch_size", 1)

  def constants(self, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns tensors of PyTorch's class that no parameter of ours makes, by name.

    Args:
      model: attributes of the network.
    """
    del model
    return {}


def _names(schema: type) -> list[str]:
  return list(schema.__dataclass_fields__)  # type: ignore[attr-defined]
