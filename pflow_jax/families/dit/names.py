"""DiT, to and from diffusers and π-Flow, whose classes share one embedding among the blocks and diffusers' do not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NoReturn

from pflow_jax.families.dit import recognise
from pflow_jax.families.metadata import POLICY_CONFIG
from pflow_jax.families.names import TEACHER, NetworkNames, Source
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


_OF_BLOCK = "transformer_blocks.{}.norm1.emb"
_BLOCK = (("norm1.linear", "adaln"), ("attn1.to_out.0", "proj"), ("ff.net.0.proj", "mlp_in"), ("ff.net.2", "mlp_out"))


class DiTNames(NetworkNames):
  """Names of `networks.dit.DiT`.

  Its attributes may have "out_channels", those of a file with more, whose first `channels` are the velocity,
  "sample_size", and "per_block", of a file with an embedding for each block.
  """

  module = DiT
  class_names: ClassVar[tuple[str, ...]] = (FLOW, DIFFUSERS, OLD)
  output = "proj_out_2"
  backbone = DIFFUSERS
  irregular: ClassVar[Mapping[str, str]] = {"GM": f"GM{DIFFUSERS}V2"}

  patch: ClassVar[str] = "pos_embed.proj.weight"
  """Name of the convolution that makes tokens."""

  block: ClassVar[str] = "transformer_blocks."
  """Start of the names of blocks, before their number."""

  positions: ClassVar[str] = "pos_embed.pos_embed"
  """Name of the table of positions, which a file need not have."""

  own_sign: ClassVar[bool] = False
  """Whether a network whose time runs from noise to data makes x0 - eps."""

  def rows(self, model: Mapping[str, Any], head: Head = TEACHER) -> tuple[Row, ...]:
    block = "transformer_blocks.{i}"
    names = ["emb"]
    if _is_diffusers(model, head) or model.get("per_block"):
      names = [_OF_BLOCK.format(i) for i in range(model["depth"])]

    def embedding(name: str, leaf: str, layout: str) -> Row:
      return Row(tuple(f"{prefix}.{name}" for prefix in names), leaf, layout, tied=True)

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
      *self.output_rows(model, head),
    )

  def output_rows(self, model: Mapping[str, Any], head: Head) -> tuple[Row, ...]:
    """Returns the names of the parameters of the head; the arguments are those of `rows`."""
    rows = head.torch_rows(self.output)
    if model.get("out_channels", model["channels"]) != model["channels"]:
      take = model["channels"], model["out_channels"]
      rows = tuple(dataclasses.replace(row, take=take) for row in rows)
    return rows

  def recognise(self, source: Source) -> Source | None:
    stated = "_class_name" in source.config
    if stated and source.config["_class_name"] not in self.classes:
      return None
    if not stated:
      names = source.tensors.places
      if self.patch not in names or not any(name.startswith(f"{self.block}0.") for name in names):
        return None
      source = dataclasses.replace(source, config={**self.told(source), **source.config})
    full = read_fields(source.config, self.schema(source.config["_class_name"]))
    if source.config["_class_name"] not in (DIFFUSERS, OLD) and _has_embedding(source, _OF_BLOCK.format(0)):
      source = dataclasses.replace(source, config={**source.config, "_per_block": True})
    source = self._with_outputs(source, full["in_channels"], full["patch_size"])
    return self._timed(recognise.without_positions(source, self.positions), stated)

  def told(self, source: Source) -> dict[str, Any]:
    """Returns a config.json but for the time, of a file that has none.

    Args:
      source: files of the model.

    Raises:
      ValueError: tensors are missing, or do not tell.
    """
    emb = "emb" if _has_embedding(source, "emb") else _OF_BLOCK.format(0)
    classes = f"{emb}.class_embedder.embedding_table.weight"
    config = {"_class_name": FLOW} | recognise.sizes(source, self.patch, classes, self.block, self.positions)
    if "proj_out_logstds.1.weight" in source.tensors.places:  # the one student whose tensors tell all of it
      count = recognise.outputs(source, "proj_out_means.weight", config, config["in_channels"])
      inner = recognise.shape_of(source, "proj_out_logstds.1.weight", 2)[0]
      return config | {"_class_name": self.irregular["GM"], "num_gaussians": count, "logstd_inner_dim": inner}
    return config | {"out_channels": recognise.outputs(source, f"{self.output}.weight", config)}

  def _with_outputs(self, source: Source, channels: int, side: int) -> Source:
    """Returns a teacher with as many outputs as its file has, and what to say of those that are no velocity."""
    layer = f"{self.output}.weight"
    if not self._is_teacher(source) or layer not in source.tensors.places:
      return source
    outputs = source.config.get("out_channels")
    if outputs is None:
      outputs, rest = divmod(recognise.shape_of(source, layer, 2)[0], side**2)
      if rest or outputs not in self.beyond(channels):
        return source
    kept = f"of every sub-pixel's {outputs} outputs the first {channels} are kept, the velocity"
    if outputs == 2 * channels:
      return source.noted(f"{kept}; the others were made for a variance", out_channels=outputs)
    if outputs == channels + 1:
      own = [name for name in source.tensors.places if name.startswith("gm_out.")]
      source = dataclasses.replace(source, tensors=source.tensors.without(own))
      return source.noted(f"{kept}; the last is the weight of the only component of a mixture", out_channels=outputs)
    return source

  def beyond(self, channels: int) -> tuple[int, ...]:
    """Returns the counts of outputs whose first are a velocity: beside a variance, or a mixture's only weight.

    Args:
      channels: C of the velocity.
    """
    return 2 * channels, channels + 1

  def _is_teacher(self, source: Source) -> bool:
    policy = HEADS[self.classes[source.config["_class_name"]]].has_policy
    return not policy and POLICY_CONFIG not in source.tensors.metadata

  def _timed(self, source: Source, stated: bool) -> Source:
    """Returns a source with the fields that say how the network is given the time, and what they were taken from."""
    if source.convention is not None:
      found: tuple[str, str] | None = (source.convention, "as --convention says")
    elif source.has_base or "flip_model_timesteps" in source.config:
      return source
    else:
      found = self.evidence(source)
    if found is None:
      return self.assumed(source, stated)
    name, why = found
    if name == recognise.NOISE:
      recognise.refuse_noise(source, why)
    told = {key: source.config[key] for key in recognise.TIMES if key in source.config and source.convention is None}
    fields = {**recognise.CONVENTIONS[name], **told}
    words = recognise.described(fields, self.own_sign)
    turned = self.own_sign and fields["flip_model_timesteps"]
    words += ", which is made eps - x0 by the sign of the last layer" if turned else ""
    return source.noted(f"taken for {name} {why}: {words}", **fields)

  def evidence(self, source: Source) -> tuple[str, str] | None:
    """Returns the convention that files tell and what tells it, see `families.dit.recognise.CONVENTIONS` and NOISE.

    Args:
      source: files of the model, with a config.json.
    """
    return recognise.published(source)

  def assumed(self, source: Source, stated: bool) -> Source:
    """Returns a source of a teacher of which nothing tells the convention.

    Args:
      source: files of the model, with a config.json.
      stated: whether it came with one.

    Raises:
      ValueError: it cannot be assumed, or it predicts noise.
    """
    config = source.config
    own = config["_class_name"] in (DIFFUSERS, OLD) or (not stated and config.get("_per_block"))
    if self._is_teacher(source) and own and config.get("out_channels") == 2 * config.get("in_channels", 4):
      recognise.refuse_noise(source, "as diffusers' DiT with a learned variance does")
    if not stated and "num_timesteps" not in config:
      self._ask(source)
    if config["_class_name"] != FLOW or not self._is_teacher(source):
      return source
    # π-Flow's release has three such teachers, of which SiT's counts time from noise to data: the tensors do not tell.
    if re.search(r"(?<![a-z])sit(?![a-z])", source.published.lower()):
      self._ask(source)
    scale = config.get("num_timesteps", Fields.num_timesteps)
    return source.noted(
      f"taken to be given time from data, 0, to noise, {scale:g}, and to return eps - x0; if it is not, say so with "
      '--convention, or in config.json: "num_timesteps", and "flip_model_timesteps": true for time from noise to data'
    )

  def _ask(self, source: Source) -> NoReturn:
    recognise.ask(source, self.own_sign)

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
    if config.get("_per_block"):
      model["per_block"] = True
    if not head.has_policy and outputs in self.beyond(channels):
      model["out_channels"] = outputs
    else:
      other = ", or twice that with a learned variance, or one more of a mixture of one component"
      check_outputs(outputs, channels, head.torch_maps, "" if head.has_policy else other)
    return model

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


def _has_embedding(source: Source, prefix: str) -> bool:
  """Returns whether there is an embedding of time and class whose names begin so."""
  return any(name.startswith(f"{prefix}.") for name in source.tensors.places)


def _is_diffusers(model: Mapping[str, Any], head: Head) -> bool:
  """Returns whether the PyTorch class is diffusers' own, which no other has the frequencies of."""
  return not head.has_policy and bool(model.get("frequency_shift"))


NAMES = DiTNames()
