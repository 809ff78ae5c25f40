"""Discriminators for adversarial finetuning: StyleGAN2's residual one for images, an MLP for points.

Layers have StyleGAN2's equalised learning rate: unit-normal kernels, scaled by 1/sqrt(fan-in) at run time, so that one
rate suits them all. No layer has a custom derivative: gradient penalties differentiate twice.

References:
  StyleGAN2, arXiv:1912.04958.
  Projection onto the class, arXiv:1802.05637.
  Minibatch standard deviation, arXiv:1710.10196.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.networks.layers import Dtype, accumulation_dtype

_normal = nn.initializers.normal(1.0)

# Placement of the parameters on a mesh, as part of a training state; see `mesh.sharding.Layout`.
SHARDING = (("opponent/(params|opt_state)/.*/kernel", (None, "fsdp")),)


def blur(x: jax.Array, stride: int, padding: int) -> jax.Array:
  """Low-pass filter [1, 3, 3, 1] / 8 along H and W of x (B, H, W, C), padded with zeros on every side.

  Sizes become (size + 2 padding - 4) // stride + 1.
  """
  x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  for axis in (1, 2):
    end = x.shape[axis] - 3
    a, b, c, d = (jax.lax.slice_in_dim(x, i, end + i, stride, axis) for i in range(4))
    x = (a + 3 * (b + c) + d) / 8
  return x


def minibatch_std(x: jax.Array, group_size: int) -> jax.Array:
  """Adds a channel to x (B, H, W, C): the standard deviation within the example's group, averaged over H, W, C.

  Groups are consecutive examples, of the largest divisor of B up to `group_size`: a batch that is sharded over devices
  in multiples of that needs no communication, and the result never depends on the devices.
  """
  batch = x.shape[0]
  size = next(g for g in range(group_size, 0, -1) if batch % g == 0)
  groups = x.reshape(-1, size, *x.shape[1:])
  # The root's slope stays finite in a group of equal examples.
  std = jnp.sqrt(jnp.var(groups, axis=1, keepdims=True) + 1e-8)
  std = jnp.broadcast_to(jnp.mean(std, axis=(2, 3, 4), keepdims=True), (*groups.shape[:-1], 1))
  return jnp.concatenate([x, std.reshape(*x.shape[:-1], 1)], axis=-1)


def _act(x: jax.Array) -> jax.Array:
  """Leaky ReLU that keeps the second moment of a unit normal, nearly."""
  return math.sqrt(2) * nn.leaky_relu(x, 0.2)


# A linear layer of the scaled input is the layer with the scaled kernel: Flax's own layers serve.


def _dense(x: jax.Array, features: int, dtype: Dtype, name: str) -> jax.Array:
  return nn.Dense(features, dtype=dtype, kernel_init=_normal, name=name)(x / math.sqrt(x.shape[-1]))


def _conv(x: jax.Array, features: int, side: int, dtype: Dtype, name: str, **options: Any) -> jax.Array:
  layer = nn.Conv(features, (side, side), dtype=dtype, kernel_init=_normal, name=name, **options)
  return layer(x / (side * math.sqrt(x.shape[-1])))


class DiscriminatorBlock(nn.Module):
  """Residual block that halves H and W: x (B, H, W, C) -> (B, H/2, W/2, features)."""

  features: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = _act(_conv(x, x.shape[-1], 3, self.dtype, "conv_0"))
    h = _conv(blur(h, 1, 2), self.features, 3, self.dtype, "conv_1", strides=2, padding="VALID")
    skip = _conv(blur(x, 2, 1), self.features, 1, self.dtype, "skip", use_bias=False)
    return (_act(h) + skip) * math.sqrt(0.5)


class ProjectionLogit(nn.Module):
  """Logit of features h (B, D) and labels cond (B,): a dense layer plus the projection onto the class, (B,)."""

  num_classes: int

  @nn.compact
  def __call__(self, h: jax.Array, cond: jax.Array) -> jax.Array:
    table = nn.Embed(self.num_classes + 1, h.shape[-1], dtype=h.dtype, embedding_init=_normal, name="class_embed")
    projection = jnp.sum(h * table(cond), axis=-1) / math.sqrt(h.shape[-1])
    return (_dense(h, 1, h.dtype, "out")[:, 0] + projection) * math.sqrt(0.5)


class Discriminator(nn.Module):
  """StyleGAN2's residual discriminator: `apply({"params": p}, x, cond)` -> logits (B,), float32.

  Attributes:
    shape: (H, W, C) of an image, H = W = 4 * 2^k.
    num_classes: rows of the class table without the null class, which is index `num_classes`.
    width: channels at the full resolution; they double with every halving of it, up to `max_width`. StyleGAN2 has
      32768 / H, up to 512.
    max_width: upper bound of the channels.
    group_size: examples that share a minibatch standard deviation, see `minibatch_std`; 1 keeps examples apart.
    dtype: compute dtype down to 4 x 4. Parameters and the later layers stay float32.

  Raises:
    ValueError: the shape cannot be halved down to 4 x 4.
  """

  shape: tuple[int, int, int]
  num_classes: int
  width: int = 64
  max_width: int = 512
  group_size: int = 4
  dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    height, width, _ = self.shape
    if height != width or height < 4 or height & (height - 1):
      raise ValueError(
        f"shape: expected (H, W, C) with H = W = 4, 8, 16, 32, ..., got {tuple(self.shape)}; crop, pad or resize "
        "the data"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
    """Maps x (B, H, W, C) and cond (B,), int32 labels, to logits (B,)."""
    _check_input(x, self.shape)
    dtype, wide = jnp.dtype(self.dtype), accumulation_dtype(self.dtype)
    halvings = int(math.log2(self.shape[0] // 4))
    widths = [min(self.width * 2**i, self.max_width) for i in range(halvings + 1)]
    h = _act(_conv(x.astype(dtype), widths[0], 1, dtype, "from_input"))
    for i, features in enumerate(widths[1:]):
      h = DiscriminatorBlock(features, dtype, name=f"block_{i}")(h)
    h = minibatch_std(h.astype(wide), self.group_size)
    h = _act(_conv(h, widths[-1], 3, wide, "conv"))
    h = _act(_dense(h.reshape(h.shape[0], -1), widths[-1], wide, "dense"))
    return ProjectionLogit(self.num_classes, name="logit")(h, cond)


class PointDiscriminator(nn.Module):
  """MLP with the image discriminator's layers: `apply({"params": p}, x, cond)` -> logits (B,), float32.

  Each point is judged alone.

  Attributes:
    shape: (C,) of a point.
    num_classes: as for `Discriminator`.
    width: features of the hidden layers.
    depth: hidden layers.
    dtype: as for `Discriminator`.
  """

  shape: tuple[int]
  num_classes: int
  width: int = 64
  depth: int = 3
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
    """Maps x (B, C) and cond (B,), int32 labels, to logits (B,)."""
    _check_input(x, self.shape)
    h = x.astype(self.dtype)
    for i in range(self.depth):
      h = _act(_dense(h, self.width, self.dtype, f"dense_{i}"))
    return ProjectionLogit(self.num_classes, name="logit")(h.astype(accumulation_dtype(self.dtype)), cond)


def _check_input(x: jax.Array, shape: tuple[int, ...]) -> None:
  if x.shape[1:] != tuple(shape):
    raise ValueError(f"x: expected shape (B, {', '.join(map(str, shape))}), the discriminator's, got {x.shape}")


def make_discriminator(
  shape: tuple[int, ...],
  num_classes: int,
  *,
  width: int = 64,
  max_width: int = 512,
  dtype: Dtype = jnp.float32,
) -> Discriminator | PointDiscriminator:
  """Makes a discriminator for examples of `shape`: (H, W, C) images, or (C,) points, whose layers all have `width`.

  Raises:
    ValueError: the shape is another, see `Discriminator`.
  """
  shape = tuple(shape)
  if len(shape) == 3:
    return Discriminator(shape, num_classes, width, max_width, dtype=dtype)
  if len(shape) == 1:
    return PointDiscriminator(shape, num_classes, width, dtype=dtype)
  raise ValueError(f"shape: expected (H, W, C) of an image or (C,) of a point, got {shape}")
