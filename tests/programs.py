"""Small runs that the tests of the programs share."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import psutil

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.network import COMPUTED, make_network
from tests.xla import flags

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load_module(path):
  spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def quick(config, variant, teacher=None, **train):
  """The quicktest of configs/<config>.py:<variant>, with keys of its section `train` changed."""
  values = load_module(ROOT / "configs" / f"{config}.py").get_config(f"{variant},quicktest")
  if teacher is not None:
    values.teacher.workdir = str(teacher)
  values.train.tensorboard = False
  values.train.update(train)
  return values


def pflow(*args, check=True, **options):
  """Runs the command in a process of its own; returns it completed."""
  run = subprocess.run(command(*args), capture_output=True, text=True, env=environment(), cwd=ROOT, **options)
  if check and run.returncode:
    raise AssertionError(f"pflow {' '.join(map(str, args))} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}")
  return run


def command(*args):
  return [sys.executable, "-c", "from pflow_jax.commands.cli import main; main()", *map(str, args)]


def environment(devices=None):
  """For a process with so many fake devices, which shares the compiled programs of these tests."""
  return os.environ | {"XLA_FLAGS": flags(devices), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def let_processes_hear():
  """Signals that are ignored here (SIGINT in the background of a script, SIGHUP under nohup) are not where a process is
  started from now on: it would inherit that, but not a handler that does nothing."""
  for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
      signal.signal(number, lambda *_: None)


def listening(*processes):
  """Where processes listen, given by their ids: {("127.0.0.1", 8000), ...}."""
  sockets = [socket for process in processes for socket in psutil.Process(process).net_connections("inet")]
  found = [socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN]
  # gRPC has sockets of IPv6 alone: ::ffff:127.0.0.1
  return {(at.ip.removeprefix("::ffff:"), at.port) for at in found}


def write_pretrained(values, folder, seed=0):
  """A workdir as `pflow convert` writes one, of a random network that `values`, a student's config, starts from."""
  # How it is computed is a student's own: no file of PyTorch tells it.
  model = {key: value for key, value in values.model.to_dict().items() if key not in COMPUTED}
  config = {"seed": 0, "model": model, "data": values.data.to_dict(), "source": {}}
  own = values.head.to_dict() if values.head.kind == "denoiser" else {"kind": "velocity"}
  config |= {"head": own, "objective": {"kind": "pretrained"}}
  settings = Settings.of(config, converted=True)
  dataset = data.load(**values.data)
  return _write_checkpoint(settings, make_network(settings.model, settings.head, dataset).shapes(dataset), folder, seed)


def write_random(values, folder, seed=0):
  """A run of `values`, a config, with random values of what trains, for which nothing is compiled."""
  settings = Settings.of(values)
  return _write_checkpoint(settings, build(settings)._trained_shapes(), folder, seed)


def _write_checkpoint(settings, shapes, folder, seed):
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype("float32"), shapes)
  workdir.claim(folder, settings)
  with Checkpointer(f"{folder}/{workdir.CHECKPOINTS}") as checkpointer:
    checkpointer.save(0, {"params": params} if settings.converted else {"params": params, "ema": params})
  return folder
