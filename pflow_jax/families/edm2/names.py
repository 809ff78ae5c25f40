"""EDM2, to and from NVIDIA's class `Precond`: its snapshots, its state dict and its training states.

References:
  training/networks_edm2.py of github.com/NVlabs/edm2, commit 4bf8162; arXiv:2312.02696.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le

from pflow_jax.families.edm2 import recognise
from pflow_jax.families.names import TEACHER, NetworkNames, Shape, Source
from pflow_jax.networks.edm2 import CLIP, CONCAT_BALANCE, LABEL_BALANCE, RESIDUAL_BALANCE, EDM2UNet
from pflow_jax.networks.heads import DenoiserHead, Head, head_options_of
from pflow_jax.torch_io.fields import Blocks, Positive, Side, Size, Sizes, joined, read_fields
from pflow_jax.torch_io.table import Row

_HEAD = "denoiser"  # kind of the head of EDM's preconditioning
_Residual = Annotated[float, Ge(RESIDUAL_BALANCE), Le(RESIDUAL_BALANCE)]
_Half = Annotated[float, Ge(LABEL_BALANCE), Le(LABEL_BALANCE)]
_Clip = Annotated[float, Ge(CLIP), Le(CLIP)]
_Count = Annotated[int, Ge(0), Le(2**20)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Arguments of `Precond`, those of its U-Net and of its blocks among them."""

  img_resolution: Side = 64
  img_channels: Size = 4
  label_dim: _Count = 1000
  use_fp16: Any = True
  sigma_data: Positive = 0.5
  logvar_channels: Size = recognise.LOGVAR_CHANNELS
  model_channels: Size = 192
  channel_mult: Sizes = (1, 2, 3, 4)
  channel_mult_noise: Size | None = None
  channel_mult_emb: Size | None = None
  num_blocks: Blocks = 3
  attn_resolutions: tuple[Side, ...] = (16, 8)
  label_balance: _Half = LABEL_BALANCE
  concat_balance: _Half = CONCAT_BALANCE
  resample_filter: tuple[Literal[1], Literal[1]] = (1, 1)
  channels_per_head: Size = 64
  dropout: Any = 0
  res_balance: _Residual = RESIDUAL_BALANCE
  attn_balance: _Residual = RESIDUAL_BALANCE
  clip_act: _Clip = CLIP


class EDM2Names(NetworkNames):
  """Names of `networks.edm2.EDM2UNet` with the head `DenoiserHead` in NVIDIA's `Precond`.

  Its attributes have "sample_size", the resolution, which is part of the names.
  """

  module = EDM2UNet
  class_names: ClassVar[tuple[str, ...]] = (recognise.PRECOND,)

  @property
  def classes(self) -> dict[str, str]:
    """The only class, in EDM's preconditioning."""
    return {recognise.PRECOND: _HEAD}

  def class_of(self, head: Head) -> str:
    if not isinstance(head, DenoiserHead):
      raise ValueError(f"config.head.kind: {recognise.PRECOND} has {_HEAD!r} alone, got {head_options_of(head)[0]!r}")
    return recognise.PRECOND

  def rows(self, model: Mapping[str, Any], head: Head = TEACHER) -> tuple[Row, ...]:
    del head
    rows = [
      Row("unet.emb_fourier.freqs", "fourier/freqs"),
      Row("unet.emb_fourier.phases", "fourier/phases"),
      _linear("unet.emb_noise", "time_embed"),
      _conv("unet.out_conv", "out_conv"),
      Row("unet.out_gain", "out_conv/gain"),
    ]
    if model["num_classes"]:
      rows.append(_linear("unet.emb_label", "class_embed"))
    for name, level, block in _blocks(model):
      half, _, rest = name.partition("_")
      side = model["sample_size"] >> level
      theirs = f"unet.{half[:3]}.{side}x{side}_{rest}"
      if block is None:
        rows.append(_conv(theirs, name))
        continue
      rows += [_conv(f"{theirs}.conv_res{i}", f"{name}/conv_res{i}") for i in range(2)]
      rows += [
        _linear(f"{theirs}.emb_linear", f"{name}/emb_linear"),
        Row(f"{theirs}.emb_gain", f"{name}/emb_linear/gain"),
      ]
      rows += [_pointwise(f"{theirs}.{layer}", f"{name}/{layer}") for layer in block]
    return tuple(rows)

  def schema(self, name: str) -> type:
    return joined(Fields, DenoiserHead.torch_schema())

  def recognise(self, source: Source) -> Source | None:
    if source.config.get("_class_name", recognise.PRECOND) != recognise.PRECOND:
      return None
    found = recognise.recognise(source)
    if found is None:
      return None
    full = read_fields(found.config, self.schema(recognise.PRECOND))
    recognise.check_depth(found, len(full["channel_mult"]), full["num_blocks"])
    return found.noted(recognise.described(full, found.config))

  def model_from_config(self, config: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    full = read_fields(config, self.schema(recognise.PRECOND), recognise.PRECOND)
    side, mult = full["img_resolution"], full["channel_mult"]
    levels = len(mult)
    if side % 2 ** (levels - 1):
      raise ValueError(f"config.json: img_resolution: expected a multiple of {2 ** (levels - 1)}, got {side}")
    noise, emb = full["channel_mult_noise"] or mult[0], full["channel_mult_emb"] or max(mult)
    if (noise, emb) != (1, max(mult)):
      raise ValueError(
        "config.json: channel_mult_noise, channel_mult_emb: expected 1 and the largest of channel_mult, got "
        f"{noise} and {emb}, which this package's network does not have"
      )
    return {
      "channels": full["img_channels"],
      "num_classes": full["label_dim"],
      "model_channels": full["model_channels"],
      "channel_mult": mult,
      "num_blocks": full["num_blocks"],
      "attn_levels": tuple(level for level in range(levels) if side >> level in full["attn_resolutions"]),
      "channels_per_head": full["channels_per_head"],
      "time_embedding": "fourier",
      "sample_size": side,
    }

  def config_from_model(self, model: Mapping[str, Any], head: Head = TEACHER) -> dict[str, Any]:
    name = self.class_of(head)
    if (model.get("time_embedding"), model.get("time_scale", 1.0)) != ("fourier", 1.0) or model["channel_mult"][0] != 1:
      raise ValueError(
        f"config.model: {name} has time_embedding 'fourier', time_scale 1 and a channel_mult that begins with 1, got "
        f"{model.get('time_embedding')!r}, {model.get('time_scale', 1.0)} and {tuple(model['channel_mult'])}"
      )
    of_head = {key: value for key, value in head.torch_fields().items() if value != getattr(DenoiserHead, key)}
    return {
      "_class_name": name,
      "img_resolution": model["sample_size"],
      "img_channels": model["channels"],
      "label_dim": model["num_classes"],
      "sigma_data": head.sigma_data,  # type: ignore[attr-defined]
      "model_channels": model["model_channels"],
      "channel_mult": list(model["channel_mult"]),
      "num_blocks": model["num_blocks"],
      "attn_resolutions": [model["sample_size"] >> level for level in model["attn_levels"]],
      "channels_per_head": model["channels_per_head"],
      **{key: value for key, value in of_head.items() if key != "sigma_data"},  # of ours, which NVIDIA's class refuses
    }

  def constants(self, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of the estimate of EDM2's loss, which serves training alone: it is 0 with these."""
    del model
    shapes = {"logvar_fourier.freqs": (), "logvar_fourier.phases": (), "logvar_linear.weight": (1,)}
    return {name: np.zeros((*lead, recognise.LOGVAR_CHANNELS), np.float32) for name, lead in shapes.items()}

  def sizes(self, shapes: Mapping[str, Shape], head: Head, patch_size: int) -> dict[str, int]:
    del head, patch_size
    if len(shapes.get("out_conv/mp_kernel", ())) != 4:
      raise ValueError("the checkpoint has no output layer 'out_conv', expected an EDM2's")
    return {
      "channels": shapes["out_conv/mp_kernel"][-1],
      "num_classes": shapes.get("class_embed/mp_kernel", (0,))[0],
    }

  def smallest_side(self, model: Mapping[str, Any]) -> int:
    return 2 ** (len(model["channel_mult"]) - 1)


def _linear(theirs: str, ours: str) -> Row:
  return Row(f"{theirs}.weight", f"{ours}/mp_kernel", "linear")


def _conv(theirs: str, ours: str) -> Row:
  return Row(f"{theirs}.weight", f"{ours}/mp_kernel", "conv")


def _pointwise(theirs: str, ours: str) -> Row:
  return Row(f"{theirs}.weight", f"{ours}/mp_kernel", "patch")  # (out, in, 1, 1) -> (in, out)


def _blocks(model: Mapping[str, Any]) -> list[tuple[str, int, tuple[str, ...] | None]]:
  """Returns the blocks of a U-Net: name, level, and the names of the layers of size 1; None for the first layer."""
  widths = [model["model_channels"] * mult for mult in model["channel_mult"]]
  count, last = model["num_blocks"], len(widths) - 1
  found: list[tuple[str, int, tuple[str, ...] | None]] = [("enc0_conv", 0, None)]

  def add(name: str, level: int, inputs: int, outputs: int, attend: bool = False) -> None:
    half, _, rest = name.partition("_")
    skip = ("conv_skip",) if inputs != outputs else ()
    found.append((f"{half}{level}_{rest}", level, skip + (("attn_qkv", "attn_proj") if attend else ())))

  now, skips = widths[0], [widths[0]]
  for level, width in enumerate(widths):
    if level:
      add("enc_down", level, now, now)
      skips.append(now)
    for i in range(count):
      add(f"enc_block{i}", level, now, width, level in model["attn_levels"])
      now = width
      skips.append(now)
  add("dec_in0", last, now, now, attend=True)
  add("dec_in1", last, now, now)
  for level, width in reversed(list(enumerate(widths))):
    if level < last:
      add("dec_up", level, now, now)
    for i in range(count + 1):
      add(f"dec_block{i}", level, now + skips.pop(), width, level in model["attn_levels"])
      now = width
  return found


NAMES = EDM2Names()
