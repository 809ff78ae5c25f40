"""FLUX.1, to and from diffusers and the releases of π-Flow and ArcFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pflow_jax.families import mmdit_names as mmdit
from pflow_jax.families.head_names import VELOCITY, config_from_policy, head_rows, student_of
from pflow_jax.torch_io.fields import Depth, Size, read_fields
from pflow_jax.torch_io.table import Row, dense

# Policies of the PyTorch classes. π-Flow's files of DX students name the backbone's class.
CLASS_NAMES = {
  "FluxTransformer2DModel": "velocity",
  "GMFluxTransformer2DModel": "gmflow",
  "DXFluxTransformer2DModel": "dx",
  "ArcFluxTransformer2DModel": "arc",
}
GUIDANCE = 3.5  # that a guidance-distilled model is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields(mmdit.Fields):
  num_layers: Depth = 19
  joint_attention_dim: Size = 4096
  num_single_layers: Depth = 38
  pooled_projection_dim: Size = 768
  guidance_embeds: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(_Fields):
  """Of diffusers' class."""

  patch_size: Size = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMFields(_Fields, mmdit.GMFields):
  """Of a GMFlow student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DXFields(Fields, mmdit.DXFields):
  """Of a DX student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArcFields(_Fields, mmdit.ArcFields):
  """Of an ArcFlow student."""


FIELDS = dict(zip(CLASS_NAMES, (Fields, GMFields, DXFields, ArcFields), strict=True))
_DOUBLE = (
  *(("norm1.linear", "img_mod"), ("norm1_context.linear", "txt_mod")),
  *(("ff.net.0.proj", "img_mlp_in"), ("ff.net.2", "img_mlp_out")),
  *(("ff_context.net.0.proj", "txt_mlp_in"), ("ff_context.net.2", "txt_mlp_out")),
)
_SINGLE = (
  *(("norm.linear", "mod"), ("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v")),
  *(("proj_mlp", "mlp_in"), ("proj_out", "out")),
)


def rows(model: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> tuple[Row, ...]:
  """Table of names for attributes of `families.flux.network.Flux` and the section `head`."""
  embeddings = {"timestep_embedder": "time_embed", "text_embedder": "pooled_embed"}
  if model["guidance"] is not None:
    embeddings["guidance_embedder"] = "guidance_embed"
  single, blocks = "single_transformer_blocks.{i}", "single_blocks"
  return (
    *dense("x_embedder", "img_in"),
    *dense("context_embedder", "txt_in"),
    *(row for a, b in embeddings.items() for row in mmdit.embedding_rows(f"time_text_embed.{a}", b)),
    *mmdit.double_block_rows(_DOUBLE),
    *(row for theirs, ours in _SINGLE for row in dense(f"{single}.{theirs}", f"{blocks}/{ours}")),
    *(Row(f"{single}.attn.norm_{name}.weight", f"{blocks}/{name}_norm/scale") for name in "qk"),
    *mmdit.final_norm_rows(),
    *head_rows(policy, "proj_out"),
  )


def model_from_config(config: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> dict[str, Any]:
  """Attributes of `families.flux.network.Flux` for a config.json.

  Raises: ValueError naming the fields that this package's network does not have.
  """
  full = read_fields(config, FIELDS[config["_class_name"]])
  return mmdit.sizes_from_config(full, policy) | {
    "single_depth": full["num_single_layers"],
    "pooled_width": full["pooled_projection_dim"],
    "guidance": GUIDANCE if full["guidance_embeds"] else None,
  }


def config_from_model(model: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> dict[str, Any]:
  """A config.json for attributes of `families.flux.network.Flux` and the section `head`."""
  outputs = model["channels"] * mmdit.SUB_PIXELS
  # A class that π-Flow's loader knows has no DX in it.
  kind = "velocity" if policy["kind"] == "dx" else policy["kind"]
  fields = {"patch_size": 1} if kind == "velocity" else {}
  return {
    "_class_name": student_of(kind, CLASS_NAMES),
    **mmdit.config_from_sizes(model),
    **fields,
    "num_single_layers": model["single_depth"],
    "pooled_projection_dim": model["pooled_width"],
    "guidance_embeds": model["guidance"] is not None,
    **config_from_policy(policy, outputs, mmdit.SUB_PIXELS),
  }
