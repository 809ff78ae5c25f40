"""Settings of the scripts in launch/, and what other machines answer them: commands, if bash computed with them."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from pflow_jax.mesh.chips import parse_topology
from tests.programs import let_processes_hear
from tests.test_launch import POD, RUN, Cloud, Stage

# Runs a script once for each setting, in one process, for starting bash takes longer than that.
EACH = """
while IFS= read -r -d '' name && IFS= read -r -d '' value; do
  said=$(
    exec 2>&1
    case "$name" in
      --*) set -- "$@" "$name=$value" ;;
      run) set -- "$@" "$value" ;;
      *) export "$name=$value" ;;
    esac
    source "$0"
  )
  printf '%s\\0%s\\0' "$?" "$said"
done
"""
COMMANDS = ("a[$(>CANARY)]", "$(>CANARY)", "PATH[`>CANARY`]", "1;>CANARY", "1\n>CANARY\n")
NUMBERS = (*COMMANDS, "-1", "+1", "08", "0x1", "1e3", " 1", "1\n", "9" * 30, "²", "x", "--help", "\x1b[2J")
TEXTS = (*COMMANDS, "-x", " ", "é", "a b", "a\nb", "\x1b[2J", "'", "*", "../..", "x" * 400, "a\\")
TPU = ("logs", "--dry-run", "--name=pod", "--zone=z", "--type=v5e-16", "--slices=2")
SLURM = "SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_GPUS_ON_NODE SLURM_CPUS_PER_TASK SLURM_RESTART_COUNT"


@pytest.fixture
def stage(tmp_path):
  stage = Stage(tmp_path)
  yield stage
  stage.clean()


@pytest.mark.parametrize(
  ("script", "args", "settings", "values"),
  [
    ("local.sh", ["train"], "PROCESSES DEVICES RESTARTS GRACE", NUMBERS),
    ("slurm.sh", ["--dry-run", "train"], f"RESTARTS REQUEUE {SLURM}", NUMBERS),
    ("tpu.sh", TPU, "GRACE POLL SPOT --slices --slice --worker", NUMBERS),
    ("tpu.sh", TPU, "--name --zone --type --project --version --network", TEXTS),
    ("tpu.sh", TPU, "--service-account --scopes --labels IAP INTERNAL_IPS", TEXTS),
    ("tpu.sh", ("run", *TPU[1:], "--"), "run", [text for text in TEXTS if text[0] != "-"]),
  ],
)
def test_a_hostile_setting_is_refused_in_one_sentence(stage, tmp_path, script, args, settings, values):
  canary = tmp_path / "canary"
  cases = [(name, value.replace("CANARY", str(canary))) for name in settings.split() for value in values]
  text = "".join(f"{name}\0{value}\0" for name, value in cases)
  bash = ["bash", "-c", EACH, stage.project / "launch" / script, *args]
  env = stage.env | {"SLURM_JOB_ID": "7"}
  run = subprocess.run(bash, input=text, env=env, cwd=tmp_path, capture_output=True, text=True)
  assert not run.stderr
  assert not canary.exists()
  answers = run.stdout.split("\0")[:-1]
  assert len(answers) == 2 * len(cases)
  for (name, value), code, said in zip(cases, answers[::2], answers[1::2], strict=True):
    assert code == "2", (name, value, said)
    assert said.startswith(f"launch/{script}: {name}: expected "), (name, value, said)
    assert "\n" not in said
    assert "\x1b" not in said
  assert not stage.read("pflow/p0")


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh"])
def test_arguments_and_folders_are_taken_as_they_are(stage, tmp_path, script):
  """Also without HOME, in the locale C, and where CDPATH leads elsewhere."""
  odd = tmp_path / "a [b] 'c' \"d\" é $(x)\n-e"
  odd.mkdir()
  os.rename(stage.project, odd / "project")
  (odd / "elsewhere" / "launch").mkdir(parents=True)
  args = ["--workdir", str(odd), "", "-n", "*", "a[$(x)]", "`x`", "~", "é\n"]
  env = {key: value for key, value in stage.env.items() if key != "HOME"}
  env |= {"LC_ALL": "C", "CDPATH": str(odd / "elsewhere"), "SLURM_JOB_ID": "7"}
  env["PATH"] = f"{odd}/project/.venv/bin:{os.environ['PATH']}"
  seen = tmp_path / "seen"
  stand_in = odd / "project" / ".venv" / "bin" / "pflow"
  stand_in.write_text(f'#!/usr/bin/env bash\nprintf \'%s\\0\' "$PWD" "$@" >{seen}\n')
  bash = ["bash", f"launch/{script}", "train", *args]
  run = subprocess.run(bash, env=env, cwd=odd / "project", capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert seen.read_text().split("\0")[:-1] == [str(odd / "project"), "train", *args]


def accelerators(*types):
  """Cloud's names of types, None for what is refused."""
  text = """
    mistake() { exit 2; }
    source launch/settings.sh
    for type in "$@"; do echo "$(accelerator --type "$type")"; done
  """
  root = pathlib.Path(__file__).parents[1]
  run = subprocess.run(["bash", "-c", text, "bash", *types], cwd=root, capture_output=True, text=True, check=True)
  return [line or None for line in run.stdout.splitlines()]


def test_types_are_those_that_cloud_has_and_the_planner_understands():
  sizes = (
    1,
    2,
    4,
    7,
    8,
    12,
    16,
    32,
    64,
    100,
    128,
    192,
    256,
    384,
    512,
    2048,
    4096,
    8192,
    8320,
    12288,
    12416,
    18432,
    18560,
  )
  types = [f"{name}-{size}" for name in ("v3", "v4", "v5e", "v5litepod", "v5p", "v6e") for size in sizes]
  taken = dict(zip(types, accelerators(*types), strict=True))
  assert taken["v5e-256"] == taken["v5litepod-256"] == "v5litepod-256"
  known = {type for type, name in taken.items() if name}
  assert {"v3-2048", "v4-8", "v5e-1", "v5p-128", "v5p-12288", "v6e-64"} < known
  assert not {"v3-16", "v5e-2", "v5e-7", "v5e-512", "v4-12", "v5p-100", "v6e-2"} & known
  for type in known:
    assert parse_topology(type) == parse_topology(taken[type])
  wrong = ("v99", "v99-8", "v5e", "v5e-", "-8", "v5e-08", "v5e-8 ", "v5e-1 4", "V5E-8", "v5e-a[$(x)]", "", "v4-0128")
  wrong += ("tpu7x-64", "tpu7x:4x4x4", "v7x-8", "ironwood")
  assert accelerators(*wrong) == [None] * len(wrong)
  assert accelerators("v2-8", "v5lite-4", "v2-9") == ["v2-8", "v5litepod-4", None]


# ---- What gcloud and the workers answer


@pytest.fixture(scope="module")
def set_up(tmp_path_factory):
  cloud = Cloud(tmp_path_factory.mktemp("set_up"))
  cloud.commit()
  cloud.ready()
  return cloud


@pytest.fixture
def pod(set_up, tmp_path):
  """With a TPU of two workers that is set up."""
  pod = Cloud(tmp_path, set_up)
  yield pod
  pod.clean()


def test_what_a_worker_says_that_a_program_ended_with_is_not_computed_with(pod, tmp_path):
  canary = tmp_path / "canary"
  pod.plan("exit 0")
  for answer in ("08", f"PATH[`>{canary}`]"):
    (pod.home("pod-w-1") / "exit").write_text(f"{answer}\n")
    assert pod("status", *POD) == 0
    assert "value too great" not in pod.err.read_text()
    assert not canary.exists()
  (pod.home("pod-w-1") / "exit").write_text(f"a[$(>{canary})]\n")
  assert pod("run", *POD, "--", *RUN) == 0, pod.err.read_text()
  assert not canary.exists()


@pytest.mark.parametrize("answer", ["a[$(>CANARY)]", "08", "-1", "0", "", "9" * 30, "2\n2"])
def test_the_number_of_workers_that_gcloud_tells_is_not_computed_with(pod, tmp_path, answer):
  canary = tmp_path / "canary"
  pod.write("workers", answer.replace("CANARY", str(canary)))
  assert pod("run", *POD, "--", *RUN) == 1
  assert "gcloud cannot tell the workers of pod: it answers '" in pod.err.read_text().replace("$'", "'")
  assert not canary.exists()


def test_what_other_machines_write_does_not_steer_the_terminal(pod):
  steering = "\x1b]0;title\x07 \x1b[2J \x9b2J \r \x7f ü\tü"
  home = pod.home("pod-w-0")
  (home / "revision").write_text(steering)
  (home / "log.txt").write_text(f"{steering}\n")
  assert pod("status", *POD) == 0
  assert pod("logs", *POD) == 0
  assert pod.out.read_bytes().decode() == "?]0;title? ?[2J ?2J ? ? ü\tü\n"
  pod.write("tpus/pod", f"STRANGE{steering}")
  assert pod("run", *POD, "--", *RUN) == 2
  assert "STRANGE?]0;" in pod.err.read_text()
  for i in range(1, pod.started + 1):
    for name in ("out", "err"):
      assert not set("\x1b\x07\x9b\r\x7f") & set((pod.state / f"{name}{i}").read_bytes().decode())


def test_a_closed_output_does_not_end_what_watches_a_run(pod):
  pod.plan("exit 1", "exit 0")
  reader, writer = os.pipe()
  os.close(reader)
  bash = ["bash", str(pod.project / "launch" / "tpu.sh"), "run", *POD, "--", *RUN]
  run = subprocess.run(bash, env=pod.env, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, timeout=60)
  os.close(writer)
  assert run.returncode == 0
  assert len(pod.read("pflow/pod-w-0")) == 2


def test_a_command_to_be_pasted_has_the_settings_that_it_needs(pod):
  settings = ("--slices=1", "--spot", "--network=n", "--internal-ips", "--version=mine")
  pod.write("tpus/pod", "DELETING")
  assert pod("run", *POD, *settings, "--", *RUN) == 2
  told = pod.err.read_text().split("not ready: ")[1].split(". A TPU")[0]
  assert told == (
    "launch/tpu.sh create --name=pod --zone=z --type=v5litepod-16 --version=mine --spot --network=n --internal-ips"
  )


# ---- The tests themselves


def test_processes_hear_signals_that_are_ignored_where_the_tests_run():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    let_processes_hear()
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    run = subprocess.run([sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True)
  finally:
    signal.signal(signal.SIGINT, before)
  assert run.stdout == "True\n"
