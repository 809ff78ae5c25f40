"""`pflow train`: one loop for every objective."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pflow_jax import data
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.foreign import check_memory
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import Experiment, build
from pflow_jax.training.keeping import Keeper, WorkdirKeeper
from pflow_jax.training.loop import fit
from pflow_jax.training.origins import inputs_of
from pflow_jax.training.sample import picture_every, preview
from pflow_jax.training.state import TrainState
from pflow_jax.training.step import make_program
from pflow_jax.training.teachers import Teacher
from pflow_jax.training.writer import parameter_table, read_metrics

WORKER_BYTES = 100 * 2**20  # bytes that a process which reads data takes at least: Python, NumPy and grain

Picture = tuple[Callable[..., None], Callable[[data.Dataset], int]]
"""A function that draws samples, see `training.sample.preview`, and one that gives their number for a data set."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """Result of a training.

  Attributes:
    experiment: the pieces of the run.
    layout: placement of its arrays.
    frozen: the teacher's parameters, by part.
    state: the last one.
    history: metrics by name, and "step": arrays with one entry an interval.
  """

  experiment: Experiment
  layout: Layout
  frozen: Any
  state: TrainState
  history: dict[str, np.ndarray]


def train(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  *,
  force: bool = False,
  picture: Picture | None = None,
) -> TrainState:
  """Trains the run that `config` describes in the workdir `folder`; resumes a run that is already there.

  Args:
    config: of the run.
    folder: its workdir.
    force: take a workdir over in which another process trains.
    picture: draws samples, see `training.sample.picture_every`; None draws none.

  Returns:
    The final state, or the one saved when SIGTERM, SIGHUP or Ctrl-C came.

  Raises:
    ValueError: the config or the folder does not fit.
    FloatingPointError: updates stay non-finite.
    OSError: the folder takes nothing more; Rescued if the state is saved elsewhere.
    TakenOver: another process has taken the folder over.
    Busy: another process holds the folder; it may have ended by the next try.
  """
  return train_run(Settings.of(config), folder, force=force, picture=picture, details=True).state


def train_run(
  settings: Settings,
  folder: str | os.PathLike | None = None,
  *,
  dataset: data.Dataset | None = None,
  teacher: Teacher | None = None,
  force: bool = False,
  picture: Picture | None = None,
  bar: bool = True,
  details: bool = False,
) -> Trained:
  """Trains a run like `train`, from pieces that need not be in files, and returns all results.

  Args:
    settings: of the run.
    folder: its workdir; without one nothing is written.
    dataset: in place of that of the settings.
    teacher: in place of that of the settings.
    force: see `train`.
    picture: see `train`.
    bar: whether to report progress.
    details: whether to print the mesh and the table of parameters.
  """
  length = settings.need("train")
  _ = settings.need("optimizer")
  workers = length.num_workers * WORKER_BYTES
  check_memory(f"config.train.num_workers={length.num_workers}", workers, "ask for fewer")
  if folder is None:
    settings = workdir.pinned(None, settings)
    experiment = build(settings, dataset=dataset, teacher=teacher)
    keeper: Keeper = Keeper()
    program = make_program(experiment)
  else:
    folder = checked_folder(folder)
    lock = Lock(folder, "pflow train", force=force, hint="--force takes it over", active=is_first())
    lock.refuse_early()
    settings = workdir.pinned(folder, settings)
    experiment = build(settings, dataset=dataset, teacher=teacher)
    _ = experiment.dataset.num_records  # opens the data, to raise before any work if they cannot be read
    inputs = inputs_of(settings, experiment.dataset, experiment.saved, folder)
    workdir.claim(folder, settings, inputs, write=False)
    program = make_program(experiment)
    keeper = WorkdirKeeper(folder, settings, inputs, lock)
  if details:
    mesh = program.layout.described()
    print(f"process {jax.process_index()} of {jax.process_count()}: a mesh of {mesh}", flush=True)
    resumed = keeper.is_resumed  # all processes ask: they agree on it
    if is_first() and not resumed:
      print(parameter_table(program.state.params))
  draw, draw_every = None, 0
  if picture is not None and folder is not None:
    count = picture[1](experiment.dataset)
    draw_every = picture_every(experiment, count)
    draw = preview(experiment, program.layout, picture[0], count) if draw_every else None
  frozen = experiment.load_frozen(program.layout)
  state = fit(program, keeper, frozen, experiment.start_params, draw, draw_every=draw_every, bar=bar)
  history = keeper.history if folder is None else read_metrics(folder)
  return Trained(experiment, program.layout, frozen, state, history)
