"""Damaged models and runs end in a ValueError of one sentence, soon, with little memory, and without running code.

PFLOW_FUZZ_CASES is the number of cases a seed, PFLOW_FUZZ_FIRST the first of them.
"""

import os
import random
import resource
import shutil
import signal
import traceback
import warnings

import jax
import pytest

from tests.fuzz.seeds_convert import SEEDS, damage

CASES = int(os.environ.get("PFLOW_FUZZ_CASES", 12))
FIRST = int(os.environ.get("PFLOW_FUZZ_FIRST", 0))
SECONDS, MEMORY = 30, 2 * 2**30  # of a case, and of all cases of a seed

pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(read):
  """What is wrong with how `read` ends; None if nothing is."""

  def late(*_):
    raise TimeoutError(f"more than {SECONDS} s")

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(SECONDS)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      read()
  except ValueError as error:
    if "\n" in str(error) or not 15 <= len(str(error)) <= 3000 or not str(error).isprintable():
      return f"a message of {len(str(error))} letters: {str(error)[:500]!r}"
  except BaseException:
    return traceback.format_exc()
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
  return None


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("seeds")


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_models_end_in_a_sentence(name, shared, monkeypatch):
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    folder = shared / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    path, read = SEEDS[name](folder)
    read()
    kept = shared / f"{name}.kept"
    if path.is_dir():
      shutil.copytree(path, kept)
    else:
      shutil.copy(path, kept)
    before, wrong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for case in range(FIRST, FIRST + CASES):
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
      if kept.is_dir():
        shutil.copytree(kept, path)
      else:
        shutil.copy(kept, path)
      how = damage(random.Random(f"{name} {case}"), path)
      if problem := outcome(read):
        wrong.append(f"case {case} ({how}): {problem}")
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:6])
    assert not (folder / "ran").exists()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"
