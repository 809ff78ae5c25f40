"""Metrics to JSON lines and boards."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from pflow_jax.files.folders import absolute
from pflow_jax.training.boards import Boards
from pflow_jax.training.lines import Lines, kept_lines, open_lines

PyTree = Any

METRICS = "metrics.jsonl"


class MetricsWriter:
  """Writes scalars to <workdir>/metrics.jsonl and to the boards of a run.

  A line is {"step": int, "time": seconds since the epoch, name: number, ...}; a NaN or an infinity
  is written as null, because JSON has neither. On the boards the names have groups, see `Boards.scalars`.

  Args:
    workdir: the folder of the run.
    tensorboard: whether to write TensorBoard's events too.
    wandb: project of Weights & Biases, "" for none.
    config: all settings of the run, for the boards.
    active: False makes every method do nothing, for all processes but the first.
    resume_step: drop the lines that an earlier run logged after this step; None drops nothing.
    writing: a context for all writing, such as `Lock.writing`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
    active: bool = True,
    resume_step: int | None = None,
    writing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
  ):
    self._writing = writing
    self._log: Lines | None = None
    self._boards: Boards | None = None
    if not active:
      return
    folder = absolute(workdir)
    with writing():
      folder.mkdir(parents=True, exist_ok=True)
      self._log = open_lines(folder / METRICS, resume_step)
      self._boards = Boards(folder, tensorboard=tensorboard, wandb=wandb, config=config, resume_step=resume_step)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs scalars: Python, NumPy or JAX numbers of shape ().

    Raises:
      ValueError: a value is not a single number; the message names it.
    """
    if self._log is None or self._boards is None:
      return
    values = {name: _number(name, value) for name, value in metrics.items()}
    line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
    with self._writing():
      self._log.write(json.dumps(line, allow_nan=False) + "\n")
      self._boards.scalars(step, values)

  def image(self, step: int, name: str, image: np.ndarray | str | os.PathLike) -> None:
    """Shows an image on the boards: uint8 (H, W, C), C = 1, 3 or 4, or the path of a picture."""
    if self._boards is not None:
      with self._writing():
        self._boards.image(step, name, image)

  def flush(self) -> None:
    """Puts everything on disk; the JSON lines are there already."""
    if self._boards is not None:
      with self._writing():
        self._boards.flush()

  def close(self) -> None:
    """Flushes and closes; writing afterwards does nothing."""
    files, self._log, self._boards = (self._boards, self._log), None, None
    with self._writing():
      for file in files:
        if file is not None:
          file.close()

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if error is None:
      self.close()
      return
    with contextlib.suppress(Exception):  # an error of writing has been raised before
      self.close()


def read_metrics(workdir: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the metrics in a workdir by name, with "step" and "time": arrays with one entry an interval; {} for none."""
  rows = [json.loads(line) for line in kept_lines(absolute(workdir) / METRICS)]
  names = list(dict.fromkeys(name for row in rows for name in row))
  number = lambda value: np.nan if value is None else value
  return {name: np.array([number(row.get(name)) for row in rows]) for name in names}


def write_metrics(workdir: str | os.PathLike, history: Mapping[str, np.ndarray]) -> None:
  """Writes metrics as `read_metrics` returns them."""
  with MetricsWriter(workdir, tensorboard=False) as writer:
    for i, step in enumerate(history.get("step", ())):
      writer.write(step, {name: values[i] for name, values in history.items() if name not in ("step", "time")})


def parameter_table(params: PyTree) -> str:
  """Table of the parameters: name, shape, dtype, size; arrays or jax.ShapeDtypeStruct."""
  from clu import parameter_overview

  return parameter_overview.get_parameter_overview(params, include_stats=False)


def _number(name: str, value: Any) -> int | float:
  value = np.asarray(value)
  if value.shape != () or value.dtype.kind in "OUSc":
    raise ValueError(f"metric {name!r}: expected one number, got {value.dtype} {value.shape}")
  return int(value) if value.dtype.kind in "iub" else float(value)
