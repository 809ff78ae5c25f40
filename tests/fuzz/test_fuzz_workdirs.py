"""Runs of somebody else, damaged: every command on one ends in a sentence."""

import pytest

from pflow_jax.training import workdir
from tests.fuzz.cases import check_cases
from tests.fuzz.commands import problem_of, stop_at_border
from tests.fuzz.mutations import OF_FILES, damage, place
from tests.fuzz.seeds_workdirs import write_runs

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


def damage_run(rng, run):
  """Mostly its config, which says most; else any file of it, those of its checkpoint among them."""
  match rng.randrange(8):
    case 0:
      part = rng.choice([workdir.CONFIG, workdir.CHECKPOINTS])
      return f"{part}: {place(rng, run / part)}"
    case 1 | 2 | 3:
      return damage(rng, run)
  return f"config: {OF_FILES['json'][0](rng, run / workdir.CONFIG)}"


@pytest.mark.parametrize("damaged", ["student", "teacher"])
@pytest.mark.parametrize("command", ["sample", "evaluate", "merge", "convert"])
def test_a_damaged_run_ends_in_a_sentence(command, damaged, commands, tmp_path):
  write_runs(tmp_path)
  problem = lambda: problem_of(*commands[command])
  check_cases(f"{command} {damaged}", tmp_path / damaged, problem, damage_run, 25)
