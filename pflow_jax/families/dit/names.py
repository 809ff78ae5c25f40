"""DiT, to and from diffusers and π-Flow, whose classes share one embedding among the blocks and diffusers' do not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pflow_jax.families.names import TEACHER, NetworkNames
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.heads import HEADS, Head
from pflow_jax.torch_io.fields import Depth, Epsilon, Positive, Side, Size, check_outputs, joined, read_fields
from pflow_jax.torch_io.table import Row, dense

DIFFUSERS, OLD = "DiTTransformer2DModel", "Transformer2DModel"
FLOW = "DiTTransformer2DModelMod"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Fields of a config.json of a DiT.

  The last few are of what π-Flow's release calls a model's diffusion, and ours: how the network is given the time.
  """

  num_attention_heads: Size = 16
  attention_head_dim: Size = 72
  in_channels: Size = 4
  out_channels: Size | None = None
  num_layers: Depth = 28
  sample_size: Side = 32
  patch_size: Size = 2
  num_embeds_ada_norm: Size = 1000
  norm_eps: Epsilon = 1e-5
  attention_bias: Literal[True] = True
  activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
  norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
  norm_elementwise_affine: Literal[False] = False
  dropout: Any = 0.0
  class_dropout_prob: Any = 0.0
  norm_num_groups: Any = 32
  upcast_attention: Any = False
  num_timesteps: Positive = 1000
  flip_model_timesteps: bool = False
  denoising_mean_mode: Literal["U"] = "U"
  frequency_shift: Literal[0, 1] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldFields(Fields):
  """Fields of diffusers' DiT before it had a class of its own, as the first files say."""

  attention_type: Literal["default"] = "default"
  cross_attention_dim: None = None
  num_vector_embeds: None = None
  double_self_attention: Literal[False] = False
  only_cross_attention: Any = False
  use_linear_projection: Any = False


_BLOCK = (("norm1.linear", "adaln"), ("attn1.to_out.0", "proj"), ("ff.net.0.proj", "mlp_in"), ("ff.net.2", "mlp_out"))


class DiTNames(NetworkNames):
  """Names of `networks.dit.DiT`.

  Its attributes may have "out_channels", those of a file with a learned variance, whose first `channels` are the
  velocity, and "sample_size".
  """

  module = DiT
  class_names = (FLOW, DIFFUSERS, OLD)
  output = "proj_out_2"
  backbone = DIFFUSERS
  irregular: ClassVar[Mapping[str, str]] = {"GM": f"GM{DIFFUSERS}V2"}

  def rows(self, model: Mapping[str, Any], head: Head = TEACHER) -> tuple[Row, ...]:
    block = "transformer_blocks.{i}"
    names = ["emb"]
    if _is_diffusers(model, head):
      names = [f"transformer_blocks.{i}.norm1.emb" for i in range(model["depth"])]

    def embedding(name: str, leaf: str, layout: str) -> Row:
      return Row(tuple(f"{prefix}.{name}" for prefix in names), leaf, layout, tied=True)

    output = head.torch_rows(self.output)
    if model.get("out_channels", model["channels"]) != model["channels"]:
      take = model["channels"], model["out_channels"]
      output = tuple(Row(row.torch, row.flax, row.layout, take=take) for row in output)
    return (
      Row("pos_embed.proj.weight", "patch_embed/kernel", "patch", patch_size=model["patch_size"]),
      Row("pos_embed.proj.bias", "patch_embed/bias"),
      *(
        embedding(f"timestep_embedder.linear_{i}.{end}", f"time_embed/{part}/{leaf}", layout)
        for i, part in ((1, "in"), (2, "out"))
        for end, leaf, layout in (("weight", "kernel", "linear"), ("bias", "bias", "same"))
      ),
      embedding("class_embedder.embedding_table.weight", "class_embed/embedding", "same"),
      *dense(tuple(f"{block}.attn1.to_{name}" for name in "qkv"), "blocks/qkv"),
      *(row for theirs, ours in _BLOCK for row in dense(f"{block}.{theirs}", f"blocks/{ours}")),
      *dense("proj_out_1", "final_norm/adaln"),
      *output,
    )

  def schema(self, name: str) -> type:
    return joined(OldFields if name == OLD else Fields, HEADS[self.classes[name]].torch_schema())

  def model_from_config(self, config: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    name = config.get("_class_name", FLOW)
    full = read_fields(config, self.schema(name))
    channels, patch, side = full["in_channels"], full["patch_size"], full["sample_size"]
    if side % patch:
      raise ValueError(f"config.json: sample_size: expected a multiple of patch_size {patch}, got {side}")
    model = {
      "channels": channels,
      "patch_size": patch,
      "width": full["num_attention_heads"] * full["attention_head_dim"],
      "depth": full["num_layers"],
      "num_heads": full["num_attention_heads"],
      "num_classes": full["num_embeds_ada_norm"],
      "mlp_ratio": 4.0,
      "norm_eps": float(full["norm_eps"]),
      "time_scale": float(full["num_timesteps"]),
      "flip_time": full["flip_model_timesteps"],
    }
    if name in (DIFFUSERS, OLD) or full["frequency_shift"]:
      model["frequency_shift"] = 1
    outputs = full["out_channels"] or channels * head.torch_maps
    if not head.has_policy and outputs == 2 * channels:
      model["out_channels"] = outputs
    else:
      other = "" if head.has_policy else ", or twice that with a learned variance"
      check_outputs(outputs, channels, head.torch_maps, other)
    return model

  def time_note(self, config: Mapping[str, Any], name: str) -> str:
    # π-Flow's release has three such teachers, of which SiT's counts time from noise to data: the tensors do not tell.
    if config["_class_name"] != FLOW or "flip_model_timesteps" in config:
      return ""
    if re.search(r"(?<![a-z])sit(?![a-z])", name.lower()):
      raise ValueError(
        f"{name}: SiT counts time from noise to data, and config.json does not say whether this model does; add "
        '"num_timesteps": 1 and "flip_model_timesteps": true (false for a model whose time runs from data to noise), '
        "of a model whose output is eps - x0, as that of π-Flow's file (SiT's own is x0 - eps: negate proj_out_2 first)"
      )
    scale = config.get("num_timesteps", Fields.num_timesteps)
    return (
      f"taken to be given time from data, 0, to noise, {scale:g}, and to return eps - x0; if it is not, say so in "
      'config.json: "num_timesteps", and "flip_model_timesteps": true for time from noise to data'
    )

  def config_from_model(self, model: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    if model["mlp_ratio"] != 4 or model.get("pooled_width") is not None:
      raise ValueError(
        "config.model: PyTorch's DiT has mlp_ratio 4 and classes, got mlp_ratio "
        f"{model['mlp_ratio']} and pooled_width {model.get('pooled_width')}"
      )
    name = self.class_of(head)
    return {
      "_class_name": DIFFUSERS if _is_diffusers(model, head) else name,
      "in_channels": model["channels"],
      "num_layers": model["depth"],
      "num_attention_heads": model["num_heads"],
      "attention_head_dim": model["width"] // model["num_heads"],
      "patch_size": model["patch_size"],
      "num_embeds_ada_norm": model["num_classes"],
      **({"sample_size": model["sample_size"]} if "sample_size" in model else {}),
      "norm_eps": model.get("norm_eps", DiT.norm_eps),
      "activation_fn": Fields.activation_fn,
      "attention_bias": Fields.attention_bias,
      "norm_elementwise_affine": Fields.norm_elementwise_affine,
      "norm_type": Fields.norm_type,
      "out_channels": head.torch_maps * model["channels"],
      **head.torch_fields(),
      # Fields of ours, said where a reader that does not know them would compute something else.
      **({} if model["time_scale"] == 1000 else {"num_timesteps": model["time_scale"]}),
      **({"flip_model_timesteps": True} if model.get("flip_time", DiT.flip_time) else {}),
      **({"frequency_shift": 1} if model.get("frequency_shift") and head.has_policy else {}),
    }


def _is_diffusers(model: Mapping[str, Any], head: Head) -> bool:
  """Returns whether the PyTorch class is diffusers' own, which no other has the frequencies of."""
  return not head.has_policy and bool(model.get("frequency_shift"))


NAMES = DiTNames()
