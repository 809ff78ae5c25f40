"""EDM2: the magnitude-preserving U-Net, with a second time and a guidance strength for flow maps.

Every layer keeps unit-variance inputs at unit variance, so no layer needs a bias or a learned norm. Only the directions
of the weights train: `normalize_weights` has to be applied after every update.

References:
  EDM2 (config G), arXiv:2312.02696; flow maps, arXiv:2506.14603; time features, arXiv:2410.11081.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import linen as nn

from pflow_jax.mesh.sharding import gather
from pflow_jax.networks.attention import attention
from pflow_jax.networks.layers import Dtype, accumulation_dtype, sinusoid

EDM2_SIZES: dict[str, dict[str, int]] = {
  "XS": dict(model_channels=128),
  "S": dict(model_channels=192),
  "M": dict(model_channels=256),
  "L": dict(model_channels=320),
  "XL": dict(model_channels=384),
  "XXL": dict(model_channels=448),
}

# Weight of the second operand of a magnitude-preserving sum or concatenation.
RESIDUAL_BALANCE = 0.3  # also that of attention
LABEL_BALANCE = 0.5
CONCAT_BALANCE = 0.5
CLIP = 256.0  # bound of a block's output, as in the release
MIN_TIME = 1e-4  # log-sigma is finite in [MIN_TIME, 1 - MIN_TIME]

_KERNEL = "mp_kernel"  # `normalize_weights` finds the kernels by this name

# Placement of the kernels on a mesh, see `mesh.sharding.Layout`: filters stay whole, because they are normalised.
SHARDING = ((f".*/{_KERNEL}", (None, "fsdp")),)


def normalize(x: jax.Array, axis: int | tuple[int, ...], eps: float = 1e-4) -> jax.Array:
  """Divides x by eps plus its root mean square along `axis`, taken in float32 (or wider); dtype of x."""
  wide = x.astype(accumulation_dtype(x.dtype))
  rms = jnp.sqrt(jnp.mean(jnp.square(wide), axis, keepdims=True))
  return (wide / (rms + eps)).astype(x.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
  """SiLU over its root mean square under a standard normal (Eq. 81)."""
  return nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
  """Returns (1 - t) a + t b at the magnitude of uncorrelated a and b (Eq. 88)."""
  return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
  """Concatenates a and b on the last axis, with contributions in the ratio 1 - t to t (Eq. 103)."""
  na, nb = a.shape[-1], b.shape[-1]
  scale = math.sqrt(na + nb) / math.hypot(1 - t, t)
  return jnp.concatenate([a * (scale * (1 - t) / math.sqrt(na)), b * (scale * t / math.sqrt(nb))], axis=-1)


def normalize_weights(params: Any) -> Any:
  """Forced weight normalisation: every filter of every MPConv to root mean square 1; other leaves stay.

  Without it the kernels grow, which does not change the forward pass, and the effective learning rate decays.

  References:
    EDM2, Sec. 2.3, Eq. 66.
  """

  def project(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    if getattr(path[-1], "key", None) != _KERNEL:
      return leaf
    return normalize(leaf, tuple(range(leaf.ndim - 1)))

  return jax.tree_util.tree_map_with_path(project, params)


class MPConv(nn.Module):
  """Magnitude-preserving linear map without a bias (Eq. 47): the last axis, or a size x size convolution.

  Attributes:
    features: channels of the output.
    size: side of the filters on x (B, H, W, C); 1 acts on the last axis of any x.
    dtype: compute dtype.
    gain: whether a learned scalar, zero at the start, multiplies the output.
  """

  features: int
  size: int = 1
  dtype: Dtype = jnp.float32
  gain: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., C) to (..., features) in `dtype`."""
    shape = (self.size,) * (2 if self.size > 1 else 0) + (x.shape[-1], self.features)
    kernel = self.param(_KERNEL, nn.initializers.normal(1.0), shape, jnp.float32)
    kernel = normalize(kernel.astype(accumulation_dtype(self.dtype)), tuple(range(len(shape) - 1)))
    kernel = kernel / math.sqrt(math.prod(shape[:-1]))
    if self.gain:
      kernel = kernel * self.param("gain", nn.initializers.zeros, (), jnp.float32)
    x, kernel = x.astype(self.dtype), gather(kernel.astype(self.dtype), *(None,) * (len(shape) - 1), "fsdp")
    if self.size == 1:
      return x @ kernel
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class MPFourier(nn.Module):
  """Random Fourier features of u (B,): (B, width), unit magnitude (Eq. 75).

  Frequencies and phases are constants; they are parameters without a gradient, so that a checkpoint holds them.
  """

  width: int

  @nn.compact
  def __call__(self, u: jax.Array) -> jax.Array:
    freqs = self.param("freqs", nn.initializers.normal(2 * math.pi), (self.width,), jnp.float32)
    phases = self.param("phases", nn.initializers.uniform(2 * math.pi), (self.width,), jnp.float32)
    freqs, phases = jax.lax.stop_gradient((freqs.astype(u.dtype), phases.astype(u.dtype)))
    return math.sqrt(2) * jnp.cos(u[:, None] * freqs[None] + phases[None])


class Block(nn.Module):
  """One block of the encoder or the decoder (Fig. 21): resampling, residual branch, attention.

  Attributes:
    features: channels of the output.
    decoder: whether it is a decoder's, which widens after its residual branch and has no pixel norm.
    resample: "keep", "down" (mean of 2 x 2) or "up" (nearest neighbour).
    num_heads: of the attention; 0 for none.
    dtype: compute dtype.
    attention: implementation name.
  """

  features: int
  decoder: bool
  resample: str
  num_heads: int
  dtype: Dtype
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) and condition (B, E) = mp_silu(embedding) to (B, H', W', features)."""
    if self.resample == "down":
      x = reduce(x, "b (h i) (w j) c -> b h w c", "mean", i=2, j=2)
    elif self.resample == "up":
      x = repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
    match_width = lambda x: x if x.shape[-1] == self.features else self._conv("conv_skip")(x)
    if not self.decoder:
      x = normalize(match_width(x), axis=-1)

    y = self._conv("conv_res0", 3)(mp_silu(x))
    # This is float32, because the derivative in time passes through here alone.
    scale = 1 + MPConv(self.features, dtype=condition.dtype, gain=True, name="emb_linear")(condition)
    y = self._conv("conv_res1", 3)(mp_silu(y * scale[:, None, None, :].astype(y.dtype)))
    x = mp_sum(match_width(x), y, RESIDUAL_BALANCE)
    if self.num_heads:
      x = mp_sum(x, self._attend(x), RESIDUAL_BALANCE)
    return jnp.clip(x, -CLIP, CLIP)

  def _conv(self, name: str, size: int = 1, features: int | None = None) -> MPConv:
    return MPConv(features or self.features, size, self.dtype, name=name)

  def _attend(self, x: jax.Array) -> jax.Array:
    """Cosine attention: queries, keys and values have unit magnitude in every head."""
    qkv = self._conv("attn_qkv", features=3 * self.features)(x)
    # The release orders channels by head, then by a head's channel, then by q, k, v.
    qkv = normalize(qkv.reshape(x.shape[0], -1, self.num_heads, self.features // self.num_heads, 3), axis=3)
    q, k, v = (qkv[..., i] for i in range(3))
    return self._conv("attn_proj")(attention(q, k, v, implementation=self.attention).reshape(x.shape))


class EDM2UNet(nn.Module):
  """EDM2's U-Net: `apply({"params": p}, x, t, cond, s, guidance)` -> velocity.

  `s` and `guidance` have branches of their own, whose parameters exist only if `init` was given them. Both start at
  gain zero: with a teacher's other parameters the network is the teacher for every s and guidance. Training on data
  fills in `channels` and `num_classes`.

  Attributes:
    channels: C of the data.
    num_classes: number of classes without the null class, which is index `num_classes`; 0 ignores `cond`.
    model_channels: channels at factor 1, see `EDM2_SIZES`.
    channel_mult: factor on the channels of each level; a level has half the resolution of the one before.
    num_blocks: blocks of a level in the encoder; the decoder has one more.
    attn_levels: levels with attention; EDM2's are those of 16 and 8 pixels, (2, 3) for inputs of 64.
    channels_per_head: of the attention.
    time_embedding: "positional" (sinusoids of time_scale * t: slow, for derivatives in t) or "fourier" (EDM2's, of
      time_scale * c_noise, c_noise = log(sigma) / 4, sigma = t / (1 - t): for released checkpoints).
    time_scale: factor on the time before its features.
    dtype: compute dtype. Parameters, the embedding, norms and outputs stay float32 (or wider).
    remat: "none" or "full" (the backward pass keeps only each block's input).
    attention: implementation name, see `pflow_jax.networks.attention`.
  """

  channels: int = 0
  num_classes: int = 0
  model_channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = 3
  attn_levels: tuple[int, ...] = (2, 3)
  channels_per_head: int = 64
  time_embedding: str = "positional"
  time_scale: float = 1.0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention: str = "xla"

  def _check(self, x: jax.Array, **per_example: jax.Array | None) -> None:
    """Raises ValueError for attributes or inputs that do not fit."""
    if self.time_embedding not in ("positional", "fourier"):
      raise ValueError(f'time_embedding: expected "positional" or "fourier", got {self.time_embedding!r}')
    if self.remat not in ("none", "full"):
      raise ValueError(f'remat: expected "none" or "full", got {self.remat!r}')
    if self.model_channels % 2:
      raise ValueError(f"model_channels: expected an even number, got {self.model_channels}")
    levels = len(self.channel_mult)
    if not set(self.attn_levels) <= set(range(levels)):
      raise ValueError(f"attn_levels: expected levels in 0 .. {levels - 1}, one a channel_mult, got {self.attn_levels}")
    for level in {*self.attn_levels, levels - 1}:
      width = self.model_channels * self.channel_mult[level]
      if width % self.channels_per_head:
        raise ValueError(
          f"level {level}: expected a multiple of channels_per_head {self.channels_per_head}, got {width}"
        )
    if x.ndim != 4 or x.shape[-1] != self.channels:
      raise ValueError(f"x: expected shape (B, H, W, {self.channels}), got {x.shape}")
    factor = 2 ** (levels - 1)
    if any(size % factor for size in x.shape[1:3]):
      raise ValueError(
        f"input size {x.shape[1:3]}: expected multiples of {factor} for {levels} levels; "
        "crop or pad the data, or shorten channel_mult"
      )
    for name, value in per_example.items():
      if value is not None and value.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected shape (B,) = {x.shape[:1]}, got {value.shape}")

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    cond: jax.Array,
    s: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> Any:
    """Returns the velocity at state `x`.

    Args:
      x: (B, H, W, C) of about unit variance; H and W are multiples of 2^(levels - 1).
      t: flow time in [0, 1], (B,); 1 is noise.
      cond: int32 labels, (B,).
      s: flow time where the flow map ends, s <= t, (B,).
      guidance: strength, (B,).

    Returns:
      (B, H, W, C), float32 (or wider).

    Raises:
      ValueError: sizes do not fit.
    """
    self._check(x, t=t, cond=cond, s=s, guidance=guidance)
    dtype, wide = jnp.dtype(self.dtype), accumulation_dtype(self.dtype)
    embedding = self._embed(t, cond, s, guidance)
    condition = mp_silu(embedding)
    block: Any = nn.remat(Block) if self.remat == "full" else Block
    widths = [self.model_channels * mult for mult in self.channel_mult]
    last = len(widths) - 1

    def run(h: jax.Array, name: str, width: int, resample: str = "keep", attend: bool = False) -> jax.Array:
      heads = width // self.channels_per_head if attend else 0
      return block(width, name.startswith("dec"), resample, heads, dtype, self.attention, name=name)(h, condition)

    # The channel of ones takes the place of biases.
    h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    h = MPConv(widths[0], 3, dtype, name="enc0_conv")(h)
    skips = [h]
    for level, width in enumerate(widths):
      if level:
        h = run(h, f"enc{level}_down", widths[level - 1], "down")
        skips.append(h)
      for i in range(self.num_blocks):
        h = run(h, f"enc{level}_block{i}", width, attend=level in self.attn_levels)
        skips.append(h)

    h = run(h, f"dec{last}_in0", widths[last], attend=True)
    h = run(h, f"dec{last}_in1", widths[last])
    for level, width in reversed(list(enumerate(widths))):
      if level < last:
        h = run(h, f"dec{level}_up", widths[level + 1], "up")
      for i in range(self.num_blocks + 1):
        h = mp_cat(h, skips.pop(), CONCAT_BALANCE)
        h = run(h, f"dec{level}_block{i}", width, attend=level in self.attn_levels)

    return MPConv(self.channels, 3, wide, gain=True, name="out_conv")(h.astype(wide))

  def _embed(self, t: jax.Array, cond: jax.Array, s: jax.Array | None, guidance: jax.Array | None) -> jax.Array:
    """Conditioning embedding before its SiLU: (B, E), float32 (or wider)."""
    wide = accumulation_dtype(self.dtype)
    t = t.astype(wide)

    def embed(features: jax.Array, name: str, gain: bool = False) -> jax.Array:
      width = self.model_channels * max(self.channel_mult)
      return MPConv(width, dtype=wide, gain=gain, name=name)(features)

    def positional(u: jax.Array) -> jax.Array:
      return math.sqrt(2) * sinusoid(u, self.model_channels)

    if self.time_embedding == "positional":
      features = positional(self.time_scale * t)
    else:
      clipped = jnp.clip(t, MIN_TIME, 1 - MIN_TIME)
      features = MPFourier(self.model_channels, name="fourier")(self.time_scale * jax.scipy.special.logit(clipped) / 4)
    embedding = embed(features, "time_embed")
    if self.num_classes:
      labels = math.sqrt(self.num_classes) * jax.nn.one_hot(cond, self.num_classes, dtype=wide)
      embedding = mp_sum(embedding, embed(labels, "class_embed"), LABEL_BALANCE)
    if s is not None:
      embedding = embedding + embed(positional(self.time_scale * (t - s.astype(wide))), "length_embed", gain=True)
    if guidance is not None:
      embedding = embedding + embed(positional(guidance.astype(wide)), "guidance_embed", gain=True)
    return embedding
