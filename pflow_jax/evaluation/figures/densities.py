"""Densities of 2-D points, as images on the axes of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
DATA = "#b9d3ea"
Limits = tuple[tuple[float, float], tuple[float, float]]


def points_of(x: ArrayLike, name: str) -> Array:
  """Returns points (n, 2) as float64.

  Raises:
    ValueError: they have another shape; it names them by `name`.
  """
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or x.shape[1] != 2 or not len(x):
    raise ValueError(f"{name}: expected points (n, 2), n >= 1, got {x.shape}")
  return x


def square_limits(points: Sequence[Array]) -> Limits:
  """The smallest square around all finite points, with a margin of 4 %."""
  x = np.concatenate(points)
  x = x[np.isfinite(x).all(axis=1)]
  if not len(x):
    raise ValueError("panels: expected finite points, got none")
  centre, half = (x.max(axis=0) + x.min(axis=0)) / 2, np.ptp(x, axis=0).max() / 2 * 1.04 or 1.0
  (a, b), (c, d) = ((float(c - half), float(c + half)) for c in centre)
  return (a, b), (c, d)


def density_image(points: Array, limits: Limits, bins: int) -> Array:
  """Shares of the points (n, 2) on a (bins, bins) grid over the limits, rows upwards in y."""
  counts = np.histogram2d(points[:, 1], points[:, 0], bins, range=(limits[1], limits[0]))[0]
  return counts / len(points)


def ceiling(image: Array) -> float:
  """Value of the brightest colour: a high percentile of the occupied bins, so that one full bin does not dim all."""
  occupied = image[image > 0]
  return float(np.percentile(occupied, 99)) if len(occupied) else 1.0


def show_density(axes: Any, image: Array, limits: Limits, cmap: str | None = None, top: float | None = None) -> None:
  """Draws a density's image over the limits, by default in a pale blue; `top` is the value of the brightest colour."""
  from matplotlib.colors import LinearSegmentedColormap

  colours = LinearSegmentedColormap.from_list("pale", ["#ffffff", DATA]) if cmap is None else cmap
  extent = (*limits[0], *limits[1])
  top = ceiling(image) if top is None else top
  axes.imshow(image, origin="lower", extent=extent, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
