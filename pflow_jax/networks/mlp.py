"""A residual MLP for points, conditioned like DiT; in any space it acts on each point alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.core.batches import BATCH
from pflow_jax.mesh.sharding import constrain
from pflow_jax.networks.layers import (
  Dtype,
  FinalNorm,
  TimeEmbed,
  accumulation_dtype,
  check_head,
  gathered,
  layer_norm,
  modulate,
)


class ResidualBlock(nn.Module):
  """Norm with shift and scale from the condition, Dense, SiLU, Dense (zero at the start)."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Maps x (B, T, D) and condition (B, D) to (B, T, D)."""
    width = x.shape[-1]
    xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
    adaln = nn.Dense(2 * width, dtype=x.dtype, kernel_init=zeros, dot_general=gathered("fsdp", None), name="adaln")(
      condition
    )
    widen, narrow = gathered("fsdp", "tensor"), gathered("tensor", "fsdp")
    shift, scale = jnp.split(adaln, 2, axis=-1)
    # A Dense on two axes has one plain matmul as its weight gradient.
    h = modulate(layer_norm(x), shift, scale).reshape(-1, width)
    h = nn.silu(nn.Dense(width, dtype=self.dtype, kernel_init=xavier, dot_general=widen, name="mlp_in")(h))
    h = nn.Dense(width, dtype=self.dtype, kernel_init=zeros, dot_general=narrow, name="mlp_out")(h)
    return x + h.astype(x.dtype).reshape(x.shape)


class MLP(nn.Module):
  """Residual MLP: `apply({"params": p}, x, t, cond)` -> output of `head`.

  Training on data fills in `channels`, `num_classes` and `head`.

  Attributes:
    width: features of a layer.
    depth: number of blocks.
    channels: C of the data.
    num_classes: rows of the class table without the null class, which is index `num_classes`.
    head: module of `pflow_jax.networks.heads` with patch_size 1; its parameters are under "head".
    dtype: compute dtype; parameters, residual stream and outputs stay float32.
    time_scale: factor on t before its sinusoid.
  """

  width: int
  depth: int
  channels: int = 0
  num_classes: int = 0
  head: Any = None
  dtype: Dtype = jnp.float32
  time_scale: float = 1000.0

  def setup(self) -> None:
    check_head(self.head, self.channels, 1)
    dtype = jnp.dtype(self.dtype)
    self.point_embed = nn.Dense(self.width, dtype=dtype, dot_general=gathered(None, "fsdp"))
    wide = accumulation_dtype(dtype)  # see DiT
    self.time_embed = TimeEmbed(self.width, self.time_scale, wide)
    # Parameters of these two exist only in networks that are called with s, or with guidance.
    self.length_embed = TimeEmbed(self.width, self.time_scale, wide, neutral=True)
    self.guidance_embed = TimeEmbed(self.width, 1.0, wide, neutral=True)
    self.class_embed = nn.Embed(
      self.num_classes + 1, self.width, dtype=dtype, embedding_init=nn.initializers.normal(0.02)
    )
    self.blocks = [ResidualBlock(dtype) for _ in range(self.depth)]
    self.final_norm = FinalNorm(dtype)

  def embed_condition(
    self, t: jax.Array, cond: jax.Array, s: jax.Array | None = None, guidance: jax.Array | None = None
  ) -> jax.Array:
    """Returns the conditioning embedding (B, D) of t (B,), labels (B,), and s and guidance if given."""
    embedding = self.time_embed(t) + self.class_embed(cond)
    if s is not None:
      embedding += self.length_embed(t - s)
    if guidance is not None:
      embedding += self.guidance_embed(guidance)
    return constrain(embedding, BATCH, None)

  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    cond: jax.Array,
    s: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> Any:
    """Returns the head's output at state `x`.

    Args:
      x: (B, *space, C).
      t: flow time in [0, 1], (B,); 1 is noise.
      cond: int32 labels, (B,).
      s: as for DiT.
      guidance: as for DiT.
    """
    if x.ndim < 2 or x.shape[-1] != self.channels:
      raise ValueError(f"x: expected shape (B, *space, {self.channels}), got {x.shape}")
    batch, space = x.shape[0], x.shape[1:-1]
    points = x.reshape(batch * math.prod(space), self.channels)
    h = self.point_embed(points).astype(accumulation_dtype(self.dtype))
    h = h.reshape(batch, -1, self.width)
    embedding = self.embed_condition(t, cond, s, guidance)
    condition = nn.silu(embedding)
    for block in self.blocks:
      h = block(h, condition)
    return self.head(self.final_norm(h, embedding), embedding, space)
