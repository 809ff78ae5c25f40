"""Autoencoders of latent diffusion models: Stable Diffusion's and FLUX's, and the parts that Qwen-Image's shares.

Images are (B, H, W, C) in [-1, 1]. Latents are (B, h, w, latent_channels) as a flow model takes them, shifted and
scaled to a variance of about one; h = H / down_factor. The networks run in their compute dtype, as in the releases;
norms, the softmax and outputs are float32.

References:
  Latent diffusion, arXiv:2112.10752; the released AutoencoderKL of diffusers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from pflow_jax.networks.attention import attention
from pflow_jax.networks.layers import Dtype, accumulation_dtype

# Autoencoders are small beside the flow models, so they are whole on every device, see `mesh.sharding.Layout`.
SHARDING = (("(encoder|decoder)/.*|(post_)?quant_conv/(kernel|bias)", ()),)

SCORES = 2**24  # attention scores of an image that are held at once: those of 64 x 64 tokens
LOGVAR_RANGE = (-30.0, 20.0)  # as in the release


@dataclasses.dataclass(frozen=True)
class Layers:
  """Layers of an encoder and a decoder, those of AutoencoderKL.

  Attributes:
    dtype: compute dtype of convolutions.
    groups: of the norms.
  """

  dtype: Dtype
  groups: int = 32

  def norm(self, name: str) -> nn.Module:
    """Returns a norm over x (B, H, W, C), float32 or wider."""
    # The fast variance, E[x^2] - E[x]^2, is too inexact: activations reach hundreds.
    wide = accumulation_dtype(self.dtype)
    return nn.GroupNorm(self.groups, epsilon=1e-6, dtype=wide, use_fast_variance=False, name=name)

  def conv(self, features: int, size: int, name: str) -> nn.Module:
    """Returns a convolution with square filters, zeros beyond the border."""
    return nn.Conv(features, (size, size), dtype=self.dtype, name=name)

  def resample(self, x: jax.Array, kind: str, level: int) -> jax.Array:
    """Halves ("down") or doubles ("up") the resolution, after level number `level`."""
    return resampled(x, x.shape[-1], kind, self.dtype)


def resampled(x: jax.Array, features: int, kind: str, dtype: Dtype) -> jax.Array:
  """Halves ("down") or doubles ("up") the resolution of x (B, H, W, C), by a convolution "resample" of `features`."""
  if kind == "up":
    x = repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
    return nn.Conv(features, (3, 3), dtype=dtype, name="resample")(x)
  # The release pads on one side.
  return nn.Conv(features, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=dtype, name="resample")(x)


class Block(nn.Module):
  """Norm, SiLU and 3 x 3 convolution, twice; a 1 x 1 convolution beside them where the width changes."""

  features: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to (B, H, W, features)."""
    h = x
    for i in (1, 2):
      h = nn.silu(self.layers.norm(f"norm{i}")(h))
      h = self.layers.conv(self.features, 3, f"conv{i}")(h)
    if x.shape[-1] != self.features:
      x = self.layers.conv(self.features, 1, "shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Self-attention of all pixels, with one head of all channels."""

  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to the same shape."""
    width, dtype = x.shape[-1], self.layers.dtype
    tokens = rearrange(self.layers.norm("norm")(x), "b h w c -> b (h w) c")
    qkv = nn.Dense(3 * width, dtype=dtype, name="qkv")(tokens)
    q, k, v = (part[:, :, None, :] for part in jnp.split(qkv, 3, axis=-1))
    h = attend(q, k, v)[:, :, 0, :]
    return x + nn.Dense(width, dtype=dtype, name="proj")(h).reshape(x.shape)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """`networks.attention.attention` of q, k, v (B, T, H, D) that never holds more than SCORES scores a head and example.

  For longer sequences the queries are taken in parts, one after the other, also in the backward pass.
  """
  tokens = q.shape[1]
  parts = -(-tokens * tokens // SCORES)
  if parts <= 1:
    return attention(q, k, v)
  q = jnp.pad(q, ((0, 0), (0, -tokens % parts), (0, 0), (0, 0)))
  q = rearrange(q, "b (n t) h d -> n b t h d", n=parts)
  h = jax.lax.map(jax.checkpoint(lambda part: attention(part, k, v)), q)
  return rearrange(h, "n b t h d -> b (n t) h d")[:, :tokens]


class Level(nn.Module):
  """The blocks of one resolution, and the resampling to the next ("down" or "up"), if there is one ("keep").

  Attributes:
    features: channels of the blocks.
    depth: number of blocks.
    resample: "down", "up" or "keep".
    index: of the level, in the order of computation.
    layers: makes the layers.
  """

  features: int
  depth: int
  resample: str
  index: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to (B, H', W', C')."""
    for j in range(self.depth):
      x = Block(self.features, self.layers, name=f"block_{j}")(x)
    return x if self.resample == "keep" else self.layers.resample(x, self.resample, self.index)


class Mid(nn.Module):
  """Block, optional attention, block."""

  attention: bool
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to the same shape."""
    x = Block(x.shape[-1], self.layers, name="block_0")(x)
    if self.attention:
      x = Attention(self.layers, name="attention")(x)
    return Block(x.shape[-1], self.layers, name="block_1")(x)


class Encoder(nn.Module):
  """Maps images to mean and log-variance side by side.

  Attributes:
    features: channels of the output.
    stem: channels of the first convolution.
    widths: channels of each level, the finest first.
    depth: blocks of a level.
    attention: whether there is attention in the middle.
    layers: makes the layers.
  """

  features: int
  stem: int
  widths: tuple[int, ...]
  depth: int
  attention: bool
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to (B, h, w, features) in the compute dtype."""
    x = self.layers.conv(self.stem, 3, "conv_in")(x)
    last = len(self.widths) - 1
    for i, width in enumerate(self.widths):
      x = Level(width, self.depth, "keep" if i == last else "down", i, self.layers, name=f"level_{i}")(x)
    x = Mid(self.attention, self.layers, name="mid")(x)
    return self.layers.conv(self.features, 3, "conv_out")(nn.silu(self.layers.norm("norm_out")(x)))


class Decoder(nn.Module):
  """Maps latents to images.

  Attributes:
    features: channels of the output.
    widths: channels of each level, the finest first, which is the last one here.
    depth: blocks of a level of the encoder; the decoder's have one more.
    attention: whether there is attention in the middle.
    layers: makes the layers.
  """

  features: int
  widths: tuple[int, ...]
  depth: int
  attention: bool
  layers: Layers

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps z (B, h, w, C) to (B, H, W, features) in the compute dtype."""
    x = self.layers.conv(self.widths[-1], 3, "conv_in")(z)
    x = Mid(self.attention, self.layers, name="mid")(x)
    last = len(self.widths) - 1
    for i, width in enumerate(reversed(self.widths)):
      x = Level(width, self.depth + 1, "keep" if i == last else "up", i, self.layers, name=f"level_{i}")(x)
    return self.layers.conv(self.features, 3, "conv_out")(nn.silu(self.layers.norm("norm_out")(x)))


class Autoencoder(nn.Module):
  """Base of the autoencoders; a subclass makes `encoder`, `decoder`, `quant_conv` and `post_quant_conv`.

  Attributes:
    has_variance: whether latents are distributions, with a shift and a scale of their own.
  """

  has_variance: ClassVar[bool] = True

  @property
  def down_factor(self) -> int:
    """Pixels of an image for a pixel of its latent, along each axis."""
    raise NotImplementedError

  def normalisation(self) -> tuple[Any, Any]:
    """Shift and scale of z = (latent - shift) * scale: numbers, or one for each channel."""
    raise NotImplementedError

  def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Encodes and decodes x; `init` makes the parameters of both."""
    return self.decode(self.encode(x, key))

  def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the latent, (B, h, w, latent_channels) each, before shift and scale; float32.

    Args:
      x: images (B, H, W, channels) in [-1, 1]; H and W are multiples of `down_factor`.

    Raises:
      ValueError: the shape is another.
    """
    self.check_images(x)
    h = self.encoder(x)
    h = (h if self.quant_conv is None else self.quant_conv(h)).astype(accumulation_dtype(h.dtype))
    mean, logvar = jnp.split(h, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def check_images(self, x: jax.Array) -> None:
    """Raises ValueError unless x is (B, H, W, channels) with H and W multiples of `down_factor`."""
    channels, factor = self.channels, self.down_factor  # type: ignore[attr-defined]
    if x.ndim != 4 or x.shape[-1] != channels or any(size % factor or size < 1 for size in x.shape[1:3]):
      raise ValueError(
        f"x: expected shape (B, H, W, {channels}) with H and W multiples of {factor}, got {x.shape}; crop or resize "
        "the images"
      )

  def encode(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Latents of images x, (B, h, w, latent_channels), shifted and scaled; float32. Errors are those of `moments`.

    Args:
      x: images, as for `moments`.
      key: to sample the latent; None takes its mean, which is its mode.
    """
    latent, logvar = self.moments(x)
    if key is not None:
      latent += jnp.exp(logvar / 2) * jax.random.normal(key, latent.shape, latent.dtype)
    shift, scale = self.normalisation()
    return (latent - shift) * scale

  def decode(self, z: jax.Array) -> jax.Array:
    """Images of latents z (B, h, w, latent_channels): (B, H, W, channels), about [-1, 1]; float32.

    Raises:
      ValueError: the shape is another.
    """
    channels = self.latent_channels  # type: ignore[attr-defined]
    if z.ndim != 4 or z.shape[-1] != channels or 0 in z.shape[1:3]:
      raise ValueError(f"z: expected latents of shape (B, h, w, {channels}), got {z.shape}")
    shift, scale = self.normalisation()
    latent = z.astype(accumulation_dtype(z.dtype)) / scale + shift
    x = self.decoder(latent if self.post_quant_conv is None else self.post_quant_conv(latent))
    return x.astype(accumulation_dtype(x.dtype))


class AutoencoderKL(Autoencoder):
  """Autoencoder of Stable Diffusion 1.x (defaults), 2, XL and 3, and of FLUX.1.

  `apply({"params": p}, ..., method=...)` has the methods "encode", "decode" and "moments".

  Attributes:
    channels: of images.
    latent_channels: of latents.
    widths: channels of each level, the finest first.
    depth: blocks of an encoder's level; a decoder's has one more.
    groups: of the group norms.
    mid_attention: whether encoder and decoder attend at the coarsest level.
    scale: factor in z = (latent - shift) * scale.
    shift: offset in it.
    use_quant_conv: whether a 1 x 1 convolution follows the encoder.
    use_post_quant_conv: whether a 1 x 1 convolution precedes the decoder.
    dtype: compute dtype. Parameters, norms and outputs stay float32.
  """

  channels: int = 3
  latent_channels: int = 4
  widths: tuple[int, ...] = (128, 256, 512, 512)
  depth: int = 2
  groups: int = 32
  mid_attention: bool = True
  scale: float = 0.18215
  shift: float = 0.0
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  dtype: Dtype = jnp.float32

  @property
  def down_factor(self) -> int:
    return 2 ** (len(self.widths) - 1)

  def setup(self) -> None:
    if not self.widths or any(width % self.groups for width in self.widths):
      raise ValueError(f"widths: expected multiples of groups {self.groups}, got {self.widths}")
    dtype = jnp.dtype(self.dtype)
    layers, latent = Layers(dtype, self.groups), self.latent_channels
    size = (self.widths, self.depth, self.mid_attention, layers)
    self.encoder = Encoder(2 * latent, self.widths[0], *size)
    self.decoder = Decoder(self.channels, *size)
    self.quant_conv = nn.Conv(2 * latent, (1, 1), dtype=dtype) if self.use_quant_conv else None
    self.post_quant_conv = nn.Conv(latent, (1, 1), dtype=dtype) if self.use_post_quant_conv else None

  def normalisation(self) -> tuple[Any, Any]:
    return self.shift, self.scale
