"""Saving of a run's state elsewhere when its workdir takes nothing more."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import tempfile

import jax
from etils import epath

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.files.lock import Unwritable
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.inputs import Inputs
from pflow_jax.training.state import TrainState
from pflow_jax.training.writer import METRICS

RESCUE_DIR = "PFLOW_RESCUE_DIR"  # folder for such states; the system's temporary one by default
_ROOM = 1.1  # times the size of the arrays, for the files beside them


class Rescued(OSError):
  """The state is saved in another folder, from which the run has to go on: the same command would begin anew."""


def rescue(
  folder: str | os.PathLike, settings: Settings, inputs: Inputs, state: TrainState, cause: Unwritable
) -> OSError:
  """Saves a run's state, config, inputs and, if it can be read, log as a new workdir elsewhere, if there is room.

  Nothing is saved of a run of several processes: each has a part of the state and a disk of its own.

  Returns:
    the error that ends the run: Rescued with `cause`, the new folder and the way to go on, or the reason why nothing
      is saved.
  """
  step = int(state.step)
  if jax.process_count() > 1:
    return OSError(f"{cause}; the same command goes on from the last checkpoint that is left; step {step} is lost")
  needed = int(_ROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
  target = None
  try:
    base = pathlib.Path(os.environ.get(RESCUE_DIR) or tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(base).free) < needed:
      raise OSError(f"{base} has {free / 1e6:,.0f} MB left of {needed / 1e6:,.0f}")
    name = re.sub(r"\W+", "-", pathlib.Path(folder).name)[:40]
    target = tempfile.mkdtemp(prefix=f"pflow-rescue-{name}-", dir=base)
    workdir.claim(target, settings, inputs)
    with contextlib.suppress(Exception):
      pathlib.Path(target, METRICS).write_bytes((epath.Path(folder) / METRICS).read_bytes())
    with Checkpointer(f"{target}/{workdir.CHECKPOINTS}") as checkpointer:
      checkpointer.save(step, state)
  except Exception as error:  # libraries raise errors of their own; the cause is raised in any case
    if target is not None:
      shutil.rmtree(target, ignore_errors=True)
    why = f"step {step} could not be saved elsewhere either ({error}); {RESCUE_DIR} names another folder for that"
    return OSError(f"{cause}; {why}")
  way = f"go on with --workdir={target}, or copy that back to {folder}"
  return Rescued(f"{cause}; step {step} is saved in {target}: {way}")
