"""The lines of a metrics log: a file that grows, or an object of a store, which does not."""

from __future__ import annotations

import json
import logging
import math
import pathlib
import time

from etils import epath

from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import is_remote

logger = logging.getLogger(__name__)

STORE_INTERVAL = 30.0  # seconds between two writes of a whole file to an object store, whose objects do not grow


def open_lines(path: epath.Path, last: int | None) -> Lines:
  """Opens a log to go on with after step `last`, see `kept_lines`."""
  kept = kept_lines(path, last)
  return _Objects(path, kept) if is_remote(path) else Lines(path, kept)


def kept_lines(path: epath.Path, last: int | None = None) -> list[str]:
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


class Lines:
  """A text file that grows by lines, which survive a killed process."""

  def __init__(self, path: epath.Path, kept: list[str]):
    write_atomically(path, "".join(kept))
    self._file = pathlib.Path(path).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115 (`close` closes it)

  def write(self, line: str) -> None:
    """Adds a line, with its end."""
    self._file.write(line)

  def close(self) -> None:
    """Closes the log; an object is stored in full."""
    self._file.close()


class _Objects(Lines):
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
