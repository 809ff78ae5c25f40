"""Densities of 2-D points, as images on the axes of a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
Limits = tuple[tuple[float, float], tuple[float, float]]
Density = ArrayLike | Callable[[Array], Array]


def points_of(x: ArrayLike, name: str) -> Array:
  """Points (n, 2) as float64; ValueError, which calls them `name`, for other shapes."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or x.shape[1] != 2 or not len(x):
    raise ValueError(f"{name}: expected points (n, 2), n >= 1, got {x.shape}")
  return x


def square_limits(points: Sequence[Array]) -> Limits:
  """The smallest square around all finite points, with a margin of 4 %."""
  x = np.concatenate(points)
  x = x[np.isfinite(x).all(axis=1)]
  if not len(x):
    raise ValueError("panels: expected finite points, got none; give limits to draw an empty panel")
  centre, half = (x.max(axis=0) + x.min(axis=0)) / 2, np.ptp(x, axis=0).max() / 2 * 1.04 or 1.0
  (a, b), (c, d) = ((float(c - half), float(c + half)) for c in centre)
  return (a, b), (c, d)


def density_image(density: Density, limits: Limits, bins: int) -> Array:
  """Density on a (bins, bins) grid over the limits, rows upwards in y."""
  (x_low, x_high), (y_low, y_high) = limits
  if not callable(density):
    points = points_of(density, "density")
    counts = np.histogram2d(points[:, 1], points[:, 0], bins, range=((y_low, y_high), (x_low, x_high)))[0]
    return counts / len(points)
  middle = (np.arange(bins) + 0.5) / bins
  grid = np.meshgrid(x_low + middle * (x_high - x_low), y_low + middle * (y_high - y_low))
  values = np.asarray(density(np.stack(grid, axis=-1).reshape(-1, 2)), np.float64)
  if values.shape != (bins * bins,):
    raise ValueError(f"density: expected a function (M, 2) -> (M,), got {values.shape} for M = {bins * bins}")
  return values.reshape(bins, bins)


def ceiling(image: Array) -> float:
  """Brightest colour: a high percentile of the occupied bins, so that one full bin does not dim the
  rest."""
  occupied = image[image > 0]
  return float(np.percentile(occupied, 99)) if len(occupied) else 1.0


def show_density(axes: Any, image: Array, limits: Limits, cmap: str | None = None, top: float | None = None) -> None:
  """Draws a density's image over the limits, by default in a pale blue; `top` is the brightest colour's value."""
  from matplotlib.colors import LinearSegmentedColormap

  colours = LinearSegmentedColormap.from_list("pale", ["#ffffff", "#b9d3ea"]) if cmap is None else cmap
  extent = (*limits[0], *limits[1])
  top = ceiling(image) if top is None else top
  axes.imshow(image, origin="lower", extent=extent, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
