"""DiT, to and from diffusers and π-Flow, whose classes share one embedding among the blocks and diffusers' do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pflow_jax.convert.heads import VELOCITY, config_from_policy, head_rows, student_of
from pflow_jax.convert.table import Row, dense

DIFFUSERS = "DiTTransformer2DModel"
# Policies of the PyTorch classes; all but diffusers' are π-Flow's, or (ArcDiT) named like them.
CLASS_NAMES = {
  "DiTTransformer2DModelMod": "velocity",
  DIFFUSERS: "velocity",
  "GMDiTTransformer2DModelV2": "gmflow",
  "DXDiTTransformer2DModel": "dx",
  "ArcDiTTransformer2DModel": "arc",
}
TIME_SCALE = "num_timesteps"  # of config.json, a field of ours: the factor on t in [0, 1], by default 1000
_DEFAULTS = dict(
  in_channels=4,
  num_layers=28,
  num_attention_heads=16,
  attention_head_dim=72,
  patch_size=2,
  num_embeds_ada_norm=1000,
)
_FIXED = dict(
  norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False
)
_BLOCK = (("norm1.linear", "adaln"), ("attn1.to_out.0", "proj"), ("ff.net.0.proj", "mlp_in"), ("ff.net.2", "mlp_out"))


def rows(model: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> tuple[Row, ...]:
  """Table of names for attributes of `models.dit.DiT` and the section `policy`.

  `model` may have "out_channels", those of a file with a learned variance, whose first `channels` are the velocity.
  """
  block = "transformer_blocks.{i}"
  names = ["emb"]
  if _is_diffusers(model, policy):
    names = [f"transformer_blocks.{i}.norm1.emb" for i in range(model["depth"])]

  def embedding(name: str, leaf: str, layout: str) -> Row:
    return Row(tuple(f"{prefix}.{name}" for prefix in names), leaf, layout, tied=True)

  head = head_rows(policy, "proj_out_2")
  if model.get("out_channels", model["channels"]) != model["channels"]:
    head = tuple(Row(row.torch, row.flax, row.layout, take=(model["channels"], model["out_channels"])) for row in head)
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
    *head,
  )


def _is_diffusers(model: Mapping[str, Any], policy: Mapping[str, Any]) -> bool:
  """Whether the PyTorch class is diffusers' own, which no other has the frequencies of."""
  return policy["kind"] == "velocity" and bool(model.get("frequency_shift"))


def model_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Attributes of `models.dit.DiT` for a config.json, and "out_channels" where the variance is learned too.

  Raises: ValueError for fields that this package's network does not have.
  """
  full = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
  other = {field: full[field] for field, value in _FIXED.items() if full.get(field, value) != value}
  if other:
    raise ValueError(f"config.json: expected { ({field: _FIXED[field] for field in other}) }, got {other}")
  model = {
    "channels": full["in_channels"],
    "patch_size": full["patch_size"],
    "width": full["num_attention_heads"] * full["attention_head_dim"],
    "depth": full["num_layers"],
    "num_heads": full["num_attention_heads"],
    "num_classes": full["num_embeds_ada_norm"],
    "mlp_ratio": 4.0,
    "time_scale": float(full.get(TIME_SCALE, 1000)),
  }
  if config.get("_class_name") == DIFFUSERS or full.get("frequency_shift"):
    model["frequency_shift"] = 1
  if CLASS_NAMES.get(config.get("_class_name", ""), "") == "velocity":
    outputs = full.get("out_channels", model["channels"])
    if outputs not in (model["channels"], 2 * model["channels"]):
      raise ValueError(
        f"config.json: expected out_channels {model['channels']}, or twice that with a learned variance, got {outputs}"
      )
    if outputs != model["channels"]:
      model["out_channels"] = outputs
  return model


def sample_size(config: Mapping[str, Any]) -> int:
  """Side of the latents for a config.json, by which diffusers scales positions; `config_from_model` takes it."""
  return config.get("sample_size") or 32


def config_from_model(model: Mapping[str, Any], policy: Mapping[str, Any] = VELOCITY) -> dict[str, Any]:
  """A config.json for attributes of `models.dit.DiT`, "sample_size" beside them, and the section `policy`.

  Raises: ValueError for attributes that the PyTorch classes do not have.
  """
  if model["mlp_ratio"] != 4 or model.get("pooled_width") is not None:
    raise ValueError(
      "config.model: PyTorch's DiT has mlp_ratio 4 and classes, got mlp_ratio "
      f"{model['mlp_ratio']} and pooled_width {model.get('pooled_width')}"
    )
  name = student_of(policy["kind"], CLASS_NAMES)
  return {
    "_class_name": DIFFUSERS if _is_diffusers(model, policy) else name,
    "in_channels": model["channels"],
    "num_layers": model["depth"],
    "num_attention_heads": model["num_heads"],
    "attention_head_dim": model["width"] // model["num_heads"],
    "patch_size": model["patch_size"],
    "num_embeds_ada_norm": model["num_classes"],
    **({"sample_size": model["sample_size"]} if "sample_size" in model else {}),
    "norm_eps": 1e-6,
    **_FIXED,
    **config_from_policy(policy, model["channels"]),
    # Fields of ours, said where a reader that does not know them would compute something else.
    **({} if model["time_scale"] == 1000 else {TIME_SCALE: model["time_scale"]}),
    **({"frequency_shift": 1} if model.get("frequency_shift") and policy["kind"] != "velocity" else {}),
  }
