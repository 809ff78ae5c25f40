"""Names that FLUX.1 and Qwen-Image share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pflow_jax.families.names import NetworkNames
from pflow_jax.networks.heads import Head
from pflow_jax.torch_io.fields import Depth, Size, check_outputs, joined
from pflow_jax.torch_io.table import Row, dense

PATCH = 2  # side of a patch, which PyTorch counts among the channels
SUB_PIXELS = PATCH**2

_ATTENTION = (
  *(("to_q", "img_q"), ("to_k", "img_k"), ("to_v", "img_v"), ("to_out.0", "img_out")),
  *(("add_q_proj", "txt_q"), ("add_k_proj", "txt_k"), ("add_v_proj", "txt_v"), ("to_add_out", "txt_out")),
)
_NORMS = (
  *(("norm_q", "img_q_norm"), ("norm_k", "img_k_norm")),
  *(("norm_added_q", "txt_q_norm"), ("norm_added_k", "txt_k_norm")),
)


def double_block_rows(others: Iterable[tuple[str, str]]) -> tuple[Row, ...]:
  """Rows of the double blocks: of the attention, and of the Linear layers `others`, (PyTorch's name, ours)."""
  torch, flax = "transformer_blocks.{i}", "double_blocks"
  rows = [row for theirs, ours in _ATTENTION for row in dense(f"{torch}.attn.{theirs}", f"{flax}/{ours}")]
  rows += [Row(f"{torch}.attn.{theirs}.weight", f"{flax}/{ours}/scale") for theirs, ours in _NORMS]
  rows += [row for theirs, ours in others for row in dense(f"{torch}.{theirs}", f"{flax}/{ours}")]
  return tuple(rows)


def embedding_rows(torch: str, flax: str) -> tuple[Row, ...]:
  """Rows of an embedding's two Linear layers."""
  return (*dense(f"{torch}.linear_1", f"{flax}/in"), *dense(f"{torch}.linear_2", f"{flax}/out"))


def final_norm_rows() -> tuple[Row, ...]:
  """Rows of the last adaLN, whose scale comes before its shift in PyTorch."""
  return dense("norm_out.linear", "final_norm/adaln", layout="swap_linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """Fields of a config.json that FLUX.1 and Qwen-Image share; a class of either has the defaults."""

  num_layers: Depth
  joint_attention_dim: Size
  in_channels: Size = 64
  out_channels: Size | None = None
  num_attention_heads: Size = 24
  attention_head_dim: Size = 128
  axes_dims_rope: tuple[Size, Size, Size] = (16, 56, 56)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFields:
  """Fields of a student whose head has layers of its own, for whole patches."""

  logweights_channels: Literal[4] = 4
  patch_size: Literal[2] = 2


class Names(NetworkNames):
  """Base of the names of both networks."""

  def branch_rows(self, model: Mapping[str, Any], inputs: Sequence[str]) -> tuple[Row, ...]:
    # The strength of a guidance-distilled network goes where its teacher's goes.
    own = [name for name in inputs if name == "s" or model.get("guidance") is None]
    branches = {"s": ("length_embedder", "length_embed"), "guidance": ("guidance_embedder", "guidance_embed")}
    return tuple(row for name in own for a, b in [branches[name]] for row in embedding_rows(f"time_text_embed.{a}", b))

  def class_of(self, head: Head) -> str:
    # π-Flow's loader knows no class of a head that the metadata alone tell of, DX.
    in_metadata = head.policy_name() and head.torch_extends and not head.torch_fields()
    return self.class_names[0] if in_metadata else super().class_of(head)


def schema(head: type[Head], network: type, backbone: type, student: type) -> type:
  """Returns the dataclass of the fields of config.json.

  Args:
    head: of the network.
    network: fields that all classes of the network have.
    backbone: fields of its class in diffusers.
    student: fields of a student whose head extends the output layer of that.
  """
  if not head.torch_extends:
    return joined(network, PackedFields, head.torch_schema())
  return joined(student if head.has_policy else backbone, head.torch_schema())


def sizes_from_config(full: Mapping[str, Any], head: Head) -> dict[str, Any]:
  """Returns the attributes that both networks have.

  Args:
    full: all fields of a config.json.
    head: of the network.

  Raises:
    ValueError: sizes do not fit, or the latent is no image's, for which this package has no network.
  """
  inputs, axes = full["in_channels"], full["axes_dims_rope"]
  channels, rest = divmod(inputs, SUB_PIXELS)
  if rest:
    raise ValueError(f"config.json: expected in_channels a multiple of {SUB_PIXELS}, got {inputs}")
  if sum(axes) != full["attention_head_dim"] or any(axis % 2 for axis in axes):
    raise ValueError(
      f"config.json: axes_dims_rope: expected even numbers that add up to attention_head_dim "
      f"{full['attention_head_dim']}, got {list(axes)}"
    )
  outputs = full["out_channels"]
  if head.torch_extends:  # diffusers may count patches apart
    outputs = full["patch_size"] ** 2 * (outputs or inputs * head.torch_maps)
  check_outputs(outputs or inputs, inputs, head.torch_maps)
  return {
    "channels": channels,
    "patch_size": PATCH,
    "depth": full["num_layers"],
    "num_heads": full["num_attention_heads"],
    "head_dim": full["attention_head_dim"],
    "text_width": full["joint_attention_dim"],
    "rope_axes": axes,
    "mlp_ratio": 4.0,
  }


def config_from_head(channels: int, head: Head) -> dict[str, Any]:
  """Returns the fields of a config.json for the output layers.

  Args:
    channels: of the latents.
    head: of the network.
  """
  fields = {"patch_size": 1} if head.torch_extends else {"logweights_channels": SUB_PIXELS}
  return {**fields, "out_channels": head.torch_maps * channels * SUB_PIXELS, **head.torch_fields()}


def config_from_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a config.json for the attributes that both networks have.

  Args:
    model: attributes of a network.

  Raises:
    ValueError: the PyTorch classes do not have such sizes.
  """
  if model["patch_size"] != PATCH or model["mlp_ratio"] != 4:
    raise ValueError(
      f"config.model: PyTorch's class has patch_size {PATCH} and mlp_ratio 4, got {model['patch_size']} and "
      f"{model['mlp_ratio']}"
    )
  return {
    "in_channels": model["channels"] * SUB_PIXELS,
    "num_layers": model["depth"],
    "num_attention_heads": model["num_heads"],
    "attention_head_dim": model["head_dim"],
    "joint_attention_dim": model["text_width"],
    "axes_dims_rope": list(model["rope_axes"]),
  }
