"""Qwen-Image: a transformer of double blocks over text and image tokens.

References: Qwen-Image, arXiv:2508.02324, as released in diffusers' QwenImageTransformer2DModel.
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
  RMSNorm,
  TimeEmbed,
  accumulation_dtype,
  check_head,
  gathered,
  grid_of,
  patchify,
  scanned,
)
from pflow_jax.models.mmdit import DoubleBlock, check_rope, check_text, rope_tables
from pflow_jax.sharding import BATCH, constrain


class QwenImage(nn.Module):
  """Qwen-Image's transformer: `apply({"params": p}, x, t, cond)` -> what `head` returns. Defaults are the release's.

  Attributes: as of `models.flux.Flux`.
  """

  head: nn.Module
  channels: int = 16
  patch_size: int = 2
  depth: int = 60
  num_heads: int = 24
  head_dim: int = 128
  text_width: int = 3584
  rope_axes: tuple[int, ...] = (16, 56, 56)
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention: str = "xla"
  scan_unroll: int = 1

  def setup(self) -> None:
    check_head(self.head, self.channels, self.patch_size)
    check_rope(self.rope_axes, self.head_dim)
    dtype, width = jnp.dtype(self.dtype), self.num_heads * self.head_dim
    self.img_in = nn.Dense(width, dtype=dtype, dot_general=gathered(None, "fsdp"))
    self.txt_norm = RMSNorm()
    self.txt_in = nn.Dense(width, dtype=dtype, dot_general=gathered(None, "fsdp"))
    self.time_embed = TimeEmbed(width, dtype=accumulation_dtype(dtype))
    blocks = scanned(DoubleBlock, self.depth, self.remat, self.scan_unroll)
    self.double_blocks = blocks(self.num_heads, self.head_dim, self.mlp_ratio, dtype, self.attention)
    self.final_norm = FinalNorm(dtype)

  def __call__(self, x: jax.Array, t: jax.Array, cond: dict[str, jax.Array]) -> Any:
    """x (B, H, W, C) latents, t (B,) flow time in [0, 1] (1 is noise).

    Args:
      cond: "text" (B, L, text_width) and perhaps "mask" (B, L) bool, True where there is a token.
    Raises: ValueError for shapes that do not fit.
    """
    if x.ndim != 4 or x.shape[-1] != self.channels:
      raise ValueError(f"x: expected shape (B, H, W, {self.channels}), got {x.shape}")
    check_text(cond, {"text": self.text_width}, x.shape[0])
    grid = grid_of(x.shape[1:-1], self.patch_size)
    img = self.img_in(patchify(x, self.patch_size, "flux"))
    txt = self.txt_in(self.txt_norm(cond["text"].astype(self.dtype)))
    embedding = constrain(self.time_embed(t), BATCH, None)
    ropes = [rope_tables(p, self.rope_axes) for p in (image_positions(grid), text_positions(grid, txt.shape[1]))]
    mask = cond.get("mask")
    if mask is not None:
      mask = jnp.concatenate([mask.astype(bool), jnp.ones(img.shape[:2], bool)], axis=1)
    (img, _), _ = self.double_blocks((img, txt), nn.silu(embedding), ropes, mask)
    return self.head(self.final_norm(img, embedding), embedding, grid)


def image_positions(grid: tuple[int, ...]) -> np.ndarray:
  """Frame 0, row and column of every token of a grid, row-major, counted from its middle: (T, 3)."""
  rows, columns = np.indices(grid).reshape(2, -1)
  return np.stack([np.zeros_like(rows), rows - (grid[0] - grid[0] // 2), columns - (grid[1] - grid[1] // 2)], axis=1)


def text_positions(grid: tuple[int, ...], length: int) -> np.ndarray:
  """Positions of text tokens, after the last of the image on all three axes: (L, 3)."""
  start = max(side // 2 for side in grid)
  return np.repeat(start + np.arange(length)[:, None], 3, axis=1)
