"""`pflow latents` by several real processes: each writes its own shards of one folder, and kills lose nothing."""

import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from pflow_jax import data
from pflow_jax.families.autoencoder import Codec
from pflow_jax.networks.vae import AutoencoderKL
from tests.data.adm_pictures import encoded, pixels
from tests.programs import ROOT, environment

pytestmark = pytest.mark.slow

MINUTE, COUNT = 60, 40
KL = AutoencoderKL(widths=(4,), depth=1, groups=2, latent_channels=3, scale=0.5, mid_attention=False)
# Slow pictures, so that there is a middle to be killed in.
PROGRAM = """
import sys, time
from pflow_jax.commands.cli import main
from pflow_jax.data.folder import FolderSource
read, wait = FolderSource.read, float(sys.argv[1])
def slow(self, row):
  time.sleep(wait)
  return read(self, row)
FolderSource.read = slow
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """The command without the folder, on pictures of two classes."""
  root = tmp_path_factory.mktemp("latents")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    Codec(KL, jax.jit(KL.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]).save(root / "kl")
  for number in range(COUNT):
    path = root / "photos" / "ab"[number % 2] / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(pixels(12 + number % 5, 16))))
  words = ["latents", f"--images={root}/photos", "--size=8", f"--autoencoder={root}/kl"]
  return [*words, "--moments", "--mirror", "--batch_size=4", "--shard_records=4"]


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
  return codes, "".join(open(f"{out}.log{i}").read() for i in range(len(children)))


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
  """What one process makes that nobody disturbs."""
  out = tmp_path_factory.mktemp("whole") / "z"
  codes, log = ended(start(words, out, 1), out)
  assert codes == [0], log
  return contents(out)


def test_processes_write_their_own_shards_of_one_folder(words, whole, tmp_path):
  out = tmp_path / "z"
  codes, log = ended(start(words, out, 2), out)
  assert codes == [0, 0], log
  assert contents(out) == whole
  assert log.count("wrote 40 latents of (8, 8, 3)") == 1
  dataset = data.load(f"latents:{out}")
  np.testing.assert_array_equal(np.bincount(dataset.records.take(np.arange(COUNT))["cond"]), [20, 20])


def test_kills_at_any_moment_lose_nothing(words, whole, tmp_path):
  """Three times, one of them in two processes, then to the end: the bytes are those of a run that nobody disturbed."""
  out, draw = tmp_path / "z", random.Random(0)
  for attempt in range(3):
    children = start(words, out, 2 if attempt == 1 else 1, wait=0.1)
    before = len(list(out.glob("*.part.json"))) if out.exists() else 0
    end = time.monotonic() + 5 * MINUTE
    while len(list(out.glob("*.part.json"))) < before + 1 and children[0].poll() is None:
      assert time.monotonic() < end
      time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.4))
    for child in children:
      child.send_signal(signal.SIGKILL)
      child.wait()
    if finished := (out / "info.json").exists():
      break
  codes, log = ended(start(words, out, 1), out)
  assert codes == [0], log
  assert finished or "going on after " in log
  left = contents(out)
  if finished:
    left.pop("lock.json", None)  # of the process that was killed; there was nothing left to take it for
  assert left == whole


def test_told_to_stop_it_says_how_to_go_on(words, tmp_path):
  out = tmp_path / "z"
  (child,) = start(words, out, 1, wait=0.2)
  end = time.monotonic() + 5 * MINUTE
  while not list(out.glob("*.part.json")):
    assert time.monotonic() < end
    assert child.poll() is None
    time.sleep(0.05)
  child.send_signal(signal.SIGINT)
  codes, log = ended([child], out)
  assert codes == [130]
  assert "stopped; the same command goes on where it was" in log
  assert "Traceback" not in log
  assert not (out / "lock.json").exists()


def test_processes_that_see_other_pictures_are_told(words, tmp_path):
  out = tmp_path / "z"
  other = tmp_path / "photos"
  other.mkdir()
  (other / "a.png").write_bytes(encoded(Image.fromarray(pixels(9, 9))))
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  children = []
  for i in range(2):
    own = [f"--images={other}" if i and word.startswith("--images=") else word for word in words]
    join = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}")
    args = [sys.executable, "-c", PROGRAM, "0", *own, f"--out={out}", *join]
    log = open(f"{out}.log{i}", "a")  # noqa: SIM115
    children.append(subprocess.Popen(args, stdout=log, stderr=log, cwd=ROOT, env=environment(1)))
  codes, log = ended(children, out)
  assert 2 in codes
  assert 0 not in codes
  assert "process 1 has other pictures than process 0; give all the same files" in log
