"""Published networks in whose features pictures are compared: Inception today, others by the same protocol.

Features of different networks, or of different weights, are never comparable. So a network has a name that tells its
weights too, and what is kept of features goes under that name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from pflow_jax.families.inception import network as inception
from pflow_jax.families.inception.files import digest_of, load_inception
from pflow_jax.mesh.sharding import Layout
from pflow_jax.training.sample import in_batches

PICTURES_A_DEVICE = 32  # at a time: in Inception they take a quarter of a gigabyte, more where channels are padded
PICTURES_AT_ONCE = 1024  # on all devices, which the host has in memory several times


class Features(NamedTuple):
  """Features of n pictures, float32.

  Attributes:
    pool: (n, F), one vector a picture, for Fréchet and kernel distances, precision and recall.
    spatial: (n, S), features that keep their places, for sFID; None where the network has none.
    logits: (n, classes), for the Inception score; None where the network has none.
  """

  pool: np.ndarray
  spatial: np.ndarray | None
  logits: np.ndarray | None


class FeatureNetwork(Protocol):
  """A network that makes features of pictures."""

  @property
  def name(self) -> str:
    """Name of the network, with a digest of its weights: equal names mean comparable features."""

  @property
  def num_features(self) -> int:
    """Width of `Features.pool`."""

  @property
  def num_spatial(self) -> int:
    """Width of `Features.spatial`; 0 where the network has none."""

  @property
  def num_logits(self) -> int:
    """Width of `Features.logits`; 0 where the network has none."""

  def __call__(self, pictures: np.ndarray) -> Features:
    """Returns the features of pictures (n, H, W, 3), uint8, of any size, which all processes have; n >= 1."""


@dataclasses.dataclass(frozen=True)
class JittedNetwork:
  """A `FeatureNetwork` of two compiled functions, on batches of one size that are split over a mesh.

  The network itself so compiles once; another size of pictures compiles the scaling alone.

  Attributes:
    name: see `FeatureNetwork`.
    num_features: see `FeatureNetwork`.
    scale: jitted, pictures (b, H, W, 3), uint8, to what the network sees.
    run: jitted, (parameters, what `scale` returns) -> `Features`.
    params: of the network, whole on every device.
    layout: of the mesh.
    batch_size: pictures at a time.
  """

  name: str
  num_features: int
  scale: Callable[[jax.Array], jax.Array]
  run: Callable[[Any, jax.Array], Features]
  params: Any
  layout: Layout
  batch_size: int

  def __call__(self, pictures: np.ndarray) -> Features:
    pictures = checked_pictures(pictures)
    run = lambda part: self.run(self.params, self.scale(part))
    return in_batches(run, self.layout, self.batch_size, pictures, what=("features", "pictures"), whole=True)

  @property
  def num_spatial(self) -> int:
    return _width(self._shapes.spatial)

  @property
  def num_logits(self) -> int:
    return _width(self._shapes.logits)

  @functools.cached_property
  def _shapes(self) -> Features:
    """Shapes of the features of a picture."""
    picture = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    return jax.eval_shape(lambda x: self.run(self.params, self.scale(x)), picture)


def _width(features: Any) -> int:
  return 0 if features is None else features.shape[1]


def open_feature_network(
  path: str | os.PathLike, layout: Layout, width: int = inception.WIDTH, batch_size: int | None = None
) -> FeatureNetwork:
  """Opens a published network by its file.

  Args:
    path: of an Inception file, see `families.inception.files.load_inception`.
    layout: of the mesh that pictures are split over.
    width: of its features; of Inception one of `families.inception.network.WIDTHS`. Papers have 2048.
    batch_size: pictures at a time, by default PICTURES_A_DEVICE for each part of a batch and at most PICTURES_AT_ONCE.

  Raises:
    ValueError: the file is another, or damaged, or has no features of that width.
  """
  if width not in inception.WIDTHS:
    raise ValueError(f"width: expected one of {inception.WIDTHS}, the features of Inception, got {width}")
  params = load_inception(path)
  fewer = "" if width == inception.WIDTH else f", {width} features"
  return JittedNetwork(
    name=f"Inception-v3 of 2015-12-05, weights {digest_of(params)}{fewer}",
    num_features=width,
    scale=_inception_scale(),
    run=_inception_run(width),
    params=jax.tree.map(layout.everywhere, params),
    layout=layout,
    batch_size=batch_size or min(PICTURES_A_DEVICE * layout.batch_parts, PICTURES_AT_ONCE),
  )


def checked_pictures(pictures: Any) -> np.ndarray:
  """Returns pictures as feature networks take them.

  Raises:
    ValueError: they are not (n, H, W, 3), uint8, with n >= 1.
  """
  pictures = np.asarray(pictures)
  if pictures.dtype != np.uint8:
    raise ValueError(f"pictures: expected bytes, uint8, got {pictures.dtype}; scale [-1, 1] to [0, 255] and round")
  if pictures.ndim != 4 or pictures.shape[-1] != 3 or not pictures.size:
    raise ValueError(f"pictures: expected (n, H, W, 3), n >= 1, got {pictures.shape}; repeat the channel of a grey one")
  return pictures


@functools.cache
def _inception_scale() -> Callable[[jax.Array], jax.Array]:
  return jax.jit(inception.resized)


@functools.cache
def _inception_run(width: int) -> Callable[[Any, jax.Array], Features]:
  module = inception.Inception(width)

  def run(params: Any, x: jax.Array) -> Features:
    outputs: Any = module.apply({"params": params}, x)
    return Features(*outputs)

  return jax.jit(run)
