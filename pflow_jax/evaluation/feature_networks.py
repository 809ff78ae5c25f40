"""Networks in whose features pictures are compared, behind one protocol."""

from __future__ import annotations

import os
from typing import NamedTuple, Protocol

import numpy as np

from pflow_jax.mesh.sharding import Layout

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

  def __call__(self, pictures: np.ndarray) -> Features:
    """Returns the features of pictures (n, H, W, 3), uint8, of any size, which all processes have; n >= 1."""


def open_feature_network(path: str | os.PathLike, layout: Layout) -> FeatureNetwork:
  """Opens a published network by its file.

  Args:
    path: of an Inception file.
    layout: of the mesh that pictures are split over.

  Raises:
    ValueError: the file is another, or damaged.
  """
  from pflow_jax.families.inception import load_inception

  del layout
  return load_inception(path)
