"""Qwen-Image: a transformer of double blocks over text and image tokens.

References:
  Qwen-Image, arXiv:2508.02324, as released in diffusers' QwenImageTransformer2DModel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.batches import BATCH
from pflow_jax.mesh.sharding import constrain
from pflow_jax.networks.layers import FinalNorm, RMSNorm, TimeEmbed, accumulation_dtype, patchify
from pflow_jax.networks.mmdit import DoubleBlock, Transformer, image_positions, rope_tables


class QwenImage(Transformer):
  """Qwen-Image's transformer: `apply({"params": p}, x, t, cond)` -> what `head` returns. Defaults are the release's.

  It has the attributes of `Transformer` too. A flow map is called with `s`, and with `guidance` if it was trained for
  several strengths; the branches of both are zero at the start.

  Attributes:
    depth: blocks.
    text_width: of cond["text"] (B, L, .).
  """

  depth: int = 60
  text_width: int = 3584

  def setup(self) -> None:
    self._check_settings()
    self.img_in = self._tokens_in()
    self.txt_norm = RMSNorm()
    self.txt_in = self._tokens_in()
    self.time_embed = TimeEmbed(self.width, dtype=accumulation_dtype(self.dtype))
    self.length_embed = self._neutral_embed()
    self.guidance_embed = self._neutral_embed()
    self.double_blocks = self._blocks(DoubleBlock, self.depth)
    self.final_norm = FinalNorm(jnp.dtype(self.dtype))

  def embed_condition(self, t: jax.Array, s: jax.Array | None = None, guidance: jax.Array | None = None) -> jax.Array:
    """Returns the conditioning embedding (B, D) of t (B,), and of s and guidance if given, see `__call__`."""
    embedding = self.time_embed(t)
    if s is not None:
      embedding += self.length_embed(t - s)
    if guidance is not None:
      embedding += self.guidance_embed(guidance)
    return constrain(embedding, BATCH, None)

  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    cond: dict[str, jax.Array],
    s: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> Any:
    """Returns the output of the head.

    Args:
      x: latents (B, H, W, C).
      t: flow time (B,) in [0, 1]; 1 is noise.
      cond: "text" (B, L, text_width) and perhaps "mask" (B, L) bool, True where there is a token.
      s: flow time s <= t where a flow map ends, (B,).
      guidance: strength of guidance an example, (B,), of a flow map that was trained for several.

    Raises:
      ValueError: shapes do not fit.
    """
    grid = self._grid(x, cond, {"text": self.text_width})
    img = self.img_in(patchify(x, self.patch_size, "flux"))
    txt = self.txt_in(self.txt_norm(cond["text"].astype(self.dtype)))
    embedding = self.embed_condition(t, s, guidance)
    # Counted from the picture's middle, so that a picture of any size looks alike there.
    middle = (grid[0] - grid[0] // 2, grid[1] - grid[1] // 2)
    positions = image_positions(grid, middle), text_positions(grid, txt.shape[1])
    ropes = [rope_tables(one, self.rope_axes) for one in positions]
    mask = cond.get("mask")
    if mask is not None:
      mask = jnp.concatenate([mask.astype(bool), jnp.ones(img.shape[:2], bool)], axis=1)
    (img, _), _ = self.double_blocks((img, txt), nn.silu(embedding), ropes, mask)
    return self.head(self.final_norm(img, embedding), embedding, grid)


def text_positions(grid: tuple[int, ...], length: int) -> np.ndarray:
  """Positions of text tokens, after the last of the image on all three axes: (L, 3)."""
  start = max(side // 2 for side in grid)
  return np.repeat(start + np.arange(length)[:, None], 3, axis=1)
