"""Parts that several networks share: patches, positions, and the conditioning embedding.

Parameters are float32 everywhere; `dtype` is a layer's compute dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from pflow_jax.core.batches import BATCH
from pflow_jax.mesh.sharding import constrain, gather

Dtype = Any
COLUMNS = ("fsdp", "tensor")  # the mesh axes that split the kernel of a Dense layer with `in_parts`
FREQUENCIES = 256  # width of the sinusoid that feeds the time MLP, as in DiT

# Placement on a mesh of this module's parameters, and of those like them in DiT and MLP; see `mesh.sharding.Layout`.
SHARDING = (
  ("adaln/kernel", ("fsdp", None)),
  ("(qkv|mlp_in)/kernel", ("fsdp", "tensor")),
  ("(proj|mlp_out)/kernel", ("tensor", "fsdp")),
  ("(patch|point)_embed/kernel", (None, "fsdp")),
  ("(time|length|guidance|interval_low|interval_high|pooled)_embed/(in|out)/kernel", (None, "fsdp")),
  ("class_embed/embedding|log_variance/.*|.*/(bias|scale)", ()),
)

# Parameters that are constants: they keep their dtype where others are rounded, and do not decay.
CONSTANTS = r"(.*/)?fourier/(freqs|phases)"

# Values of a block that the backward pass keeps: all, none, the matmul outputs, those marked with `kept`, or the matmul
# outputs in the host's memory.
_KEPT = "layer"
REMAT_POLICIES: dict[str, Any] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "layers": jax.checkpoint_policies.save_only_these_names(_KEPT),
  "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def kept(value: jax.Array) -> jax.Array:
  """Marks the output of a layer or of the attention, which remat="layers" keeps.

  All that is between two of them is elementwise or a norm, and is computed again where a product reads it. A matmul's
  output before its bias, which "dots" keeps, is an array more.
  """
  return checkpoint_name(value, _KEPT)


def scanned(block: Any, depth: int, remat: str = "none", unroll: int = 1, in_axes: Any = nn.broadcast) -> Any:
  """Makes one nn.scan of `depth` blocks, one after the other; parameters have a leading axis `depth`.

  Args:
    block: module (carry, *inputs) -> (carry, None).
    depth: number of blocks.
    remat: see REMAT_POLICIES.
    unroll: blocks in one iteration.
    in_axes: of the inputs: nn.broadcast for one that all blocks share, 0 for one with a leading axis `depth`.

  Raises:
    ValueError: `remat` is unknown.
  """
  if remat not in REMAT_POLICIES:
    raise ValueError(f"remat: expected one of {sorted(REMAT_POLICIES)}, got {remat!r}")
  if remat != "none":
    # Inside a rolled scan XLA cannot merge the recomputation away; unrolled, it could.
    block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll > 1)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=depth,
    unroll=unroll,
  )


def accumulation_dtype(dtype: Dtype) -> jnp.dtype:
  """Returns the dtype of sums, norms and outputs under compute dtype `dtype`: float32, or wider."""
  return jnp.promote_types(dtype, jnp.float32)


def check_layout(layout: str) -> None:
  """Raises ValueError unless layout is "dit" or "flux"."""
  if layout not in ("dit", "flux"):
    raise ValueError(f'layout: expected "dit" or "flux", got {layout!r}')


def _patch_axes(axes: int, layout: str) -> tuple[str, str, str]:
  """Returns einops names of a space with `axes` axes: its grid, its sub-pixels, and both merged."""
  check_layout(layout)
  grid = " ".join(f"g{i}" for i in range(axes))
  sub = " ".join(f"p{i}" for i in range(axes))
  space = " ".join(f"(g{i} p{i})" for i in range(axes))
  return grid, sub, space


def grid_of(space: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
  """Returns the space shape counted in patches.

  Raises:
    ValueError: a size is not a multiple of the patch.
  """
  if any(size % patch_size or size < 1 for size in space):
    raise ValueError(
      f"input size {space}: expected every axis to be a multiple of patch_size {patch_size}; "
      "crop or pad the data, or choose a patch_size that divides it"
    )
  return tuple(size // patch_size for size in space)


def patchify(x: jax.Array, patch_size: int, layout: str = "dit") -> jax.Array:
  """Cuts x (B, *space, C) into row-major patches, (B, T, p^n C) for n space axes.

  Order of the last axis: (p1, p2, c) for "dit" (a convolution's kernel, reshaped), (c, p1, p2) for
  "flux" (its packed latents).
  """
  axes = x.ndim - 2
  grid, sub, space = _patch_axes(axes, layout)
  grid_of(x.shape[1:-1], patch_size)
  row = f"{sub} c" if layout == "dit" else f"c {sub}"
  sizes = {f"p{i}": patch_size for i in range(axes)}
  return rearrange(x, f"b {space} c -> b ({grid}) ({row})", **sizes)


def unpatchify(rows: jax.Array, grid: tuple[int, ...], patch_size: int, groups: int, layout: str = "dit") -> jax.Array:
  """Puts the output rows of every token back in space.

  Args:
    rows: (B, T, p^n M C) with T = prod(grid); a row counts (p1, p2, m, c) for "dit" and
      (m, c, p1, p2) for "flux".
    grid: patches along each axis of space.
    patch_size: p.
    groups: M, the number of maps (components, coefficients) in a row.
    layout: "dit" or "flux".

  Returns:
    (B, M, *space, C), space = grid * patch_size.
  """
  axes = len(grid)
  names, sub, space = _patch_axes(axes, layout)
  row = f"{sub} m c" if layout == "dit" else f"m c {sub}"
  sizes = {f"g{i}": size for i, size in enumerate(grid)}
  sizes |= {f"p{i}": patch_size for i in range(axes)}
  return rearrange(rows, f"b ({names}) ({row}) -> b m {space} c", m=groups, **sizes)


def sinusoid(position: jax.Array, width: int, max_period: float = 10_000.0, shift: int = 0) -> jax.Array:
  """Returns cosines then sines of position (B,) at width/2 log-spaced frequencies: (B, width).

  The frequencies fall from 1 towards 1 / max_period, which the last one reaches with a `shift` of 1, as in diffusers'
  DiT alone.
  """
  half = width // 2
  frequencies = np.exp(-math.log(max_period) * np.arange(half) / (half - shift)).astype(position.dtype)
  angles = position[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(grid: tuple[int, ...], width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine positions of DiT (and MAE) on grid (Hp, Wp): (Hp * Wp, width), float64.

  The first half of the channels encodes the column, the second the row; each half is sines, then
  cosines. This order is the released checkpoints'.
  """
  if width % 4:
    raise ValueError(f"width: expected a multiple of 4 for 2-D positions, got {width}")
  frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

  def encode(position: np.ndarray) -> np.ndarray:
    angles = np.outer(position, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  rows, columns = np.indices(grid).reshape(2, -1)
  return np.concatenate([encode(columns), encode(rows)], axis=1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns x (B, T, D) scaled by 1 + scale and shifted; shift and scale are (B, D)."""
  return x * (1 + scale[:, None, :]) + shift[:, None, :]


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """Normalises the last axis to mean 0, variance 1, without a learned affine map."""
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon)


@functools.cache
def gathered(*spec: Any) -> Callable[..., jax.Array]:
  """Returns a `dot_general` for nn.Dense whose kernel lies on a mesh as `spec` says, see SHARDING, and is gathered.

  GSPMD by itself may move activations instead, or cut the product in hundreds of small ones. The kernel is sent in the
  layer's compute dtype; in an nn.scan one layer at a time is whole.
  """

  def dot_general(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    return jax.lax.dot_general(x, gather(kernel, *spec), *args, **options)

  return dot_general


def in_parts(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
  """A `dot_general` for a Dense layer on one vector an example, (B, D), whose kernel lies in parts of its columns.

  The kernel may be large, as those of adaLN are, and the inputs are few: the inputs are sent, not the kernel.
  """
  data = tuple(axis for axis in BATCH if axis != "fsdp")
  y = jax.lax.dot_general(constrain(x, data, None), kernel, *args, **options)
  return constrain(constrain(y, data, COLUMNS), BATCH, None)


class TimeEmbed(nn.Module):
  """Embedding (B, width) of t (B,): sinusoid of time_scale * t, Dense, SiLU, Dense (DiT).

  Attributes:
    width: of the embedding.
    time_scale: factor on t.
    dtype: compute dtype.
    neutral: whether it starts at 0 for every t: such a branch does not change a trained network.
    frequency_shift: see `sinusoid`.
  """

  width: int
  time_scale: float = 1000.0
  dtype: Dtype = jnp.float32
  neutral: bool = False
  frequency_shift: int = 0

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    t = t.astype(accumulation_dtype(self.dtype))
    h = sinusoid(self.time_scale * t, FREQUENCIES, shift=self.frequency_shift)
    dense = functools.partial(nn.Dense, self.width, dtype=self.dtype, dot_general=gathered(None, "fsdp"))
    h = nn.silu(dense(kernel_init=init, name="in")(h))
    return dense(kernel_init=nn.initializers.zeros if self.neutral else init, name="out")(h)


class VectorEmbed(nn.Module):
  """Embedding (B, width) of vectors (B, P), such as a text's: Dense, SiLU, Dense."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def dense(name: str) -> nn.Dense:
      return nn.Dense(self.width, dtype=self.dtype, dot_general=gathered(None, "fsdp"), name=name)

    return dense("out")(nn.silu(dense("in")(x)))


def check_head(head: Any, channels: int, patch_size: int) -> None:
  """Raises ValueError if a network has no head, or one that disagrees about the data."""
  if head is None:
    raise ValueError("head: expected the output layer of the network, such as VelocityHead(channels=C), got None")
  got = (head.channels, head.patch_size)
  if got != (channels, patch_size):
    raise ValueError(f"head: expected the network's (channels, patch_size) {(channels, patch_size)}, got {got}")


class RMSNorm(nn.Module):
  """Divides x (..., D) by its root mean square along the last axis, times a learned scale; float32 or wider within."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    wide = x.astype(accumulation_dtype(x.dtype))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
    return (wide * jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class FinalNorm(nn.Module):
  """Last adaLN: norm, then shift and scale from SiLU(embedding), both zero at the start."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array) -> jax.Array:
    """Maps tokens (B, T, D) and embedding (B, D) to (B, T, D), float32 or wider."""
    wide = accumulation_dtype(self.dtype)
    zeros = nn.initializers.zeros
    split = gathered("fsdp", None)
    dense = nn.Dense(2 * tokens.shape[-1], dtype=wide, kernel_init=zeros, dot_general=split, name="adaln")
    adaln = dense(nn.silu(embedding))
    shift, scale = jnp.split(adaln, 2, axis=-1)
    return modulate(layer_norm(tokens.astype(wide)), shift, scale)
