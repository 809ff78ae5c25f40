"""Tiny autoencoders to and from PyTorch: diffusers' AutoencoderTiny, and the authors' own files.

Both number the layers of an encoder and a decoder. The authors' decoder begins with a layer that has no weights, so
that its numbers are larger by one, and its parts are in files of their own, see `families.taesd.files`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Len

from pflow_jax.families.names import TorchNames
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.torch_io.fields import Blocks, Number, Positive, Size, Sizes, read_fields
from pflow_jax.torch_io.table import Row, conv

_Counts = Annotated[tuple[Blocks, ...], Len(1, 16)]

# diffusers' name and ours.
_CONFIG = (
  ("in_channels", "channels"),
  ("latent_channels", "latent_channels"),
  ("encoder_block_out_channels", "encoder_widths"),
  ("num_encoder_blocks", "encoder_depths"),
  ("decoder_block_out_channels", "decoder_widths"),
  ("num_decoder_blocks", "decoder_depths"),
  ("scaling_factor", "scale"),
  ("shift_factor", "shift"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Fields of a config.json of an AutoencoderTiny."""

  in_channels: Size = 3
  out_channels: Size = 3
  encoder_block_out_channels: Sizes = (64, 64, 64, 64)
  decoder_block_out_channels: Sizes = (64, 64, 64, 64)
  num_encoder_blocks: _Counts = (1, 3, 3, 3)
  num_decoder_blocks: _Counts = (3, 3, 3, 1)
  latent_channels: Size = 4
  act_fn: Literal["relu"] = "relu"
  upsample_fn: Literal["nearest"] = "nearest"
  upsampling_scaling_factor: Literal[2] = 2
  scaling_factor: Positive = 1.0
  shift_factor: Number = 0.0
  latent_magnitude: Any = 3  # for latents that are kept as bytes
  latent_shift: Any = 0.5
  force_upcast: Any = False
  block_out_channels: Any = None  # the decoder's, once more


class TinyNames(TorchNames):
  """Names of `families.taesd.network.TinyAutoencoder`."""

  module = TinyAutoencoder
  class_names = ("AutoencoderTiny",)

  def schema(self, name: str) -> type:
    return Fields

  def body(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
    module = TinyAutoencoder(**model)
    return (*_encoder(module), *_decoder(module))

  def model_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    full = read_fields(config, Fields, self.class_names[0])
    problems = []
    for part in ("encoder", "decoder"):
      widths, depths = full[f"{part}_block_out_channels"], full[f"num_{part}_blocks"]
      if len(set(widths)) > 1:
        problems.append(f"{part}_block_out_channels: expected the same for all levels, got {list(widths)}")
      if len(widths) != len(depths):
        problems.append(f"num_{part}_blocks: expected {len(widths)}, one a level, got {list(depths)}")
    if len(full["num_encoder_blocks"]) != len(full["num_decoder_blocks"]):
      problems.append("num_decoder_blocks: expected as many levels as num_encoder_blocks")
    if full["out_channels"] != full["in_channels"]:
      problems.append(f"out_channels: expected in_channels {full['in_channels']}, got {full['out_channels']}")
    if problems:
      raise ValueError(f"config.json of {self.class_names[0]}: {'; '.join(problems)}")
    model = {ours: full[theirs] for theirs, ours in _CONFIG}
    return model | {"scale": float(model["scale"]), "shift": float(model["shift"])}

  def config_from_model(self, model: Mapping[str, Any]) -> dict[str, Any]:
    module = TinyAutoencoder(**model)
    if module.stem or module.pool or len({*module.encoder_widths}) > 1 or len({*module.decoder_widths}) > 1:
      raise ValueError("diffusers' AutoencoderTiny cannot hold this one, of FLUX.2 or Sana; keep the authors' files")
    sizes = {theirs: getattr(module, ours) for theirs, ours in _CONFIG}
    return {"_class_name": self.class_names[0], **sizes, "out_channels": module.channels}


def _encoder(module: TinyAutoencoder) -> list[Row]:
  rows: list[Row] = []
  number = 0
  for i in range(len(module.stem)):
    rows += conv(f"encoder.layers.{number}", f"encoder/stem_{i}")
    number += 2  # ReLU
  if not module.stem:
    rows += conv("encoder.layers.0", "encoder/conv_in")
    number = 1
  last = len(module.encoder_depths) - 1
  for i, depth in enumerate(module.encoder_depths):
    if i:
      rows += conv(f"encoder.layers.{number}", f"encoder/down_{i}", bias=False)
      number += 1
    rows += _level(f"encoder/level_{i}", "encoder.layers", number, depth, module.pool and i == last)
    number += depth
  return [*rows, *conv(f"encoder.layers.{number}", "encoder/conv_out")]


def _decoder(module: TinyAutoencoder) -> list[Row]:
  rows, number = [*conv("decoder.layers.0", "decoder/conv_in")], 2  # ReLU
  for i, depth in enumerate(module.decoder_depths):
    if i:
      rows += conv(f"decoder.layers.{number + 1}", f"decoder/up_{i}", bias=False)  # after the resampling
      number += 2
    rows += _level(f"decoder/level_{i}", "decoder.layers", number, depth, module.pool and i == 0)
    number += depth
  return [*rows, *conv(f"decoder.layers.{number}", "decoder/conv_out")]


def _level(flax: str, torch: str, number: int, depth: int, pool: bool) -> list[Row]:
  rows: list[Row] = []
  for j in range(depth):
    theirs, ours = f"{torch}.{number + j}", f"{flax}_block_{j}"
    if pool:
      rows += conv(f"{theirs}.pool.0", f"{ours}/pool_in", bias=False)
      rows += [Row(f"{theirs}.pool.1.weight", f"{ours}/pool_norm/scale")]
      rows += [Row(f"{theirs}.pool.1.bias", f"{ours}/pool_norm/bias")]
      rows += conv(f"{theirs}.pool.3", f"{ours}/pool_out", bias=False)
    for k in range(3):
      rows += conv(f"{theirs}.conv.{2 * k}", f"{ours}/conv_{k}")
  return rows


NAMES = TinyNames()
