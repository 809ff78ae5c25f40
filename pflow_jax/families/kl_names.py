"""AutoencoderKL, of Stable Diffusion and FLUX.1, to and from diffusers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from pflow_jax.families.names import TorchNames
from pflow_jax.networks.vae import AutoencoderKL
from pflow_jax.torch_io.fields import Blocks, Number, Positive, Size, Sizes, read_fields
from pflow_jax.torch_io.table import Row, conv, dense

# What diffusers called the layers of the attention when Stable Diffusion 1.x was released.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# diffusers' name and ours, for what a model may choose.
_CONFIG = (
  ("in_channels", "channels"),
  ("latent_channels", "latent_channels"),
  ("block_out_channels", "widths"),
  ("layers_per_block", "depth"),
  ("norm_num_groups", "groups"),
  ("mid_block_add_attention", "mid_attention"),
  ("scaling_factor", "scale"),
  ("shift_factor", "shift"),
  ("use_quant_conv", "use_quant_conv"),
  ("use_post_quant_conv", "use_post_quant_conv"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Fields of a config.json of an AutoencoderKL."""

  in_channels: Size = 3
  out_channels: Size = 3
  down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
  block_out_channels: Sizes = (64,)
  layers_per_block: Blocks = 1
  latent_channels: Size = 4
  norm_num_groups: Size = 32
  mid_block_add_attention: bool = True
  scaling_factor: Positive = 0.18215
  shift_factor: Number | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  act_fn: Literal["silu"] = "silu"
  latents_mean: None = None
  latents_std: None = None
  sample_size: Any = 32  # for tiles alone
  force_upcast: Any = True


def _half(
  name: str, levels: str, resample: str, widths: tuple[int, ...], depth: int, module: AutoencoderKL
) -> list[Row]:
  """Rows of the encoder or the decoder `name`; `widths` in the order of computation."""
  mid, ours = f"{name}.mid_block", f"{name}/mid"
  table = [*conv(f"{name}.conv_in", f"{name}/conv_in"), *conv(f"{name}.conv_out", f"{name}/conv_out")]
  table += [*_norm(f"{name}.conv_norm_out", f"{name}/norm_out")]
  table += [*_block(f"{mid}.resnets.0", f"{ours}/block_0"), *_block(f"{mid}.resnets.1", f"{ours}/block_1")]
  if module.mid_attention:
    theirs = f"{mid}.attentions.0"
    table += _norm(f"{theirs}.group_norm", f"{ours}/attention/norm")
    table += dense(tuple(f"{theirs}.to_{part}" for part in "qkv"), f"{ours}/attention/qkv")
    table += dense(f"{theirs}.to_out.0", f"{ours}/attention/proj")
  # The first convolution has the width of the first level, in the encoder and in the decoder.
  for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
    theirs, level = f"{name}.{levels}.{i}", f"{name}/level_{i}"
    for j in range(depth):
      table += _block(f"{theirs}.resnets.{j}", f"{level}/block_{j}", shortcut=j == 0 and before != width)
    if i < len(widths) - 1:
      table += conv(f"{theirs}.{resample}", f"{level}/resample")
  return table


def _block(torch: str, flax: str, shortcut: bool = False) -> list[Row]:
  table = [row for i in (1, 2) for row in _norm(f"{torch}.norm{i}", f"{flax}/norm{i}")]
  table += [row for i in (1, 2) for row in conv(f"{torch}.conv{i}", f"{flax}/conv{i}")]
  return [*table, *conv(f"{torch}.conv_shortcut", f"{flax}/shortcut")] if shortcut else table


def _norm(torch: str, flax: str) -> tuple[Row, Row]:
  return Row(f"{torch}.weight", f"{flax}/scale"), Row(f"{torch}.bias", f"{flax}/bias")


class KLNames(TorchNames):
  """Names of `networks.vae.AutoencoderKL`."""

  module = AutoencoderKL
  class_names = ("AutoencoderKL",)

  def schema(self, name: str) -> type:
    return Fields

  def current_name(self, name: str) -> str:
    return re.sub(
      r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda found: _OLD_NAMES[found[0]], name
    )

  def body(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
    module = AutoencoderKL(**model)
    table = [
      *_half("encoder", "down_blocks", "downsamplers.0.conv", module.widths, module.depth, module),
      *_half("decoder", "up_blocks", "upsamplers.0.conv", module.widths[::-1], module.depth + 1, module),
    ]
    for name in ("quant_conv", "post_quant_conv"):
      if getattr(module, f"use_{name}"):
        table += conv(name, name)
    return tuple(table)

  def model_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    name = self.class_names[0]
    full = read_fields(config, Fields, name)
    widths, groups = full["block_out_channels"], full["norm_num_groups"]
    problems = [
      f"{name}: expected one for each of block_out_channels {list(widths)}, got {list(full[name])}"
      for name in ("down_block_types", "up_block_types")
      if len(full[name]) != len(widths)
    ]
    if full["out_channels"] != full["in_channels"]:
      problems.append(f"out_channels: expected in_channels {full['in_channels']}, got {full['out_channels']}")
    if any(width % groups for width in widths):
      problems.append(f"block_out_channels: expected multiples of norm_num_groups {groups}, got {list(widths)}")
    if problems:
      raise ValueError(f"config.json of {name}: {'; '.join(problems)}")
    model = {ours: full[theirs] for theirs, ours in _CONFIG}
    return model | {"scale": float(model["scale"]), "shift": float(model["shift"] or 0.0)}

  def config_from_model(self, model: Mapping[str, Any]) -> dict[str, Any]:
    count = len(model["widths"])
    blocks = {
      f"{way}_block_types": [f"{name}Block2D"] * count for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    sizes = {theirs: model[ours] for theirs, ours in _CONFIG}
    return {"_class_name": self.class_names[0], **sizes, "out_channels": model["channels"], **blocks}


NAMES = KLNames()
