"""Qwen-Image, to and from diffusers and the releases of π-Flow and ArcFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pflow_jax.families import mmdit_names as mmdit
from pflow_jax.families.names import TEACHER
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.networks.heads import HEADS, Head
from pflow_jax.torch_io.fields import Depth, Size, read_fields
from pflow_jax.torch_io.table import Row, dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields(mmdit.Fields):
  num_layers: Depth = 60
  joint_attention_dim: Size = 3584
  pooled_projection_dim: Any = None  # published, and of nothing
  # Of the models that edit images.
  guidance_embeds: Literal[False] = False
  zero_cond_t: Literal[False] = False
  use_additional_t_cond: Literal[False] = False
  use_layer3d_rope: Literal[False] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(_Fields):
  """Fields of diffusers' class."""

  patch_size: Size = 2
  out_channels: Size | None = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentFields(_Fields):
  """Fields of a student in that class, for which π-Flow's counts the channels of whole patches."""

  patch_size: Size = 1


_DOUBLE = (
  *(("img_mod.1", "img_mod"), ("txt_mod.1", "txt_mod")),
  *(("img_mlp.net.0.proj", "img_mlp_in"), ("img_mlp.net.2", "img_mlp_out")),
  *(("txt_mlp.net.0.proj", "txt_mlp_in"), ("txt_mlp.net.2", "txt_mlp_out")),
)


class QwenImageNames(mmdit.Names):
  """Names of `families.qwen_image.network.QwenImage`."""

  module = QwenImage
  class_names = ("QwenImageTransformer2DModel",)
  flow_map_class = "FlowMapQwenImageTransformer2DModel"

  def body(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
    return (
      *dense("img_in", "img_in"),
      *dense("txt_in", "txt_in"),
      Row("txt_norm.weight", "txt_norm/scale"),
      *mmdit.embedding_rows("time_text_embed.timestep_embedder", "time_embed"),
      *mmdit.double_block_rows(_DOUBLE),
      *mmdit.final_norm_rows(),
    )

  def schema(self, name: str) -> type:
    return mmdit.schema(HEADS[self.classes[name]], _Fields, Fields, StudentFields)

  def model_from_config(self, config: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    return mmdit.sizes_from_config(read_fields(config, self.schema(config["_class_name"])), head)

  def config_from_model(self, model: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    fields = mmdit.config_from_head(model["channels"], head)
    if not head.has_policy:  # diffusers counts a teacher's channels before they are packed
      fields = {"patch_size": mmdit.PATCH, "out_channels": model["channels"]}
    return {"_class_name": self.class_of(head), **mmdit.config_from_sizes(model), **fields}


NAMES = QwenImageNames()
