"""`pflow merge`: a run with adapters as one without."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.files.lock import Lock
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.inputs import read_inputs
from pflow_jax.training.origins import inputs_of, use_teacher
from pflow_jax.training.step import make_step


def merge(folder: str | os.PathLike, out: str | os.PathLike, *, teacher: str | os.PathLike | None = None) -> int:
  """Writes the run in `folder` to the new workdir `out` with its adapters added to the teacher's weights.

  The new run has all parameters and no adapters: it is sampled and evaluated like any other, and another can start
  from it (config.start.workdir). The optimizer's state and the data's position stay behind. The checkpoints of
  `folder` hold the adapters alone, with the layers that train in full.

  Args:
    folder: workdir of the run.
    out: the new workdir.
    teacher: workdir of its teacher, if that has moved.

  Returns:
    The step of the checkpoint.

  Raises:
    ValueError: the run has no adapters, its teacher is kept in low precision, or `out` holds a run.
  """
  folder, out = expanded(folder), checked_folder(out, "out")
  settings = workdir.load_settings(folder)
  if not settings.adapters.table:
    raise ValueError(f"{folder}: expected a run with adapters (config.adapters.table), this one trains in full already")
  if workdir.has_checkpoint(out):
    raise ValueError(f"{out} holds a run already; give another --out")
  settings = use_teacher(settings, teacher)
  experiment = build(settings, run=folder)
  low = {leaf.dtype.name for leaf in jax.tree.leaves(experiment.frozen["strong"]) if leaf.dtype.itemsize < 4}
  if low:
    raise ValueError(
      f"{folder}: its teacher is kept in {', '.join(low)}, too few digits for a run that trains in full; `pflow "
      "convert` writes the adapters for PyTorch, `pflow sample` takes them as they are"
    )
  step = newest_step(f"{folder}/{workdir.CHECKPOINTS}")
  if step is None:
    raise ValueError(f"{folder} has no checkpoint yet; train it first")
  saved, kept = experiment.saved, read_inputs(folder)
  for name, key in (("teacher", "workdir"), ("weak", "weak_workdir")):
    if getattr(settings.teacher, key):
      settings = settings.changed("teacher", **{key: saved[name].workdir})  # which may have moved
  folders = {name: one.workdir for name, one in saved.items()}
  inputs = kept.moved(folders) if kept else inputs_of(settings, experiment.dataset, saved, out)
  frozen = experiment.load_frozen()
  whole = (experiment.load(folder, which, frozen=frozen) for which in ("params", "ema"))
  params, ema = map(experiment.network.merged, whole)
  settings = settings.changed("adapters", table=())
  state = make_step(build(settings, run=folder)).init(jax.random.key(0), params)
  state = dataclasses.replace(state, ema=ema, step=jnp.asarray(step, jnp.int32))
  with Lock(out, "pflow merge"), Checkpointer(f"{out}/{workdir.CHECKPOINTS}") as checkpointer:
    workdir.claim(out, settings, inputs)
    checkpointer.save(step, state)
  return step
