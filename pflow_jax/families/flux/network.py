"""FLUX.1: a transformer over text and image tokens, double blocks first, then single ones.

References:
  FLUX.1-dev and -schnell (Black Forest Labs), as released in diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.batches import BATCH
from pflow_jax.mesh.sharding import constrain
from pflow_jax.networks.layers import FinalNorm, TimeEmbed, VectorEmbed, accumulation_dtype, patchify
from pflow_jax.networks.mmdit import DoubleBlock, SingleBlock, Transformer, image_positions, rope_tables


class Flux(Transformer):
  """FLUX.1's transformer: `apply({"params": p}, x, t, cond)` -> what `head` returns. Defaults are FLUX.1-dev's.

  It has the attributes of `Transformer` too. A flow map is called with `s`, whose branch is zero at the start. Its
  strength of guidance goes where the teacher's goes, so that it starts as its teacher at every strength; only a model
  without that input has a new branch for it.

  Attributes:
    depth: double blocks.
    single_depth: single blocks.
    text_width: of cond["text"] (B, L, .).
    pooled_width: of cond["pooled"] (B, .).
    guidance: strength that a guidance-distilled model is asked for where a call names none; None for a model without
      that input (schnell).
  """

  depth: int = 19
  single_depth: int = 38
  text_width: int = 4096
  pooled_width: int = 768
  guidance: float | None = 3.5

  def setup(self) -> None:
    self._check_settings()
    wide = accumulation_dtype(self.dtype)
    self.img_in = self._tokens_in()
    self.txt_in = self._tokens_in()
    self.time_embed = TimeEmbed(self.width, dtype=wide)
    distilled = self.guidance is not None
    self.guidance_embed = TimeEmbed(self.width, dtype=wide) if distilled else self._neutral_embed()
    self.length_embed = self._neutral_embed()
    self.pooled_embed = VectorEmbed(self.width, dtype=wide)
    self.double_blocks = self._blocks(DoubleBlock, self.depth)
    self.single_blocks = self._blocks(SingleBlock, self.single_depth)
    self.final_norm = FinalNorm(jnp.dtype(self.dtype))

  def embed_condition(
    self, t: jax.Array, pooled: jax.Array, s: jax.Array | None = None, guidance: jax.Array | None = None
  ) -> jax.Array:
    """Returns the conditioning embedding (B, D).

    Args:
      t: flow time (B,).
      pooled: of the text, (B, P).
      s: flow time where a flow map ends, (B,).
      guidance: strength (B,), default the attribute.
    """
    embedding = self.time_embed(t) + self.pooled_embed(pooled)
    if guidance is None and self.guidance is not None:
      guidance = jnp.full(t.shape, self.guidance, t.dtype)
    if guidance is not None:
      embedding += self.guidance_embed(guidance)
    if s is not None:
      embedding += self.length_embed(t - s)
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
      cond: "text" (B, L, text_width) and "pooled" (B, pooled_width); every text token is attended to, padding too, as
        in the released model.
      s: flow time s <= t where a flow map ends, (B,).
      guidance: strength an example (B,), in place of the attribute.

    Raises:
      ValueError: shapes do not fit.
    """
    grid = self._grid(x, cond, {"text": self.text_width, "pooled": self.pooled_width})
    length = cond["text"].shape[1]
    img = self.img_in(patchify(x, self.patch_size, "flux"))
    txt = self.txt_in(cond["text"])
    embedding = self.embed_condition(t, cond["pooled"], s, guidance)
    condition = nn.silu(embedding)
    img_rope = rope_tables(image_positions(grid), self.rope_axes)
    txt_rope = rope_tables(np.zeros((length, 3)), self.rope_axes)
    (img, txt), _ = self.double_blocks((img, txt), condition, (img_rope, txt_rope), None)
    rope = tuple(np.concatenate(pair) for pair in zip(txt_rope, img_rope, strict=True))
    both, _ = self.single_blocks(jnp.concatenate([txt, img], axis=1), condition, rope, None)
    return self.head(self.final_norm(both[:, length:], embedding), embedding, grid)
