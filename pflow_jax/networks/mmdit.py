"""Blocks of transformers over text and image tokens, the parts of FLUX.1 and Qwen-Image.

A double block has separate weights for text and for image tokens, which meet in the attention alone; a single block has
one set for both, and its attention and MLP side by side. Residual streams have the network's compute dtype, as in the
released models; norms are float32 within.

References:
  MMDiT, arXiv:2403.03206; FLUX.1 (Black Forest Labs); Qwen-Image, arXiv:2508.02324.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.batches import BATCH
from pflow_jax.mesh.sharding import constrain
from pflow_jax.networks.attention import attention
from pflow_jax.networks.layers import (
  COLUMNS,
  Dtype,
  RMSNorm,
  TimeEmbed,
  accumulation_dtype,
  check_head,
  gathered,
  grid_of,
  in_parts,
  kept,
  layer_norm,
  modulate,
  scanned,
)

# Placement of the parameters on a mesh, see `mesh.sharding.Layout`.
SHARDING = (
  (r"(double|single)_blocks/((img|txt)_)?mod/kernel", (None, COLUMNS)),
  (r"(double|single)_blocks/((img|txt)_)?(q|k|v|mlp_in)/kernel", ("fsdp", "tensor")),
  (r"(double|single)_blocks/((img|txt)_)?(out|mlp_out)/kernel", ("tensor", "fsdp")),
  (r"(img|txt)_in/kernel", (None, "fsdp")),
)

ROPE_BASE = 10_000.0

# Factor on the length of a flow map's jump, and on a strength of guidance that the teacher has no input for, before
# their sinusoids. A flow map is differentiated in t, and with it in the length: the 1000 that t has in these networks
# would have the derivative grow as much.
SLOW = 1.0


def rope_tables(positions: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines (T, D) of rotary positions (T, n) whose axis i turns `axes[i]` of the D channels.

  Every pair of neighbouring channels turns by one angle. The result is float32, from angles in float64.
  """
  angles = []
  for i, width in enumerate(axes):
    frequencies = ROPE_BASE ** (-np.arange(0, width, 2) / width)
    angles.append(np.repeat(positions[:, i, None] * frequencies, 2, axis=1))
  table = np.concatenate(angles, axis=1)
  return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def rotate(x: jax.Array, rope: tuple[np.ndarray, np.ndarray]) -> jax.Array:
  """Turns the channels of x (B, T, H, D) by their positions' angles, see `rope_tables`."""
  cos, sin = (jnp.asarray(table, accumulation_dtype(x.dtype))[:, None, :] for table in rope)
  wide = x.astype(cos.dtype)
  # Rolling maps (a, b) to (-b, a): a reshape to pairs would use two of a register's lanes.
  even = np.arange(x.shape[-1]) % 2 == 0
  turned = jnp.where(even, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
  return (wide * cos[None] + turned * sin[None]).astype(x.dtype)


class _Block(nn.Module):
  """Base of both kinds of block.

  Attributes:
    num_heads: heads of the attention.
    head_dim: channels of a head.
    mlp_ratio: width of the MLP over that of the tokens.
    dtype: compute dtype.
    attention: implementation, see `networks.attention`.
  """

  num_heads: int
  head_dim: int
  mlp_ratio: float
  dtype: Dtype
  attention: str

  @property
  def width(self) -> int:
    return self.num_heads * self.head_dim

  def _dense(self, features: int, name: str, *split: Any) -> Callable[[jax.Array], jax.Array]:
    layer = nn.Dense(features, dtype=self.dtype, dot_general=gathered(*split), name=name)
    return lambda x: kept(layer(x))

  def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attention of heads (B, T, H, D), as tokens (B, T, H D)."""
    return kept(attention(q, k, v, mask, implementation=self.attention).reshape(*q.shape[:2], self.width))

  def _modulation(self, condition: jax.Array, parts: int, name: str) -> list[jax.Array]:
    """Makes shifts, scales and gates (B, D) from SiLU(embedding); zero at the start."""
    zeros = nn.initializers.zeros
    dense = nn.Dense(parts * self.width, dtype=self.dtype, kernel_init=zeros, dot_general=in_parts, name=name)
    return jnp.split(kept(dense(condition)), parts, axis=-1)

  def _norm(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    wide = accumulation_dtype(self.dtype)
    return modulate(layer_norm(x.astype(wide)), shift.astype(wide), scale.astype(wide)).astype(self.dtype)

  def _heads(self, x: jax.Array, prefix: str, rope: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes queries, keys and values (B, T, H, D) of tokens (B, T, H D); the first two normalised and turned."""

    def project(name: str) -> jax.Array:
      h = self._dense(self.width, f"{prefix}{name}", "fsdp", "tensor")(x)
      return constrain(h.reshape(*x.shape[:2], self.num_heads, self.head_dim), BATCH, None, "tensor", None)

    q, k = (rotate(RMSNorm(name=f"{prefix}{name}_norm")(project(name)), rope) for name in ("q", "k"))
    return q, k, project("v")

  def _mlp_in(self, x: jax.Array, prefix: str) -> jax.Array:
    hidden = self._dense(int(self.width * self.mlp_ratio), f"{prefix}mlp_in", "fsdp", "tensor")(x)
    return nn.gelu(hidden, approximate=True)


class DoubleBlock(_Block):
  """Block with separate weights for image and text tokens, and one attention over both."""

  @nn.compact
  def __call__(
    self, carry: tuple[jax.Array, jax.Array], condition: jax.Array, ropes: Any, mask: jax.Array | None
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Maps the tokens to the next block's.

    Args:
      carry: image (B, T, D) and text (B, L, D) tokens.
      condition: SiLU of the embedding, (B, D).
      ropes: of image and text, see `rope_tables`.
      mask: True for the tokens that are attended to, (B, L + T), text first; None is all.
    """
    tokens = [constrain(x, BATCH, None, None) for x in carry]
    prefixes = ("img_", "txt_")
    mods = [self._modulation(condition, 6, f"{prefix}mod") for prefix in prefixes]
    heads = [
      self._heads(self._norm(x, mod[0], mod[1]), prefix, rope)
      for x, mod, prefix, rope in zip(tokens, mods, prefixes, ropes, strict=True)
    ]
    q, k, v = (jnp.concatenate([txt, img], axis=1) for img, txt in zip(*heads, strict=True))
    mixed = self._attend(q, k, v, mask)
    length = tokens[1].shape[1]
    out = []
    for x, part, mod, prefix in zip(tokens, (mixed[:, length:], mixed[:, :length]), mods, prefixes, strict=True):
      x = x + mod[2][:, None] * self._dense(self.width, f"{prefix}out", "tensor", "fsdp")(part)
      hidden = self._mlp_in(self._norm(x, mod[3], mod[4]), prefix)
      x = x + mod[5][:, None] * self._dense(self.width, f"{prefix}mlp_out", "tensor", "fsdp")(hidden)
      out.append(constrain(x, BATCH, None, None))
    return (out[0], out[1]), None


class SingleBlock(_Block):
  """Block with the same weights for all tokens; attention and MLP have the same input and one output layer."""

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array, rope: Any, mask: jax.Array | None) -> tuple[jax.Array, None]:
    """Maps tokens x (B, L + T, D), text first, to the next block's; other arguments as in `DoubleBlock`."""
    x = constrain(x, BATCH, None, None)
    shift, scale, gate = self._modulation(condition, 3, "mod")
    h = self._norm(x, shift, scale)
    mixed = self._attend(*self._heads(h, "", rope), mask)
    both = jnp.concatenate([mixed, self._mlp_in(h, "")], axis=-1)
    return constrain(
      x + gate[:, None] * self._dense(self.width, "out", "tensor", "fsdp")(both), BATCH, None, None
    ), None


class Transformer(nn.Module):
  """Base of the networks made of these blocks: settings, their checks, and the tokens of a picture.

  Attributes:
    head: module of `pflow_jax.networks.heads` in layout "flux", which training on data fills in; its parameters are
      under "head".
    channels: of the latents; the head must have the same.
    patch_size: side of a patch of the latents; the head must have the same.
    num_heads: heads of the attention; times `head_dim` they are the width.
    head_dim: channels of a head.
    rope_axes: channels of a head that turn with a token's frame, row and column.
    mlp_ratio: width of the MLPs over that of the tokens.
    dtype: compute dtype and that of the residual stream. Norms, embeddings and outputs stay float32.
    remat: see `networks.layers.scanned`.
    attention: see `networks.attention`.
    scan_unroll: see `networks.layers.scanned`.
  """

  head: Any = None
  channels: int = 16
  patch_size: int = 2
  num_heads: int = 24
  head_dim: int = 128
  rope_axes: tuple[int, ...] = (16, 56, 56)
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention: str = "xla"
  scan_unroll: int = 1

  @property
  def width(self) -> int:
    """Features of a token."""
    return self.num_heads * self.head_dim

  def _check_settings(self) -> None:
    check_head(self.head, self.channels, self.patch_size)
    check_rope(self.rope_axes, self.head_dim)

  def _tokens_in(self) -> nn.Dense:
    """Returns a layer that makes tokens, of image or text."""
    return nn.Dense(self.width, dtype=jnp.dtype(self.dtype), dot_general=gathered(None, "fsdp"))

  def _neutral_embed(self) -> TimeEmbed:
    """Returns the embedding of an input that the teacher lacks; its parameters exist where `init` was given that."""
    return TimeEmbed(self.width, SLOW, accumulation_dtype(self.dtype), neutral=True)

  def _blocks(self, block: Any, depth: int) -> Any:
    size = (self.num_heads, self.head_dim, self.mlp_ratio, jnp.dtype(self.dtype), self.attention)
    return scanned(block, depth, self.remat, self.scan_unroll)(*size)

  def _grid(self, x: jax.Array, cond: Any, widths: dict[str, int]) -> tuple[int, int]:
    """Returns the rows and columns of patches of x (B, H, W, C).

    Raises:
      ValueError: x or `cond`, see `check_text`, does not fit.
    """
    if x.ndim != 4 or x.shape[-1] != self.channels:
      raise ValueError(f"x: expected shape (B, H, W, {self.channels}), got {x.shape}")
    check_text(cond, widths, x.shape[0])
    rows, columns = grid_of(x.shape[1:-1], self.patch_size)
    return rows, columns


def image_positions(grid: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> np.ndarray:
  """Frame 0, row and column of every token of a grid, row-major, counted from the one at `origin`: (T, 3)."""
  rows, columns = np.indices(grid).reshape(2, -1)
  return np.stack([np.zeros_like(rows), rows - origin[0], columns - origin[1]], axis=1)


def check_text(cond: Any, widths: dict[str, int], batch: int) -> None:
  """Raises ValueError unless `cond` has embeddings of these widths for `batch` examples; a mask is optional.

  "text" is (B, L, width), any other (B, width); "mask" is (B, L).
  """
  got = {name: tuple(value.shape) for name, value in cond.items()} if isinstance(cond, dict) else {}
  length = (got.get("text") or (batch, 1))[1]
  expected = {name: (batch, length, width) if name == "text" else (batch, width) for name, width in widths.items()}
  if "mask" in got:
    expected["mask"] = (batch, length)
  if any(got.get(name) != shape for name, shape in expected.items()):
    raise ValueError(f"cond: expected a dict of arrays of shapes {expected}, got {got or cond}")


def check_rope(axes: tuple[int, ...], head_dim: int) -> None:
  """Raises ValueError unless three even `axes` share the channels of a head."""
  if len(axes) != 3 or sum(axes) != head_dim or any(width % 2 for width in axes):
    raise ValueError(f"rope_axes: expected three even widths that sum to head_dim {head_dim}, got {axes}")
