"""Runs of several real processes: they stop together, resume on other machines, and survive being killed."""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.checkpoints.steps import newest_step
from tests.programs import ROOT, command, environment, listening

pytestmark = pytest.mark.slow

FLAGS = (
  "--config=configs/checkerboard.py:teacher,quicktest",
  "--config.optimizer.schedule=constant",
  "--config.train.tensorboard=False",
  "--config.train.checkpoint_every=3",
)
MINUTE = 60
KILLS = int(os.environ.get("PFLOW_KILLS", 6))  # `make fuzz` has twenty


@dataclasses.dataclass
class Processes:
  """N processes of one program, each with its own fake devices; their output is in files."""

  folder: pathlib.Path
  workdir: pathlib.Path
  count: int
  devices: int
  flags: tuple[str, ...]
  program: str = "train"
  own: tuple[str, ...] = FLAGS  # of a training

  def __enter__(self):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    self.folder.mkdir(parents=True, exist_ok=True)
    self.children = []
    for i in range(self.count):
      join = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={self.count}", f"--process_id={i}")
      with (self.folder / f"log{i}").open("w") as log:
        own = self.own if self.program == "train" else ()
        args = command(self.program, *own, *self.flags, f"--workdir={self.workdir}", *join)
        child = subprocess.Popen(args, stdout=log, stderr=log, cwd=ROOT, env=environment(self.devices))
      self.children.append(child)
    return self

  def __exit__(self, *_):
    for child in self.children:
      if child.poll() is None:
        child.kill()
      child.wait()

  def wait(self, timeout=3 * MINUTE):
    end = time.monotonic() + timeout
    return [child.wait(max(end - time.monotonic(), 0.1)) for child in self.children]

  def log(self, i):
    return (self.folder / f"log{i}").read_text()


def steps_logged(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for(condition, timeout=3 * MINUTE):
  end = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < end, "it took too long"
    time.sleep(0.05)


def run(folder, workdir, count, devices, steps, *flags):
  with Processes(folder, workdir, count, devices, (f"--config.train.steps={steps}", *flags)) as processes:
    codes = processes.wait()
    assert codes == [0] * count, processes.log(0)
    return processes.log(0)


def samples(folder, workdir, count, devices):
  flags = ("--num=6", "--config.sample.nfe=(3,)", "--config.sample.h=0.5", f"--out={folder}/drawn")
  with Processes(folder, workdir, count, devices, flags, "sample") as processes:
    assert processes.wait() == [0] * count, processes.log(0)
  with np.load(folder / "drawn.npz") as arrays:
    return arrays["x0_nfe3"]


def final_params(workdir):
  return {which: load_params(workdir / "checkpoints", which=which) for which in ("params", "ema")}


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def children_of(local):
  """Ids of the pflow processes of a launch/local.sh."""
  found = subprocess.run(["pgrep", "-f", "-P", str(local), "--", "--process_id="], capture_output=True, text=True)
  return [int(pid) for pid in found.stdout.split()]


def test_stopped_together_and_resumed_on_other_machines(tmp_path):
  """SIGTERM to one of two processes; then one process and four go on to what an undisturbed run comes to."""
  workdir = tmp_path / "run"
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.mesh.min_size=64")
  with Processes(tmp_path / "two", workdir, 2, 4, ("--config.train.steps=1000000", *mesh)) as two:
    wait_for(lambda: len(steps_logged(workdir)) > 4)
    two.children[1].send_signal(signal.SIGTERM)
    assert two.wait() == [130, 130]
    stopped = [int(re.search(r"stopped at step (\d+)", two.log(i))[1]) for i in (0, 1)]
    for i in (0, 1):
      assert f"process {i} of 2: 4 of 8 devices" in two.log(i)
      assert f"process {i} of 2: a mesh of 8 devices: data 2 x fsdp 4" in two.log(i)
  assert stopped[0] == stopped[1] == newest_step(workdir / "checkpoints")
  end = stopped[0] + 4
  elsewhere = tmp_path / "elsewhere"
  subprocess.run(["cp", "-r", workdir, elsewhere], check=True)
  assert f"resuming {workdir} from step {stopped[0]}" in run(tmp_path / "one", workdir, 1, 8, end, *mesh)
  run(tmp_path / "four", elsewhere, 4, 2, end)  # data parallel, too: another mesh
  run(tmp_path / "whole", tmp_path / "undisturbed", 1, 8, end)
  whole = final_params(tmp_path / "undisturbed")
  assert_same(final_params(workdir), whole)
  assert_same(final_params(elsewhere), whole)
  assert steps_logged(workdir) == list(range(1, end + 1)), "metrics come from one process, each step once"
  drawn = [samples(tmp_path / f"samples{count}", workdir, count, 8 // count) for count in (1, 2)]
  assert drawn[0].shape == (6, 2)
  np.testing.assert_allclose(*drawn, atol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_others_end_with_a_message_when_one_is_killed(tmp_path, victim):
  workdir = tmp_path / "run"
  with Processes(tmp_path, workdir, 2, 2, ("--config.train.steps=1000000",)) as two:
    wait_for(lambda: len(steps_logged(workdir)) > 4)
    two.children[victim].kill()
    other = two.children[1 - victim]
    assert other.wait(MINUTE) not in (0, 2, 130)
    assert re.search("(?i)connection|unhealthy|heartbeat|closed", two.log(1 - victim))


def test_told_to_stop_while_it_compiles(tmp_path):
  """A program of one process that has joined, as on any TPU VM: JAX has the signal's handler from the start."""
  with Processes(tmp_path, tmp_path / "run", 1, 2, ("--config.train.steps=1000000",)) as one:
    wait_for(lambda: "a mesh of" in one.log(0))
    one.children[0].send_signal(signal.SIGTERM)
    assert one.wait() == [130]
  assert newest_step(tmp_path / "run" / "checkpoints") < 100


def test_a_missing_process_is_said_in_time(tmp_path):
  start = time.monotonic()
  with Processes(tmp_path, tmp_path / "run", 2, 1, ("--join_timeout=4",)) as two:
    two.children[1].kill()
    assert two.children[0].wait(MINUTE) == 1
  assert time.monotonic() - start < MINUTE
  assert "not all processes came within 4 s. Start the program on every worker" in two.log(0)
  assert not (tmp_path / "run").exists()


def test_a_mistake_ends_all_of_them(tmp_path):
  with Processes(tmp_path, tmp_path / "run", 2, 2, ("--config.train.batch_size=6",)) as two:
    codes = two.wait()
    assert 2 in codes
    assert 0 not in codes
    assert "config.train.batch_size: expected a multiple" in two.log(0) + two.log(1)


def test_processes_of_one_machine_listen_on_loopback_alone(tmp_path):
  flags = (*FLAGS, "--config.train.steps=1000000", f"--workdir={tmp_path}/run")
  log = tmp_path / "log"
  with log.open("w") as out:
    args = ["bash", "launch/local.sh", "train", *flags]
    local = subprocess.Popen(args, stdout=out, stderr=out, cwd=ROOT, env=environment() | {"PROCESSES": "2"})
  try:
    wait_for(lambda: log.read_text().count("a mesh of 2 devices") == 2)
    found = listening(*children_of(local.pid))
    port = int(re.search(r"2 at 127.0.0.1:(\d+)", log.read_text())[1])
    assert ("127.0.0.1", port) in found
    assert {host for host, _ in found} == {"127.0.0.1"}
  finally:
    left = children_of(local.pid)
    local.kill()
    for pid in left:
      os.kill(pid, signal.SIGKILL)
    local.wait()


def test_no_run_is_lost_to_kills(tmp_path):
  """One of two processes is killed at a random moment, KILLS times, half of them after it has begun to train."""
  workdir, draw = tmp_path / "run", random.Random(0)
  flags = (*FLAGS, "--config.train.sample_every=5", f"--workdir={workdir}")
  env = environment() | {"PROCESSES": "2", "DEVICES": "2", "RESTARTS": "100", "GRACE": "1"}

  def start(steps, log):
    args = ["bash", "launch/local.sh", "train", *flags, f"--config.train.steps={steps}"]
    return subprocess.Popen(args, stdout=log, stderr=log, cwd=ROOT, env=env)

  with (tmp_path / "log").open("w") as log:
    local = start(1_000_000, log)
    try:
      gone = set()
      for i in range(KILLS):
        wait_for(lambda: len(set(children_of(local.pid)) - gone) == 2)
        victims, before = children_of(local.pid), steps_logged(workdir)
        if i % 2 == 0:
          time.sleep(draw.uniform(0, 6))  # importing, joining, compiling, restoring
        else:
          wait_for(lambda before=before: steps_logged(workdir) not in ([], before))
          time.sleep(draw.uniform(0, 1.5))  # stepping, saving, sampling
        os.kill(draw.choice(victims), signal.SIGKILL)
        gone.update(victims)
      wait_for(lambda: len(steps_logged(workdir)) > 10)
      local.send_signal(signal.SIGTERM)
      assert local.wait(2 * MINUTE) == 130, (tmp_path / "log").read_text()[-3000:]
    finally:
      if local.poll() is None:
        left = children_of(local.pid)
        local.kill()
        for pid in left:
          os.kill(pid, signal.SIGKILL)
    step = newest_step(workdir / "checkpoints")
    assert step > 10
    assert start(step + 3, log).wait(3 * MINUTE) == 0, (tmp_path / "log").read_text()[-3000:]
  assert newest_step(workdir / "checkpoints") == step + 3
  assert not list((workdir / "checkpoints").glob("*.damaged*"))
  steps = steps_logged(workdir)
  assert steps == sorted(set(steps))
  run(tmp_path / "whole", tmp_path / "undisturbed", 2, 2, step + 3)
  assert_same(final_params(workdir), final_params(tmp_path / "undisturbed"))
