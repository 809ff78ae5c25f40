"""Metrics of trainings, side by side: as series for a figure, and as a plot of text for a terminal."""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from pflow_jax.evaluation import figures
from pflow_jax.files.folders import expanded, told_apart
from pflow_jax.files.nearest import did_you_mean
from pflow_jax.training.inputs import is_run
from pflow_jax.training.writer import read_metrics

logger = logging.getLogger(__name__)

History = Mapping[str, np.ndarray]
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]

MARKS = "*o+x#@%&=~"
HEIGHT, TICKS = 17, 4  # rows of a plot of text, and rows from one number to the next


def histories_of(runs: Any) -> dict[str, History]:
  """Finds the metrics of runs, by name.

  Args:
    runs: a workdir, which may be on gs://, a `Run`, or its history; or several, as a sequence, or by name.

  Raises:
    ValueError: there is no run in a folder, or none is given.
  """
  if isinstance(runs, (str, os.PathLike)) or hasattr(runs, "history") or (isinstance(runs, Mapping) and "step" in runs):
    runs = [runs]
  if not isinstance(runs, Mapping):
    runs = dict(zip(_names(list(runs)), runs, strict=True))
  if not runs:
    raise ValueError("runs: expected at least one workdir of a run, got none")
  return {name: _history(one) for name, one in runs.items()}


def series_of(histories: Mapping[str, History], metric: str, smooth: float = 0.0) -> Series:
  """Picks a metric of runs, those of its values that are finite: label -> (steps (n,), values (n,)).

  A run that lacks it is left out, with a warning.

  Args:
    histories: by name of the run.
    metric: its name, with or without the group that TensorBoard shows, or a pattern such as "loss_t*".
    smooth: share of the average so far in every value, see `smoothed`.

  Raises:
    ValueError: no run has it.
  """
  if not 0 <= smooth < 1:
    raise ValueError(f"smooth: expected a share in [0, 1), got {smooth}")
  found: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
  missing: list[str] = []
  for run, history in histories.items():
    size = len(found)
    for name in fnmatch.filter(history, metric) or fnmatch.filter(history, metric.rpartition("/")[2]):
      steps, values = np.asarray(history["step"]), np.asarray(history[name], float)
      kept = np.isfinite(values)
      if kept.any():
        found[run, name] = steps[kept], smoothed(values[kept], smooth)
    if len(found) == size:
      missing.append(run)
  if not found:
    known = sorted({name for history in histories.values() for name in history} - {"step", "time"})
    raise ValueError(
      f"metric: no run has {metric!r}{did_you_mean(metric, known)} (there are: {', '.join(known) or 'none so far'})"
    )
  for run in missing:
    logger.warning("%s: has no values of %r so far, and is left out", run, metric)
  several = len({name for _, name in found}) > 1
  return {f"{run} {name}".strip() if several else run: series for (run, name), series in found.items()}


def smoothed(values: np.ndarray, share: float) -> np.ndarray:
  """Exponential averages, TensorBoard's: `share` is of the average so far; the first value has no more weight."""
  total, weight, out = 0.0, 0.0, []
  for value in values:
    total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
    out.append(total / weight)
  return np.array(out)


def is_logarithmic(series: Series, log: bool | None) -> bool:
  """Returns whether to draw values on a logarithmic axis: `log`, or where it is None, whether all are positive.

  Raises:
    ValueError: such an axis is asked for, and cannot show them.
  """
  positive = all(values.min() > 0 for _, values in series.values())
  if log and not positive:
    raise ValueError("log: expected values above 0 for a logarithmic axis, got others; leave it out, or draw without")
  return positive if log is None else log


def as_figure(series: Series, title: str, *, log: bool) -> Any:
  """Draws series as a matplotlib Figure; the arguments are those of `as_text`."""
  label = f"{title} (lower is better)" if title.endswith("loss") else title
  yscale = "log" if log else "linear"
  figure = figures.curves(series, xlabel="step", ylabel=label, xscale="linear", yscale=yscale, markers=False)
  for line in figure.axes[0].lines:
    if len(line.get_xdata()) == 1:  # a lone point would be invisible
      line.set_marker("o")
  return figure


def as_text(series: Series, title: str, *, log: bool, width: int | None = None) -> str:
  """Draws series with letters, without colours, and a legend with their last values.

  Args:
    series: of `series_of`; of several points in a column their mean is drawn, and gaps are filled linearly.
    title: name of the values.
    log: whether they have a logarithmic axis.
    width: columns; by default those of the terminal.
  """
  width = max(40, min(width or shutil.get_terminal_size().columns, 120))
  scaled = {label: (steps, np.log(values) if log else values) for label, (steps, values) in series.items()}
  low, high = (float(choose([choose(y) for _, y in scaled.values()])) for choose in (np.min, np.max))
  if low == high:
    low, high = low - 0.5, high + 0.5
  first, last = (int(choose([choose(x) for x, _ in scaled.values()])) for choose in (np.min, np.max))
  marked = [*range(0, HEIGHT - 1, TICKS), HEIGHT - 1]
  heights = np.linspace(high, low, HEIGHT)
  ticks = [f"{np.exp(y) if log else y:.4g}" if i in marked else "" for i, y in enumerate(heights)]
  margin = max(map(len, ticks)) + 1
  columns = width - margin - 2
  canvas = np.full((HEIGHT, columns), " ")
  for number, (steps, values) in enumerate(scaled.values()):
    at = np.round((steps - first) / max(last - first, 1) * (columns - 1)).astype(int)
    count = np.bincount(at, minlength=columns)
    filled = np.flatnonzero(count)
    means = np.bincount(at, values, minlength=columns)[filled] / count[filled]
    across = np.arange(filled[0], filled[-1] + 1)
    rows = np.round((high - np.interp(across, filled, means)) / (high - low) * (HEIGHT - 1)).astype(int)
    canvas[rows, across] = MARKS[number % len(MARKS)]
  lines = [f"{title}, logarithmic" if log else title]
  lines += [f"{tick:>{margin}} |{''.join(row)}" for tick, row in zip(ticks, canvas, strict=True)]
  lines += [f"{'':{margin}} +{'-' * columns}"]
  end = f"step {last:,}"
  lines += [f"{'':{margin}}  {f'{first:,}':<{columns - len(end)}}{end}"]
  told = [f"{values[-1]:.4g} at step {steps[-1]:,}" for steps, values in series.values()]
  room = max(width - max(map(len, told)) - 4, 4)
  names = [label if len(label) <= room else f"...{label[3 - room :]}" for label in series]
  for number, (name, value) in enumerate(zip(names, told, strict=True)):
    lines.append(f"{MARKS[number % len(MARKS)]} {name:<{max(map(len, names))}}  {value}")
  return "\n".join(line.rstrip() for line in lines)


def _names(runs: list[Any]) -> list[str]:
  """Names of runs without any, by their workdirs; of one that has none, a number."""
  places = [getattr(run, "workdir", run) for run in runs]
  nameless = "run" if len(runs) > 1 else ""
  return told_apart([expanded(one, "runs") if isinstance(one, (str, os.PathLike)) else nameless for one in places])


def _history(run: Any) -> History:
  """The metrics of a workdir or a run, or such as they are."""
  if not isinstance(run, (str, os.PathLike)):
    return getattr(run, "history", run)
  folder = expanded(run, "runs")
  history = read_metrics(folder)
  if not history and not is_run(folder):
    raise ValueError(f"runs: there is no run in {folder}; expected a folder that `pflow train --workdir` made")
  return history
