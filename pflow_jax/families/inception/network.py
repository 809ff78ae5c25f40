"""Inception-v3 as TensorFlow published it on 2015-12-05, with that version's resizing of pictures.

It differs from the Inception-v3 of other libraries: an average at a border counts the pixels that are there, the last
block takes a maximum where all others take an average, and there are 1008 classes. Batch norms are parts of the
convolutions before them: their moments are fixed.

References:
  Szegedy et al., arXiv:1512.00567.
  The graph in http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz.
  pytorch_fid/inception.py of github mseitzer/pytorch-fid, which names the differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

SIDE = 299  # pixels of the pictures that the network sees
WIDTHS = (64, 192, 768, 2048)  # of the features that are pooled: after both maxima, of mixed_7, and of the last block
WIDTH, CLASSES = WIDTHS[-1], 1008  # of the published features, and of the logits
SPATIAL = 7  # channels of the features that keep their places


class Outputs(NamedTuple):
  """Features of n pictures, float32.

  Attributes:
    pool: (n, width), the mean over the picture of a layer's output; of 2048, pool_3 in the graph.
    spatial: (n, 2023), the first 7 channels of mixed_6/conv in the graph, after its ReLU, at 17 x 17 places in reading
      order, the channels of a place together: the order of ADM's evaluator, which sFID's references have. None where
      the network ends before.
    logits: (n, 1008), without the bias of their layer, as the Inception score takes them; None where it ends before.
  """

  pool: jax.Array
  spatial: jax.Array | None
  logits: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution without a bias, its batch norm and ReLU.

  Attributes:
    name: in the graph, with "_" for "/".
    features: channels that it makes.
    size: of the kernel, height and width.
    stride: in both directions.
    padding: "SAME" or "VALID".
  """

  name: str
  features: int
  size: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


Pool = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Fork:
  """Branches from one input, whose outputs are joined along the channels in order.

  Attributes:
    branches: layers of each, one after the other.
    name: of a block in the graph; "" within one.
  """

  branches: tuple[tuple[Conv | Pool | Fork, ...], ...]
  name: str = ""


Layers = Sequence[Conv | Pool | Fork]
Kernel = tuple[int, int, int, int]


def average(x: jax.Array) -> jax.Array:
  """Averages the 3 x 3 pixels around each that are in the picture; x (n, h, w, c)."""
  over = lambda size: 3 - (np.arange(size) == 0) - (np.arange(size) == size - 1)
  count = np.outer(over(x.shape[1]), over(x.shape[2])).astype(x.dtype)
  window = (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
  return jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, *window) / count[None, :, :, None]


def largest(x: jax.Array) -> jax.Array:
  """Takes the largest of the 3 x 3 pixels around each; x (n, h, w, c)."""
  return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def halved(x: jax.Array) -> jax.Array:
  """Takes the largest of 3 x 3 pixels at every second place; x (n, h, w, c) -> (n, (h - 1) // 2, (w - 1) // 2, c)."""
  return nn.max_pool(x, (3, 3), (2, 2), "VALID")


_THREE = (3, 3)
_ROW, _COLUMN = (1, 7), (7, 1)


def _a(name: str, width: int) -> Fork:
  return Fork(
    (
      (Conv("conv", 64),),
      (Conv("tower_conv", 48), Conv("tower_conv_1", 64, (5, 5))),
      (Conv("tower_1_conv", 64), Conv("tower_1_conv_1", 96, _THREE), Conv("tower_1_conv_2", 96, _THREE)),
      (average, Conv("tower_2_conv", width)),
    ),
    name,
  )


def _b(name: str) -> Fork:
  last = Conv("tower_conv_2", 96, _THREE, 2, "VALID")
  return Fork(
    (
      (Conv("conv", 384, _THREE, 2, "VALID"),),
      (Conv("tower_conv", 64), Conv("tower_conv_1", 96, _THREE), last),
      (halved,),
    ),
    name,
  )


def _c(name: str, width: int) -> Fork:
  return Fork(
    (
      (Conv("conv", 192),),
      (Conv("tower_conv", width), Conv("tower_conv_1", width, _ROW), Conv("tower_conv_2", 192, _COLUMN)),
      (
        Conv("tower_1_conv", width),
        Conv("tower_1_conv_1", width, _COLUMN),
        Conv("tower_1_conv_2", width, _ROW),
        Conv("tower_1_conv_3", width, _COLUMN),
        Conv("tower_1_conv_4", 192, _ROW),
      ),
      (average, Conv("tower_2_conv", 192)),
    ),
    name,
  )


def _d(name: str) -> Fork:
  return Fork(
    (
      (Conv("tower_conv", 192), Conv("tower_conv_1", 320, _THREE, 2, "VALID")),
      (
        Conv("tower_1_conv", 192),
        Conv("tower_1_conv_1", 192, _ROW),
        Conv("tower_1_conv_2", 192, _COLUMN),
        Conv("tower_1_conv_3", 192, _THREE, 2, "VALID"),
      ),
      (halved,),
    ),
    name,
  )


def _e(name: str, pool: Pool) -> Fork:
  def split(stem: str) -> Fork:
    return Fork(((Conv(f"{stem}_mixed_conv", 384, (1, 3)),), (Conv(f"{stem}_mixed_conv_1", 384, (3, 1)),)))

  return Fork(
    (
      (Conv("conv", 320),),
      (Conv("tower_conv", 384), split("tower")),
      (Conv("tower_1_conv", 448), Conv("tower_1_conv_1", 384, _THREE), split("tower_1")),
      (pool, Conv("tower_2_conv", 192)),
    ),
    name,
  )


GRAPH: Layers = (
  Conv("conv", 32, _THREE, 2, "VALID"),
  Conv("conv_1", 32, _THREE, 1, "VALID"),
  Conv("conv_2", 64, _THREE),
  halved,
  Conv("conv_3", 80),
  Conv("conv_4", 192, _THREE, 1, "VALID"),
  halved,
  *(_a("mixed", 32), _a("mixed_1", 64), _a("mixed_2", 64)),
  _b("mixed_3"),
  *(_c("mixed_4", 128), _c("mixed_5", 160), _c("mixed_6", 160), _c("mixed_7", 192)),
  _d("mixed_8"),
  *(_e("mixed_9", average), _e("mixed_10", largest)),
)

# Layers up to the features of a width: the two maxima of the stem, the last block of 17 x 17 places, all.
_ENDS = dict(zip(WIDTHS, (4, 7, 15, len(GRAPH)), strict=True))


def kernel_shapes(layers: Layers = GRAPH, channels: int = 3, block: str = "") -> tuple[dict[str, Kernel], int]:
  """Returns the shapes (height, width, channels, features) of kernels by path, "mixed_6/tower_conv_1".

  Args:
    layers: one after the other.
    channels: of their input.
    block: that they are in, and "/".

  Returns:
    the shapes, and the channels of the output.
  """
  found: dict[str, Kernel] = {}
  for layer in layers:
    if isinstance(layer, Conv):
      found[block + layer.name] = (*layer.size, channels, layer.features)
      channels = layer.features
    elif isinstance(layer, Fork):
      own = f"{layer.name}/" if layer.name else block
      branches = [kernel_shapes(branch, channels, own) for branch in layer.branches]
      for shapes, _ in branches:
        found |= shapes
      channels = sum(outputs for _, outputs in branches)
  return found, channels


class Inception(nn.Module):
  """Maps pictures as `resized` makes them to features, in float32.

  Attributes:
    width: of the pooled features, one of WIDTHS: the network ends where it has so many. Few samples have moments of few
      features alone; pytorch-fid calls them its dims.
    precision: of products. By default they are computed in float32 everywhere. In bfloat16, a TPU's own way, features
      are not those that references were made with.
  """

  width: int = WIDTH
  precision: jax.lax.Precision = jax.lax.Precision.HIGHEST

  @nn.compact
  def __call__(self, x: jax.Array) -> Outputs:
    """Maps x (n, 299, 299, 3)."""
    spatial, logits = None, None
    for layer in GRAPH[: _ENDS[self.width]]:
      x = _apply(layer, x, self.precision)
      if isinstance(layer, Fork) and layer.name == "mixed_6":
        spatial = rearrange(x[..., :SPATIAL], "n h w c -> n (h w c)")  # its branch "conv" comes first
    pool = x.mean(axis=(1, 2))
    if self.width == WIDTH:
      logits = nn.Dense(CLASSES, use_bias=False, dtype=jnp.float32, precision=self.precision, name="output")(pool)
    return Outputs(pool, spatial, logits)


class _Block(nn.Module):
  fork: Fork
  precision: jax.lax.Precision

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _joined(self.fork, x, self.precision)


def _apply(layer: Conv | Pool | Fork, x: jax.Array, precision: jax.lax.Precision) -> jax.Array:
  """Applies a layer inside of a module's compact method."""
  if isinstance(layer, Conv):
    conv = nn.Conv(
      *(layer.features, layer.size, layer.stride, layer.padding),
      dtype=jnp.float32,
      precision=precision,
      name=layer.name,
    )
    return nn.relu(conv(x))
  if isinstance(layer, Fork):
    return _Block(layer, precision, name=layer.name)(x) if layer.name else _joined(layer, x, precision)
  return layer(x)


def _joined(fork: Fork, x: jax.Array, precision: jax.lax.Precision) -> jax.Array:
  outputs = []
  for branch in fork.branches:
    y = x
    for layer in branch:
      y = _apply(layer, y, precision)
    outputs.append(y)
  return jnp.concatenate(outputs, axis=-1)


def resized(pictures: jax.Array) -> jax.Array:
  """Scales pictures as the graph does: bilinear, without antialiasing, pixel i of 299 at i * size / 299.

  Args:
    pictures: (n, H, W, 3), uint8.

  Returns:
    (n, 299, 299, 3) in [-1, 1), float32.

  References:
    ResizeBilinear of TensorFlow 1 with align_corners=False.
  """
  x = pictures.astype(jnp.float32)
  for axis in (1, 2):
    weights, exact = _bilinear(x.shape[axis]), jax.lax.Precision.HIGHEST
    x = jnp.moveaxis(jnp.tensordot(x, weights, ((axis,), (1,)), precision=exact), -1, axis)
  return (x - 128) / 128


def _bilinear(size: int) -> np.ndarray:
  """Returns the weights (299, size) of pixels in a row, in float32 as TensorFlow computes them."""
  at = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
  low = at.astype(np.int32)
  share = at - low.astype(np.float32)
  weights = np.zeros((SIDE, size), np.float32)
  rows = np.arange(SIDE)
  np.add.at(weights, (rows, low), 1 - share)
  np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), share)
  return weights
