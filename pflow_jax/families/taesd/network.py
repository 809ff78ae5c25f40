"""Tiny autoencoders: a few convolutions that imitate the autoencoder of a published model.

They decode a picture in milliseconds on a CPU, so that a run in latents shows pictures while it trains.

References:
  TAESD, https://github.com/madebyollin/taesd (MIT): taesd, taesdxl, taesd3, taef1, taef2, taesana.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn

from pflow_jax.networks.layers import Dtype, accumulation_dtype
from pflow_jax.networks.vae import Autoencoder

_GROUPS, _WIDER = 4, 4  # of the norm in a block, and of the channels that it normalises
_BOUND = 3.0  # latents beyond it are squashed before they are decoded


class TinyBlock(nn.Module):
  """Three convolutions with ReLU and a residual; with `pool`, a normalised 1 x 1 branch before them.

  Attributes:
    pool: whether the branch is there; its norm is over the whole picture.
    dtype: compute dtype.
  """

  pool: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to the same shape."""
    width = x.shape[-1]
    if self.pool:
      h = _conv(_WIDER * width, "pool_in", self.dtype, size=1, bias=False)(x)
      h = nn.GroupNorm(_GROUPS, epsilon=1e-5, dtype=accumulation_dtype(self.dtype), name="pool_norm")(h)
      x = x + _conv(width, "pool_out", self.dtype, size=1, bias=False)(nn.relu(h))
    h = nn.relu(_conv(width, "conv_0", self.dtype)(x))
    h = nn.relu(_conv(width, "conv_1", self.dtype)(h))
    return nn.relu(_conv(width, "conv_2", self.dtype)(h) + x)


class TinyEncoder(nn.Module):
  """Maps pictures in [0, 1] to latents.

  Attributes:
    features: channels of the latents.
    stem: channels of convolutions that halve the resolution before the first level; () is one that keeps it.
    widths: channels of each level, the finest first.
    depths: blocks of each level.
    pool: whether the blocks of the last level have a normalised branch.
    dtype: compute dtype.
  """

  features: int
  stem: tuple[int, ...]
  widths: tuple[int, ...]
  depths: tuple[int, ...]
  pool: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) to (B, h, w, features) in the compute dtype."""
    for i, width in enumerate(self.stem):
      x = nn.relu(_conv(width, f"stem_{i}", self.dtype, stride=2)(x))
    if not self.stem:
      x = _conv(self.widths[0], "conv_in", self.dtype)(x)
    last = len(self.widths) - 1
    for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
      if i:
        x = _conv(width, f"down_{i}", self.dtype, stride=2, bias=False)(x)
      for j in range(depth):
        x = TinyBlock(self.pool and i == last, self.dtype, name=f"level_{i}_block_{j}")(x)
    return _conv(self.features, "conv_out", self.dtype)(x)


class TinyDecoder(nn.Module):
  """Maps latents to pictures in about [0, 1].

  Attributes:
    features: channels of the pictures.
    widths: channels of each level, the coarsest first.
    depths: blocks of each level.
    pool: whether the blocks of the first level have a normalised branch.
    dtype: compute dtype.
  """

  features: int
  widths: tuple[int, ...]
  depths: tuple[int, ...]
  pool: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps z (B, h, w, C) to (B, H, W, features) in the compute dtype."""
    x = nn.relu(_conv(self.widths[0], "conv_in", self.dtype)(jnp.tanh(z / _BOUND) * _BOUND))
    for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
      if i:
        x = repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
        x = _conv(width, f"up_{i}", self.dtype, bias=False)(x)
      for j in range(depth):
        x = TinyBlock(self.pool and i == 0, self.dtype, name=f"level_{i}_block_{j}")(x)
    return _conv(self.features, "conv_out", self.dtype)(x)


class TinyAutoencoder(Autoencoder):
  """Tiny autoencoder; the defaults are those of Stable Diffusion's, taesd and taesdxl.

  `apply({"params": p}, ..., method=...)` has the methods "encode" and "decode". An encoder without a variance.

  Attributes:
    channels: of images.
    latent_channels: of latents.
    stem: channels of the encoder's first convolutions that halve the resolution.
    encoder_widths: channels of each level of the encoder, the finest first.
    encoder_depths: blocks of each of them.
    decoder_widths: channels of each level of the decoder, the coarsest first.
    decoder_depths: blocks of each of them.
    pool: whether the blocks at the coarsest level have a normalised branch, as FLUX.2's.
    scale: factor in z = (latent - shift) * scale.
    shift: offset in it.
    dtype: compute dtype. Parameters, norms and outputs stay float32.
  """

  has_variance: ClassVar[bool] = False  # its latents imitate those of another, already scaled

  channels: int = 3
  latent_channels: int = 4
  stem: tuple[int, ...] = ()
  encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
  encoder_depths: tuple[int, ...] = (1, 3, 3, 3)
  decoder_widths: tuple[int, ...] = (64, 64, 64, 64)
  decoder_depths: tuple[int, ...] = (3, 3, 3, 1)
  pool: bool = False
  scale: float = 1.0
  shift: float = 0.0
  dtype: Dtype = jnp.float32

  @property
  def down_factor(self) -> int:
    return 2 ** (len(self.stem) + len(self.encoder_widths) - 1)

  def setup(self) -> None:
    halved, doubled = len(self.stem) + len(self.encoder_widths), len(self.decoder_widths)
    if halved != doubled:
      raise ValueError(f"decoder_widths: expected {halved} levels, as many as the encoder has, got {doubled}")
    dtype = jnp.dtype(self.dtype)
    encoder = self.latent_channels, self.stem, self.encoder_widths, self.encoder_depths, self.pool, dtype
    self.encoder = TinyEncoder(*encoder)
    self.decoder = TinyDecoder(self.channels, self.decoder_widths, self.decoder_depths, self.pool, dtype)
    self.quant_conv = self.post_quant_conv = None

  def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    self.check_images(x)
    mean = self.encoder((x + 1) / 2).astype(accumulation_dtype(x.dtype))
    return mean, jnp.full_like(mean, -jnp.inf)

  def decode(self, z: jax.Array) -> jax.Array:
    return 2 * super().decode(z) - 1

  def normalisation(self) -> tuple[Any, Any]:
    return self.shift, self.scale


def _conv(features: int, name: str, dtype: Dtype, *, size: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv:
  pad = size // 2
  return nn.Conv(
    features, (size, size), stride, padding=((pad, pad), (pad, pad)), use_bias=bias, dtype=dtype, name=name
  )
