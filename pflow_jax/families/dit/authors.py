"""DiT by the names of its authors' code, made of timm's parts, which SiT and REPA have too.

References:
  github.com/facebookresearch/DiT, github.com/willisma/SiT, github.com/sihyun-yu/REPA.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pflow_jax.families.dit import recognise
from pflow_jax.families.dit.names import DiTNames, Fields
from pflow_jax.families.names import TEACHER, Source
from pflow_jax.networks.heads import Head
from pflow_jax.networks.layers import grid_of, position_table
from pflow_jax.torch_io.fields import Epsilon, Positive, joined
from pflow_jax.torch_io.table import Row, dense

SIT = "SiT"
_CLASSES = "y_embedder.embedding_table.weight"
_BLOCK = (("attn.qkv", "qkv"), ("attn.proj", "proj"), ("mlp.fc1", "mlp_in"), ("mlp.fc2", "mlp_out"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuthorsFields(Fields):
  """Fields of a config.json that this package writes beside such tensors; the authors' code has none."""

  norm_eps: Epsilon = 1e-6
  num_timesteps: Positive = 1


class AuthorsNames(DiTNames):
  """Names of `networks.dit.DiT` in SiT's, REPA's and DiT's own files.

  A network whose time runs from noise to data, as SiT's, makes x0 - eps there: the sign of its last layer is turned.
  """

  class_names = (SIT,)
  output = "final_layer.linear"
  patch = "x_embedder.proj.weight"
  block = "blocks."
  positions = "pos_embed"
  own_sign = True

  def _class_names(self, prefix: str) -> tuple[str, ...]:
    return () if prefix else self.class_names

  @property
  def classes(self) -> dict[str, str]:
    """The only class, a teacher's."""
    return {SIT: "velocity"}

  def rows(self, model: Mapping[str, Any], head: Head = TEACHER) -> tuple[Row, ...]:
    block = "blocks.{i}"
    output = self.output_rows(model, head)
    if model.get("flip_time"):
      output = tuple(dataclasses.replace(row, negate=True) for row in output)
    return (
      Row(self.patch, "patch_embed/kernel", "patch", patch_size=model["patch_size"]),
      Row("x_embedder.proj.bias", "patch_embed/bias"),
      *dense("t_embedder.mlp.0", "time_embed/in"),
      *dense("t_embedder.mlp.2", "time_embed/out"),
      Row(_CLASSES, "class_embed/embedding"),
      *(row for theirs, ours in _BLOCK for row in dense(f"{block}.{theirs}", f"blocks/{ours}")),
      *dense(f"{block}.adaLN_modulation.1", "blocks/adaln"),
      *dense("final_layer.adaLN_modulation.1", "final_norm/adaln"),
      *output,
    )

  def schema(self, name: str) -> type:
    return joined(AuthorsFields, super().schema(name))

  def recognise(self, source: Source) -> Source | None:
    return super().recognise(_renumbered(source))

  def told(self, source: Source) -> dict[str, Any]:
    config = {"_class_name": SIT} | recognise.sizes(source, self.patch, _CLASSES, self.block, self.positions)
    return config | {"out_channels": recognise.outputs(source, f"{self.output}.weight", config)}

  def beyond(self, channels: int) -> tuple[int, ...]:
    return (2 * channels,)

  def evidence(self, source: Source) -> tuple[str, str] | None:
    if (found := recognise.trained(source)) is not None:
      return found
    if _projectors(source):
      return "repa", "by its projectors"
    inputs, outputs = source.config.get("in_channels"), source.config.get("out_channels")
    if inputs and outputs == 2 * inputs and recognise.learned_nothing(source, self.output, inputs):
      return "sit", "by the outputs for a variance that nothing was learned for"
    return recognise.published(source)

  def assumed(self, source: Source, stated: bool) -> Source:
    self._ask(source)

  def _timed(self, source: Source, stated: bool) -> Source:
    source, aligned = super()._timed(source, stated), _projectors(source)
    if not aligned:
      return source
    source = dataclasses.replace(source, tensors=source.tensors.without(aligned))
    return source.noted(f"left out: projectors, {len(aligned)} tensors, which serve REPA's loss alone")

  def config_from_model(self, model: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    wanted = {"time_scale": 1, "frequency_shift": 0, "norm_eps": AuthorsFields.norm_eps}
    got = {name: model.get(name, getattr(self.module, name)) for name in wanted}
    if differing := [name for name in wanted if got[name] != wanted[name]]:
      text = ", ".join(f"{name} {wanted[name]:g}, got {got[name]:g}" for name in differing)
      raise ValueError(f"format: the code of SiT and REPA has no other than {text}; leave out the format")
    times = {"num_timesteps": 1, "flip_model_timesteps": bool(model.get("flip_time"))}
    return super().config_from_model(model, head) | times

  def constants(self, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    side = model.get("sample_size", Fields.sample_size)
    table = position_table(grid_of((side, side), model["patch_size"]), model["width"])
    return {self.positions: table[None].astype(np.float32)}


def _projectors(source: Source) -> list[str]:
  """Returns the names of tensors that REPA's loss needs, and its network does not."""
  return [name for name in source.tensors.places if name.startswith("projectors.")]


def _renumbered(source: Source) -> Source:
  """Returns a source whose decoder_blocks, of REPA's early files, are numbered on from its blocks."""
  names = list(source.tensors.places)
  late = [name for name in names if name.startswith("decoder_blocks.")]
  if not late:
    return source
  early = {match[1] for name in names if (match := re.match(r"blocks\.(\d{1,4})\.", name))}

  def number(name: str) -> str:
    match = re.match(r"decoder_blocks\.(\d{1,4})\.", name)
    return name if match is None else f"blocks.{int(match[1]) + len(early)}.{name[match.end() :]}"

  renamed = {number(name): name for name in names}
  return dataclasses.replace(source, tensors=source.tensors.renamed(renamed))


NAMES = AuthorsNames()
