"""Metrics to JSON lines and TensorBoard."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from etils import epath

from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import absolute, is_remote

PyTree = Any

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
STORE_INTERVAL = 30.0  # seconds between two writes of a whole file to an object store, whose objects do not grow


class MetricsWriter:
  """Writes scalars to <workdir>/metrics.jsonl and to TensorBoard events in <workdir>/tensorboard.

  A line is {"step": int, "time": seconds since the epoch, name: number, ...}; a NaN or an infinity
  is written as null, because JSON has neither.

  Args:
    workdir: the folder of the run.
    tensorboard: whether to write events too.
    active: False makes every method do nothing, for all processes but the first.
    resume_step: drop the lines that an earlier run logged after this step; None drops nothing.
    writing: a context for all writing, such as `Lock.writing`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    active: bool = True,
    resume_step: int | None = None,
    writing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
  ):
    self._writing = writing
    self._log: _Lines | None = None
    self._events: _Events | None = None
    if not active:
      return
    folder = absolute(workdir)
    with writing():
      folder.mkdir(parents=True, exist_ok=True)
      path = folder / METRICS
      kept = _kept_lines(path, resume_step)
      self._log = _Objects(path, kept) if is_remote(path) else _Lines(path, kept)
      if tensorboard:
        self._events = _Events(folder / "tensorboard", None if resume_step is None else resume_step + 1)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs scalars: Python, NumPy or JAX numbers of shape ().

    Raises:
      ValueError: a value is not a single number; the message names it.
    """
    if self._log is None:
      return
    values = {name: _number(name, value) for name, value in metrics.items()}
    line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
    with self._writing():
      self._log.write(json.dumps(line, allow_nan=False) + "\n")
      if self._events is not None:
        self._events.scalars(step, values)

  def image(self, step: int, name: str, image: np.ndarray | str | os.PathLike) -> None:
    """Shows an image in TensorBoard: uint8 (H, W, C), C = 1, 3 or 4, or the path of a picture."""
    if self._log is None:
      return
    if isinstance(image, (str, os.PathLike)):
      from PIL import Image

      image = np.asarray(Image.open(io.BytesIO(epath.Path(image).read_bytes()), formats=("PNG",)).convert("RGB"))
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
      raise ValueError(f"image {name!r}: expected uint8 (H, W, 1, 3 or 4), got {image.dtype} {image.shape}")
    if self._events is not None:
      with self._writing():
        self._events.image(step, name, image)

  def flush(self) -> None:
    """Puts everything on disk; the JSON lines are there already."""
    if self._events is not None:
      with self._writing():
        self._events.flush()

  def close(self) -> None:
    """Flushes and closes; writing afterwards does nothing."""
    files, self._log, self._events = (self._events, self._log), None, None
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
  path = absolute(workdir) / METRICS
  rows = [json.loads(line) for line in _kept_lines(path, None)]
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


class _Lines:
  """A text file that grows by lines, which survive a killed process."""

  def __init__(self, path: epath.Path, kept: list[str]):
    write_atomically(path, "".join(kept))
    self._file = pathlib.Path(path).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115 (`close` closes it)

  def write(self, line: str) -> None:
    self._file.write(line)

  def close(self) -> None:
    self._file.close()


class _Objects(_Lines):
  """Lines in an object store (gs://...): the whole is stored again, at most every STORE_INTERVAL."""

  def __init__(self, path: epath.Path, kept: list[str]):
    self._path, self._lines, self._stored = path, kept, -math.inf

  def write(self, line: str) -> None:
    self._lines.append(line)
    if time.monotonic() - self._stored >= STORE_INTERVAL:
      self.close()

  def close(self) -> None:
    self._path.write_text("".join(self._lines))
    self._stored = time.monotonic()


class _Events:
  """TensorBoard's events, written in the caller's thread: tensorboardX's own one dies and then waits on a full disk.

  Args:
    folder: of the events.
    purge_step: TensorBoard forgets earlier values from this step on.
  """

  def __init__(self, folder: epath.Path, purge_step: int | None):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import directory_check

    self._remote, self._flushed = is_remote(folder), -math.inf
    self._event = event_pb2.Event
    directory_check(str(folder))
    self._file = EventsWriter(f"{folder}/events")
    if purge_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._file.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))
    self.flush()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX import summary

    self._add(step, *(summary.scalar(name, value) for name, value in values.items()))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    from tensorboardX import summary

    self._add(step, summary.image(name, image, dataformats="HWC"))

  def _add(self, step: int, *summaries: Any) -> None:
    for one in summaries:
      self._file.write_event(self._event(wall_time=time.time(), step=step, summary=one))
    if not self._remote or time.monotonic() - self._flushed >= STORE_INTERVAL:
      self.flush()

  def flush(self) -> None:
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._file.close()


def _kept_lines(path: epath.Path, last: int | None) -> list[str]:
  """Lines of the log up to step `last`, without lines that are no metrics, such as a killed process's last one."""
  if not path.exists():
    return []
  if not is_remote(path) and not pathlib.Path(path).is_file():
    raise ValueError(f"{path} is no file, expected the metrics of an earlier run; move it away")
  kept, strange = [], 0
  for line in path.read_bytes().decode(errors="replace").split("\n"):
    try:
      step = json.loads(line)["step"]
      if type(step) is not int:
        raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
      strange += bool(line)
    else:
      if last is None or step <= last:
        kept.append(line + "\n")
  if strange > 1:
    logger.warning("%s: %d lines are no metrics, and are left out", path, strange)
  return kept
