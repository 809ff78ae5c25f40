"""Who joins whom, and on which addresses processes listen for it."""

import os
import socket
import subprocess
import sys

import pytest

from pflow_jax.mesh import distributed
from tests.programs import ROOT, environment, listening

PROGRAM = """
import sys
from pflow_jax.mesh.distributed import join
arguments = sys.argv[1:]
join(*(arguments[:1] + [int(number) for number in arguments[1:]]), timeout=60)
print("joined", flush=True)
sys.stdin.read()
"""


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def slurm_step(port, task):
  """The environment of one of two tasks on this machine, as SLURM sets it."""
  tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
  step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": socket.gethostname(), "JAX_COORDINATOR_PORT": str(port)}
  return tasks | step


@pytest.mark.parametrize("where", ["told", "slurm"])
def test_nobody_listens_on_all_interfaces(where):
  port = free_port()
  processes = []
  for i in range(2):
    args = (f"127.0.0.1:{port}", "2", str(i)) if where == "told" else ()
    env = environment() | (slurm_step(port, i) if where == "slurm" else {})
    args = [sys.executable, "-c", PROGRAM, *args]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    processes.append(subprocess.Popen(args, env=env, cwd=ROOT, text=True, **pipes))
  try:
    for process in processes:
      while (line := process.stdout.readline()) != "joined\n":
        assert line, "a process has not joined"
    hosts = {i: {host for host, _ in listening(process.pid)} for i, process in enumerate(processes)}
    coordinator = {host for host, at in listening(processes[0].pid) if at == port}
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert len(coordinator) == 1
  # For the runtime and for what collects between CPUs, the address of one interface; on one machine it is the same.
  assert hosts == {0: coordinator, 1: coordinator}
  assert not coordinator & {"0.0.0.0", "::"}
  if where == "told":
    assert coordinator == {"127.0.0.1"}


@pytest.mark.parametrize(
  "coordinator",
  [
    "host",
    "host:",
    ":80",
    "host:0",
    "host:65536",
    "host:٣",
    "host:-1",
    "a b:80",
    "[::1:80",
    "::1",
    "host:80\n",
    "a[$(x)]:1",
  ],
)
def test_a_coordinator_is_a_host_and_a_port(coordinator):
  with pytest.raises(ValueError, match="--coordinator: expected host:port of process 0, got"):
    distributed.join(coordinator, 2, 0)


@pytest.mark.parametrize("coordinator", ["0.0.0.0:80", "[::]:80"])
def test_all_interfaces_are_no_address_of_a_coordinator(coordinator):
  with pytest.raises(ValueError, match="at which the others reach process 0"):
    distributed.join(coordinator, 2, 0)


@pytest.mark.parametrize(
  ("host", "leads_to", "seen"),
  [
    ("node", ["127.0.1.1"], "10.0.0.5"),  # as Debian has it
    ("node", ["10.0.0.7", "127.0.1.1"], "node"),
    ("other", ["10.0.0.9"], "other"),
    ("localhost", ["127.0.0.1", "::1"], "localhost"),
    ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
  ],
)
def test_a_name_that_leads_to_loopback_on_its_own_machine(monkeypatch, host, leads_to, seen):
  monkeypatch.setattr(distributed, "_addresses", lambda name: leads_to)
  monkeypatch.setattr(distributed, "_facing", lambda name: "10.0.0.5")
  assert distributed._as_others_see(host) == seen


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1"])
def test_loopback_is_faced_by_the_same_address(host):
  assert distributed._facing(host) == host


@pytest.mark.parametrize("tasks", ["1", "", "a[$(x)]"])
def test_a_slurm_allocation_without_a_step_is_a_process_alone(monkeypatch, tasks):
  monkeypatch.setitem(os.environ, "SLURM_PROCID", "0")
  monkeypatch.setitem(os.environ, "SLURM_STEP_NUM_TASKS", tasks)
  distributed.join()


@pytest.mark.parametrize(
  "error", [ValueError("a mistake"), FileNotFoundError(2, "no file"), MemoryError("none"), KeyError("odd"), None]
)
def test_what_the_first_process_finds_or_raises_all_have(error, monkeypatch):
  """The others take part in the exchange whatever the first one raises, or they would wait for ever."""
  told, others = [], None

  def compute():
    if error is not None:
      raise error
    return [3, [[1, "damaged"]]]

  def from_first(value):
    told.append(value)
    return value if others is None else next(others)

  monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
  monkeypatch.setattr(distributed, "from_first", from_first)

  def outcome(first):
    monkeypatch.setattr(distributed, "is_first", lambda: first)
    try:
      return distributed.agreed(compute if first else lambda: pytest.fail("called"))
    except Exception as raised:
      return raised

  mine = outcome(True)
  assert len(told) == 2
  others = iter(list(told))
  theirs = outcome(False)
  if error is None:
    assert mine == theirs == [3, [[1, "damaged"]]]
  else:
    kind = next((k for k in (ValueError, MemoryError, OSError) if isinstance(error, k)), RuntimeError)
    assert (mine, type(theirs), str(theirs)) == (error, kind, str(error))
