"""Faults of a training in a real process: a second writer, a full disk, a folder that goes, a closed output."""

import json
import os
import re
import signal
import subprocess

import pytest

from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.files.lock import LOCK
from pflow_jax.files.output import LOG
from tests.programs import ROOT, command, environment, pflow
from tests.test_processes import FLAGS, MINUTE, steps_logged, wait_for

pytestmark = pytest.mark.slow

LOCAL = ("bash", "launch/local.sh", "train")
ENDLESS = (*FLAGS, "--config.train.log_every=1", "--config.train.steps=1000000")


@pytest.fixture
def start(tmp_path):
  """Starts `pflow train`; what it says of errors goes to a file. Whatever still runs at the end is killed."""
  children = []

  def start(workdir, *flags, prefix=(), program=(), **options):
    errors = tmp_path / f"errors{len(children)}"
    args = [*prefix, *(program or command("train")), *ENDLESS, *flags, f"--workdir={workdir}"]
    env = environment() | {"PFLOW_RESCUE_DIR": str(tmp_path / "rescue")}
    with errors.open("w") as stderr:
      options = {"stdout": subprocess.DEVNULL, "start_new_session": True} | options
      child = subprocess.Popen(args, stderr=stderr, cwd=ROOT, env=env, text=True, **options)
    child.errors = errors
    children.append(child)
    return child

  yield start
  for child in children:
    if child.poll() is None:
      os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def ended(child):
  """Exit code, and the one sentence on it."""
  code = child.wait(3 * MINUTE)
  said = child.errors.read_text()
  assert "Traceback" not in said
  (sentence,) = [line for line in said.splitlines() if line.startswith("pflow: ")]
  return code, sentence


def test_a_closed_output_two_writers_and_a_hang_up(start, tmp_path):
  workdir = tmp_path / "run"
  first = start(workdir, stdout=subprocess.PIPE)
  first.stdout.readline()
  first.stdout.close()  # as of `| head -1`
  wait_for(lambda: len(steps_logged(workdir)) > 4)
  second = pflow("train", *ENDLESS, f"--workdir={workdir}", check=False)
  assert second.returncode == 2
  assert f"{workdir} is being written by 'pflow train', process {first.pid} on " in second.stderr
  assert "--force takes it over" in second.stderr
  rows = len(steps_logged(workdir))
  wait_for(lambda: len(steps_logged(workdir)) > rows)
  forced = start(workdir, "--force")
  code, sentence = ended(first)
  assert (code, f"was taken over by 'pflow train', process {forced.pid} on " in sentence) == (2, True)
  taken = max(steps_logged(workdir))
  wait_for(lambda: forced.poll() is not None or max(steps_logged(workdir), default=0) > taken + 1)
  forced.send_signal(signal.SIGHUP)
  code, sentence = ended(forced)
  assert code == 130
  stopped = int(re.search(r"stopped at step (\d+), which is saved", sentence)[1])
  assert newest_step(workdir / "checkpoints") == stopped
  steps = steps_logged(workdir)
  assert steps == sorted(set(steps))
  # The first one was refused the row of its last step, which it had saved.
  assert len(steps) >= stopped - 1
  assert not (workdir / LOCK).exists()


def test_a_full_disk_and_a_folder_that_goes(start, tmp_path):
  full, moved = tmp_path / "full", tmp_path / "moved"
  # No file of more than 32 KiB, which a checkpoint has and the log has not.
  filled = start(full, prefix=("bash", "-c", 'ulimit -f 32; exec "$@"', "bash"))
  mover = start(moved)
  wait_for(lambda: newest_step(moved / "checkpoints") is not None and len(steps_logged(moved)) > 4)
  moved.rename(tmp_path / "elsewhere")
  code, sentence = ended(mover)
  assert code == 2
  assert re.search(f"{moved}.*(was removed, emptied or unmounted|No such file)", sentence)
  (rescued,) = (tmp_path / "rescue").glob("*moved*")
  step = int(re.search(f"step (\\d+) is saved in {rescued}: go on with --workdir={rescued}", sentence)[1])
  assert newest_step(rescued / "checkpoints") == step >= max(steps_logged(tmp_path / "elsewhere"))
  assert json.loads((rescued / "config.json").read_text())["train"]["steps"] == 1_000_000
  code, sentence = ended(filled)
  assert code == 1
  assert "File too large" in sentence
  assert "could not be saved elsewhere either" in sentence
  assert list((tmp_path / "rescue").iterdir()) == [rescued], "nothing that is cut short is left"
  assert newest_step(full / "checkpoints") is None
  assert "Traceback" in (full / LOG).read_text()
  assert not (full / LOCK).exists()


def test_a_launcher_does_not_start_again_what_was_taken_over_or_saved_elsewhere(start, tmp_path):
  """It would take the workdir back; train from the first step where a disk was mounted, or save a copy at each try."""
  taken, moved = tmp_path / "taken", tmp_path / "moved"
  holder, mover = start(taken, "--force", program=LOCAL), start(moved, program=LOCAL)
  wait_for(lambda: len(steps_logged(taken)) > 4 and newest_step(moved / "checkpoints") is not None)
  moved.rename(tmp_path / "elsewhere")
  forced = start(taken, "--force")
  code, sentence = ended(holder)
  assert (code, f"was taken over by 'pflow train', process {forced.pid} on " in sentence) == (2, True)
  code, sentence = ended(mover)
  assert (code, "go on with --workdir=" in sentence) == (2, True)
  assert "restart" not in holder.errors.read_text() + mover.errors.read_text()
  assert not (moved / "config.json").exists()
  assert len(list((tmp_path / "rescue").iterdir())) == 1
  rows = len(steps_logged(taken))
  wait_for(lambda: len(steps_logged(taken)) > rows)
  forced.send_signal(signal.SIGTERM)
  assert ended(forced)[0] == 130


def test_a_launcher_tries_again_while_one_on_another_machine_gives_signs_of_life(start, tmp_path):
  """As a preempted one does, whose job is started anew elsewhere, until its last save is complete."""
  lock = tmp_path / "run" / LOCK
  lock.parent.mkdir()
  lock.write_text(json.dumps({"machine": ["elsewhere"], "host": "elsewhere", "pid": 1, "program": "pflow train"}))
  local = start(lock.parent, program=LOCAL)

  def refused():
    os.utime(lock)
    return "restart 1 of 3" in local.errors.read_text()

  wait_for(refused)
  lock.unlink()
  wait_for(lambda: len(steps_logged(lock.parent)) > 4)
  local.send_signal(signal.SIGTERM)
  assert local.wait(MINUTE) == 130
  assert "is being written by 'pflow train', process 1 on elsewhere" in local.errors.read_text()
