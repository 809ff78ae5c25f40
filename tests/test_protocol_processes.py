"""ADM's protocol by several real processes: they draw parts together, the first writes them, a kill loses one part."""

import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from pflow_jax.evaluation import metrics
from pflow_jax.evaluation.references import Reference
from tests.programs import ROOT, environment

pytestmark = pytest.mark.slow

MINUTE = 60
# A feature network without a file, small parts, and time between them to be killed in.
PROGRAM = """
import sys, time
from pflow_jax.commands.cli import main
from pflow_jax.evaluation.protocol import evaluate
from pflow_jax.evaluation.protocol.parts import Parts
from tests.evaluation.stub_network import StubNetwork
evaluate.PART = evaluate.PAIRS_IN_PART = 16
evaluate.open_feature_network = lambda *_: StubNetwork()
write = Parts.write
def slow(*arguments, **options):
  write(*arguments, **options)
  time.sleep(float(sys.argv[1]))
Parts.write = slow
main(sys.argv[2:])
"""


@pytest.fixture
def words(student_run, tmp_path):
  features = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
  Reference(metrics.Moments.from_features(features), None, features, "stub 1").save(tmp_path / "reference.npz")
  words = ["evaluate", f"--workdir={student_run}", "--protocol=adm", "--features=stub", "--paired=16", "--num=40"]
  return [*words, f"--reference={tmp_path}/reference.npz", "--keep=npz"]


def start(words, out, processes, wait=0.0):
  """Starts so many processes of one program, each with two devices."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  children = []
  for i in range(processes):
    join = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}")
    args = [sys.executable, "-c", PROGRAM, str(wait), *words, f"--out={out}", *(join if processes > 1 else ())]
    log = open(f"{out}.log{i}", "a")  # noqa: SIM115
    children.append(subprocess.Popen(args, stdout=log, stderr=log, cwd=ROOT, env=environment(2)))
  return children


def ended(children, out):
  codes = [child.wait(5 * MINUTE) for child in children]
  logs = [out.with_name(f"{out.name}.log{i}").read_text() for i in range(len(children))]
  assert codes == [0] * len(children), "".join(logs)
  with np.load(out / "1_nfe" / "samples.npz") as file:
    return json.loads((out / "adm.json").read_text())["rows"][0], file["arr_0"].astype(int)


def test_processes_share_the_work_and_one_goes_on_alone(words, tmp_path):
  together, seen = ended(start(words, tmp_path / "two", 2), tmp_path / "two")
  out = tmp_path / "killed"
  children = start(words, out, 2, wait=1.0)
  end = time.monotonic() + 5 * MINUTE
  while not (out / "1_nfe" / "part_00000").exists():
    assert time.monotonic() < end
    assert children[0].poll() is None
    time.sleep(0.05)
  for child in children:
    child.send_signal(signal.SIGKILL)
    child.wait()
  assert not json.loads((out / "adm.json").read_text())["finished"]
  alone, others = ended(start(words, out, 1), out)
  assert np.abs(seen - others).max() <= 1, "another number of devices rounds otherwise"
  speed = "images_per_second"
  of_text = ("fid_interval", "reference", "reference_digest", "notes")
  numbers = lambda row: {key: value for key, value in row.items() if key not in (speed, *of_text)}
  assert json.dumps([*numbers(alone)]) == json.dumps([*numbers(together)])
  flat = lambda row: np.hstack([np.ravel(value) for value in numbers(row).values()])
  np.testing.assert_allclose(flat(alone), flat(together), rtol=2e-2, atol=1e-3)
