"""Qwen-Image, to and from diffusers and the releases of π-Flow and ArcFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pflow_jax.families import mmdit_names as mmdit
from pflow_jax.families.head_names import VELOCITY, config_from_policy, head_rows, student_of
from pflow_jax.torch_io.fields import Depth, Size, read_fields
from pflow_jax.torch_io.table import Row, dense

# Policies of the PyTorch classes. π-Flow's files of DX students name the backbone's class.
CLASS_NAMES = {
  "QwenImageTransformer2DModel": "velocity",
  "GMQwenImageTransformer2DModel": "gmflow",
  "DXQwenImageTransformer2DModel": "dx",
  "ArcQwenImageTransformer2DModel": "arc",
}


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
  """Of diffusers' class."""

  patch_size: Size = 2
  out_channels: Size | None = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMFields(_Fields, mmdit.GMFields):
  """Of a GMFlow student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DXFields(_Fields, mmdit.DXFields):
  """Of a DX student, for which π-Flow's class counts the channels of whole patches."""

  patch_size: Size = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArcFields(_Fields, mmdit.ArcFields):
  """Of an ArcFlow student."""


FIELDS = dict(zip(CLASS_NAMES, (Fields, GMFields, DXFields, ArcFields), strict=True))
_DOUBLE = (
  *(("img_mod.1", "img_mod"), ("txt_mod.1", "txt_mod")),
  *(("img_mlp.net.0.proj", "img_mlp_in"), ("img_mlp.net.2", "img_mlp_out")),
  *(("txt_mlp.net.0.proj", "txt_mlp_in"), ("txt_mlp.net.2", "txt_mlp_out")),
)


def rows(model: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> tuple[Row, ...]:
  """Table of names for attributes of `families.qwen_image.network.QwenImage` and the section `head`."""
  return (
    *dense("img_in", "img_in"),
    *dense("txt_in", "txt_in"),
    Row("txt_norm.weight", "txt_norm/scale"),
    *mmdit.embedding_rows("time_text_embed.timestep_embedder", "time_embed"),
    *mmdit.double_block_rows(_DOUBLE),
    *mmdit.final_norm_rows(),
    *head_rows(policy, "proj_out"),
  )


def model_from_config(config: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> dict[str, Any]:
  """Attributes of `families.qwen_image.network.QwenImage` for a config.json.

  Raises: ValueError naming the fields that plain Qwen-Image does not have.
  """
  return mmdit.sizes_from_config(read_fields(config, FIELDS[config["_class_name"]]), policy)


def config_from_model(model: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> dict[str, Any]:
  """A config.json for attributes of `families.qwen_image.network.QwenImage` and the section `head`."""
  outputs = model["channels"] * mmdit.SUB_PIXELS
  fields = config_from_policy(policy, outputs, mmdit.SUB_PIXELS)
  kind = policy["kind"]
  if kind == "velocity":  # of which diffusers counts the channels before they are packed
    fields = {"patch_size": mmdit.PATCH, "out_channels": model["channels"]}
  if kind == "dx":  # a class that π-Flow's loader knows has no DX in it
    fields, kind = {"patch_size": 1} | fields, "velocity"
  return {"_class_name": student_of(kind, CLASS_NAMES), **mmdit.config_from_sizes(model), **fields}
