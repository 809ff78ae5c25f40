"""A state that its workdir takes no more, saved elsewhere."""

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
_ROOM = 1.1  # times the size of the arrays, for what goes with them


class Rescued(OSError):
  """A workdir takes nothing more, and the run is to be gone on with elsewhere: tried again, it would begin anew."""


def rescue(
  folder: str | os.PathLike, settings: Settings, inputs: Inputs, state: TrainState, cause: Unwritable
) -> OSError:
  """Saves a run's state, config, inputs and, if it can be read, log as a new workdir elsewhere, if there is room.

  Of a run of several processes, each of which has a part of the state and a disk of its own, nothing is saved.

  Returns:
    what the run ends with, `cause` and where it is and how to go on, Rescued, or why it is not saved.
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
  except Exception as error:  # libraries have their own; what made the run end is said in any case
    if target is not None:
      shutil.rmtree(target, ignore_errors=True)
    why = f"step {step} could not be saved elsewhere either ({error}); {RESCUE_DIR} names another folder for that"
    return OSError(f"{cause}; {why}")
  way = f"go on with --workdir={target}, or copy that back to {folder}"
  return Rescued(f"{cause}; step {step} is saved in {target}: {way}")
