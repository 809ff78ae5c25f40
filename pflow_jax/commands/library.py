"""What a notebook calls: `train`, `distill`, `load`, and the runs that they return. The command line calls the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from pflow_jax import data as datasets
from pflow_jax.checkpoints.checkpoint import Checkpointer, newest_step
from pflow_jax.conversion.program import convert
from pflow_jax.conversion.runs import is_run
from pflow_jax.core.objectives import kind_of
from pflow_jax.evaluation.evaluate import KeptInFolder, save_pictures
from pflow_jax.evaluation.measure import Report, measure
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.evaluation.samplers import student_samplers, velocity_samplers
from pflow_jax.families.registry import network_kind
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.sharding import Layout
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
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.inputs import absolute_path
from pflow_jax.training.origins import inputs_of
from pflow_jax.training.sample import draw_noise, evaluations, in_batches, make_sampler
from pflow_jax.training.state import TrainState
from pflow_jax.training.teachers import Part, Teacher, which_of
from pflow_jax.training.train import train_run
from pflow_jax.training.writer import read_metrics, write_metrics

Params = Any
Folder = str | os.PathLike


class Run:
  """A trained model: a teacher or a student, in memory, and perhaps in a workdir.

  Attributes:
    params: all parameters of its network, the averages of those that trained.
    history: metrics of its training by name, and "step": arrays with one entry an interval.
    workdir: where it is saved; None of a run that is in memory alone.
  """

  def __init__(
    self,
    experiment: Experiment,
    layout: Layout,
    params: Params,
    *,
    frozen: Params = None,
    state: TrainState | None = None,
    history: dict[str, np.ndarray] | None = None,
    workdir: Folder | None = None,
  ):
    self._experiment, self._layout, self._state = experiment, layout, state
    self._frozen = frozen
    self.params, self.history = params, history or {}
    self.workdir = None if workdir is None else absolute_path(workdir)

  @property
  def data(self) -> datasets.Dataset:
    """What it was trained on; of a run that was loaded perhaps without records."""
    return self._experiment.dataset

  @property
  def settings(self) -> Settings:
    """All that decided it."""
    return self._experiment.settings

  @property
  def steps(self) -> int:
    """Optimizer steps that it was trained for."""
    if self._state is not None:
      return int(self._state.step)
    return newest_step(f"{self.workdir}/{workdirs.CHECKPOINTS}") or 0

  def sample(
    self,
    num: int = 16,
    *,
    labels: Sequence[int | str] | None = None,
    nfe: int | None = None,
    seed: int = 0,
    **sampling: Any,
  ) -> np.ndarray:
    """Draws samples; the same that `pflow sample` draws.

    Args:
      num: how many.
      labels: classes by number or name, repeated; by default all in turn.
      nfe: network evaluations; by default what a policy student was trained for, 1 of a flow map, 128 of a teacher.
      seed: of the noise.
      **sampling: other values of fields of `SampleSettings`.

    Returns:
      (num, *space, C), float32.

    Raises:
      ValueError: a class, a number or a setting that does not fit.
    """
    if num < 1:
      raise ValueError(f"num: expected at least 1 sample, got {num}")
    settings = self._sampling(nfe, **sampling)
    noise, cond = draw_noise(self.data, num, seed, labels)
    keys = jax.random.split(jax.random.key(seed + 1), num)
    run = self._sampler(settings, evaluations(self._experiment.method, settings)[0])
    draw = functools.partial(run, self.params)
    return in_batches(draw, self._layout, settings.batch_size, noise, cond, keys)

  def trajectories(
    self, num: int = 64, *, labels: Sequence[int | str] | None = None, nfe: int | None = None, seed: int = 0
  ) -> np.ndarray:
    """The ways of samples from noise to data, (steps + 1, num, *space, C); arguments as of `sample`."""
    settings = self._sampling(nfe)
    method = self._experiment.method
    noise, cond = draw_noise(self.data, num, seed, labels)
    walk = jax.jit(method.trajectory(settings, evaluations(method, settings)[0]))
    return np.asarray(walk(self.params, noise, cond))

  def evaluate(self, *, out: Folder | None = None, quiet: bool = False, **settings: Any) -> Report:
    """Measures it against its teacher and its data.

    Args:
      out: folder for evaluation.md and pictures; by default nothing is written.
      quiet: whether to say nothing meanwhile.
      **settings: other values of fields of `EvaluateSettings`.

    Returns:
      The numbers, with a table in their `repr`.

    Raises:
      ValueError: there are no data to compare with, or too few samples.
    """
    method, teacher = self._experiment.method, self._experiment.teacher
    own = dataclasses.replace(self.settings.evaluate, **settings)
    if teacher is None:
      samplers = velocity_samplers(method, method.velocity, self.params, own.teacher_steps)
    else:
      if self._frozen is None:
        self._frozen = teacher.load(self._layout)
      samplers = velocity_samplers(method, teacher.velocity, self._frozen, own.teacher_steps)
    if method.is_student:
      samplers += student_samplers(method, self.settings.sample, self.params)
    kept = None
    if self.workdir is not None and (teacher is None or teacher.saved):
      kept = KeptInFolder(self._experiment, self.workdir)
    batch_size = self.settings.sample.batch_size
    report = measure(samplers, self.data, own, self._layout, batch_size=batch_size, kept=kept, quiet=quiet)
    if out is not None:
      folder = pathlib.Path(checked_folder(out, "out"))
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "evaluation.md").write_text(report.table, encoding="utf-8")
      save_pictures(report, samplers, self.data, folder)
    return report

  def save(self, folder: Folder) -> str:
    """Writes it as a workdir, which the command line and `load` read, and which training goes on from.

    Args:
      folder: a new one.

    Returns:
      Its absolute path.

    Raises:
      ValueError: the folder holds a run; the run was loaded, and is in a folder already; its adapters sit on a teacher
        that is not saved.
    """
    folder, state = checked_folder(folder), self._state
    if state is None:
      raise ValueError(f"save: this run was loaded from {self.workdir}; copy that folder")
    if workdirs.has_checkpoint(folder):
      raise ValueError(f"{folder} holds a run already; give another folder")
    settings, saved = self.settings, self._experiment.saved
    if settings.adapters.table and "teacher" not in saved:
      raise ValueError("save: the adapters sit on a teacher that is not saved; save that first, and distill from it")
    inputs = inputs_of(settings, self.data, saved, folder)
    with Lock(folder, "save"), Checkpointer(f"{folder}/{workdirs.CHECKPOINTS}") as checkpointer:
      workdirs.claim(folder, settings, inputs)
      write_metrics(folder, self.history)
      checkpointer.save(int(state.step), state)
    self.workdir = absolute_path(folder)
    return self.workdir

  def as_teacher(self) -> Teacher:
    """It as the teacher of a student.

    Raises:
      ValueError: it is a student.
    """
    if self._experiment.method.is_student:
      raise ValueError(f"teacher: expected a run of flow matching, got a student ({self.settings.kind})")
    return RunTeacher(self)

  def __repr__(self) -> str:
    where = f", in {self.workdir}" if self.workdir else ""
    settings = self.settings
    what = f"{settings.kind}, {settings.model.kind} with head {settings.head.kind}, on {self.data.name}"
    return f"Run({what}, {self.steps} steps{where})"

  def _sampling(self, nfe: int | None, **changes: Any) -> SampleSettings:
    return dataclasses.replace(self.settings.sample, **(changes if nfe is None else {**changes, "nfe": (nfe,)}))

  @functools.cache  # noqa: B019 (of the few settings that a run is sampled with)
  def _sampler(self, settings: SampleSettings, nfe: int) -> Any:
    return make_sampler(self._experiment.method, settings, nfe)


class RunTeacher(Teacher):
  """A run in memory as the teacher of a student, which starts from its parameters."""

  def __init__(self, run: Run):
    method, shapes = run._experiment.method, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), run.params)
    self.settings, self.null_cond = TeacherSettings(), None
    self._own = {"strong": Part(method.velocity, shapes, method.network, values=run.params)}


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

  A run that is interrupted, by Ctrl-C or a notebook's stop, returns what it has. With a `workdir` it is saved there,
  and the same call goes on with it to the bit; without one nothing is written.

  Args:
    objective: settings of the loss, such as `FlowMatching()` or `mean_flow()`.
    data: what `pf.data.load` or `pf.data.from_arrays` returns.
    network: such as `DiT(patch_size=2, width=64, depth=4, num_heads=4)`; channels, classes and head are filled in.
    steps: optimizer steps.
    batch_size: examples a step.
    head: output layer; by default the velocity's.
    optimizer: by default AdamW at 2e-3 with a warm-up of up to 100 steps and a cosine.
    ema: of the average.
    mesh: sizes of the mesh; by default all devices split the batch.
    sample: how it is sampled later.
    start: a finished run of the same network whose parameters it starts from.
    seed: of all that is drawn.
    workdir: folder to keep the run in.
    bar: whether to report progress.
    **length: other fields of `TrainSettings`, such as log_every.

  Raises:
    ValueError: the pieces do not fit together.
  """
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
  """Trains a student of a teacher; what is not said here is as for `train`.

  Args:
    teacher: a run, its workdir, or a `Teacher`, which may be a plain function.
    objective: such as `Imitation(nfe=1)` or `ayf_emd()`.
    head: of a policy student `GMFlowHead(...)`, `DXHead(...)` or `ArcHead(...)`; of a flow map the teacher's, which is
      the default.
    data: by default the teacher's.
    network: by default the teacher's.
    guidance: strength, or all settings of how the teacher is guided.
    adapters: low-rank adapters that train in place of all parameters.
  """
  run = load(teacher) if isinstance(teacher, (str, os.PathLike)) else teacher
  guided = guidance if isinstance(guidance, TeacherSettings) else TeacherSettings(guidance=guidance)
  source: Teacher
  if isinstance(run, Run):
    data = data if data is not None else run.data
    model, own_head = run.settings.model, run.settings.head
    source = run.as_teacher()
    if run.workdir is not None:  # then the student names it, and others find it
      guided = dataclasses.replace(guided, workdir=run.workdir, which=which_of(run.settings, "ema"))
  else:
    if data is None or network is None:
      raise ValueError("distill: of a teacher that is a function, the student's data and network must be given")
    source, model, own_head = run, None, Choice("velocity")
  chosen: Any = network if network is not None else model
  settings = _settings(objective, data, chosen, head or own_head, steps, batch_size, optimizer, length)
  settings = dataclasses.replace(settings, teacher=guided, adapters=adapters, start=start, seed=seed)
  settings = dataclasses.replace(settings, ema=ema, mesh=mesh, sample=sample)
  return _run(settings, data, None if guided.workdir else source, workdir, bar)


def load(folder: Folder, *, base: Folder | None = None, which: str = "ema", teacher: Folder | None = None) -> Run:
  """A finished run, or a model of PyTorch.

  Args:
    folder: a workdir; or a folder of diffusers, or a student of π-Flow or ArcFlow, which is converted.
    base: of a student of PyTorch that is an adapter: its teacher, a workdir or a folder of diffusers.
    which: "ema" or "params".
    teacher: workdir of its teacher, if that has moved.

  Raises:
    ValueError: there is no run and no model, or it cannot be read.
  """
  if not is_run(folder):
    with _converted(folder, base) as made:
      return load(made, which=which)
  if base is not None:
    raise ValueError(f"base: {folder} is a run, which knows its teacher; `teacher` says where that has moved")
  settings = workdirs.load_settings(folder)
  if teacher is not None:
    settings = settings.changed("teacher", workdir=absolute_path(teacher))
  experiment, layout = build(settings, run=folder), layout_of(settings)
  params = experiment.load(folder, which_of(settings, which), layout)
  return Run(experiment, layout, params, history=read_metrics(folder), workdir=folder)


@contextlib.contextmanager
def _converted(folder: Folder, base: Folder | None) -> Iterator[str]:
  """A workdir made of a model of PyTorch, for as long as it takes to read it."""
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
  """Settings of these objects."""
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
  )
