"""Words, digests and a report of bytes for both ways of a conversion."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from pflow_jax.files.progress import progress
from pflow_jax.mesh.distributed import is_first

_MB = 10**6


def digest(value: Any) -> str:
  """Returns a hash of a value in JSON."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def in_words(nbytes: int) -> str:
  """Returns a size in MB or GB."""
  return f"{nbytes / 10**9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 10**6:.2f} MB"


@contextlib.contextmanager
def megabytes(total: int, what: str) -> Iterator[Callable[[int], None]]:
  """Yields a function to report the bytes that are done since; the bar counts whole megabytes.

  Args:
    total: bytes in all.
    what: word for it.
  """
  done, shown, whole = 0, 0, max(total // _MB, 1)
  with progress(whole, 0, what, not is_first(), unit="MB") as report:

    def add(nbytes: int) -> None:
      nonlocal done, shown
      done += nbytes
      now = whole if done >= total else done // _MB
      if now > shown:
        shown = now
        report.update(now)

    yield add
