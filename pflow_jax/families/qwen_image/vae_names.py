"""Qwen-Image's autoencoder to and from diffusers, the kernels whole in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Len

from pflow_jax.families.names import TorchNames
from pflow_jax.families.qwen_image.vae import QwenVAE
from pflow_jax.torch_io.fields import Blocks, Number, Positive, Size, Sizes, read_fields
from pflow_jax.torch_io.table import Row, conv

# diffusers' name and ours; the defaults are the same.
_CONFIG = (
  ("input_channels", "channels"),
  ("z_dim", "latent_channels"),
  ("base_dim", "width"),
  ("dim_mult", "width_mult"),
  ("num_res_blocks", "depth"),
  ("temperal_downsample", "temporal"),
  ("latents_mean", "latent_mean"),
  ("latents_std", "latent_std"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Fields of a config.json of an AutoencoderKLQwenImage."""

  base_dim: Size = QwenVAE.width
  z_dim: Size = QwenVAE.latent_channels
  dim_mult: Sizes = QwenVAE.width_mult
  num_res_blocks: Blocks = QwenVAE.depth
  temperal_downsample: Annotated[tuple[bool, ...], Len(0, 15)] = QwenVAE.temporal
  input_channels: Size = QwenVAE.channels
  latents_mean: tuple[Number, ...] = QwenVAE.latent_mean
  latents_std: tuple[Positive, ...] = QwenVAE.latent_std
  attn_scales: tuple[()] = ()
  dropout: Any = 0.0


def _encoder_levels(module: QwenVAE) -> list[Row]:
  # Blocks and changes of resolution are counted through.
  table, count, mult = [], 0, (1, *module.width_mult)
  for i in range(len(module.width_mult)):
    for j in range(module.depth):
      changes = j == 0 and mult[i] != mult[i + 1]
      table += _block(f"encoder.down_blocks.{count}", f"encoder/level_{i}/block_{j}", changes)
      count += 1
    if i < len(module.temporal):
      table += _resample(f"encoder.down_blocks.{count}", f"encoder/level_{i}", module.temporal[i])
      count += 1
  return table


def _decoder_levels(module: QwenVAE) -> list[Row]:
  table = []
  widths = [module.width * mult for mult in reversed(module.width_mult)]
  incoming = widths[0]
  for i, (width, temporal) in enumerate(zip(widths, (*module.temporal[::-1], None), strict=True)):
    theirs, level = f"decoder.up_blocks.{i}", f"decoder/level_{i}"
    for j in range(module.depth + 1):
      table += _block(f"{theirs}.resnets.{j}", f"{level}/block_{j}", j == 0 and incoming != width)
    if temporal is not None:
      table += _resample(f"{theirs}.upsamplers.0", level, temporal)
    incoming = width // 2
  return table


def _mid(torch: str, flax: str) -> list[Row]:
  theirs, ours = f"{torch}.attentions.0", f"{flax}/attention"
  return [
    *_block(f"{torch}.resnets.0", f"{flax}/block_0"),
    *_block(f"{torch}.resnets.1", f"{flax}/block_1"),
    Row(f"{theirs}.norm.gamma", f"{ours}/norm/scale", "channels2d"),
    *conv(f"{theirs}.to_qkv", f"{ours}/qkv", layout="patch"),
    *conv(f"{theirs}.proj", f"{ours}/proj", layout="patch"),
  ]


def _block(torch: str, flax: str, shortcut: bool = False) -> list[Row]:
  table = [_norm(f"{torch}.norm{i}", f"{flax}/norm{i}") for i in (1, 2)]
  table += [row for i in (1, 2) for row in _conv(f"{torch}.conv{i}", f"{flax}/conv{i}")]
  return [*table, *_conv(f"{torch}.conv_shortcut", f"{flax}/shortcut")] if shortcut else table


def _resample(torch: str, flax: str, temporal: bool) -> list[Row]:
  table = [*conv(f"{torch}.resample.1", f"{flax}/resample")]
  return [*table, *_conv(f"{torch}.time_conv", f"{flax}/time_conv")] if temporal else table


def _conv(torch: str, flax: str) -> tuple[Row, ...]:
  return conv(torch, flax, layout="conv3d")


def _norm(torch: str, flax: str) -> Row:
  return Row(f"{torch}.gamma", f"{flax}/scale", "channels3d")


class QwenVAENames(TorchNames):
  """Names of `families.qwen_image.vae.QwenVAE`."""

  module = QwenVAE
  class_names = ("AutoencoderKLQwenImage",)

  def schema(self, name: str) -> type:
    return Fields

  def body(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
    module = QwenVAE(**model)
    table = [*_conv("quant_conv", "quant_conv"), *_conv("post_quant_conv", "post_quant_conv")]
    for name in ("encoder", "decoder"):
      table += [*_conv(f"{name}.conv_in", f"{name}/conv_in"), *_conv(f"{name}.conv_out", f"{name}/conv_out")]
      table += [_norm(f"{name}.norm_out", f"{name}/norm_out"), *_mid(f"{name}.mid_block", f"{name}/mid")]
    return (*table, *_encoder_levels(module), *_decoder_levels(module))

  def model_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    name = self.class_names[0]
    full = read_fields(config, Fields, name)
    lengths = {"temperal_downsample": len(full["dim_mult"]) - 1}
    lengths |= dict.fromkeys(("latents_mean", "latents_std"), full["z_dim"])
    problems = [
      f"{name}: expected {count} of them, got {len(full[name])}"
      for name, count in lengths.items()
      if len(full[name]) != count
    ]
    if problems:
      raise ValueError(
        f"config.json of {name}: {'; '.join(problems)} (there are z_dim {full['z_dim']} channels and "
        f"{len(full['dim_mult'])} levels)"
      )
    return {ours: full[theirs] for theirs, ours in _CONFIG}

  def config_from_model(self, model: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": self.class_names[0], **{theirs: model[ours] for theirs, ours in _CONFIG}}


NAMES = QwenVAENames()
