"""The scripts in launch/, end to end, against stand-ins (tests/launch/) for pflow, gcloud, SLURM and TPU workers."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from packaging.requirements import Requirement

from pflow_jax.commands import cli

ROOT = pathlib.Path(__file__).parents[1]
STAND_INS = ROOT / "tests" / "launch"


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

  def run(*args, codes=(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    script = tmp_path / "launch" / "local.sh"
    run = subprocess.run(["bash", script, *args], stdout=stdout, stderr=stderr, text=True, env=os.environ | env)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return run, calls

  return run


def test_a_killed_run_is_started_again_with_the_same_flags(project):
  run, calls = project("train", "--workdir", "w", codes=[137, 143, 0])
  assert run.returncode == 0
  assert calls == ["train --workdir w"] * 3
  assert "restart 2" in run.stderr


@pytest.mark.parametrize("program", ["latents", "convert", "sample", "evaluate"])
def test_other_programs_are_started_again_too(project, program):
  run, calls = project(program, "--out", "a b", codes=[137, 0])
  assert run.returncode == 0
  assert calls == [f"{program} --out a b"] * 2
  assert f"pflow {program} ended with code 137; restart 1" in run.stderr


@pytest.mark.parametrize("program", ["plan", "train latents", "-train", "*", "demos", "find_port"])
def test_what_is_no_program_to_be_started_again_is_refused(project, program):
  run, calls = project(program)
  assert (run.returncode, calls) == (2, [])
  assert "launch/local.sh demo" in run.stdout


def test_programs_are_commands_of_pflow():
  text = (ROOT / "launch" / "settings.sh").read_text()
  programs = re.search(r"^PROGRAMS='(.*)'$", text, re.M)[1].split()
  assert programs[0] == "train"
  assert set(programs) < set(cli.COMMANDS)


def test_restarts_end(project):
  run, calls = project("train", codes=[137] * 9, RESTARTS="2")
  assert (run.returncode, len(calls)) == (137, 3)


@pytest.mark.parametrize("code", [2, 130, 141])
def test_mistakes_and_requested_stops_are_not_repeated(project, code):
  run, calls = project("train", codes=[code, 0])
  assert (run.returncode, len(calls)) == (code, 1)


def test_a_closed_output_does_not_end_what_watches_a_run(project):
  reader, writer = os.pipe()
  os.close(reader)
  run, calls = project("train", codes=[1, 137, 0], stdout=writer, stderr=writer)
  os.close(writer)
  assert (run.returncode, len(calls)) == (0, 3)


def test_a_machine_without_pflow(project, tmp_path):
  (tmp_path / ".venv" / "bin" / "pflow").unlink()
  run, _ = project("train", PATH="/usr/bin:/bin")
  assert run.returncode == 2
  assert "pflow is not installed here" in run.stderr


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
  scripts = [
    *(ROOT / "launch").glob("*.sh"),
    ROOT / ".ci" / "run",
    *STAND_INS.glob("*.sh"),
    *STAND_INS.glob("worker/*"),
  ]
  run = subprocess.run([checker, *scripts], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout


# ---- What the tests below share: a project with all stand-ins, whose pflow does what `plan` says.


def until(condition, seconds=20):
  """Waits for a condition, which must come true."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.02)


class Stage:
  """A copy of launch/ in `project`, the stand-ins' state in `state`; or a copy of another stage with all that."""

  def __init__(self, folder, template=None):
    self.project = folder / "project"
    self.state = folder / "state"
    if template is None:
      self.state.mkdir()
      shutil.copytree(ROOT / "launch", self.project / "launch")
    else:
      shutil.copytree(template.state, self.state)
      shutil.copytree(template.project, self.project)
    (folder / "tmp").mkdir()
    self.bin = self.project / ".venv" / "bin"
    self.bin.mkdir(parents=True, exist_ok=True)
    self.put("pflow", f'exec bash {STAND_INS / "pflow.sh"} "$@"')
    self.put("srun", f'exec bash {STAND_INS / "srun.sh"} "$@"')
    self.put("scontrol", f'exec bash {STAND_INS / "scontrol.sh"} "$@"')
    self.put("gcloud", f'exec {sys.executable} -S -E {STAND_INS / "gcloud.py"} "$@"')
    self.put("ssh-add", f"exit $(cat {self.state}/agent 2>/dev/null || echo 0)")
    self.write("job", "JobId=7 JobState=RUNNING PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None")
    inherited = {
      key: value
      for key, value in os.environ.items()
      if key not in ("XLA_FLAGS", "JAX_PLATFORMS", "PROCESSES", "DEVICES") and not key.startswith(("SLURM_", "GIT_"))
    }
    settings = (
      "NAME ZONE TYPE PROJECT VERSION SLICES SPOT RESERVED QUEUED PREPARE RESTARTS SERVICE_ACCOUNT SCOPES LABELS"
    )
    settings += " INTERNAL_IPS IAP NETWORK SUBNETWORK"
    for key in settings.split():
      inherited.pop(key, None)
    self.env = inherited | {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "STANDIN": str(self.state),
      "STANDIN_PFLOW": str(STAND_INS / "pflow.sh"),
      "TMPDIR": str(folder / "tmp"),
      "CLOUDSDK_CONFIG": str(folder / "no-account"),
      "POLL": "0.05",
      "GRACE": "1",
    }

  def put(self, name, line):
    (self.bin / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
    (self.bin / name).chmod(0o755)

  def commit(self):
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(self.project)]
    (self.project / ".gitignore").write_text(".venv/\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
      subprocess.run([*git, *command], check=True)

  def start(self, script, *args, **env):
    """The script as a process, in a group of its own, with its two outputs in self.out and self.err."""
    self.started = getattr(self, "started", 0) + 1
    self.out, self.err = (self.state / f"{name}{self.started}" for name in ("out", "err"))
    with self.out.open("w") as out, self.err.open("w") as err:
      return subprocess.Popen(
        ["bash", str(self.project / "launch" / script), *args],
        env=self.env | env,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
      )

  def run(self, script, *args, **env):
    """The script's exit code."""
    return self.start(script, *args, **env).wait(timeout=60)

  def write(self, path, *lines):
    (self.state / path).parent.mkdir(parents=True, exist_ok=True)
    (self.state / path).write_text("".join(f"{line}\n" for line in lines))

  def read(self, path):
    path = self.state / path
    return path.read_text().splitlines() if path.exists() else []

  def clean(self):
    for process in map(int, self.read("pids")):
      kill(process)


def kill(process):
  """Kills a process if it is a stand-in for pflow: its number may be another's by now."""
  try:
    if b"pflow" in pathlib.Path(f"/proc/{process}/cmdline").read_bytes():
      os.kill(process, signal.SIGKILL)
  except (ProcessLookupError, FileNotFoundError):
    pass


@pytest.fixture
def stage(tmp_path):
  stage = Stage(tmp_path)
  yield stage
  stage.clean()


# ---- launch/local.sh with several processes


def test_processes_get_their_numbers_and_one_port(stage):
  code = stage.run("local.sh", "train", "--workdir", "a b", PROCESSES="3", DEVICES="2", XLA_FLAGS="--xla_x=1")
  assert code == 0, stage.err.read_text()
  calls = [stage.read(f"pflow/p{i}") for i in range(3)]
  port = re.search(r"--coordinator=127.0.0.1:(\d+)", calls[0][0])[1]
  for i in range(3):
    assert calls[i] == [f"train --workdir a b --coordinator=127.0.0.1:{port} --num_processes=3 --process_id={i}"]
  assert sorted(stage.out.read_text().splitlines()) == ["[1] p1 works", "[2] p2 works", "p0 works"]
  assert sorted(stage.err.read_text().splitlines()) == ["[1] p1 warns", "[2] p2 warns", "p0 warns"]
  for line in stage.read("env"):
    assert "--xla_x=1 --xla_force_host_platform_device_count=2 cpu train" in line


def test_one_process_needs_no_port(stage):
  assert stage.run("local.sh", "train", "--workdir", "w") == 0
  assert stage.read("pflow/p0") == ["train --workdir w"]


def test_all_processes_start_again_on_another_port_when_one_is_killed(stage):
  stage.write("plan/p0", "exit 1", "exit 0")
  stage.write("plan/p1", "kill KILL", "exit 0")
  assert stage.run("local.sh", "train", PROCESSES="2") == 0
  ports = [[call.split(":")[1].split()[0] for call in stage.read(f"pflow/p{i}")] for i in range(2)]
  assert ports[0] == ports[1]
  assert len(set(ports[0])) == 2
  assert "restart 1 of 3" in stage.err.read_text()


def test_processes_that_outlive_a_failed_one_are_killed_and_not_blamed(stage):
  stage.write("plan/p0", "deaf")
  stage.write("plan/p1", "exit 3")
  start = time.monotonic()
  assert stage.run("local.sh", "train", PROCESSES="2", RESTARTS="0", GRACE="1") == 3
  assert 1 <= time.monotonic() - start < 10
  assert "1 of 2 processes still run" in stage.err.read_text()


def test_processes_that_outlive_one_that_is_done_are_left_alone(stage):
  stage.write("plan/p0", "run 0")
  script = stage.start("local.sh", "train", PROCESSES="2", GRACE="0")
  until(lambda: len(stage.read("pids")) == 2)
  time.sleep(1.5)
  script.send_signal(signal.SIGTERM)
  assert script.wait(timeout=20) == 0
  assert len(stage.read("pflow/p0")) == 1


@pytest.mark.parametrize(
  ("ends", "code", "tries"),
  [(("1", "130", "2"), 2, 1), (("2", "130", "1"), 2, 1), (("1", "130", "1"), 130, 1), (("0", "7", "0"), 7, 2)],
)
def test_a_mistake_goes_before_a_stop_and_a_stop_before_a_failure(stage, ends, code, tries):
  for i, end in enumerate(ends):
    stage.write(f"plan/p{i}", f"exit {end}", f"exit {end}")
  assert stage.run("local.sh", "train", PROCESSES="3", RESTARTS="1") == code
  assert len(stage.read("pflow/p0")) == tries


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_reaches_all_processes_which_save(stage, number, processes):
  for i in range(processes):
    stage.write(f"plan/p{i}", "run")
  script = stage.start("local.sh", "train", PROCESSES=str(processes))
  until(lambda: len(stage.read("pids")) == processes)
  script.send_signal(number)
  assert script.wait(timeout=20) == 130
  assert {"p0 saves", "[1] p1 saves"}.issuperset(
    saved := {x for x in stage.out.read_text().splitlines() if "saves" in x}
  )
  assert len(saved) == processes
  assert len(stage.read("pflow/p0")) == 1


def test_a_process_that_dies_of_the_stop_is_no_failure(stage):
  stage.write("plan/p0", "run 143")
  script = stage.start("local.sh", "train")
  until(lambda: stage.read("pids"))
  script.send_signal(signal.SIGTERM)
  assert script.wait(timeout=20) == 130
  assert len(stage.read("pflow/p0")) == 1


def test_a_second_interrupt_ends_at_once(stage):
  stage.write("plan/p0", "deaf")
  script = stage.start("local.sh", "train")
  until(lambda: stage.read("pids"))
  script.send_signal(signal.SIGINT)
  until(lambda: "told to stop" in stage.err.read_text())
  # One that comes while the first is handled is lost.
  until(lambda: script.send_signal(signal.SIGINT) or script.poll() is not None)
  assert script.returncode == 130


@pytest.mark.parametrize("setting", ["PROCESSES=0", "DEVICES=two", "RESTARTS=-1", "GRACE=x"])
def test_local_settings_are_checked(stage, setting):
  assert stage.run("local.sh", "train", **dict([setting.split("=")])) == 2
  assert setting.split("=")[0] in stage.err.read_text()
  assert not stage.read("pflow/p0")


# ---- launch/slurm.sh

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}


def test_slurm_starts_one_task_a_node_with_all_its_devices(stage):
  assert stage.run("slurm.sh", "train", "--workdir", "w", **JOB) == 0
  assert stage.read("slurm") == [
    "0,1,2,3 srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16"
  ]
  assert [stage.read(f"pflow/p{i}") for i in range(2)] == [["train --workdir w"]] * 2


def test_slurm_runs_other_programs(stage):
  stage.write("plan/p0", "exit 1", "exit 0")
  assert stage.run("slurm.sh", "evaluate", "--workdir", "w", **JOB) == 0
  assert stage.read("pflow/p0") == ["evaluate --workdir w"] * 2
  assert stage.run("slurm.sh", "plan", "--config", "c", **JOB) == 2
  assert "sbatch [OPTIONS" in stage.out.read_text()


def test_slurm_leaves_arguments_as_they_are(stage):
  stage.put("pflow", f"printf '%s\\0' \"$@\" >{stage.state}/args")
  args = ["--a=b c", "", "it's", '"$HOME" `x` $(x) \\', "*", "--", "two\nlines", "-n"]
  assert stage.run("slurm.sh", "train", *args, **JOB | {"SLURM_JOB_NUM_NODES": "1"}) == 0, stage.err.read_text()
  assert (stage.state / "args").read_text().split("\0")[:-1] == ["train", *args]


@pytest.mark.parametrize(
  ("plans", "srun", "code", "tries"),
  [
    (("exit 134", "exit 2"), 134, 2, 1),  # lost the one with the mistake
    (("deaf", "exit 2"), 137, 2, 1),  # killed for it
    (("exit 2", "deaf"), 137, 2, 1),
    (("exit 1", "exit 134"), 134, 134, 2),
  ],
)
def test_slurm_does_not_repeat_a_mistake_of_any_task(stage, plans, srun, code, tries):
  for i, plan in enumerate(plans):
    stage.write(f"plan/p{i}", plan, plan)
  assert stage.run("slurm.sh", "train", **JOB, RESTARTS="1") == code
  assert stage.err.read_text().count(f"srun ended with code {srun}\n") == tries
  assert [len(stage.read(f"pflow/p{i}")) for i in range(2)] == [tries] * 2
  assert not list(stage.project.glob(".pflow-mistake*"))


def test_slurm_tries_again_after_a_failure_and_then_finds_a_mistake(stage):
  stage.write("plan/p0", "exit 1", "exit 134", "exit 0")
  stage.write("plan/p1", "exit 1", "exit 2", "exit 0")
  assert stage.run("slurm.sh", "train", **JOB) == 2
  assert len(stage.read("pflow/p0")) == 2


def test_slurm_finds_the_project_from_the_copy_that_sbatch_makes(stage, tmp_path):
  copy = tmp_path / "spool" / "job7" / "slurm_script"
  copy.parent.mkdir(parents=True)
  shutil.copy(stage.project / "launch" / "slurm.sh", copy)
  env = stage.env | JOB | {"SLURM_SUBMIT_DIR": str(stage.project)}
  run = subprocess.run(["bash", copy, "train"], env=env, cwd=tmp_path, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  env["SLURM_SUBMIT_DIR"] = str(tmp_path)
  run = subprocess.run(["bash", copy, "train"], env=env, cwd=tmp_path, capture_output=True, text=True)
  assert run.returncode == 2
  assert "not the project's folder" in run.stderr


@pytest.mark.parametrize(
  ("ends", "code", "tries"),
  [(("1", "137", "0"), 0, 3), (("2",), 2, 1), (("130",), 130, 1), (("141",), 141, 1), (("1",) * 9, 1, 4)],
)
def test_slurm_restarts_what_died(stage, ends, code, tries):
  stage.write("plan/p0", *(f"exit {end}" for end in ends))
  assert stage.run("slurm.sh", "train", **JOB) == code
  assert len(stage.read("pflow/p0")) == tries
  assert not any("requeue" in call for call in stage.read("slurm"))


@pytest.mark.parametrize(
  ("number", "job", "env", "requeued"),
  [
    (signal.SIGTERM, "JobState=RUNNING PreemptTime=None", {}, True),  # the time limit is near
    (signal.SIGTERM, "JobState=RUNNING PreemptTime=None", {"REQUEUE": "0"}, False),
    (signal.SIGTERM, "JobState=COMPLETING PreemptTime=None", {}, False),  # cancelled
    (signal.SIGINT, "JobState=RUNNING PreemptTime=None", {}, False),  # for good
  ],
)
def test_slurm_requeues_a_run_that_was_told_to_save(stage, number, job, env, requeued):
  stage.write("job", job)
  stage.write("plan/p0", "run")
  script = stage.start("slurm.sh", "train", **JOB, **env)
  until(lambda: "p0 works" in stage.out.read_text())  # it listens by then
  script.send_signal(number)
  assert script.wait(timeout=20) == 130
  assert "p0 saves" in stage.out.read_text().splitlines()
  assert ("scontrol requeue 7" in stage.read("slurm")) == requeued
  assert len(stage.read("pflow/p0")) == 1


@pytest.mark.parametrize(
  ("job", "requeued"),
  [("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True), ("JobState=CANCELLED PreemptTime=None", False)],
)
def test_slurm_looks_whether_a_run_was_stopped_through_its_steps(stage, job, requeued):
  stage.write("job", job)
  stage.write("plan/p0", "exit 143")
  assert stage.run("slurm.sh", "train", **JOB) == 130
  assert ("scontrol requeue 7" in stage.read("slurm")) == requeued
  assert len(stage.read("pflow/p0")) == 1


def test_slurm_outside_of_an_allocation(stage):
  assert stage.run("slurm.sh", "train", "--workdir", "w") == 2
  assert "SLURM_JOB_ID" in stage.err.read_text()
  assert stage.run("slurm.sh", "--dry-run", "train", "--workdir", "a b", SLURM_GPUS_ON_NODE="2") == 0
  shown = stage.out.read_text()
  assert "export JAX_LOCAL_DEVICE_IDS=0,1\n" in shown
  assert r"pflow train --workdir a\ b" in shown
  subprocess.run(["bash", "-nc", shown], check=True)
  assert "scontrol requeue" in shown
  assert stage.run("slurm.sh", "--dry-run") == 2
  assert "sbatch [OPTIONS" in stage.out.read_text()
  assert not stage.read("slurm")


# ---- launch/tpu.sh

POD = ("--name=pod", "--zone=z", "--type=v5litepod-16")
RUN = ("--config=configs/x.py:y z", "--workdir=gs://b/w")


class Cloud(Stage):
  def __call__(self, *args, **env):
    return self.run("tpu.sh", *args, **env)

  @property
  def calls(self):
    """What gcloud was called with, without `compute tpus`."""
    calls = [line.split("\t") for line in self.read("calls")]
    return [call[call.index("tpus") + 1 :] if "tpus" in call else call for call in calls]

  def verbs(self, *hidden):
    verbs = (call[1] for call in self.calls)
    return [verb for verb in verbs if verb not in hidden]

  def home(self, host):
    return self.state / "homes" / host / "pflow"

  def plan(self, *steps, hosts=("pod-w-0", "pod-w-1")):
    for host in hosts:
      self.write(f"plan/{host}", *steps)

  def clean(self):
    super().clean()
    # Who supervises a program ends with it, and may be about to write: not into a folder that goes.
    until(lambda: not any(running(home / "pflow") for home in self.state.glob("homes/*")))

  def ready(self, *settings):
    """Creates a TPU and sets it up; the calls for it are forgotten."""
    assert self("create", *POD, *settings) == 0, self.err.read_text()
    assert self("setup", *POD, *settings) == 0, self.err.read_text()
    self.write("calls")

  def preempt(self, state, *nodes):
    """Takes TPUs away together with what runs there."""
    for node in nodes:
      self.write(f"tpus/{node}", state)
    for process in map(int, self.read("pids")):
      try:
        supervisor = int(pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
      except FileNotFoundError:
        continue
      if b"tpu_worker.sh" in pathlib.Path(f"/proc/{supervisor}/cmdline").read_bytes():
        os.kill(supervisor, signal.SIGKILL)
      kill(process)


def running(home):
  return home.exists() and subprocess.run(["flock", "-n", home / "lock", "true"]).returncode != 0


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
  """A project that is committed."""
  cloud = Cloud(tmp_path_factory.mktemp("committed"))
  cloud.commit()
  return cloud


@pytest.fixture
def cloud(committed, tmp_path):
  """Without TPUs."""
  cloud = Cloud(tmp_path, committed)
  yield cloud
  cloud.clean()


@pytest.fixture(scope="module")
def set_up(committed, tmp_path_factory):
  cloud = Cloud(tmp_path_factory.mktemp("set_up"), committed)
  cloud.ready()
  return cloud


@pytest.fixture
def pod(set_up, tmp_path):
  """With a TPU of two workers that is set up."""
  pod = Cloud(tmp_path, set_up)
  yield pod
  pod.clean()


@pytest.mark.parametrize(
  ("settings", "command"),
  [
    ("--type=v5litepod-16", "tpu-vm create pod --zone=z --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
    ("--type=v5e-16", "tpu-vm create pod --zone=z --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
    (
      "--type=v5p-8 --spot --project p",
      "tpu-vm create pod --zone=z --project=p --accelerator-type=v5p-8 --version=v2-alpha-tpuv5 --spot",
    ),
    (
      "--type v6e-64 --reserved --network n --subnetwork=s --internal-ips",
      "tpu-vm create pod --zone=z --accelerator-type=v6e-64 --version=v2-alpha-tpuv6e --reserved --network=n"
      " --subnetwork=s --internal-ips",
    ),
    (
      "--type v6e-8 --service-account runs@p.iam.gserviceaccount.com --labels team=a_b,run=7 --scopes"
      " devstorage.read_write,https://www.googleapis.com/auth/logging.write",
      "tpu-vm create pod --zone=z --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"
      " --service-account=runs@p.iam.gserviceaccount.com"
      " --scopes=https://www.googleapis.com/auth/devstorage.read_write,https://www.googleapis.com/auth/logging.write"
      " --labels=team=a_b,run=7",
    ),
    (
      "--type v5p-8 --slices 2 --internal-ips --iap --scopes=cloud-platform --service-account"
      " 12-compute@developer.gserviceaccount.com",
      "queued-resources create pod --zone=z --accelerator-type=v5p-8 --runtime-version=v2-alpha-tpuv5"
      " --node-count=2 --node-prefix=pod --internal-ips --service-account=12-compute@developer.gserviceaccount.com"
      " --scopes=https://www.googleapis.com/auth/cloud-platform",
    ),
    (
      "--type v4-32 --queued --spot",
      "queued-resources create pod --zone=z --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base"
      " --node-id=pod --spot",
    ),
    (
      "--type v5p-8 --slices 3 --reserved --version=mine",
      "queued-resources create pod --zone=z --accelerator-type=v5p-8 --runtime-version=mine"
      " --node-count=3 --node-prefix=pod --reserved",
    ),
  ],
)
def test_tpu_create(cloud, settings, command):
  assert cloud("create", "--name=pod", "--zone", "z", *settings.split()) == 0, cloud.err.read_text()
  created = [" ".join(call) for call in cloud.calls if call[1] == "create"]
  assert created == [command]
  assert "pod: ready" in cloud.err.read_text()
  # In a dry run the same is shown, and nothing is called.
  calls = len(cloud.calls)
  assert cloud("create", "--dry-run", "--name=pod", "--zone", "z", *settings.split()) == 0
  assert f"gcloud compute tpus {command} \n" in cloud.out.read_text().replace("'", "")
  assert len(cloud.calls) == calls


def test_tpu_create_takes_its_settings_from_the_environment_too(cloud):
  env = dict(NAME="pod", ZONE="z", TYPE="v5p-8", SLICES="2", SPOT="1", LABELS="a=b", SCOPES="cloud-platform")
  assert cloud("create", **env, SERVICE_ACCOUNT="a@p.iam.gserviceaccount.com") == 0, cloud.err.read_text()
  created = next(call for call in cloud.calls if call[1] == "create")
  assert {"--node-count=2", "--node-prefix=pod", "--spot", "--zone=z", "--labels=a=b"} < set(created)
  scopes = "--scopes=https://www.googleapis.com/auth/cloud-platform"
  assert {"--service-account=a@p.iam.gserviceaccount.com", scopes} < set(created)


def test_tpu_create_ends_where_nobody_reads_what_it_would_do(cloud):
  script = cloud.project / "launch" / "tpu.sh"
  shown = f"bash {script} create {' '.join(POD)} --dry-run | head -n 1"
  run = subprocess.run(["bash", "-c", shown], env=cloud.env, capture_output=True, text=True, timeout=120)
  assert run.stdout.startswith("gcloud compute tpus tpu-vm create pod ")


def test_tpu_create_waits_in_the_queue_and_says_so(cloud):
  cloud.write("states", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  assert cloud("create", *POD, "--queued") == 0
  said = [line.split(": ")[-1] for line in cloud.err.read_text().splitlines() if ": pod: " in line]
  assert said == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ready"]
  # Called again, it goes on waiting for what is there.
  assert cloud("create", *POD, "--queued") == 0
  assert cloud.verbs("describe") == ["create"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_tpu_create_fails_in_words(cloud, state):
  cloud.write("states", "WAITING_FOR_RESOURCES", state)
  assert cloud("create", *POD, "--queued") == 1
  assert f"pod will not become ready, it is {state}" in cloud.err.read_text()
  assert ("no capacity before the deadline" in cloud.err.read_text()) == (state == "FAILED")
  assert cloud("create", *POD, "--queued") == 1
  assert "delete it first" in cloud.err.read_text()


def test_tpu_dry_run_shows_commands_that_can_be_pasted_and_runs_none(cloud):
  pod = ("--name=pod", "--zone=z", "--type=v5p-16", "--slices=2", "--dry-run")
  shown = {}
  for command in (["setup"], ["run", "--", *RUN], ["logs", "--worker=1"], ["status"], ["stop"], ["delete"]):
    assert cloud(command[0], *pod, *command[1:]) == 0, cloud.err.read_text()
    shown[command[0]] = cloud.out.read_text()
    for line in shown[command[0]].splitlines():
      assert line.startswith(("gcloud compute tpus ", "git archive "))
      subprocess.run(["bash", "-nc", line], check=True)
  assert not cloud.calls
  assert shown["setup"].count("scp /tmp/pflow.tar.gz") == 2
  assert "--worker=1" in shown["logs"]
  assert "delete pod --zone=z --force --quiet" in shown["delete"]
  # Pasted, it reaches gcloud as it would have.
  line = next(line for line in shown["run"].splitlines() if "tpu_worker.sh start" in line)
  subprocess.run(["bash", "-c", line], env=cloud.env, capture_output=True)
  command = cloud.calls[0][-1].removeprefix("--command=")
  assert command == "bash ~/pflow/src/launch/tpu_worker.sh start train '--config=configs/x.py:y z' '--workdir=gs://b/w'"
  assert not cloud.read("pflow/pod-w-0")


def test_tpu_setup_copies_the_commit_and_installs_the_pinned_environment_once(cloud):
  assert cloud("create", *POD) == 0
  (cloud.project / "launch" / "local.sh").write_text("changed")
  (cloud.project / "new.py").write_text("")
  assert cloud("setup", *POD) == 0, cloud.err.read_text()
  assert "not copied: launch/local.sh, new.py" in cloud.err.read_text()
  lock = (cloud.project / "launch" / "requirements-tpu.txt").read_text()
  pinned = re.search(r"^setuptools==.*$", lock, re.MULTILINE)[0]
  installs = ["venv"] + [
    f"pip --quiet --disable-pip-version-check {line}"
    for line in (
      f"install {pinned}",
      "install --no-deps --no-build-isolation -r src/launch/requirements-tpu.txt",
      "install --no-deps --no-build-isolation --editable src",
      "check",
    )
  ]
  for host in ("pod-w-0", "pod-w-1"):
    assert cloud.read(f"homes/{host}/installs") == installs
    assert "changed" not in (cloud.home(host) / "src" / "launch" / "local.sh").read_text()
    assert not (cloud.home(host) / "src" / "new.py").exists()
  assert all("--worker=all" in call for call in cloud.calls if call[1] in ("ssh", "scp"))

  # Again: the files follow the commit, what a run left stays, and nothing is installed.
  (cloud.home("pod-w-0") / "src" / "runs").mkdir()
  (cloud.project / "launch" / "slurm.sh").unlink()
  cloud.commit()
  assert cloud("setup", *POD) == 0, cloud.err.read_text()
  source = cloud.home("pod-w-0") / "src"
  assert (source / "launch" / "local.sh").read_text() == "changed"
  assert not (source / "launch" / "slurm.sh").exists()
  assert (source / "runs").exists()
  assert cloud.read("homes/pod-w-0/installs") == installs

  # Another lock file is another environment.
  (cloud.project / "launch" / "requirements-tpu.txt").write_text(lock + "more==1\n")
  cloud.commit()
  assert cloud("setup", *POD) == 0
  assert cloud.read("homes/pod-w-1/installs") == installs * 2


def test_tpu_setup_that_failed_goes_on(cloud):
  assert cloud("create", *POD) == 0
  cloud.write("unreachable", "pod-w-1")
  assert cloud("setup", *POD) == 1
  assert "setup failed on some worker" in cloud.err.read_text()
  cloud.write("unreachable")
  assert cloud("setup", *POD) == 0
  assert [cloud.read(f"homes/pod-w-{i}/installs").count("venv") for i in range(2)] == [1, 1]


# Adds to a file, so that it tells how often it was run; with all that a shell could misread.
PREPARE = """
if [[ -e ~/broken ]]; then echo "no bucket" >&2; exit 3; fi
printf '%s|' "$PWD" 'it'"'"'s' "a  b" "$(echo "\\$x")" '--' >>~/"pre pared"
"""


def prepared(cloud, host):
  """How often PREPARE was run on a worker."""
  home = cloud.home(host).parent
  text = (home / "pre pared").read_text() if (home / "pre pared").exists() else ""
  once = f"{home}|it's|a  b|$x|--|"
  assert text == once * text.count("--")
  return text.count("--")


@pytest.mark.parametrize("how", ["flag", "environment", "pasted"])
def test_tpu_setup_prepares_every_worker_each_time(cloud, how):
  env = {"PREPARE": PREPARE} if how == "environment" else {}
  args = [] if env else ["--prepare", PREPARE] if how == "flag" else [f"--prepare={PREPARE}"]
  assert cloud("create", *POD, *args, **env) == 0
  assert [prepared(cloud, f"pod-w-{i}") for i in range(2)] == [0, 0]
  told = cloud.err.read_text().split("next: ")[1]
  for times in (1, 2):
    if how == "pasted":
      assert subprocess.run(["bash", "-c", told], env=cloud.env, cwd=cloud.project).returncode == 0
    else:
      assert cloud("setup", *POD, *args, **env) == 0, cloud.err.read_text()
    assert [prepared(cloud, f"pod-w-{i}") for i in range(2)] == [times] * 2
  assert cloud("run", *POD, *args, "--", *RUN, **env) == 0
  assert [prepared(cloud, f"pod-w-{i}") for i in range(2)] == [2, 2]


def test_tpu_setup_fails_with_what_it_is_to_prepare(cloud):
  assert cloud("create", *POD) == 0
  assert cloud("setup", *POD) == 0
  broken = cloud.home("pod-w-1").parent / "broken"
  broken.touch()
  assert cloud("setup", *POD, "--prepare", PREPARE) == 1
  said = cloud.err.read_text()
  assert "no bucket" in said
  assert "pod-w-1: --prepare failed with code 3: " in said
  assert "setup failed on some worker" in said
  assert "pod-w-0: --prepare" not in said
  # Nothing runs without it.
  assert cloud("status", *POD) == 0
  assert "pod-w-1: not set up" in cloud.out.read_text()
  assert cloud("run", *POD, "--", *RUN) == 2
  broken.unlink()
  assert cloud("setup", *POD, "--prepare", PREPARE) == 0
  assert cloud("run", *POD, "--", *RUN) == 0


def test_tpu_run_prepares_what_it_made_anew(cloud):
  cloud.ready("--prepare", PREPARE)
  cloud.plan("run", "exit 0")
  script = cloud.start("tpu.sh", "run", *POD, "--prepare", PREPARE, "--", *RUN)
  until(lambda: len(cloud.read("pids")) == 2)
  cloud.preempt("PREEMPTED", "pod")
  assert script.wait(timeout=40) == 0, cloud.err.read_text()
  assert cloud.verbs().count("create") == 1
  assert [prepared(cloud, f"pod-w-{i}") for i in range(2)] == [1, 1]


def test_tpu_run_starts_nothing_on_a_new_tpu_that_it_cannot_prepare(cloud):
  cloud.ready()
  cloud.plan("run", "exit 0")
  script = cloud.start("tpu.sh", "run", *POD, "--prepare", "exit 3", "--", *RUN, RESTARTS="2")
  until(lambda: len(cloud.read("pids")) == 2)
  cloud.preempt("PREEMPTED", "pod")
  assert script.wait(timeout=40) == 1
  assert "pod-w-1: --prepare failed with code 3: exit 3" in cloud.err.read_text()
  assert len(cloud.read("pflow/pod-w-0")) == 1


@pytest.mark.parametrize("source", ["apt", "uv", "nowhere"])
def test_tpu_setup_finds_a_python(committed, tmp_path, source):
  home, tools = tmp_path / "home", tmp_path / "tools"
  home.mkdir()
  tools.mkdir()
  python = STAND_INS / "worker" / "python3.11"
  for name, line in {
    "hostname": "echo host",
    "python3.11": f'[[ -e ~/apt-has-it ]] && exec {python} "$@"',
    "sudo": f'echo "$*" >>~/apt; if [[ {source} == apt ]]; then touch ~/apt-has-it; fi',
    "uv": f"echo $* >>~/uv; [[ {source} == uv ]] && mkdir -p venv/bin && cp {python} venv/bin/python",
  }.items():
    (tools / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
    (tools / name).chmod(0o755)
  archive = ["git", "-C", committed.project, "archive", "--format=tar.gz", "-o", home / "pflow.tar.gz", "HEAD"]
  subprocess.run(archive, check=True)
  env = committed.env | {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
  script = committed.project / "launch" / "tpu_worker.sh"
  run = subprocess.run(["bash", script, "setup", "abc"], env=env, capture_output=True, text=True)
  assert "install python3.11 python3.11-venv" in (home / "apt").read_text()
  if source == "nowhere":
    assert run.returncode == 1
    assert "host: no Python 3.11 here, none from apt" in run.stderr
    assert not (home / "pflow" / "revision").exists()
  else:
    assert run.returncode == 0, run.stderr
    assert (home / "pflow" / "venv" / "bin" / "pflow").exists()
    assert (home / "uv").exists() == (source == "uv")


def test_tpu_run_starts_on_every_worker_and_shows_the_first_ones_log(pod):
  assert pod("run", *POD, "--", *RUN) == 0, pod.err.read_text()
  for host in ("pod-w-0", "pod-w-1"):
    assert pod.read(f"pflow/{host}") == ["train " + " ".join(RUN)]
    assert (pod.home(host) / "exit").read_text() == "0\n"
    assert (pod.home(host) / "program").read_text() == "train\n"
  assert pod.out.read_text() == "pod-w-0 works\npod-w-0 warns\n"
  assert "pod is still there, and is billed: launch/tpu.sh delete --name=pod --zone=z\n" in pod.err.read_text()
  starts = [call for call in pod.calls if "tpu_worker.sh start" in call[-1]]
  assert [call[:5] for call in starts] == [["tpu-vm", "ssh", "pod", "--zone=z", "--worker=all"]]
  assert "create" not in pod.verbs()


@pytest.mark.parametrize(
  ("words", "call"),
  [
    (["train", *RUN], f"train {' '.join(RUN)}"),
    (["convert", "--source=a b", "--out", "gs://b/z"], "convert --source=a b --out gs://b/z"),
    (["evaluate", "--workdir=gs://b/w", "--also", "it's"], "evaluate --workdir=gs://b/w --also it's"),
    (["sample", "--workdir", "gs://b/w", "--labels=3,7"], "sample --workdir gs://b/w --labels=3,7"),
  ],
)
def test_tpu_run_runs_each_program_as_it_runs_train(pod, words, call):
  pod.plan("exit 1", "exit 0")
  assert pod("run", *POD, "--", *words) == 0, pod.err.read_text()
  for host in ("pod-w-0", "pod-w-1"):
    assert pod.read(f"pflow/{host}") == [call] * 2
  assert pod.out.read_text() == "pod-w-0 works\npod-w-0 warns\n" * 2
  assert f"pflow {words[0]} ended with code 1, the TPU is ready; restart 1 of 10" in pod.err.read_text()


def test_tpu_run_takes_a_program_that_dies_of_the_stop_as_stopped(pod):
  """Only `pflow train` listens for SIGTERM."""
  pod.plan("kill TERM")
  assert pod("run", *POD, "--", "evaluate", "--workdir=gs://b/w") == 130
  assert len(pod.read("pflow/pod-w-0")) == 1
  assert pod("status", *POD) == 0
  assert "pod-w-1: ended with code 130" in pod.out.read_text()


def test_tpu_run_writes_into_a_folder_that_is_mounted(cloud):
  run = ("run", *POD, "--dry-run", "--prepare=mountpoint /data", "--", "latents", "--images=x", "--out=/data/z")
  cloud.write("workers", "4")
  assert cloud(*run) == 0, cloud.err.read_text()
  assert "own disk" not in cloud.err.read_text()
  assert "start latents --images=x --out=/data/z" in re.sub(r"['\\]", "", cloud.out.read_text())


def test_tpu_run_shows_a_line_once_while_other_workers_still_run(pod):
  pod.plan("exit 0")
  pod.plan("run 0", hosts=["pod-w-1"])
  script = pod.start("tpu.sh", "run", *POD, "--", *RUN, GRACE="60")
  until(lambda: len(pod.read("pids")) == 2 and sum("state" in call[-1] for call in pod.calls) > 4)
  os.kill(int((pod.home("pod-w-1") / "pid").read_text()), signal.SIGTERM)
  assert script.wait(timeout=20) == 0, pod.err.read_text()
  assert pod.out.read_text() == "pod-w-0 works\npod-w-0 warns\n"


def test_tpu_run_on_several_slices_and_inside_the_network(cloud):
  cloud.ready("--slices=2", "--internal-ips")
  assert cloud("--slices=2", "--internal-ips", *POD, "run", *RUN) == 0, cloud.err.read_text()
  for host in ("pod-0-w-0", "pod-0-w-1", "pod-1-w-0", "pod-1-w-1"):
    assert cloud.read(f"pflow/{host}") == ["train " + " ".join(RUN)]
  reached = [line.split("\t") for line in cloud.read("calls") if re.search(r"\t(ssh|scp)\t", line)]
  assert all("--internal-ip" in call and call[0] == "compute" for call in reached)
  assert cloud.out.read_text() == "pod-0-w-0 works\npod-0-w-0 warns\n"


def test_tpu_run_reaches_internal_addresses_from_outside(cloud):
  cloud.ready("--internal-ips", "--iap")
  assert cloud("run", *POD, "--internal-ips", "--iap", "--", *RUN) == 0, cloud.err.read_text()
  assert cloud.read("pflow/pod-w-1") == ["train " + " ".join(RUN)]
  reached = [line.split("\t") for line in cloud.read("calls") if re.search(r"\t(ssh|scp)\t", line)]
  assert len(reached) > 3
  assert all(call[:2] == ["alpha", "compute"] and "--tunnel-through-iap" in call for call in reached)
  assert cloud("delete", *POD, "--internal-ips", "--iap", "--dry-run") == 0
  assert "alpha" not in cloud.out.read_text()
  cloud.write("tpus/pod", "DELETING")
  assert cloud("run", *POD, "--internal-ips", "--iap", "--", *RUN) == 2
  assert "--internal-ips --iap. A TPU" in cloud.err.read_text()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--worker=0", "--", *RUN), "run on all workers"),
    (("--", *RUN, "--worker", "0"), "run on all workers"),
    (("--", "--config=c"), "--workdir is missing"),
    (("--", "--config=c", "--workdir", "runs/w"), "begin with gs://"),
    (("--prepare=true", "--", "--config=c", "--workdir", "/data/w"), "begin with gs://"),
    (("--", "latents", "--images=x"), "--out is missing in the flags for pflow"),
    (
      ("--", "convert", "--source=gs://b/x", "--out=x"),
      "begin with gs://, or with the path of a folder that --prepare",
    ),
    (("--", "latents", "--out=/data/z"), "give the whole path of a folder that --prepare mounts"),
    (("--prepare=true", "--", "latents", "--out=gs://b/z"), "latents are written to a file system"),
    (("--prepare=true", "--", "latents", "--out=data/z"), "give the whole path of a folder"),
    (("--prepare=true", "--", "latents", "--images=x"), "--out /data/..."),
    (("--", "evaluate", "--out=gs://b/x"), "--workdir is missing"),
    (("--", "evaluate", "--workdir=gs://b/x", "--out", "x"), "begin with gs://"),
    (("--", "plan", *RUN), "run: expected a program that several workers run together (train latents convert sample"),
    (("--", "train latents", *RUN), "expected a program"),
    (("--", "", *RUN), "expected a program"),
    (("--", "sample", *RUN, "--service-account=x"), "settings go before"),
    (("--", *RUN, "--slices=2"), "settings go before"),
    (("--slices=2", "--", *RUN), "not ready"),
  ],
)
def test_tpu_run_refuses_what_cannot_work(cloud, args, message):
  cloud.write("tpus/pod", "READY")
  assert cloud("run", *POD, *args) == 2
  assert message in cloud.err.read_text()
  assert "ssh" not in cloud.verbs()


def test_tpu_run_refuses_workers_that_are_not_set_up_alike(cloud):
  assert cloud("create", *POD) == 0
  assert cloud("run", *POD, "--", *RUN) == 2
  assert "not all workers are set up alike" in cloud.err.read_text()
  assert cloud("setup", *POD) == 0
  (cloud.home("pod-w-1") / "revision").write_text("0123456789\n")
  assert cloud("run", *POD, "--", *RUN) == 2
  for host in ("pod-w-0", "pod-w-1"):
    (cloud.home(host) / "revision").write_text("0123456789\n")
  assert cloud("run", *POD, "--", *RUN) == 2
  assert "0123456789, which is unknown here" in cloud.err.read_text()
  # So does the script of an earlier version.
  worker = cloud.home("pod-w-1") / "src" / "launch" / "tpu_worker.sh"
  worker.write_text(worker.read_text().replace('"$(cat program 2>/dev/null || echo -)"', ""))
  assert cloud("run", *POD, "--", *RUN) == 2
  assert "not all workers are set up alike" in cloud.err.read_text()
  assert not cloud.read("pflow/pod-w-0")


def test_tpu_run_keeps_a_workdir_on_a_single_worker_but_not_its_restart_elsewhere(cloud):
  cloud.write("workers", "1")
  cloud.ready()
  cloud.plan("run", hosts=["pod-w-0"])
  script = cloud.start("tpu.sh", "run", *POD, "--", "--workdir=runs/w")
  until(lambda: cloud.read("pids"))
  assert "goes when the TPU goes" in cloud.err.read_text()
  cloud.preempt("PREEMPTED", "pod")
  assert script.wait(timeout=20) == 1
  assert "only what is in gs:// can be resumed" in cloud.err.read_text()
  assert not {"create", "delete"} & set(cloud.verbs())


def test_tpu_run_does_not_repeat_a_mistake_on_any_worker(pod):
  pod.plan("exit 1")
  pod.plan("exit 2", hosts=["pod-w-1"])
  assert pod("run", *POD, "--", *RUN) == 2
  assert len(pod.read("pflow/pod-w-0")) == 1


def test_tpu_run_restarts_in_place_on_all_workers_what_died_on_one(pod):
  pod.plan("exit 1", "exit 0")
  pod.plan("kill SEGV", "exit 0", hosts=["pod-w-1"])
  assert pod("run", *POD, "--", *RUN) == 0, pod.err.read_text()
  for host in ("pod-w-0", "pod-w-1"):
    assert pod.read(f"pflow/{host}") == ["train " + " ".join(RUN)] * 2
  assert "restart 1 of 10" in pod.err.read_text()
  assert not {"create", "delete", "scp"} & set(pod.verbs())


def test_tpu_run_gives_up_after_its_restarts(pod):
  pod.plan(*["exit 9"] * 9)
  assert pod("run", *POD, "--", *RUN, RESTARTS="1") == 9
  assert len(pod.read("pflow/pod-w-0")) == 2
  assert "given up after 1 restarts" in pod.err.read_text()
  assert "pod is still there, and is billed: launch/tpu.sh delete --name=pod --zone=z" in pod.err.read_text()


@pytest.mark.parametrize(("ends", "code"), [("exit 0", 0), ("exit 2", 2), ("run", 130), ("exit 9", 9)])
def test_tpu_run_deletes_what_it_is_done_with(pod, ends, code):
  pod.plan(ends)
  script = pod.start("tpu.sh", "run", *POD, "--delete-when-done", "--", *RUN, RESTARTS="0")
  err = pod.err
  if ends == "run":
    until(lambda: len(pod.read("pids")) == 2)
    assert pod("stop", *POD) == 0
  assert script.wait(timeout=20) == code, err.read_text()
  assert pod.verbs()[-1] == "delete"
  assert not (pod.state / "tpus" / "pod").exists()
  assert "billed" not in err.read_text()


def test_tpu_run_deletes_no_results(cloud):
  cloud.write("workers", "1")
  cloud.write("tpus/pod", "READY")
  assert cloud("run", *POD, "--delete-when-done", "--", "--workdir=runs/w") == 2
  assert "--delete-when-done deletes --workdir=runs/w too" in cloud.err.read_text()
  assert "delete" not in cloud.verbs()


def test_tpu_run_kills_what_outlives_the_others(pod):
  pod.plan("exit 1", "exit 0")
  pod.plan("deaf", "exit 0", hosts=["pod-w-1"])
  assert pod("run", *POD, "--", *RUN) == 0, pod.err.read_text()
  assert "still runs on 1 workers" in pod.err.read_text()


@pytest.mark.parametrize("how", ["queued", "told", "slices"])
def test_tpu_run_goes_on_elsewhere_after_a_preemption(cloud, how):
  settings = {"queued": ["--spot", "--queued"], "told": ["--spot"], "slices": ["--slices=2"]}[how]
  nodes = ["pod-0", "pod-1"] if how == "slices" else ["pod"]
  hosts = [f"{node}-w-{i}" for node in nodes for i in range(2)]
  cloud.ready(*settings)
  cloud.plan("run", "exit 0", hosts=hosts)
  for host in hosts:
    (cloud.home(host) / "stopped").write_text("")  # an earlier run was
  # The copy that is set up anew is of the commit that ran, not of a later one.
  revision = (cloud.home(hosts[0]) / "revision").read_text()
  (cloud.project / "later").write_text("")
  cloud.commit()
  script = cloud.start("tpu.sh", "run", *POD, *settings, "--", *RUN, POLL="0.5" if how == "told" else "0.05")
  until(lambda: len(cloud.read("pids")) == len(hosts))
  if how == "told":
    # The machines tell their programs to end, which save and end with 130, before the state says anything.
    cloud.write("errors", "no capacity now")
    looks = cloud.verbs().count("describe")
    for process in map(int, cloud.read("pids")):
      os.kill(process, signal.SIGTERM)
    until(lambda: cloud.verbs().count("describe") > looks)
  if how == "queued":
    cloud.write("states", *["SUSPENDING"] * 4, "SUSPENDED")
    cloud.preempt("PREEMPTED", "pod")
  elif how == "slices":
    cloud.preempt("PREEMPTED", "pod-1")
  else:
    cloud.preempt("PREEMPTED", "pod")
  assert script.wait(timeout=40) == 0, cloud.err.read_text()
  for host in hosts:
    assert cloud.read(f"pflow/{host}") == ["train " + " ".join(RUN)] * 2
    assert (cloud.home(host) / "revision").read_text() == revision
  again = [verb for verb in cloud.verbs() if verb in ("create", "delete", "scp")]
  assert again == ["delete"] + ["create"] * (1 + (how == "told")) + ["scp"] * len(nodes)
  assert cloud.err.read_text().count(" of 10") == 1 + (how == "told")


def test_tpu_run_leaves_a_tpu_alone_that_somebody_stopped(pod):
  pod.plan("run")
  script = pod.start("tpu.sh", "run", *POD, "--", *RUN)
  until(lambda: len(pod.read("pids")) == 2)
  pod.preempt("STOPPED", "pod")
  assert script.wait(timeout=20) == 1
  assert "which no preemption does" in pod.err.read_text()
  assert not {"create", "delete"} & set(pod.verbs())


def test_tpu_run_sets_up_again_what_was_repaired(pod):
  pod.plan("run", "exit 0")
  script = pod.start("tpu.sh", "run", *POD, "--", *RUN)
  until(lambda: len(pod.read("pids")) == 2)
  pod.preempt("REPAIRING", "pod")
  until(lambda: "pod: REPAIRING" in pod.err.read_text())
  shutil.rmtree(pod.home("pod-w-1"))
  pod.write("tpus/pod", "READY")
  assert script.wait(timeout=20) == 0, pod.err.read_text()
  assert [verb for verb in pod.verbs() if verb in ("create", "delete", "scp")] == ["scp"]


def test_tpu_an_interrupt_leaves_the_run_going_and_says_how_to_go_on(pod):
  pod.plan("run")
  script = pod.start("tpu.sh", "run", *POD, "--", *RUN)
  until(lambda: "pod-w-0 works" in pod.out.read_text())
  os.killpg(script.pid, signal.SIGINT)
  assert script.wait(timeout=20) == 130
  said = pod.err.read_text()
  assert "the run goes on" in said
  assert "is billed: launch/tpu.sh delete --name=pod" in said
  assert "launch/tpu.sh logs --name=pod --zone=z" in said
  assert "launch/tpu.sh stop --name=pod --zone=z" in said

  assert pod("run", *POD, "--", *RUN) == 2
  assert "runs there already" in pod.err.read_text()
  assert pod("setup", *POD) == 1
  assert "a program runs here" in pod.err.read_text()
  assert pod("status", *POD) == 0
  status = pod.out.read_text()
  assert status.startswith("pod: READY\n")
  assert re.search(r"pod-w-0: runs train, process \d+ \(commit [0-9a-f]{12}\)", status)
  assert "pod-w-1: runs train" in status

  # Another follows; stop has the run save, and both see its end.
  script = pod.start("tpu.sh", "logs", "--worker", "1", *POD)
  log = pod.out
  until(lambda: "pod-w-1 works" in log.read_text())
  assert pod("stop", *POD) == 0, pod.err.read_text()
  assert sorted(pod.out.read_text().splitlines()) == [f"pod-w-{i}: ended with code 130" for i in range(2)]
  assert script.wait(timeout=20) == 0
  assert pod("status", *POD) == 0
  assert "pod-w-1: ended with code 130, told to stop" in pod.out.read_text()
  assert pod("stop", *POD) == 0
  assert "pod-w-0: nothing runs" in pod.out.read_text()


def test_tpu_a_stopped_run_is_not_restarted_whatever_it_ends_with(pod):
  pod.plan("run 1")
  script = pod.start("tpu.sh", "run", *POD, "--", *RUN)
  err, out = pod.err, pod.out
  until(lambda: "pod-w-0 works" in out.read_text())
  env = pod.env
  stop = [str(pod.project / "launch" / "tpu.sh"), "stop", *POD]
  assert subprocess.run(["bash", *stop], env=env, capture_output=True).returncode == 0
  assert script.wait(timeout=20) == 130, err.read_text()
  assert "pod-w-0 saves" in out.read_text()
  assert len(pod.read("pflow/pod-w-0")) == 1


def test_tpu_run_outlives_a_connection(pod):
  pod.plan("run 0")
  script = pod.start("tpu.sh", "run", *POD, "--", *RUN)
  until(lambda: "pod-w-0 works" in pod.out.read_text())
  pod.write("unreachable", "pod-w-1")
  pids = [int(process) for process in pod.read("pids")]
  os.kill(pids[0], signal.SIGTERM)
  os.kill(pids[1], signal.SIGTERM)
  until(lambda: "not all workers answer, the TPU is ready" in pod.err.read_text())
  pod.write("unreachable")
  assert script.wait(timeout=20) == 0
  assert len(pod.read("pflow/pod-w-0")) == 1


def on_worker(pod, *args):
  """What tpu_worker.sh prints on the first worker."""
  home = pod.home("pod-w-0")
  env = pod.env | {"HOME": str(home.parent), "STANDIN_HOST": "pod-w-0"}
  env["PATH"] = f"{STAND_INS / 'worker'}:{env['PATH']}"
  script = home / "src" / "launch" / "tpu_worker.sh"
  return subprocess.run(["bash", script, *args], env=env, capture_output=True, text=True).stdout


def test_tpu_worker_knows_what_runs(pod):
  def call(*args):
    return on_worker(pod, *args)

  def state():
    return call("state").split()[2:5]

  assert state() == ["idle", "-", "-"]
  # What a program leaves behind is not the program.
  pod.plan("leave", "run", "deaf", "kill TERM")
  call("start", "train")
  until(lambda: state() == ["ended", "0", "-"])
  # Started again, nothing is left of the first.
  call("start", "latents", "--x=1 2")
  begun = state()
  assert call("state").split()[6:] == ["latents"]
  until(lambda: len(pod.read("pids")) == 3)
  process = pod.read("pids")[-1]
  assert begun == ["running", process, "-"]
  # The machine tells all processes to end: what the program ends with is written still.
  supervisor = int(pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
  os.kill(supervisor, signal.SIGTERM)
  time.sleep(0.1)
  assert state() == ["running", process, "-"]
  os.kill(int(process), signal.SIGTERM)
  until(lambda: state() == ["ended", "130", "-"])
  assert call("follow", "1") == "pod-w-0 saves\n"
  # Without a code, program and supervisor went with the machine.
  call("start", "train")
  until(lambda: len(pod.read("pids")) == 4)
  pod.preempt("READY", "pod")
  until(lambda: state() == ["died", "-", "-"])
  # A program that does not listen when it is told to end has been told all the same.
  call("start", "sample")
  until(lambda: state() == ["ended", "130", "-"])
  assert pod.read("pflow/pod-w-0") == ["train", "latents --x=1 2", "train", "sample"]


def test_tpu_worker_does_not_take_for_dead_what_ends_while_it_looks(pod):
  pod.plan("run 0")
  on_worker(pod, "start", "train")
  until(lambda: pod.read("pids"))
  flock = shutil.which("flock")
  end = f"kill -TERM {pod.read('pids')[0]}; {flock} --shared -w 20 lock true"
  pod.put("flock", f'if [[ "$*" == *--nonblock* ]]; then {end}; fi; exec {flock} "$@"')
  assert on_worker(pod, "state").split()[2:5] == ["ended", "0", "-"]


def test_tpu_status_of_what_is_not_there_or_not_set_up(cloud):
  assert cloud("status", *POD) == 0
  assert cloud.out.read_text() == "pod: NOT_FOUND\n"
  assert cloud("create", *POD, "--slices=2") == 0
  assert cloud("status", *POD, "--slices=2") == 0
  lines = cloud.out.read_text().splitlines()
  assert lines[:3] == ["queued resource pod: ACTIVE", "pod-0: READY", "pod-1: READY"]
  assert lines[3:] == [f"  pod-{j}-w-{i}: not set up" for j in range(2) for i in range(2)]


def test_tpu_delete_asks_first_and_takes_a_queued_resource_with_its_nodes(cloud):
  assert cloud("create", *POD) == 0
  assert cloud("delete", *POD) == 1
  assert "not deleted" in cloud.err.read_text()
  assert "delete" not in cloud.verbs()
  script = str(cloud.project / "launch" / "tpu.sh")
  asked = subprocess.run(["bash", script, "delete", *POD], env=cloud.env, input="y\n", text=True, capture_output=True)
  assert asked.returncode == 0
  assert cloud.calls[-1] == ["tpu-vm", "delete", "pod", "--zone=z", "--quiet"]
  assert cloud("delete", "--yes", *POD) == 0
  assert "there is no pod to delete" in cloud.err.read_text()
  # A queued resource is found without being told.
  assert cloud("create", *POD, "--queued") == 0
  assert cloud("delete", "--yes", *POD) == 0
  assert cloud.calls[-1] == ["queued-resources", "delete", "pod", "--zone=z", "--force", "--quiet"]
  assert not any((cloud.state / "tpus").iterdir())


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("create", "--zone=z", "--type=v5p-8"), "--name is missing"),
    (("status", "--name=n"), "--zone is missing"),
    (("create", "--name=n", "--zone=z"), "--type is missing"),
    (("start", *POD), "no command or setting 'start'"),
    (("create", *POD, "--nam=x"), "no command or setting '--nam=x'"),
    (("create", *POD, "--type=v99"), "--type: expected v5e-N (which is v5litepod-N) or v6e-N with N of 1 4 8 16"),
    (("create", *POD, "--type=v5e-7"), "--type: expected v5litepod-N with N of 1 4 8 16"),
    (("create", *POD, "--spot", "--reserved"), "exclude each other"),
    (("create", *POD, "--slices=0"), "--slices"),
    (("logs", *POD, "--worker=all"), "expected a number"),
    (("logs", *POD, "--slice=1"), "--slice"),
    (("create", *POD, "--prepare=if mount x"), "bash cannot read it: if mount x"),
    (("stop", *POD, "--worker=1"), "--worker is a setting of logs"),
    (("setup", *POD, "--name"), "--name needs a value"),
    (("setup", *POD, "--", "--workdir=w"), "only run and check take flags"),
    (("create", *POD, "--type=tpu7x-64"), "up to v6e; TPU7x and later are on GKE: launch/gke.yaml and docs/tpu.md"),
    (("run", *POD, "--type=ironwood", "--", *RUN), "TPU7x and later are on GKE"),
    (("create", *POD, "--type=v7x:4x4x4"), "TPU7x and later are on GKE"),
    (("create", *POD, "--labels=Team=a"), "--labels: expected pairs such as team=vision"),
    (("create", *POD, "--labels=a=b,c"), "--labels: expected pairs"),
    (("create", *POD, "--service-account=me@example.com"), "--service-account: expected an account's address"),
    (("create", *POD, "--scopes=a b"), "--scopes: expected names of scopes"),
    (("check", *POD[:2]), "--type is missing"),
    (("check", *POD, "--", "--worker=0"), "takes no --worker"),
  ],
)
def test_tpu_mistakes_are_told_with_their_remedy(cloud, args, message):
  assert cloud(*args) == 2
  assert message in cloud.err.read_text()
  assert not cloud.calls


def test_tpu_usage_and_a_machine_without_gcloud(cloud, tmp_path):
  assert cloud() == 2
  assert "launch/tpu.sh create SETTINGS" in cloud.out.read_text()
  tools = tmp_path / "tools"
  tools.mkdir()
  for tool in ("bash", "env", "dirname", "mktemp", "rm", "sed"):
    (tools / tool).symlink_to(shutil.which(tool))
  assert cloud("status", *POD, PATH=str(tools)) == 2
  assert "gcloud is not installed" in cloud.err.read_text()


def test_tpu_a_gcloud_that_cannot_tell_is_not_taken_for_a_preemption(cloud):
  cloud.put("gcloud", "echo 'ERROR: (gcloud) PERMISSION_DENIED' >&2; exit 1")
  assert cloud("run", *POD, "--", *RUN) == 1
  assert "PERMISSION_DENIED" in cloud.err.read_text()
  assert cloud("delete", "--yes", *POD) == 1
  # Nor is it asked for ever, when it has forgotten who signed in.
  lost = 'echo "ERROR: (gcloud) Reauthentication failed" >&2; exit 1'
  absent = 'if ! test -e $STANDIN/made; then echo "ERROR: NOT_FOUND" >&2; exit 1; fi'
  cloud.put("gcloud", f'case "$*" in *create*) touch $STANDIN/made; exit;; esac\n{absent}\n{lost}')
  assert cloud("create", *POD, POLL="0") == 1
  assert (
    "gcloud could not tell the state of pod 21 times: ERROR: (gcloud) Reauthentication failed" in cloud.err.read_text()
  )


# ---- launch/requirements-tpu.txt


def test_the_lock_has_all_that_is_needed_in_versions_that_are_allowed():
  lines = (ROOT / "launch" / "requirements-tpu.txt").read_text().splitlines()
  locked = dict(line.split("==") for line in lines if not line.startswith("#"))
  assert {"jax", "libtpu", "requests", "gcsfs", "setuptools"} <= set(locked)
  where = {"python_version": "3.11", "python_full_version": "3.11.7", "sys_platform": "linux"}
  wanted = [Requirement(text) for text in importlib.metadata.requires("pflow-jax") if "extra ==" not in text]
  assert len(wanted) > 15
  seen = set()
  while wanted:
    requirement = wanted.pop()
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    assert requirement.specifier.contains(locked[name], prereleases=True), requirement
    # What a version asks for is known of those that are installed here.
    if importlib.metadata.version(name) != locked[name]:
      continue
    for extra in {(name, extra) for extra in requirement.extras or {""}} - seen:
      seen.add(extra)
      for inner in map(Requirement, importlib.metadata.requires(name) or ()):
        if inner.marker is None or inner.marker.evaluate(where | {"extra": extra[1]}):
          wanted.append(inner)
