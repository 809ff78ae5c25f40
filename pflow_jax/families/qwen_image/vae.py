"""Qwen-Image's autoencoder, a network for videos of which an image is the first frame.

Its convolutions are causal in time. At the first frame all before it is zero, so that only the last slice in time of
a kernel acts, and the layers that change the frame rate let the frame pass. The parameters are the video network's,
for a conversion back to lose nothing; the computation is that of an image.

References:
  Qwen-Image, arXiv:2508.02324; Wan, arXiv:2503.20314; the released AutoencoderKLQwenImage of diffusers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.networks import vae
from pflow_jax.networks.layers import Dtype, accumulation_dtype

SHARDING = vae.SHARDING


class CausalConv(nn.Module):
  """The last slice in time of a causal convolution: zeros beyond the border, one frame.

  Attributes:
    size: of the filters along time, height and width.
  """

  features: int
  size: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x (B, H, W, C) -> (B, H, W, features)."""
    kernel, bias = _kernel_and_bias(self, (self.size,) * 3, x.shape[-1], self.features)
    x, kernel = x.astype(self.dtype), kernel[-1].astype(self.dtype)
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + bias.astype(x.dtype).reshape(1, 1, 1, -1)


class TimeConv(nn.Module):
  """The parameters of a convolution in time, which no image meets."""

  width: int
  features: int

  @nn.compact
  def __call__(self) -> None:
    _kernel_and_bias(self, (3, 1, 1), self.width, self.features)


def _kernel_and_bias(module: nn.Module, size: tuple[int, ...], width: int, features: int) -> tuple[Any, Any]:
  kernel = module.param("kernel", nn.initializers.lecun_normal(), (*size, width, features), jnp.float32)
  return kernel, module.param("bias", nn.initializers.zeros, (features,), jnp.float32)


class PixelNorm(nn.Module):
  """x (..., C) at the length sqrt(C) along the last axis, times a learned scale; float32 or wider."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(accumulation_dtype(self.dtype))
    length2 = jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24)
    return x * (jax.lax.rsqrt(length2) * math.sqrt(x.shape[-1])) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


@dataclasses.dataclass(frozen=True)
class CausalLayers(vae.Layers):
  """The layers of Qwen-Image's autoencoder.

  Attributes:
    temporal: whether the frame rate changes with the resolution, for each change of it, in the order of computation.
  """

  temporal: tuple[bool, ...] = ()

  def norm(self, name: str) -> nn.Module:
    return PixelNorm(self.dtype, name=name)

  def conv(self, features: int, size: int, name: str) -> nn.Module:
    return CausalConv(features, size, self.dtype, name=name)

  def resample(self, x: jax.Array, kind: str, level: int) -> jax.Array:
    width = x.shape[-1]
    if self.temporal[level]:
      TimeConv(width, 2 * width if kind == "up" else width, name="time_conv")()
    return vae.resampled(x, width // 2 if kind == "up" else width, kind, self.dtype)


class QwenVAE(vae.Autoencoder):
  """Autoencoder of Qwen-Image for single images; defaults are the released sizes.

  Methods, with `apply({"params": p}, ..., method=...)`: "encode", "decode" and "moments".

  Attributes:
    channels: of images.
    latent_channels: of latents.
    width: of the finest level.
    width_mult: factors of `width`, one a level, the finest first.
    depth: blocks of an encoder's level; a decoder's has one more.
    temporal: whether the encoder halves the frame rate too, for each of its changes of resolution.
    latent_mean: in z = (latent - mean) / std, one a channel.
    latent_std: likewise.
    dtype: compute dtype. Parameters, norms and outputs stay float32.
  """

  channels: int = 3
  latent_channels: int = 16
  width: int = 96
  width_mult: tuple[int, ...] = (1, 2, 4, 4)
  depth: int = 2
  temporal: tuple[bool, ...] = (False, True, True)
  latent_mean: tuple[float, ...] = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
  )
  latent_std: tuple[float, ...] = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
  )
  dtype: Dtype = jnp.float32

  @property
  def down_factor(self) -> int:
    return 2 ** (len(self.width_mult) - 1)

  def setup(self) -> None:
    self._check()
    dtype = jnp.dtype(self.dtype)
    widths, latent = tuple(self.width * m for m in self.width_mult), self.latent_channels
    size = (widths, self.depth, True)
    self.encoder = vae.Encoder(2 * latent, self.width, *size, CausalLayers(dtype, temporal=self.temporal))
    self.decoder = vae.Decoder(self.channels, *size, CausalLayers(dtype, temporal=self.temporal[::-1]))
    self.quant_conv = CausalConv(2 * latent, dtype=dtype)
    self.post_quant_conv = CausalConv(latent, dtype=dtype)

  def _check(self) -> None:
    """Raises ValueError for attributes that do not fit together."""
    if len(self.temporal) != len(self.width_mult) - 1:
      raise ValueError(
        f"temporal: expected one entry for each change of resolution, {len(self.width_mult) - 1} of them, got "
        f"{self.temporal}"
      )
    for name in ("latent_mean", "latent_std"):
      if len(getattr(self, name)) != self.latent_channels:
        raise ValueError(
          f"{name}: expected one number for each of latent_channels {self.latent_channels}, got {getattr(self, name)}"
        )

  def normalisation(self) -> tuple[Any, Any]:
    wide = accumulation_dtype(self.dtype)
    mean, std = (jnp.asarray(values, wide).reshape(1, 1, 1, -1) for values in (self.latent_mean, self.latent_std))
    return mean, 1 / std

  def decode(self, z: jax.Array) -> jax.Array:
    """Images of latents z (B, h, w, latent_channels): (B, H, W, channels), clipped to [-1, 1]; float32.

    Raises:
      ValueError: z has another shape.
    """
    return jnp.clip(super().decode(z), -1.0, 1.0)
