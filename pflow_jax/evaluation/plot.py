"""Figures for a notebook: samples, trajectories and losses as matplotlib Figures, and animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax.evaluation import figures, histories

COLUMNS = 16  # images side by side
POINTS = 4096  # samples of a run on points
WAYS = 64  # trajectories in a panel


def samples(rows: Any, *, labels: Sequence[str] | None = None, title: str | None = None, columns: int = COLUMNS) -> Any:
  """Samples, a row (images) or a panel (points) for each name; a column is meant to come from the same noise.

  Args:
    rows: an array (n, H, W, C) or (n, 2), or such arrays by name. A run stands for samples of its own, from the same
      noise and of the same classes as those of others.
    labels: n texts above the columns.
    title: above the figure.
    columns: images side by side; the others continue below.

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: shapes that cannot be shown.
  """
  named = {name: _drawn(x) for name, x in _named(rows).items()}
  if next(iter(named.values())).ndim == 2:
    return figures.scatter_panels(named, title=title)
  named = {name: figures.visible(x) for name, x in named.items()}
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


def animation(
  paths: Any, evaluations: Any = None, *, title: str | None = None, shift: float = 1.0, seconds: float = 4.0
) -> figures.Animation:
  """Images that emerge from noise, a row for each name, over a mark for every network evaluation so far.

  A teacher's marks fill its row; a policy student's stand where its segments start, and its policy does the rest.

  Args:
    paths: states (steps + 1, n, H, W, C), or such by name, see `Run.trajectories`.
    evaluations: network evaluations of the whole path, or such by name; by default one a step, as a teacher's.
    title: above the rows.
    shift: of the schedule, for the clock.
    seconds: from noise to data.

  Returns:
    An animation, which a notebook shows and whose `save` writes a GIF.

  Raises:
    ValueError: states that are no images, or numbers of evaluations that do not fit.
  """
  named = {name: figures.visible(x) for name, x in _named(paths).items()}
  given = evaluations if isinstance(evaluations, Mapping) else {} if evaluations is None else {"": evaluations}
  unknown = [name for name in given if name not in named]
  if unknown:
    raise ValueError(f"evaluations: expected names of paths, {list(named)}, got {unknown}")
  made = {name: given.get(name, len(x) - 1) for name, x in named.items()}
  return figures.image_animation(named, made, title=title, shift=shift, seconds=seconds)


def losses(runs: Any, *, metric: str = "loss", smooth: float = 0.0, log: bool | None = None) -> Any:
  """A metric over the steps of trainings, a line for each run, as `pflow plot` draws it.

  Runs that lack the metric are left out, with a warning; they may have any lengths, and still be training.

  Args:
    runs: a workdir, which may be on gs://, a `Run`, or its history; or several, as a sequence, or by name.
    metric: its name, with or without the group that TensorBoard shows; a pattern such as "loss_t*" draws several.
    smooth: share of the average so far in every value, in [0, 1), as in TensorBoard.
    log: whether the values have a logarithmic axis; by default where all are positive.

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: there is no such run, or none has the metric.
  """
  series = histories.series_of(histories.histories_of(runs), metric, smooth)
  return histories.as_figure(series, metric, log=histories.is_logarithmic(series, log))


def _drawn(rows: Any) -> np.ndarray:
  """Returns samples as they are, or those of a run."""
  if not hasattr(rows, "sample"):
    return np.asarray(rows)
  return rows.sample(POINTS) if rows.data.shape == (2,) else rows.decode(rows.sample(COLUMNS))


def _named(values: Any) -> Mapping[str, Any]:
  return values if isinstance(values, Mapping) else {"": values}
