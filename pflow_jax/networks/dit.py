"""DiT: a transformer over patches, conditioned on time and class, or a text's vector, through adaLN-zero.

References:
  DiT, arXiv:2212.09748; SiT, arXiv:2401.08740.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.core.batches import BATCH
from pflow_jax.mesh.sharding import constrain
from pflow_jax.networks.attention import self_attention
from pflow_jax.networks.layers import (
  Dtype,
  FinalNorm,
  TimeEmbed,
  VectorEmbed,
  accumulation_dtype,
  check_head,
  gathered,
  grid_of,
  kept,
  layer_norm,
  modulate,
  patchify,
  position_table,
  scanned,
)

DIT_SIZES: dict[str, dict[str, int]] = {
  "S": dict(width=384, depth=12, num_heads=6),
  "B": dict(width=768, depth=12, num_heads=12),
  "L": dict(width=1024, depth=24, num_heads=16),
  "XL": dict(width=1152, depth=28, num_heads=16),
}

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


class Block(nn.Module):
  """One adaLN-zero transformer block.

  Every Dense sees (B * T, D): its weight gradient is then one 2-D matmul, about three times as fast on a CPU as the
  contraction over two batch axes. All else sees (B, T, D), to which what belongs to an example, (B, 1, D), is broadcast
  where it is used; broadcast to (B * T, D) it would lie in a TPU's main memory.
  """

  num_heads: int
  mlp_ratio: float
  dtype: Dtype
  attention: str
  norm_eps: float

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array, late: jax.Array | None = None) -> tuple[jax.Array, None]:
    """Maps tokens to those of the next block, (x, None), a scan's carry and output.

    Norms, modulation and gates are float32 or wider, whatever the dtype of `x`; the sums have that of `x`.

    Args:
      x: tokens (B, T, D).
      condition: SiLU(embedding), (B, D); with `late` one for early and one for late blocks, (2, B, D).
      late: whether this is a late block, ().
    """
    if late is not None:
      condition = jnp.where(late, condition[1], condition[0])
    batch, tokens, width = x.shape
    wide = accumulation_dtype(self.dtype)

    def dense(name: str, features: int, *split: Any) -> Callable[[jax.Array], jax.Array]:
      layer = nn.Dense(features, dtype=self.dtype, kernel_init=_xavier, dot_general=gathered(*split), name=name)
      return lambda h: kept(layer(h.reshape(batch * tokens, -1))).reshape(batch, tokens, features)

    x = constrain(x, BATCH, None, None)
    split = gathered("fsdp", None)
    adaln = nn.Dense(6 * width, dtype=wide, kernel_init=_zeros, dot_general=split, name="adaln")
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(kept(adaln(condition)), 6, axis=-1)

    def norm(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
      return modulate(layer_norm(x.astype(wide), epsilon), shift, scale)

    def added(x: jax.Array, h: jax.Array, gate: jax.Array) -> jax.Array:
      return (x.astype(wide) + h.astype(wide) * gate[:, None, :]).astype(x.dtype)

    qkv = dense("qkv", 3 * width, "fsdp", "tensor")(norm(x, shift1, scale1))
    h = kept(self_attention(qkv, self.num_heads, implementation=self.attention))
    x = added(x, dense("proj", width, "tensor", "fsdp")(h), gate1)

    h = dense("mlp_in", int(width * self.mlp_ratio), "fsdp", "tensor")(norm(x, shift2, scale2, self.norm_eps))
    h = dense("mlp_out", width, "tensor", "fsdp")(nn.gelu(h, approximate=True))
    return constrain(added(x, h, gate2), BATCH, None, None), None


class DiT(nn.Module):
  """Diffusion transformer: `apply({"params": p}, x, t, cond)` -> output of `head`.

  Training on data fills in `channels`, `num_classes`, `head` and `pooled_width`.

  Attributes:
    patch_size: side of a patch; the head must have the same.
    width: features of a token.
    depth: number of blocks.
    num_heads: of the attention, see `DIT_SIZES`.
    channels: C of the input, as its head's.
    num_classes: rows of the class table without the null class, which is index `num_classes`.
    head: module of `pflow_jax.networks.heads`; its parameters are under "head".
    pooled_width: width of the vector (B, P) in cond["pooled"] that takes the place of a class; None for classes.
    mlp_ratio: width of the MLPs over that of a token.
    dtype: compute dtype. Parameters, norms and outputs stay float32.
    residual_dtype: of the sum that the blocks add to, "bfloat16" as under PyTorch's autocast; no narrower than `dtype`.
    remat: "none", "full" (keep only each block's input), "dots" (keep the matmul outputs), "layers" (keep the outputs
      of the layers and of the attention) or "offload" (keep the matmul outputs in the host's memory; for TPU and GPU).
    attention: implementation name, see `pflow_jax.networks.attention`.
    norm_eps: added to the variance by the norms before the MLPs, as in diffusers; the other norms have 1e-6.
    time_scale: factor on t before its sinusoid.
    frequency_shift: of the sinusoid, see `networks.layers.sinusoid`.
    flip_time: whether the sinusoid gets 1 - t: 0 is noise and 1 data, as in SiT.
    scan_unroll: blocks unrolled in one iteration of the scan over depth.
    late_blocks: blocks at the end that a flow map conditions, with the output layer, on s in place of t (DMF). It then
      has no embedding of its length: no parameter is added to a trained flow.
    velocity_depth: blocks of its own that an instantaneous velocity beside a flow map's average one has (iMF), in place
      of that many at the end; it has an output layer of its own too. None for a network without that output.
  """

  patch_size: int
  width: int
  depth: int
  num_heads: int
  channels: int = 0
  num_classes: int = 0
  head: Any = None
  pooled_width: int | None = None
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  residual_dtype: str = "float32"
  remat: str = "none"
  attention: str = "xla"
  norm_eps: float = 1e-6
  time_scale: float = 1000.0
  frequency_shift: int = 0
  flip_time: bool = False
  scan_unroll: int = 1
  late_blocks: int = 0
  velocity_depth: int | None = None

  def setup(self) -> None:
    self._check()
    dtype = jnp.dtype(self.dtype)
    self.patch_embed = nn.Dense(self.width, dtype=dtype, kernel_init=_xavier, dot_general=gathered(None, "fsdp"))
    wide = accumulation_dtype(dtype)  # bfloat16 would blur t by 0.02 where time_scale is 1
    self.time_embed = TimeEmbed(self.width, self.time_scale, wide, frequency_shift=self.frequency_shift)
    # Parameters of these exist only in networks that are called with s, guidance, or its interval.
    self.length_embed = TimeEmbed(self.width, self.time_scale, wide, neutral=True)
    self.guidance_embed = TimeEmbed(self.width, 1.0, wide, neutral=True)
    self.interval_low_embed = TimeEmbed(self.width, 1.0, wide, neutral=True)
    self.interval_high_embed = TimeEmbed(self.width, 1.0, wide, neutral=True)
    if self.pooled_width is not None:
      self.pooled_embed = VectorEmbed(self.width, wide)
    else:
      normal = nn.initializers.normal(0.02)
      self.class_embed = nn.Embed(self.num_classes + 1, self.width, dtype=dtype, embedding_init=normal)
    in_axes = (nn.broadcast, 0) if self.late_blocks else nn.broadcast

    def blocks(depth: int) -> Any:
      stack = scanned(Block, depth, self.remat, self.scan_unroll, in_axes)
      return stack(self.num_heads, self.mlp_ratio, dtype, self.attention, self.norm_eps)

    own = self.velocity_depth or 0
    self.blocks = blocks(self.depth - own)
    self.final_norm = FinalNorm(dtype)
    if own:
      self.average_blocks, self.velocity_blocks = blocks(own), blocks(own)
    if self.velocity_depth is not None:
      self.velocity_norm = FinalNorm(dtype)
      self.velocity_head = self.head.clone(parent=None, name=None)

  def _check(self) -> None:
    """Raises ValueError for attributes that do not fit together."""
    if self.width % self.num_heads or self.width % 4:
      raise ValueError(f"width: expected a multiple of 4 and of num_heads {self.num_heads}, got {self.width}")
    check_head(self.head, self.channels, self.patch_size)
    for name in ("late_blocks", "velocity_depth"):
      if not 0 <= (getattr(self, name) or 0) < self.depth:
        raise ValueError(f"{name}: expected fewer than all {self.depth} blocks, got {getattr(self, name)}")
    if self.late_blocks and self.velocity_depth:
      raise ValueError("velocity_depth: expected 0 or None with late_blocks, of which the last ones are")

  def embed_condition(
    self,
    t: jax.Array,
    cond: Any,
    s: jax.Array | None = None,
    guidance: jax.Array | None = None,
    interval: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the conditioning embedding (B, D) of t (B,), labels (B,) or a text, and of the others if given."""
    embedding = self.time_embed(1 - t if self.flip_time else t)
    embedding += self.class_embed(cond) if self.pooled_width is None else self.pooled_embed(cond["pooled"])
    if s is not None:
      embedding += self.length_embed(t - s)
    if guidance is not None:
      embedding += self.guidance_embed(guidance)
    if interval is not None:
      embedding += self.interval_low_embed(interval[:, 0]) + self.interval_high_embed(interval[:, 1])
    return constrain(embedding, BATCH, None)

  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    cond: Any,
    s: jax.Array | None = None,
    guidance: jax.Array | None = None,
    interval: jax.Array | None = None,
    with_velocity: bool = False,
  ) -> Any:
    """Returns the head's output at state `x`.

    Args:
      x: (B, H, W, C); H and W are any multiples of `patch_size`.
      t: flow time in [0, 1], (B,); 1 is noise.
      cond: int32 labels (B,), or {"pooled": (B, P)}.
      s: time that a flow map jumps to, (B,).
      guidance: strength, (B,), of a flow map that was trained for several.
      interval: flow times between which that strength counts, (B, 2), of one that was trained for several.
      with_velocity: return a pair: the output, and the instantaneous velocity of a network with `velocity_depth`.

    Raises:
      ValueError: sizes do not fit, or there is no velocity to return.
    """
    if with_velocity and self.velocity_depth is None:
      raise ValueError("velocity_depth: expected the depth of the instantaneous velocity, got None")
    if x.ndim != 4 or x.shape[-1] != self.channels:
      raise ValueError(f"x: expected shape (B, H, W, {self.channels}), got {x.shape}")
    grid = grid_of(x.shape[1:-1], self.patch_size)
    batch, wide = x.shape[0], accumulation_dtype(self.dtype)
    positions = jnp.asarray(position_table(grid, self.width), wide)
    tokens = patchify(x, self.patch_size)
    h = self.patch_embed(tokens.reshape(-1, tokens.shape[-1])).astype(wide)
    h = (h.reshape(batch, -1, self.width) + positions[None]).astype(jnp.promote_types(self.dtype, self.residual_dtype))
    embedding = self.embed_condition(t, cond, None if self.late_blocks else s, guidance, interval)
    inputs: tuple[jax.Array, ...] = (nn.silu(embedding),)
    if self.late_blocks:
      early, embedding = embedding, self.embed_condition(t if s is None else s, cond, None, guidance, interval)
      late = jnp.arange(self.depth) >= self.depth - self.late_blocks
      inputs = (nn.silu(jnp.stack([early, embedding])), late)
    shared, _ = self.blocks(h, *inputs)
    h = self.average_blocks(shared, *inputs)[0] if self.velocity_depth else shared
    output = self.head(self.final_norm(h, embedding), embedding, grid)
    if not with_velocity:
      return output
    h = self.velocity_blocks(shared, *inputs)[0] if self.velocity_depth else shared
    return output, self.velocity_head(self.velocity_norm(h, embedding), embedding, grid)


def with_velocity_branch(params: dict[str, Any], velocity_depth: int) -> dict[str, Any]:
  """Returns parameters of a network with an instantaneous velocity, both of whose outputs are the given network's.

  Args:
    params: of a network without `velocity_depth`.
    velocity_depth: of the result.
  """
  branches = {"velocity_norm": params["final_norm"], "velocity_head": params["head"]}
  shared = params["blocks"]
  if velocity_depth:
    own = jax.tree.map(lambda leaf: leaf[-velocity_depth:], shared)
    shared = jax.tree.map(lambda leaf: leaf[:-velocity_depth], shared)
    branches |= {"average_blocks": own, "velocity_blocks": own}
  return {**params, "blocks": shared, **branches}
