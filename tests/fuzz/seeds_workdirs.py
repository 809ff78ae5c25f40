"""Finished runs that nothing was trained for."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.step import make_step
from tests.programs import quick


def write_run(values: Any, folder: pathlib.Path, step: int = 3) -> pathlib.Path:
  """Writes a workdir as one that was trained for `step` steps, with random parameters."""
  values = workdir.pinned(folder, Settings.of(values))
  experiment = build(values)
  make = make_step(experiment)
  init = lambda key, frozen: make.init(key, experiment.init(key, frozen))
  shapes = jax.eval_shape(init, jax.random.key(0), experiment.frozen)
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(scale=0.05, size=leaf.shape) if leaf.dtype == np.float32 else np.zeros(leaf.shape)
  workdir.claim(folder, Settings.of(values, converted=True))
  with Checkpointer(f"{folder}/{workdir.CHECKPOINTS}") as checkpointer:
    checkpointer.save(step, jax.tree.map(lambda leaf: draw(leaf).astype(leaf.dtype), shapes))
  return folder


def write_runs(root: pathlib.Path) -> pathlib.Path:
  """Writes <root>/teacher and <root>/student, of points on a checkerboard."""
  write_run(quick("checkerboard", "teacher"), root / "teacher")
  write_run(quick("checkerboard", "gmflow", root / "teacher"), root / "student")
  return root
