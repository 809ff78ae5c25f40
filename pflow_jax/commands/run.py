"""A trained model in a notebook: it is sampled, measured, saved, and the teacher of another."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pflow_jax import data as datasets
from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.data.pictures import as_html
from pflow_jax.evaluation import plot
from pflow_jax.evaluation.evaluate import KeptInFolder
from pflow_jax.evaluation.measure import Report, measure
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.report import EvaluatedRun, save_report
from pflow_jax.evaluation.samplers import Sampler, own_samplers, student_samplers, velocity_samplers
from pflow_jax.evaluation.text_to_image import ask, draw
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout, to_host
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.sections import call
from pflow_jax.settings.teacher import TeacherSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir as workdirs
from pflow_jax.training.experiment import Experiment, build
from pflow_jax.training.inputs import absolute_path
from pflow_jax.training.methods import Method
from pflow_jax.training.origins import inputs_of
from pflow_jax.training.parts import Part, check_fit
from pflow_jax.training.sample import draw_noise, evaluations, in_batches, make_sampler, sample_keys, with_guide
from pflow_jax.training.state import TrainState, count_parameters
from pflow_jax.training.teachers import Teacher
from pflow_jax.training.writer import write_metrics

Params = Any
Folder = str | os.PathLike


class Run:
  """A trained model: a teacher or a student, in memory, and perhaps in a workdir.

  Attributes:
    params: all parameters of its network, the averages of those that trained.
    history: metrics of its training by name, and "step": arrays with one entry an interval.
    workdir: its folder; None for a run that is in memory alone.
    steps: optimizer steps that it was trained for; 0 for a model of PyTorch, whose number is unknown.
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
    which: str = "ema",
    steps: int = 0,
  ):
    self._experiment, self._layout, self._state = experiment, layout, state
    self._frozen, self._which = frozen, which
    self._samplers: dict[str, Any] = {}
    self._encoders: dict[str, Any] = {}
    self.params, self.history, self.steps = params, history or {}, steps
    self.workdir = None if workdir is None else absolute_path(workdir)

  @property
  def data(self) -> datasets.Dataset:
    """Data that it was trained on; a loaded run may lack the records."""
    return self._experiment.dataset

  @property
  def settings(self) -> Settings:
    """All settings of the run."""
    return self._experiment.settings

  def sample(
    self,
    num: int = 16,
    *,
    labels: Sequence[int | str] | None = None,
    nfe: int | None = None,
    seed: int = 0,
    **sampling: Any,
  ) -> np.ndarray:
    """Draws samples, the same as `pflow sample`.

    Args:
      num: number of samples.
      labels: classes by number or name, repeated; by default all in turn.
      nfe: network evaluations; by default those a policy student was trained for, 1 for a flow map, 128 for a teacher.
      seed: of the noise.
      **sampling: other values of fields of `SampleSettings`.

    Returns:
      (num, *space, C), float32.

    Raises:
      ValueError: a class, a number or a setting does not fit.
    """
    if num < 1:
      raise ValueError(f"num: expected at least 1 sample, got {num}")
    settings = self._sampling(nfe, **sampling)
    noise, cond = draw_noise(self.data, num, seed, labels)
    keys = sample_keys(num, seed)
    method = self._experiment.method
    run = self._sampler(method, settings, evaluations(method, settings)[0])
    one = functools.partial(run, with_guide(method, settings, self.params, self._layout))
    return in_batches(one, self._layout, settings.batch_size, noise, cond, keys)

  def decode(self, x: np.ndarray) -> np.ndarray:
    """Returns samples as pictures (n, H, W, 1 or 3), about [-1, 1]: latents decoded, if their autoencoder is known.

    Args:
      x: samples (n, *space, C).
    """
    return as_pictures(self.data, np.asarray(x))

  def pictures(
    self,
    prompts: str | Sequence[str],
    *,
    pipeline: Folder | None = None,
    height: int | None = None,
    width: int | None = None,
    nfe: int | None = None,
    seed: int = 0,
    **sampling: Any,
  ) -> np.ndarray:
    """Draws a picture of every prompt; the same that `pflow sample --prompt` draws.

    Args:
      prompts: texts, or one text.
      pipeline: folder of the published model, whose text encoders and autoencoder are used; not needed for a run on
        MiniLM's embeddings and pixels.
      height: in pixels; by default as trained.
      width: in pixels; by default as trained.
      nfe: network evaluations, as for `sample`.
      seed: picture i starts from noise that depends on it and i alone.
      **sampling: other values of fields of `SampleSettings`.

    Returns:
      (n, H, W, C), about [-1, 1], float32.

    Raises:
      ValueError: the run is not conditioned on texts; a folder, a size or a setting does not fit.
    """
    settings = self._sampling(nfe, **sampling)
    asked = ask(dataclasses.replace(self.settings, sample=settings), prompts, pipeline, height, width, self._encoders)
    count = evaluations(self._experiment.method, settings)[0]
    # A sampler is of its condition's kind and, guided, of the empty prompt.
    make = functools.partial(self._sampler, mark=f"texts {'' if settings.guidance is None else asked.digest}")
    x0 = draw(self._experiment, self.params, self._layout, settings, asked, count, seed, make)[1]
    return self.decode(x0) if asked.codec is None else asked.decoded(x0)

  def trajectories(
    self, num: int = 64, *, labels: Sequence[int | str] | None = None, nfe: int | None = None, seed: int = 0
  ) -> np.ndarray:
    """Draws trajectories from noise to data, (steps + 1, num, *space, C); arguments as of `sample`."""
    settings = self._sampling(nfe)
    method = self._experiment.method
    noise, cond = draw_noise(self.data, num, seed, labels)
    walk = jax.jit(method.trajectory(settings, evaluations(method, settings)[0]))
    return to_host(walk(with_guide(method, settings, self.params, self._layout), noise, cond))

  def evaluate(self, *, out: Folder | None = None, quiet: bool = False, **settings: Any) -> Report:
    """Measures it against its teacher and its data.

    Args:
      out: folder for evaluation.html, .md, .json and pictures; by default nothing is written.
      quiet: whether to print no progress.
      **settings: other values of fields of `EvaluateSettings`.

    Returns:
      The numbers, with a table in their `repr`.

    Raises:
      ValueError: there are no data to compare with, or too few samples.
    """
    experiment = self._experiment
    if self.workdir is not None and self.data.embedding is not None and self.data.null_cond is None:
      # What a workdir says of its data lacks the empty prompt, with which a teacher is guided.
      whole = call(datasets.load, "data", self.settings.data)
      experiment = build(self.settings, dataset=whole, run=self.workdir)
    method, teacher = experiment.method, experiment.teacher
    own = dataclasses.replace(self.settings.evaluate, **settings)

    def samplers() -> list[Sampler]:
      sampling = self.settings.sample
      if teacher is None:
        found = velocity_samplers(method, method.velocity, self.params, own)
      else:
        found = velocity_samplers(method, teacher.velocity, self._teachers_params(teacher), own)
      mine = student_samplers if method.is_student else own_samplers
      return found + mine(method, sampling, with_guide(method, sampling, self.params, self._layout))

    kept = None
    if self.workdir is not None and (teacher is None or teacher.saved):
      kept = KeptInFolder(experiment, self.workdir)
    batch_size = self.settings.sample.batch_size
    report = measure(samplers, experiment.dataset, own, self._layout, batch_size=batch_size, kept=kept, quiet=quiet)
    if out is not None and is_first():
      folder = pathlib.Path(checked_folder(out, "out"))
      save_report(report, folder, {self.workdir or self.settings.kind: EvaluatedRun(self.settings, self.history)})
    return report

  def save(self, folder: Folder) -> str:
    """Writes it as a workdir, which the command line and `load` read, and from which training goes on.

    Args:
      folder: a new folder.

    Returns:
      Its absolute path.

    Raises:
      ValueError: the folder holds a run; this run was loaded, and is in a folder already; or its adapters belong to a
        teacher that is not saved.
    """
    folder, state = checked_folder(folder), self._state
    if state is None:
      where = self.workdir or "a model of PyTorch, which `pflow convert` makes a workdir of"
      raise ValueError(f"save: this run was loaded from {where}; copy that folder")
    if workdirs.has_checkpoint(folder):
      raise ValueError(f"{folder} holds a run already; give another folder")
    settings, saved = self.settings, self._experiment.saved
    if settings.adapters.table and "teacher" not in saved:
      raise ValueError("save: the adapters sit on a teacher that is not saved; save that first, and distill from it")
    inputs = inputs_of(settings, self.data, saved, folder)
    with (
      Lock(folder, "save", active=is_first()),
      Checkpointer(f"{folder}/{workdirs.CHECKPOINTS}") as checkpointer,
    ):
      workdirs.claim(folder, settings, inputs, write=is_first())
      if is_first():
        write_metrics(folder, self.history)
      checkpointer.save(int(state.step), state)
    self.workdir = absolute_path(folder)
    return self.workdir

  def as_teacher(self) -> Teacher:
    """Returns it as the teacher of a student.

    Raises:
      ValueError: it is a student.
    """
    if self._experiment.method.is_student:
      raise ValueError(f"teacher: expected a run of flow matching, got a student ({self.settings.kind})")
    return RunTeacher(self)

  def __repr__(self) -> str:
    where = f", in {self.workdir}" if self.workdir else ""
    settings = self.settings
    what = f"{settings.kind}, {settings.model.kind} with head {settings.head.kind}"
    return f"Run({what}, {count_parameters(self.params):,} parameters, on {self.data.name}, {self.steps} steps{where})"

  def _repr_html_(self) -> str:
    """Returns the line of `repr`, with the curve of its loss where it is known: no network is evaluated."""
    known = "loss" in self.history and np.isfinite(self.history["loss"]).any()
    return as_html(repr(self), plot.losses(self)._repr_png_() if known else None, width=400)

  def _teachers_params(self, teacher: Teacher) -> Params:
    if self._frozen is None:
      self._frozen = teacher.load(self._layout)
    return self._frozen

  def _sampling(self, nfe: int | None, **changes: Any) -> SampleSettings:
    return dataclasses.replace(self.settings.sample, **(changes if nfe is None else {**changes, "nfe": (nfe,)}))

  def _sampler(self, method: Method, settings: SampleSettings, nfe: int, mark: str = "") -> Any:
    key = f"{settings}, {nfe}, {mark}"
    if key not in self._samplers:
      self._samplers[key] = make_sampler(method, settings, nfe)
    return self._samplers[key]


class RunTeacher(Teacher):
  """A run in memory as the teacher of a student, which starts from its parameters."""

  def __init__(self, run: Run):
    method, shapes = run._experiment.method, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), run.params)
    self.settings, self.null_cond, self._settings = TeacherSettings(), None, run.settings
    self._about = repr(run)
    self._own = {"strong": Part(method.velocity, shapes, method.network, values=run.params)}

  def check(self, settings: Settings, dataset: datasets.Dataset, strengths: tuple[float, float]) -> None:
    own, asked = self._settings, settings.teacher or TeacherSettings()
    check_fit(settings, own, "this run", asked, dataset, asked.is_guided(strengths), about_data=not own.converted)
