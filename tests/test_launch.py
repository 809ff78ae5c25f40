"""launch/local.sh: restarts what dies, and does not repeat a mistake."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path):
  """A copy of launch/ beside a stand-in for pflow that ends with the codes in the file `codes`, one a call."""
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  stand_in = tmp_path / ".venv" / "bin" / "pflow"
  stand_in.parent.mkdir(parents=True)
  stand_in.write_text(
    "#!/usr/bin/env bash\n"
    f'echo "$*" >> {tmp_path}/calls\n'
    f"code=$(head -n 1 {tmp_path}/codes)\n"
    f"sed -i 1d {tmp_path}/codes\n"
    "exit ${code:-0}\n"
  )
  stand_in.chmod(0o755)

  def run(*args, codes=(), **env):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    script = tmp_path / "launch" / "local.sh"
    run = subprocess.run(["bash", script, *args], capture_output=True, text=True, env=os.environ | env)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return run, calls

  return run


def test_a_killed_run_is_started_again_with_the_same_flags(project):
  run, calls = project("train", "--workdir", "w", codes=[137, 143, 0])
  assert run.returncode == 0
  assert calls == ["train --workdir w"] * 3
  assert "restart 2" in run.stderr


def test_restarts_end(project):
  run, calls = project("train", codes=[137] * 9, RESTARTS="2")
  assert (run.returncode, len(calls)) == (137, 3)


@pytest.mark.parametrize("code", [2, 130])
def test_mistakes_and_requested_stops_are_not_repeated(project, code):
  run, calls = project("train", codes=[code, 0])
  assert (run.returncode, len(calls)) == (code, 1)


def test_other_failures_are_tried_again(project):
  run, calls = project("train", codes=[1, 0])
  assert (run.returncode, len(calls)) == (0, 2)


def test_a_stopped_demo_does_not_go_on_with_a_half_trained_teacher(project):
  run, calls = project("demo", codes=[130])
  assert (run.returncode, len(calls)) == (130, 1)


def test_demo_trains_a_teacher_and_its_students_and_evaluates_them_together(project):
  run, calls = project("demo", "out", "7")
  assert run.returncode == 0
  assert [call.split()[0] for call in calls] == ["train"] * 4 + ["evaluate"]
  assert all("--config.seed=7" in call for call in calls[:4])
  assert all("--config.teacher.workdir=out/teacher" in call for call in calls[1:4])
  assert calls[4].count("--also") == 2


def test_usage_without_a_command(project):
  run, calls = project()
  assert run.returncode == 2
  assert "launch/local.sh demo" in run.stdout
  assert not calls


def test_scripts_pass_shellcheck():
  checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if checker is None:
    pytest.skip("shellcheck is not installed")
  for script in [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]:
    run = subprocess.run([checker, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
