"""FLUX.1, to and from diffusers and the releases of π-Flow and ArcFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pflow_jax.families import mmdit_names as mmdit
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.names import TEACHER
from pflow_jax.networks.heads import HEADS, Head
from pflow_jax.torch_io.fields import Depth, Size, read_fields
from pflow_jax.torch_io.table import Row, dense

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
  """Fields of diffusers' class."""

  patch_size: Size = 1


_DOUBLE = (
  *(("norm1.linear", "img_mod"), ("norm1_context.linear", "txt_mod")),
  *(("ff.net.0.proj", "img_mlp_in"), ("ff.net.2", "img_mlp_out")),
  *(("ff_context.net.0.proj", "txt_mlp_in"), ("ff_context.net.2", "txt_mlp_out")),
)
_SINGLE = (
  *(("norm.linear", "mod"), ("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v")),
  *(("proj_mlp", "mlp_in"), ("proj_out", "out")),
)


class FluxNames(mmdit.Names):
  """Names of `families.flux.network.Flux`."""

  module = Flux
  class_names = ("FluxTransformer2DModel",)
  flow_map_class = "FlowMapFluxTransformer2DModel"

  def body(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
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
    )

  def schema(self, name: str) -> type:
    return mmdit.schema(HEADS[self.classes[name]], _Fields, Fields, Fields)

  def model_from_config(self, config: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    full = read_fields(config, self.schema(config["_class_name"]))
    return mmdit.sizes_from_config(full, head) | {
      "single_depth": full["num_single_layers"],
      "pooled_width": full["pooled_projection_dim"],
      "guidance": GUIDANCE if full["guidance_embeds"] else None,
    }

  def config_from_model(self, model: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    return {
      "_class_name": self.class_of(head),
      **mmdit.config_from_sizes(model),
      "num_single_layers": model["single_depth"],
      "pooled_projection_dim": model["pooled_width"],
      "guidance_embeds": model["guidance"] is not None,
      **mmdit.config_from_head(model["channels"], head),
    }


NAMES = FluxNames()
