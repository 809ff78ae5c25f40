"""Progress of long work, for people: a bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import html
import sys
import time
from types import TracebackType
from typing import Any

REDRAWN = 0.2  # seconds between two states of a bar in a notebook
SHOWN = 2.0  # seconds after which work that is mostly short shows a bar
_BAR = 16  # letters of a bar on a terminal, so that 80 columns have room for the loss


class Progress:
  """Progress with rate, time left and a note.

  On a terminal and in a notebook it is a bar, elsewhere a plain line at intervals. A bar inside the work of another one
  is a row below it, which goes when its work is done. The rate counts from the first `update`, so that compiling does
  not enter it.

      with progress(total=1000, initial=200, description="teacher") as report:
        report.update(201, loss=0.5)

  Attributes:
    total: of the work; it may change.
  """

  def __init__(
    self, total: int, initial: int, description: str, disable: bool, interval: float, unit: str, delay: float
  ):
    self.total, self.description, self.unit = total, description, unit
    self._disable, self._interval, self._delay = disable, interval, delay
    self.done, self._note, self._ended = initial, "", ""
    self._first: tuple[float, int] | None = None
    self._start = self._now = time.monotonic()
    self._printed: tuple[float, int] | None = None
    self._screen: _Screen | None = None

  def __enter__(self) -> Progress:
    self._start = self._now = time.monotonic()
    self._open()
    return self

  def update(self, done: int, loss: float | None = None) -> None:
    """Reports that `done` of `total` are done; `loss` as a number already on the host."""
    if self._disable:
      return
    self.done, self._now = done, time.monotonic()
    self._first = self._first or (self._now, done)
    if loss is not None:
      self._note = f"loss {loss:.4g}"
    if done < self.total:  # work that ends as it is first heard of needs no bar
      self._open()
    if self._screen is not None:
      self._screen.changed(self)

  def say(self, text: str) -> None:
    """Tells what is being done: a note at the bar, or a line of its own."""
    if not self._disable:
      self._note = text
      self._open()
      if self._screen is not None:
        self._screen.told(self, text)

  @property
  def status(self) -> str:
    """Rate, time left and note in words."""
    start, first = self._first or (self._now, self.done)
    parts = [self._ended] if self._ended else []
    if self.done > first and self._now > start:
      rate = (self.done - first) / (self._now - start)
      parts.append(f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.0f} s/{self.unit.removesuffix('s')}")
      parts.append(
        f"in {_clock(self._now - self._start)}"
        if self._ended or self.done >= self.total
        else f"left {_clock((self.total - self.done) / rate)}"
      )
    return "  ".join([*parts, self._note] if self._note else parts)

  def __str__(self) -> str:
    return f"{self.description} {self.done}/{self.total}  {self.status}".strip()

  def _open(self) -> None:
    """Shows it, once the delay is over: below the bars that are open, or on a screen of its own."""
    if self._screen is None and not self._disable and self._now - self._start >= self._delay:
      self._screen = _SCREEN.get() or _make_screen()
      self._screen.rows.append(self)
      if len(self._screen.rows) == 1:
        self._screen.start()
        _SCREEN.set(self._screen)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    screen = self._screen
    if screen is None:
      return
    self._ended = "" if self.done >= self.total and kind is None else "stopped"
    if screen.rows[0] is self:
      if _SCREEN.get() is screen:
        _SCREEN.set(None)
      screen.end(self)
    else:
      screen.rows.remove(self)
      screen.left(self)


def progress(
  total: int,
  initial: int = 0,
  description: str = "",
  disable: bool = False,
  *,
  interval: float = 10.0,
  unit: str = "steps",
  delay: float = 0.0,
) -> Progress:
  """Context manager that reports steps, or another `unit`, `initial` to `total`.

  Args:
    total: of the work.
    initial: how much is done already.
    description: of the work, in a word.
    disable: report nothing.
    interval: seconds between two plain lines.
    unit: word for what is counted.
    delay: seconds of work before anything is shown.
  """
  return Progress(total, initial, description, disable, interval, unit, delay)


class _Screen:
  """A place for bars; this one prints them as lines.

  Attributes:
    rows: the open bars, each inside the work of the one before.
  """

  def __init__(self) -> None:
    self.rows: list[Progress] = []

  def start(self) -> None:
    """Begins, with the first bar."""

  def changed(self, row: Progress) -> None:
    """Shows a bar's new state: a line at intervals, once there is a rate."""
    last, counted = row._printed, row._first is not None and row.done > row._first[1]
    if row.done < row.total and counted and (last is None or row._now - last[0] >= row._interval):
      self._print(row)

  def told(self, row: Progress, text: str) -> None:
    """Shows a bar's new note."""
    if text:
      print(text, flush=True)
    row._note = ""

  def left(self, row: Progress) -> None:
    """Takes a bar away that is inside another one."""
    self.end(row)

  def end(self, row: Progress) -> None:
    """Shows the last state of all."""
    counted = row._first is not None and row.done > row._first[1]
    if row._first is not None and (row._ended or (counted and row._printed != (row._now, row.done))):
      self._print(row)

  def _print(self, row: Progress) -> None:
    row._printed = row._now, row.done
    print(row, flush=True)


class _Terminal(_Screen):
  """Bars that rich draws on a terminal."""

  def start(self) -> None:
    from rich.errors import LiveError
    from rich.live import Live

    self._live = Live(get_renderable=self._table, refresh_per_second=5)
    with contextlib.suppress(LiveError):  # another one is drawn, by a thread or by the caller: rich before 14.1 has one
      self._live.start()

  def _table(self) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    # Where there is little room the last column alone is cut.
    table = Table.grid(*(Column(no_wrap=True) for _ in range(3)), Column(), padding=(0, 1))
    for row in self.rows:
      bar = ProgressBar(total=max(row.total, 1), completed=row.done, width=_BAR)
      status = Text(row.status, no_wrap=True, overflow="ellipsis")
      table.add_row(Text(row.description), bar, f"{row.done}/{row.total}", status)
    return table

  def changed(self, row: Progress) -> None:
    """Nothing to do: the bars are drawn several times a second."""

  def told(self, row: Progress, text: str) -> None:
    self._live.refresh()

  def left(self, row: Progress) -> None:
    """Nothing to do, for the same reason."""

  def end(self, row: Progress) -> None:
    self._live.stop()


class _Cell(_Screen):
  """Bars in a notebook's cell: one output, which is replaced.

  Every front end replaces outputs, that of an executed file too, and its last state is stored. Widgets, which rich and
  tqdm draw their bars with, have to be installed, and a stored notebook shows none.
  """

  def start(self) -> None:
    from IPython.display import display

    self._drawn = time.monotonic()
    self._handle = display(self, display_id=True)

  def changed(self, row: Progress) -> None:
    if time.monotonic() - self._drawn >= REDRAWN:
      self._draw()

  def told(self, row: Progress, text: str) -> None:
    self._draw()

  def left(self, row: Progress) -> None:
    self._draw()

  def end(self, row: Progress) -> None:
    self._draw()

  def _draw(self) -> None:
    self._drawn = time.monotonic()
    self._handle.update(self)

  def __repr__(self) -> str:
    return "\n".join(map(str, self.rows))

  def _repr_html_(self) -> str:
    cells = (
      f"<td>{html.escape(row.description)}</td>"
      f'<td><progress value="{row.done}" max="{max(row.total, 1)}"></progress></td>'
      f'<td>{row.done}/{row.total}</td><td style="text-align: left; white-space: pre">{html.escape(row.status)}</td>'
      for row in self.rows
    )
    return f"<table>{''.join(f'<tr>{one}</tr>' for one in cells)}</table>"


_SCREEN: contextvars.ContextVar[_Screen | None] = contextvars.ContextVar("screen", default=None)


def _make_screen() -> _Screen:
  if "IPython" in sys.modules:
    from IPython.core.getipython import get_ipython

    if getattr(get_ipython(), "kernel", None) is not None:
      return _Cell()
  return _Terminal() if sys.stdout.isatty() else _Screen()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
