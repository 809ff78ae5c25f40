"""FLUX.1: a transformer over text and image tokens, double blocks first, then single ones.

References: FLUX.1-dev and -schnell (Black Forest Labs), as released in diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.models.layers import (
  Dtype,
  FinalNorm,
  TimeEmbed,
  VectorEmbed,
  accumulation_dtype,
  check_head,
  gathered,
  grid_of,
  patchify,
  scanned,
)
from pflow_jax.models.mmdit import DoubleBlock, SingleBlock, check_rope, check_text, rope_tables
from pflow_jax.sharding import BATCH, constrain


class Flux(nn.Module):
  """FLUX.1's transformer: `apply({"params": p}, x, t, cond)` -> what `head` returns. Defaults are FLUX.1-dev's.

  Attributes:
    head: module of `pflow_jax.models.heads` in layout "flux"; its parameters live under "head".
    channels, patch_size: of the latents; the head must have the same.
    depth, single_depth: double and single blocks.   num_heads, head_dim: their product is the width.
    text_width, pooled_width: of cond["text"] (B, L, .) and cond["pooled"] (B, .).
    rope_axes: channels of a head that turn with a token's frame, row and column.
    guidance: strength that a guidance-distilled model is asked for; None for a model without that input (schnell).
    dtype: compute dtype and that of the residual stream. Norms, embeddings and outputs stay float32.
    remat, scan_unroll: see `layers.scanned`.   attention: see `models.attention`.
  """

  head: nn.Module
  channels: int = 16
  patch_size: int = 2
  depth: int = 19
  single_depth: int = 38
  num_heads: int = 24
  head_dim: int = 128
  text_width: int = 4096
  pooled_width: int = 768
  rope_axes: tuple[int, ...] = (16, 56, 56)
  guidance: float | None = 3.5
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention: str = "xla"
  scan_unroll: int = 1

  def setup(self) -> None:
    check_head(self.head, self.channels, self.patch_size)
    check_rope(self.rope_axes, self.head_dim)
    dtype, width = jnp.dtype(self.dtype), self.num_heads * self.head_dim
    wide = accumulation_dtype(dtype)
    self.img_in = nn.Dense(width, dtype=dtype, dot_general=gathered(None, "fsdp"))
    self.txt_in = nn.Dense(width, dtype=dtype, dot_general=gathered(None, "fsdp"))
    self.time_embed = TimeEmbed(width, dtype=wide)
    self.guidance_embed = TimeEmbed(width, dtype=wide)
    self.pooled_embed = VectorEmbed(width, dtype=wide)
    size = (self.num_heads, self.head_dim, self.mlp_ratio, dtype, self.attention)
    self.double_blocks = scanned(DoubleBlock, self.depth, self.remat, self.scan_unroll)(*size)
    self.single_blocks = scanned(SingleBlock, self.single_depth, self.remat, self.scan_unroll)(*size)
    self.final_norm = FinalNorm(dtype)

  def embed_condition(self, t: jax.Array, pooled: jax.Array, guidance: jax.Array | None = None) -> jax.Array:
    """The conditioning embedding (B, D) of t (B,), pooled text (B, P) and a strength (B,), default the attribute."""
    embedding = self.time_embed(t) + self.pooled_embed(pooled)
    if self.guidance is not None:
      embedding += self.guidance_embed(jnp.full(t.shape, self.guidance, t.dtype) if guidance is None else guidance)
    return constrain(embedding, BATCH, None)

  def __call__(self, x: jax.Array, t: jax.Array, cond: dict[str, jax.Array], guidance: jax.Array | None = None) -> Any:
    """x (B, H, W, C) latents, t (B,) flow time in [0, 1] (1 is noise).

    Args:
      cond: "text" (B, L, text_width) and "pooled" (B, pooled_width); every text token is attended to, padding too, as
        in the released model.
      guidance: strength an example (B,), in place of the attribute.
    Raises: ValueError for shapes that do not fit.
    """
    if x.ndim != 4 or x.shape[-1] != self.channels:
      raise ValueError(f"x: expected shape (B, H, W, {self.channels}), got {x.shape}")
    check_text(cond, {"text": self.text_width, "pooled": self.pooled_width}, x.shape[0])
    grid = grid_of(x.shape[1:-1], self.patch_size)
    length = cond["text"].shape[1]
    img = self.img_in(patchify(x, self.patch_size, "flux"))
    txt = self.txt_in(cond["text"])
    embedding = self.embed_condition(t, cond["pooled"], guidance)
    condition = nn.silu(embedding)
    img_rope = rope_tables(image_positions(grid), self.rope_axes)
    txt_rope = rope_tables(np.zeros((length, 3)), self.rope_axes)
    (img, txt), _ = self.double_blocks((img, txt), condition, (img_rope, txt_rope), None)
    rope = tuple(np.concatenate(pair) for pair in zip(txt_rope, img_rope, strict=True))
    both, _ = self.single_blocks(jnp.concatenate([txt, img], axis=1), condition, rope, None)
    return self.head(self.final_norm(both[:, length:], embedding), embedding, grid)


def image_positions(grid: tuple[int, ...]) -> np.ndarray:
  """Frame 0, row and column of every token of a grid, row-major: (T, 3)."""
  rows, columns = np.indices(grid).reshape(2, -1)
  return np.stack([np.zeros_like(rows), rows, columns], axis=1)
