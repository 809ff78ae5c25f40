"""Runs of somebody else, damaged: every command on one ends in a sentence."""

import os
import random
import shutil

import pytest

from tests.fuzz.commands import problem_of, stop_at_border
from tests.fuzz.seeds_workdirs import damage, write_runs

CASES = int(os.environ.get("PFLOW_FUZZ_CASES", 20))  # of each command and damaged run
FIRST = int(os.environ.get("PFLOW_FUZZ_FIRST", 0))

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def commands(tmp_path, monkeypatch):
  stop_at_border(monkeypatch)
  student, out = tmp_path / "student", tmp_path / "out"
  return {
    "sample": ("sample", "--workdir", student, "--num", 2, "--out", out / "s"),
    "evaluate": ("evaluate", "--workdir", student, "--out", out),
    "merge": ("merge", "--workdir", student, "--out", out),
    "convert": ("convert", "--source", student, "--out", out),
  }


@pytest.mark.parametrize("damaged", ["student", "teacher"])
@pytest.mark.parametrize("command", ["sample", "evaluate", "merge", "convert"])
def test_a_damaged_run_ends_in_a_sentence(command, damaged, commands, tmp_path):
  write_runs(tmp_path)
  kept = tmp_path / "kept"
  shutil.copytree(tmp_path / damaged, kept)
  assert problem_of(*commands[command]) is None
  wrong = []
  for case in range(FIRST, FIRST + CASES):
    shutil.rmtree(tmp_path / damaged)
    shutil.copytree(kept, tmp_path / damaged)
    how = damage(random.Random(f"{command} {damaged} {case}"), tmp_path / damaged)
    if problem := problem_of(*commands[command]):
      wrong.append(f"case {case} ({how}): {problem}")
  assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:8])
