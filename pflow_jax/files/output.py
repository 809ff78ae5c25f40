"""Output of programs: to a terminal or a pipe, which may be closed, and to a log."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

LOG = "train.log"
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # errors of a pipe or a terminal without a reader


class _Tolerant:
  """A text stream that drops text that cannot be written."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
    except OSError as error:
      self._lose(error.errno in _GONE)
    return len(text)

  def flush(self, *, last: bool = False) -> None:
    try:
      self._stream.flush()
    except OSError as error:
      self._lose(last or error.errno in _GONE)

  def _lose(self, for_good: bool) -> None:
    if for_good:  # else the rest of the buffer would raise again, at the latest when Python ends
      with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
  """Lets a program run on, and end with its own code, if its output is closed, full or was never open."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which the next file would have otherwise
  streams = [_Tolerant(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
  with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
    try:
      yield
    finally:
      for stream in streams:
        stream.flush(last=True)


@contextlib.contextmanager
def logged_tracebacks() -> Iterator[None]:
  """Logs errors of threads and of libraries' callbacks, which nobody can catch, in place of printing them."""
  before = sys.unraisablehook, threading.excepthook
  sys.unraisablehook = lambda args: _log(args.exc_value)
  threading.excepthook = lambda args: _log(args.exc_value)
  try:
    yield
  finally:
    sys.unraisablehook, threading.excepthook = before


def _log(error: BaseException | None) -> None:
  logging.getLogger(__name__).warning("an error that was not caught: %r", error, exc_info=error)


def without_tracebacks(record: logging.LogRecord) -> bool:
  """A filter of log records for the terminal: libraries log tracebacks of errors that they also raise."""
  return not record.exc_info or bool(os.environ.get("PFLOW_TRACEBACK"))


class _LogFile(logging.FileHandler):
  """A log file that ignores errors of writing it."""

  def emit(self, record: logging.LogRecord) -> None:
    with contextlib.suppress(OSError):
      super().emit(record)

  def handleError(self, record: logging.LogRecord) -> None:
    pass


@contextlib.contextmanager
def logged(folder: str) -> Iterator[None]:
  """Context that appends warnings and errors of all libraries, with their tracebacks, to <folder>/train.log.

  The first of them makes the file; an object store gets none.
  """
  if "://" in folder:
    yield
    return
  handler = _LogFile(os.path.join(folder, LOG), delay=True, encoding="utf-8")
  handler.setLevel(logging.WARNING)
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
  logging.getLogger().addHandler(handler)
  try:
    yield
  finally:
    logging.getLogger().removeHandler(handler)
    with contextlib.suppress(OSError):
      handler.close()
