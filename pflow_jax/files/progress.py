"""Progress of long work, for people."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
  """Progress with rate, time left and loss: a bar on a terminal or in a notebook, else a plain line at intervals.

  The rate counts from the first `update`, so that compiling does not enter it.

      with progress(total=1000, initial=200, description="teacher") as report:
        report.update(201, loss=0.5)
  """

  def __init__(self, total: int, initial: int, description: str, disable: bool, interval: float, unit: str):
    self._total, self._initial, self._description = total, initial, description
    self._unit = unit
    self._interval = interval
    self._disable = disable
    self._first: tuple[float, int] | None = None
    self._printed = -math.inf
    self._bar: Any = None
    self._task: Any = None

  def __enter__(self) -> Progress:
    if not self._disable and _shows_bars():
      from rich import progress as rich_progress

      self._bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[status]}"),
      )
      self._task = self._bar.add_task(self._description, total=self._total, completed=self._initial, status="")
      self._bar.start()
    return self

  def update(self, step: int, loss: float | None = None) -> None:
    """Reports that `step` of `total` steps are done; `loss` as a number already on the host."""
    if self._disable:
      return
    now = time.monotonic()
    if self._first is None:
      self._first = (now, step)
    status = self._status(now, step, loss)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, status=status)
    elif now - self._printed >= self._interval or step >= self._total:
      self._printed = now
      print(f"{self._description} {step}/{self._total} {status}".strip(), flush=True)

  def _status(self, now: float, step: int, loss: float | None) -> str:
    start, first = self._first or (now, step)
    parts = []
    if step > first and now > start:
      rate = (step - first) / (now - start)
      left = max(self._total - step, 0) / rate
      parts = [f"{rate:.1f} {self._unit}/s", f"left {_clock(left)}"]
    if loss is not None:
      parts.append(f"loss {loss:.4g}")
    return "  ".join(parts)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.stop()


def progress(
  total: int,
  initial: int = 0,
  description: str = "",
  disable: bool = False,
  *,
  interval: float = 10.0,
  unit: str = "steps",
) -> Progress:
  """Context manager that reports steps, or another `unit`, `initial` to `total`; plain lines every `interval` s."""
  return Progress(total, initial, description, disable, interval, unit)


def _shows_bars() -> bool:
  """Returns whether the output is a terminal, or a notebook with the widgets that rich draws its bar with."""
  if sys.stdout.isatty():
    return True
  if "IPython" not in sys.modules:  # saves the import of rich, which takes a while
    return False
  import rich

  return rich.get_console().is_jupyter and importlib.util.find_spec("ipywidgets") is not None


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
