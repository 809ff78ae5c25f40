"""Many damaged copies of a valid file, each of which must end in a sentence.

PFLOW_FUZZ_CASES is the number of cases of everything that is damaged, PFLOW_FUZZ_FIRST the first of them.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil

FIRST = int(os.environ.get("PFLOW_FUZZ_FIRST", 0))
MANY = "PFLOW_FUZZ_CASES" in os.environ
SECONDS, MEMORY = 30, 2 * 2**30  # of a case


class Late(BaseException):
  """A case that takes too long; no reader catches it."""


def limited(call: Callable[[], Any], seconds: int = SECONDS) -> Any:
  """Returns what `call` does; raises Late where that takes too long."""

  def late(*_: Any) -> None:
    raise Late

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(seconds)
  try:
    return call()
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def problem_of_reader(read: Callable[[], Any]) -> str | None:
  """What is wrong with how `read` ends; None if it reads all, or raises a ValueError of one sentence."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      limited(read)
  except ValueError as error:
    if isinstance(error.__cause__, MemoryError):
      return traceback.format_exc()
    if not str(error).isprintable() or not 15 <= len(str(error)) <= 3000:
      return f"a message of {len(str(error))} letters: {str(error)[:500]!r}"
  except (Exception, Late, SystemExit):
    return traceback.format_exc()
  return None


def check_cases(
  name: str,
  path: pathlib.Path,
  problem: Callable[[], str | None],
  damage: Callable[[random.Random, pathlib.Path], str],
  count: int,
) -> None:
  """Asserts that there is no problem with `path` as it is, nor with `count` damaged copies of it.

  Args:
    name: of what is read, which the cases are drawn by.
    path: a file or folder; what it was at first is kept in <path>.kept meanwhile.
    problem: reads it, and returns what is wrong with how that ended.
    count: of cases; PFLOW_FUZZ_CASES stands in for it.
  """
  count = int(os.environ.get("PFLOW_FUZZ_CASES", count))
  assert problem() is None
  kept = path.with_name(f"{path.name}.kept")
  path.rename(kept)
  wrong = []
  for case in range(FIRST, FIRST + count):
    _copy(kept, path)
    how = damage(random.Random(f"{name} {case}"), path)
    with _little_memory():
      told = problem()
    if told:
      wrong.append(f"case {case} ({how}): {told}")
  assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:8])


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
  """Has the process end in a MemoryError that asks for more than MEMORY on top of what it has."""
  before = resource.getrlimit(resource.RLIMIT_DATA)  # what is allocated, without files that are mapped
  resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + MEMORY, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_DATA, before)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes `target` a copy of `source`, whatever was there."""
  if target.is_dir() and not target.is_symlink():
    shutil.rmtree(target)
  else:
    target.unlink(missing_ok=True)
  (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
