"""TensorBoard's event files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from pflow_jax.files.folders import is_remote
from pflow_jax.training.lines import STORE_INTERVAL


class Events:
  """An event file, written in the caller's thread: tensorboardX's own one dies and then waits on a full disk.

  Args:
    folder: of the events.
    purge_step: TensorBoard forgets earlier values from this step on.
  """

  def __init__(self, folder: epath.Path, purge_step: int | None = None):
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

  def text(self, step: int, name: str, markdown: str) -> None:
    from tensorboardX import summary

    self._add(step, summary.text(name, markdown))

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
