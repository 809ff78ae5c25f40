"""`pflow evaluate`: students beside their teacher, from the same noise and labels."""

from __future__ import annotations

import io
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from pflow_jax import data
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.evaluation import board
from pflow_jax.evaluation.features import Classifier
from pflow_jax.evaluation.measure import Drawn, Kept, measure
from pflow_jax.evaluation.report import EvaluatedRun, save_report
from pflow_jax.evaluation.sample import check_local
from pflow_jax.evaluation.samplers import Sampler, student_samplers, teacher_samplers
from pflow_jax.files import foreign
from pflow_jax.files.array_files import read_npz
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import checked_folder, expanded, told_apart
from pflow_jax.mesh.distributed import from_first, is_first
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.origins import use_teacher
from pflow_jax.training.sample import with_guide
from pflow_jax.training.writer import read_metrics


def evaluate(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  *,
  others: Sequence[str | os.PathLike] = (),
  teacher: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Measures the run in `folder`; writes evaluation.html, .md, .json and pictures into <folder>/evaluation.

  What lies there is also shown where the run is watched, in TensorBoard say.

  Alignment, the primary measure, is the mean root-mean-square distance to the teacher's 128-step sample from the same
  noise. Ratios carry a standard error over the paired samples.

  Args:
    config: of the run in `folder`, perhaps with other settings for evaluation.
    folder: workdir of the run.
    others: workdirs of more students of the same teacher, with their own settings, for the same table and picture.
    teacher: workdir of that teacher, if it has moved.
    out: folder of the results; by default <folder>/evaluation.

  Returns:
    the content of evaluation.json.

  Raises:
    ValueError: the students have different teachers, or there are fewer samples than a Fréchet distance needs.
  """
  folder = expanded(folder)
  check_local(out, folder)
  own = out is None
  out = pathlib.Path(checked_folder(f"{folder}/evaluation" if out is None else out, "out"))
  runs = {str(folder): Settings.of(config, converted=True)} | {
    str(other): workdir.load_settings(other) for other in others
  }
  if converted := [name for name, one in runs.items() if one.converted]:
    raise ValueError(
      f"{converted[0]} holds a converted teacher, which has no data to compare with; evaluate its student, or measure "
      "it against a reference (pflow evaluate --protocol=adm)"
    )
  runs = {name: use_teacher(one, teacher) for name, one in runs.items()}
  # An evaluation reads the data; the descriptions in the runs' inputs are not enough.
  experiments = {name: build(one, dataset=call(data.load, "data", one.data), run=name) for name, one in runs.items()}
  experiment = experiments[str(folder)]
  settings, sampling = experiment.settings.evaluate, experiment.settings.sample
  _check_teachers(experiments)
  dataset, layout = experiment.dataset, layout_of(experiment.settings)

  def samplers() -> list[Sampler]:
    frozen = experiment.load_frozen(layout)
    found = teacher_samplers(experiment, layout, folder, settings, frozen)
    for own_name, (name, one) in zip(told_apart(list(experiments)), experiments.items(), strict=True):
      if one.method.is_student:
        suffix = f" ({own_name})" if others else ""
        mine, teachers = (each.teacher and each.teacher.settings.dtype for each in (one, experiment))
        shared = frozen if one.teacher and mine == teachers else None
        params = with_guide(one.method, one.settings.sample, one.load(name, layout=layout, frozen=shared), layout)
        found += student_samplers(one.method, one.settings.sample, params, suffix)
    return found

  kept = KeptInFolder(experiment, folder)
  measured = measure(samplers, dataset, settings, layout, batch_size=sampling.batch_size, kept=kept)
  if not is_first():
    return {"workdirs": list(experiments), **measured.about, "rows": measured.rows}
  measured.about["step"] = newest_step(f"{folder}/{workdir.CHECKPOINTS}")
  evaluated = {name: EvaluatedRun(one.settings, read_metrics(name)) for name, one in experiments.items()}
  report = save_report(measured, out, evaluated)
  if own:
    pictures = {name: out / f"{name}.png" for name in ("samples", "trajectories")}
    board.show(experiment.settings, folder, measured, {k: path for k, path in pictures.items() if path.exists()})
  print(measured.table)
  print(f"wrote {out}/evaluation.html, evaluation.md, evaluation.json and samples.png")
  return report


class KeptInFolder(Kept):
  """Keeps a teacher's samples and its data's classifier in its folder: all its students are measured alike.

  Args:
    experiment: a run.
    folder: its workdir.
  """

  def __init__(self, experiment: Experiment, folder: str | os.PathLike):
    self._experiment = experiment
    self._folder = epath.Path(_owner(experiment, folder)) / "evaluation"

  def samples(self, sampler: Sampler, draw: Callable[[], Drawn], shape: tuple[int, ...]) -> Drawn:
    teacher, settings = self._experiment.teacher, self._experiment.settings
    if teacher is None:
      return draw()
    what = (
      f"{described_teacher(self._experiment)}, in {teacher.settings.dtype}; {settings.evaluate.num_samples} samples of "
    )
    what += f"seed {settings.evaluate.seed}, {settings.sample.batch_size} at a time"
    what += f", {jax.devices()[0].device_kind} x {jax.device_count()}"
    # The reference of many evaluations is kept under the name that it has had.
    how = "steps" if sampler.solver == "euler" else sampler.solver
    return _draw_once(draw, self._folder / f"samples_{sampler.nfe}_{how}.npz", what, shape)

  def classifier(self, train: Callable[[], Classifier], dataset: data.Dataset, steps: int) -> Classifier:
    # The name has the number of steps: another setting trains another classifier.
    path = self._folder / f"classifier_{steps}_steps.npz"
    if from_first(path.exists()):
      return Classifier.load(path, image_shape=dataset.shape, num_classes=dataset.num_classes)  # type: ignore[arg-type]
    classifier = train()
    if is_first():
      path.parent.mkdir(parents=True, exist_ok=True)
      classifier.save(path)
    return classifier


def _draw_once(draw: Callable[[], Drawn], path: epath.Path, what: str, shape: tuple[int, ...]) -> Drawn:
  """Returns the samples of `draw`, or those of the file `path` if it holds `what`; keeps them there.

  All students of a teacher are measured against the same samples, and those of 128 steps take longer than all others.
  """
  samples, speed = _read_samples(path, what, shape) if is_first() else (None, 0.0)
  if from_first(samples is not None):
    return from_first(samples if samples is not None else np.zeros(shape, np.float32)), speed
  samples, speed = draw()
  if is_first():
    content = io.BytesIO()
    np.savez(content, what=what, samples=samples, images_per_second=speed)  # type: ignore[arg-type]
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(path, content.getvalue())
    except OSError as error:  # the teacher's folder may be read-only
      print(f"{path} cannot be written ({error}): the next evaluation draws these samples again", flush=True)
  return samples, speed


def _read_samples(path: epath.Path, what: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, float]:
  """Reads samples and speed from the file `path`, if it holds `what`; prints a line if it is no such file."""
  try:
    if not path.exists():
      return None, 0.0
    # Beside the samples there are a line, a number and the headers.
    content = foreign.read_bytes(path, 4 * math.prod(shape) + 2**20)
    names = ("what", "samples", "images_per_second")
    arrays = read_npz(content, names, name="it")
    told, samples, speed = (arrays[name] for name in names)
    if told.shape != () or told.dtype.kind != "U":
      raise ValueError(f"expected a line that says what it holds, got {foreign.shown(told)}")
    if str(told) != what:
      return None, 0.0  # the samples are of other noise, or of a former teacher in this folder
    if (samples.dtype, samples.shape) != (np.float32, shape) or not np.isfinite(samples).all():
      raise ValueError(f"expected {shape} finite numbers in float32, got {samples.dtype} {samples.shape}")
    if speed.shape != () or speed.dtype.kind != "f" or not 0 < speed < np.inf:
      raise ValueError(f"expected a number of images a second, got {foreign.shown(speed)}")
    return samples, float(speed)
  except Exception as error:  # a damaged zip or header fails in a dozen ways
    print(f"{path} cannot be used ({error}): these samples are drawn anew", flush=True)
    return None, 0.0


def _check_teachers(experiments: dict[str, Experiment]) -> None:
  """Raises ValueError unless all runs have one teacher, with one guidance and sampler: the common reference."""
  references = {name: described_teacher(one) if one.teacher else f"itself, {name}" for name, one in experiments.items()}
  if len(set(references.values())) > 1:
    folders = {name: f" ({_owner(one, name)})" if one.teacher else "" for name, one in experiments.items()}
    listing = "".join(f"\n  {name}: {text}{folders[name]}" for name, text in references.items())
    raise ValueError(f"runs that are compared must share a teacher, got:{listing}")


def _owner(experiment: Experiment, folder: str | os.PathLike) -> str:
  """The workdir of a run's teacher; the run's own if it is a teacher."""
  return experiment.teacher.saved["strong"].workdir if experiment.teacher else str(folder)


def described_teacher(experiment: Experiment) -> str:
  """Text with all that the samples of a run's teacher depend on, except their number and noise."""
  assert experiment.teacher is not None
  t = experiment.teacher.settings
  digests = {name: saved.digest for name, saved in experiment.teacher.saved.items()}
  shift = experiment.method.shift
  how = f"guidance {t.guidance} in {tuple(t.interval)}, orthogonal {t.orthogonal}, shift {shift}"
  # A weak teacher guides nothing at strength 1.
  if t.autoguided and t.guidance != 1:
    how += f", weak teacher {digests['weak']}"
  return f"{digests['strong']}, {how}"
