"""Pictures of 2-D points: densities, and trajectories over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.figures.canvas import drawing, some
from pflow_jax.evaluation.figures.densities import (
  DATA,
  Limits,
  ceiling,
  density_image,
  points_of,
  show_density,
  square_limits,
)
from pflow_jax.evaluation.figures.palette import COLOURS, GRID, INK, MUTED


def trajectory_plot(
  data: ArrayLike,
  panels: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
) -> Any:
  """Trajectories of 2-D points over the data's density, one square panel per method, with a legend below.

  All panels show the square around all trajectories and points.

  Args:
    data: points (N, 2), drawn as a histogram.
    panels: label -> states (steps, n, 2), steps >= 2, from noise to data; a ring marks the start, a dot the end.
    title: above the panels.

  Raises:
    ValueError: for other shapes.
  """
  paths = {label: np.asarray(x, np.float64) for label, x in some(panels).items()}
  for label, x in paths.items():
    if x.ndim != 3 or x.shape[0] < 2 or x.shape[-1] != 2 or x.size == 0:
      raise ValueError(f"panels[{label!r}]: expected (steps >= 2, n, 2), got {x.shape}")
  points = points_of(data, "data")
  limits = square_limits([points, *(x.reshape(-1, 2) for x in paths.values())])
  image = density_image(points, limits, bins=100)
  with _square_panels(list(paths), limits, title, foot=0.3) as all_axes:
    for axes, x in zip(all_axes, paths.values(), strict=True):
      show_density(axes, image, limits)
      axes.plot(x[..., 0], x[..., 1], color=INK, linewidth=0.55, alpha=0.55, solid_capstyle="round")
      axes.scatter(*x[0].T, s=9, facecolors="white", edgecolors=MUTED, linewidths=0.6, zorder=3)
      axes.scatter(*x[-1].T, s=10, color=COLOURS[1], linewidths=0, zorder=4)
    figure = all_axes[0].figure
    _legend(figure)
  return figure


def _legend(figure: Any) -> None:
  """Says below the panels what ring, dot, line and colour are; on two lines where one is too narrow."""
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  handles = {
    "start: noise, t = 1": Line2D([], [], ls="", marker="o", ms=4, mfc="white", mec=MUTED, mew=0.8),
    "path": Line2D([], [], color=INK, lw=0.8, alpha=0.7),
    "end: sample, t = 0": Line2D([], [], ls="", marker="o", ms=4, color=COLOURS[1]),
    "density of the data": Patch(color=DATA),
  }
  wide = figure.get_figwidth() > 4.5
  figure.legend(
    handles.values(),
    handles,
    loc="lower center",
    ncols=4 if wide else 2,
    frameon=False,
    fontsize=8 if wide else 7,
    handletextpad=0.5,
    columnspacing=1.4,
    borderaxespad=0.1,
  )


def scatter_panels(
  panels: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
  bins: int = 120,
) -> Any:
  """2-D samples (n, 2) as density histograms side by side, with common limits and a common colour scale.

  The limits are those of the first panel (the data, say), so that outliers of another do not shrink it.

  Raises:
    ValueError: for other shapes.
  """
  points = {label: points_of(x, f"panels[{label!r}]") for label, x in some(panels).items()}
  limits = square_limits([next(iter(points.values()))])
  images = [density_image(x, limits, bins) for x in points.values()]
  top = ceiling(images[0])
  with _square_panels(list(points), limits, title) as all_axes:
    for axes, image in zip(all_axes, images, strict=True):
      show_density(axes, image, limits, "magma", top)
  return all_axes[0].figure


@contextlib.contextmanager
def _square_panels(names: Sequence[str], limits: Limits, title: str | None, foot: float = 0.0) -> Iterator[list[Any]]:
  """Square axes side by side, one for each name, without ticks and with the same limits; `foot` inches are below."""
  side, gap, head = 2.4, 0.12, 0.6 if title else 0.3
  foot *= 1 if len(names) > 1 else 1.6  # a legend on two lines
  width, height = len(names) * (side + gap) + gap, side + head + gap + foot
  with drawing(width, height) as figure:
    all_axes = []
    for i, name in enumerate(names):
      box = ((gap + i * (side + gap)) / width, (gap + foot) / height, side / width, side / height)
      axes = figure.add_axes(box)
      axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
      axes.spines[:].set_color(GRID)
      axes.set_title(name, parse_math=False)
      all_axes.append(axes)
    if title:
      figure.text(gap / width, 1 - 0.18 / height, title, va="center", fontsize=11, parse_math=False)
    yield all_axes
