"""Figures for a notebook, as matplotlib Figures: samples, trajectories, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax.evaluation import figures

COLUMNS = 16  # images side by side
WAYS = 64  # trajectories in a panel


def samples(rows: Any, *, labels: Sequence[str] | None = None, title: str | None = None, columns: int = COLUMNS) -> Any:
  """Samples, a row (images) or a panel (points) for each name; a column is meant to come from the same noise.

  Args:
    rows: an array (n, H, W, C) or (n, 2), or such arrays by name.
    labels: n texts above the columns.
    title: above the figure.
    columns: images side by side; the others continue below.

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: shapes that cannot be shown.
  """
  named = {name: np.asarray(x) for name, x in _named(rows).items()}
  if next(iter(named.values())).ndim == 2:
    return figures.scatter_panels(named, title=title)
  if next(iter(named.values())).shape[-1] not in (1, 3):  # latents: the first channels show their outlines
    named = {name: x[..., :3] if x.shape[-1] > 3 else x[..., :1] for name, x in named.items()}
  return figures.image_grid(named, column_labels=labels, title=title, columns=columns)


def trajectories(paths: Any, data: Any) -> Any:
  """Trajectories of points from noise to data over the data's density, a panel for each name.

  Args:
    paths: states (steps + 1, n, 2), or such by name, see `Run.trajectories`; at most WAYS are drawn.
    data: (m, 2).

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: states that are no points.
  """
  named = {name: np.asarray(x)[:, :WAYS] for name, x in _named(paths).items()}
  return figures.trajectory_plot(np.asarray(data), named)


def losses(histories: Any, *, metric: str = "loss") -> Any:
  """A metric over the steps of trainings, a line for each name.

  Args:
    histories: `Run.history`, or such by name; an object with a `history` may stand for it.
    metric: name of the metric.

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: no such metric, or none that was logged.
  """
  if hasattr(histories, "history") or (isinstance(histories, Mapping) and "step" in histories):
    histories = {"": histories}
  series = {}
  for name, one in histories.items():
    own = getattr(one, "history", one)
    if metric not in own:
      raise ValueError(f"{name or 'history'}: expected the metric {metric!r}, got {sorted(own)}")
    series[name] = own["step"], own[metric]
  return figures.curves(series, xlabel="step", ylabel=metric, xscale="linear")


def _named(values: Any) -> Mapping[str, Any]:
  return values if isinstance(values, Mapping) else {"": values}
