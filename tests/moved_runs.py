"""Trained runs without a training: a teacher, a full student and one of adapters, on a data file of their own."""

import jax
import numpy as np

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.inputs import digest_of_parameters
from pflow_jax.training.origins import inputs_of
from tests.programs import quick

NAMES = ("circle", "red square", "a star of seven points")


def write_data(path, seed=0, records=160):
  """Pictures like those of digits, so that the programs of other tests fit."""
  rng = np.random.default_rng(seed)
  x0 = rng.uniform(-1, 1, (records, 8, 8, 1)).astype(np.float32)
  np.savez(path, x0=x0, label=np.arange(records) % len(NAMES), class_names=np.array(NAMES))


def write_student(folder, root, variant, seed=0):
  """A run of configs/digits.py:<variant> on <root>/data.npz, of the teacher <root>/teacher, with random parameters."""
  config = quick("digits", variant, None if variant == "teacher" else root / "teacher", steps=5)
  config.data = dict(name=f"npz:{root / 'data.npz'}")
  config = workdir.pinned(folder, Settings.of(config))
  experiment = build(config)
  shapes = jax.eval_shape(experiment.init, jax.random.key(0), experiment.frozen)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda s: rng.normal(scale=0.1, size=s.shape).astype(s.dtype), shapes)
  workdir.claim(
    folder,
    Settings.of(config, converted=True),
    inputs_of(Settings.of(config), experiment.dataset, experiment.saved, folder),
  )
  with Checkpointer(folder / workdir.CHECKPOINTS) as checkpointer:
    checkpointer.save(2, {"params": params, "ema": params})


def write_tree(root):
  write_data(root / "data.npz")
  for folder, variant in (("teacher", "teacher"), ("student", "gmflow"), ("adapters", "arc_adapters")):
    write_student(root / folder, root, variant)


def digest(folder):
  return digest_of_parameters(str(folder), 2, "ema")
