"""The functions for notebooks: `train`, `distill`, `load`, which return runs. The command line calls the same."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn

from pflow_jax import data as datasets
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.commands.compilations import cache_compilations
from pflow_jax.commands.run import Folder, Run
from pflow_jax.conversion.program import convert
from pflow_jax.conversion.runs import is_run
from pflow_jax.core.objectives import kind_of
from pflow_jax.core.objectives.adversarial import Adversarial
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.evaluation.teacher_check import TeacherReport, check
from pflow_jax.families.registry import network_kind
from pflow_jax.networks.heads import Head, VelocityHead, head_options_of
from pflow_jax.networks.registry import options_of
from pflow_jax.settings.adapters import AdapterSettings
from pflow_jax.settings.mesh import MeshSettings
from pflow_jax.settings.optimizer import EmaSettings, OptimizerSettings
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.teacher import StartSettings, TeacherSettings
from pflow_jax.settings.train import TrainSettings
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.training import workdir as workdirs
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.origins import use_teacher, which_of
from pflow_jax.training.teachers import Teacher
from pflow_jax.training.train import train_run
from pflow_jax.training.writer import read_metrics


def train(
  objective: Any,
  data: datasets.Dataset,
  network: nn.Module,
  *,
  steps: int,
  batch_size: int = 128,
  head: Head | None = None,
  optimizer: OptimizerSettings | None = None,
  ema: EmaSettings = EmaSettings(),
  mesh: MeshSettings = MeshSettings(),
  sample: SampleSettings = SampleSettings(),
  start: StartSettings = StartSettings(),
  seed: int = 0,
  workdir: Folder | None = None,
  bar: bool = True,
  **length: Any,
) -> Run:
  """Trains a network on data: a teacher by flow matching, or a flow map that needs none.

  A run that is interrupted, by Ctrl-C or a notebook's stop, is returned as it is. With a `workdir` it is saved there,
  and the same call goes on with it to the bit; without one nothing is written.

  Args:
    objective: settings of the loss, such as `FlowMatching()` or `mean_flow()`.
    data: a result of `pf.data.load` or `pf.data.from_arrays`.
    network: such as `DiT(patch_size=2, width=64, depth=4, num_heads=4)`; channels, classes and head are filled in.
    steps: optimizer steps.
    batch_size: examples a step.
    head: output layer; by default the velocity's.
    optimizer: by default AdamW at 2e-3 with a warm-up of up to 100 steps and a cosine.
    ema: settings of the average.
    mesh: sizes of the mesh; by default all devices split the batch.
    sample: settings of later samples.
    start: a finished run of the same network whose parameters it starts from.
    seed: of all random draws.
    workdir: folder to keep the run in.
    bar: whether to report progress.
    **length: other fields of `TrainSettings`, such as log_every.

  Raises:
    ValueError: the pieces do not fit together.
  """
  cache_compilations()
  settings = _settings(objective, data, network, head or VelocityHead(), steps, batch_size, optimizer, length)
  settings = dataclasses.replace(settings, ema=ema, mesh=mesh, sample=sample, start=start, seed=seed)
  return _run(settings, data, None, workdir, bar)


def distill(
  teacher: Run | Teacher | Folder,
  objective: Any,
  head: Head | None = None,
  *,
  steps: int,
  data: datasets.Dataset | None = None,
  network: nn.Module | None = None,
  batch_size: int = 64,
  guidance: TeacherSettings | float = 1.0,
  adapters: AdapterSettings = AdapterSettings(),
  adversarial: Adversarial | None = None,
  optimizer: OptimizerSettings | None = None,
  ema: EmaSettings = EmaSettings(),
  mesh: MeshSettings = MeshSettings(),
  sample: SampleSettings = SampleSettings(),
  start: StartSettings = StartSettings(),
  seed: int = 0,
  workdir: Folder | None = None,
  bar: bool = True,
  **length: Any,
) -> Run:
  """Trains a student of a teacher; the arguments that are not listed are those of `train`.

  Args:
    teacher: a run, its workdir, or a `Teacher`, which may be a plain function.
    objective: such as `Imitation(nfe=1)` or `ayf_emd()`.
    head: `GMFlowHead(...)`, `DXHead(...)` or `ArcHead(...)` for a policy student; a flow map has the teacher's, the
      default.
    data: by default the teacher's.
    network: by default the teacher's.
    guidance: strength of the teacher's guidance, or all its settings.
    adapters: low-rank adapters that train in place of all parameters.
    adversarial: an adversarial loss beside that of a flow map, which `start` names a finished run of.
  """
  cache_compilations()
  if "teacher" not in objective.sections:
    raise ValueError(f"distill: {type(objective).__name__} learns from data alone; see train")
  run = load(teacher) if isinstance(teacher, (str, os.PathLike)) else teacher
  guided = guidance if isinstance(guidance, TeacherSettings) else TeacherSettings(guidance=guidance)
  source: Teacher
  if isinstance(run, Run):
    data = data if data is not None else run.data
    model, own_head = run.settings.model, run.settings.head
    source = run.as_teacher()
    if run.workdir is not None:  # the student's config names it, so that other programs find it
      which = guided.which if isinstance(guidance, TeacherSettings) else run._which
      guided = dataclasses.replace(guided, workdir=run.workdir, which=which)
  else:
    if data is None or network is None:
      raise ValueError("distill: of a teacher that is a function, the student's data and network must be given")
    source, model, own_head = run, None, Choice("velocity")
  chosen: Any = network if network is not None else model
  settings = _settings(objective, data, chosen, head or own_head, steps, batch_size, optimizer, length)
  settings = dataclasses.replace(settings, teacher=guided, adapters=adapters, start=start, seed=seed)
  if adversarial is not None:
    settings = dataclasses.replace(settings, adversarial=adversarial)
  settings = dataclasses.replace(settings, ema=ema, mesh=mesh, sample=sample)
  return _run(settings, data, None if guided.workdir else source, workdir, bar)


def load(folder: Folder, *, base: Folder | None = None, which: str = "ema", teacher: Folder | None = None) -> Run:
  """Loads a finished run, or a model of PyTorch.

  Args:
    folder: a workdir; or a folder of diffusers, or a student of π-Flow or ArcFlow, which is converted.
    base: teacher of a student of PyTorch that is an adapter, a workdir or a folder of diffusers.
    which: "ema" or "params".
    teacher: workdir of its teacher, if that has moved.

  Raises:
    ValueError: there is no run and no model, or it cannot be read; or it is a model of PyTorch, and there are several
      processes.
  """
  cache_compilations()
  if not is_run(folder):
    if teacher is not None:
      raise ValueError("teacher: is for a run; the teacher of an adapter of PyTorch is `base`")
    if jax.process_count() > 1:
      raise ValueError(f"load: convert it first, pf.convert({str(folder)!r}, a workdir that all processes see)")
    with _converted(folder, base) as made:
      run = load(made)
      run.workdir = None  # the folder is temporary; all that is needed is in memory
      if run.settings.adapters.table or (base is not None and not is_run(base)):
        run._frozen = run._experiment.load_frozen(run._layout)
      return run
  if base is not None:
    raise ValueError(f"base: {folder} is a run, which knows its teacher; `teacher` says where that has moved")
  settings = workdirs.load_settings(folder)
  settings = use_teacher(settings, teacher)
  experiment, layout = build(settings, run=folder), layout_of(settings)
  params = experiment.load(folder, which_of(settings, which), layout)
  # All processes ask for the step together, once: a run's `steps` and `repr` may be asked for by one of them alone.
  steps = newest_step(f"{folder}/{workdirs.CHECKPOINTS}") or 0
  return Run(experiment, layout, params, history=read_metrics(folder), workdir=folder, which=which, steps=steps)


def check_teacher(
  teacher: Run | Teacher | Callable[..., Any] | Folder,
  data: datasets.Dataset | None = None,
  *,
  num: int = 256,
  batch_size: int = 64,
  seed: int = 0,
) -> TeacherReport:
  """Says what is wrong with a teacher, before a student is trained.

  It looks at shape, dtype and finite numbers, and at whether an example depends on others or on chance. The error on
  examples, E|v - (eps - x0)|^2 at x = (1 - t) x0 + t eps, tells the sign, direction and scale of time, predictions of
  noise or of x0, the scale of data and velocity, and the order of labels; guidance is left out of it. It takes some
  twenty passes over the examples.

  Args:
    teacher: a run, its workdir, a `Teacher`, or a function (x, t, cond) -> v.
    data: by default those of the run.
    num: examples, at least 16.
    batch_size: examples at a time.
    seed: of the examples and their noise.

  Returns:
    The problems that were found, each with what to do; `ok` tells whether there are none.

  Raises:
    ValueError: the arguments do not fit; a problem of the teacher is not raised.
  """
  cache_compilations()
  if isinstance(teacher, (str, os.PathLike)):
    teacher = load(teacher)
  if isinstance(teacher, Run):
    data = teacher.data if data is None else data
    teacher = teacher.as_teacher()
  if not isinstance(teacher, Teacher):
    teacher = Teacher(teacher)
  if not isinstance(data, datasets.Dataset):
    raise ValueError(f"data: expected what pf.data.load or from_arrays returns, got {type(data).__name__}")
  if num < 16 or batch_size < 1:
    raise ValueError(f"num, batch_size: expected at least 16 examples, 1 at a time, got {num} and {batch_size}")
  own = teacher.on(data, teacher.settings)
  is_guided = own.settings.is_guided((1.0, 1.0))
  if is_guided and own.null_cond is None and not own.settings.autoguided:
    raise ValueError("teacher: guidance needs the empty condition, which these data lack; give null_cond")
  return check(own, data, num=num, batch_size=batch_size, seed=seed)


@contextlib.contextmanager
def _converted(folder: Folder, base: Folder | None) -> Iterator[str]:
  """Context with a temporary workdir made of a model of PyTorch."""
  with tempfile.TemporaryDirectory(prefix="pflow-") as place:
    if base is not None and not is_run(base):
      convert(base, f"{place}/base")
      base = f"{place}/base"
    convert(folder, f"{place}/model", base=base)
    yield f"{place}/model"


def _settings(
  objective: Any,
  data: datasets.Dataset,
  network: nn.Module | Choice,
  head: Head | Choice,
  steps: int,
  batch_size: int,
  optimizer: OptimizerSettings | None,
  length: dict[str, Any],
) -> Settings:
  """Makes the settings of a run from the objects that a notebook gives."""
  if not isinstance(data, datasets.Dataset):
    raise ValueError(f"data: expected what pf.data.load or from_arrays returns, got {type(data).__name__}")
  model = network if isinstance(network, Choice) else Choice(*options_of(network))
  output = head if isinstance(head, Choice) else Choice(*head_options_of(head))
  _ = network_kind(model.kind)
  default = OptimizerSettings(2e-3, warmup_steps=min(100, steps // 10), schedule="cosine")
  return Settings(
    data=data.options,
    model=model,
    head=output,
    kind=kind_of(objective),
    objective=objective,
    optimizer=optimizer or default,
    train=TrainSettings(steps, batch_size, **length),
  )


def _run(settings: Settings, data: datasets.Dataset, teacher: Teacher | None, workdir: Folder | None, bar: bool) -> Run:
  picture = (save_picture, preview_size)
  trained = train_run(settings, workdir, dataset=data, teacher=teacher, picture=picture, bar=bar)
  experiment, state = trained.experiment, trained.state
  params = experiment.complete(state.ema, trained.frozen)
  return Run(
    experiment,
    trained.layout,
    params,
    frozen=trained.frozen if experiment.teacher else None,
    state=state,
    history=trained.history,
    workdir=workdir,
    steps=int(state.step),
  )
