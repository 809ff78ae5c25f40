"""Damaged files of data end in a ValueError of one sentence, soon, and with little memory."""

import os
import pathlib
import random
import resource
import signal
import traceback
import warnings

import pytest

from tests.fuzz.mutations import copy, damage
from tests.fuzz.seeds_data import SEEDS, SLOW_SEEDS

CASES = int(os.environ.get("PFLOW_FUZZ_CASES", 15))  # of each kind of file
FIRST = int(os.environ.get("PFLOW_FUZZ_FIRST", 0))
KINDS = SEEDS | SLOW_SEEDS if "PFLOW_FUZZ_CASES" in os.environ else SEEDS
SECONDS, MEMORY = 30, 2**30  # of a case, and of all cases of a kind


class Late(BaseException):
  """A case that takes too long; no reader catches it."""


def outcome(read) -> str | None:
  """What is wrong with how `read` ends; None if nothing is."""

  def late(*_):
    raise Late

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(SECONDS)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      read()
  except ValueError as error:
    if isinstance(error.__cause__, MemoryError):
      return traceback.format_exc()
    if "\n" in str(error) or len(str(error)) > 2000 or len(str(error)) < 15:
      return f"a message of {len(str(error))} letters: {str(error)[:300]!r}"
  except (Exception, Late):
    return traceback.format_exc()
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
  return None


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_a_sentence(kind, tmp_path):
  copied = tmp_path / "copied"  # what is read lies there
  copied.mkdir()
  path, read = KINDS[kind](copied)
  assert outcome(read) is None
  read()
  kept = tmp_path / "kept"
  copied.rename(kept)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  wrong = []
  for case in range(FIRST, FIRST + CASES):
    copy(kept, copied)
    how = damage(random.Random(f"{kind} {case}"), path)
    if problem := outcome(read):
      wrong.append(f"case {case} ({how}): {problem}")
  assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:5])
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
  assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"


def test_every_set_that_is_read_from_files_has_a_seed():
  from pflow_jax.data import registry

  text = pathlib.Path(__file__).with_name("seeds_data.py").read_text()
  for pattern in registry._OPEN_SOURCES:
    assert f'"{pattern.partition(":")[0]}:' in text, pattern
