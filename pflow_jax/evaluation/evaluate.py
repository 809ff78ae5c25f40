"""`pflow evaluate`: students beside their teacher, from the same noise and labels."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from pflow_jax import data
from pflow_jax.evaluation import figures, metrics
from pflow_jax.evaluation.features import Classifier, pixel_features, train_classifier
from pflow_jax.evaluation.sample import check_local, save_picture
from pflow_jax.evaluation.samplers import Sampler, student_samplers, teacher_name, teacher_samplers
from pflow_jax.files import foreign
from pflow_jax.files.array_files import read_npz
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.mesh.distributed import from_first, is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.origins import use_teacher
from pflow_jax.training.sample import check_room, draw_noise, in_batches, labels_of

COLUMNS = {
  "name": "sampler",
  "nfe": "NFE",
  "alignment": "alignment error",
  "alignment_ratio": "/ teacher-4",
  "fd": "FD",
  "fd_ratio": "/ teacher-128",
  "fd_pixels_ratio": "FD pixels / teacher-128",
  "diversity_ratio": "diversity / teacher-128",
  "precision": "precision",
  "recall": "recall",
  "accuracy": "class accuracy",
  "images_per_second": "images/s",
}


def evaluate(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  *,
  others: Sequence[str | os.PathLike] = (),
  teacher: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Measures the run in `folder`; writes evaluation.json, .md and pictures into <folder>/evaluation.

  Alignment, the primary measure, is the mean root-mean-square distance to the teacher's 128-step sample from the same
  noise. Ratios carry a standard error over the paired samples.

  Args:
    config: of the run in `folder`, perhaps with other settings for evaluation.
    others: workdirs of more students of the same teacher, with their own settings, for the same table and picture.
    teacher: workdir of that teacher, if it has moved.
  Returns: what evaluation.json holds.
  Raises: ValueError for students of different teachers, or fewer samples than a Fréchet distance needs.
  """
  folder = expanded(folder)
  check_local(out, folder)
  out = pathlib.Path(checked_folder(f"{folder}/evaluation" if out is None else out, "--out"))
  runs = {str(folder): Settings.of(config)} | {str(other): workdir.load_settings(other) for other in others}
  runs = {name: use_teacher(one, teacher) for name, one in runs.items()}
  # The data are read here, whatever the runs tell of theirs.
  experiments = {name: build(one, dataset=call(data.load, "data", one.data), run=name) for name, one in runs.items()}
  experiment = experiments[str(folder)]
  settings, batch_size = experiment.settings.evaluate, experiment.settings.sample.batch_size
  _check_teachers(experiments)
  dataset, layout = experiment.dataset, layout_of(experiment.settings)
  if not dataset.has_x0:
    raise ValueError(f"{dataset.name} has prompts alone: there is no data to compare samples with; see `pflow sample`")
  check_room(dataset, settings.num_samples, 1 + len(settings.teacher_steps), "config.evaluate.num_samples")
  noise, cond = draw_noise(dataset, settings.num_samples, settings.seed)
  labels = labels_of(cond, settings.num_samples)
  # All of a small data set; of an endless one, or one with texts, which are large, as many as there are samples.
  most = settings.num_samples * (1 if isinstance(cond, dict) and "text" in cond else 10)
  real, real_labels = data.examples(dataset, min(dataset.num_records or settings.num_samples, most))
  classifier = _classifier(experiment, settings, real, real_labels, folder)
  features = classifier.features if classifier else pixel_features
  real_features = features(real)
  real_spaces = {"fd": real_features} | ({"fd_pixels": pixel_features(real)} if classifier else {})
  if isinstance(cond, dict):
    # Pixels alone, which are more than there are samples: without a Fréchet distance the rest still says something.
    real_spaces = {"fd_pixels": real_features}
  else:
    _check_count(settings.num_samples, real_features.shape[1])

  frozen = experiment.load_frozen(layout)
  samplers = teacher_samplers(experiment, layout, folder, settings.teacher_steps, frozen)
  for name, one in experiments.items():
    if one.method.is_student:
      suffix = f" ({pathlib.Path(name).name})" if others else ""
      mine, teachers = (each.teacher and each.teacher.settings.dtype for each in (one, experiment))
      shared = frozen if one.teacher and mine == teachers else None
      samplers += student_samplers(one, layout, one.settings.sample, name, suffix, shared)
  keys = jax.random.split(jax.random.key(settings.seed + 1), settings.num_samples)
  samples: dict[str, np.ndarray] = {}
  rows: list[dict[str, Any]] = []
  for s in samplers:
    draw = functools.partial(_draw, s, layout, batch_size, noise, cond, keys)
    if s.is_student or experiment.teacher is None:
      samples[s.name], speed = draw()
    else:
      kept = epath.Path(_owner(experiment, folder)) / "evaluation" / f"samples_{s.nfe}_steps.npz"
      what = f"{_reference(experiment)}, in {experiment.teacher.settings.dtype}; {settings.num_samples} samples of "
      what += f"seed {settings.seed}, {batch_size} at a time"
      what += f", {jax.devices()[0].device_kind} x {jax.device_count()}"
      samples[s.name], speed = _draw_once(draw, kept, what, noise.shape)
    rows.append({"name": s.name, "nfe": s.nfe, "images_per_second": speed})
  reference, yardstick = samples[teacher_name(REFERENCE_STEPS)], samples[teacher_name(YARDSTICK_STEPS)]
  yardstick_errors = metrics.alignment_errors(yardstick, reference)
  spread = metrics.diversity(reference, labels)
  reference_spaces = {"fd": features(reference), "fd_pixels": pixel_features(reference)}
  for row in rows:
    x = samples[row["name"]]
    spaces = {"fd": features(x), "fd_pixels": pixel_features(x)}
    row["diversity"] = metrics.diversity(x, labels)
    row["diversity_ratio"] = row["diversity"] / spread
    if x is not reference:
      ratio = metrics.ratio_of_means(metrics.alignment_errors(x, reference), yardstick_errors)
      row["alignment"], row["alignment_ratio"] = ratio.value, (ratio.ratio, ratio.standard_error)
    for name, real_space in real_spaces.items():
      row |= _frechet(name, spaces[name], reference_spaces[name], real_space, settings.num_resamples)
    row["precision"], row["recall"] = metrics.precision_recall(real_features, spaces["fd"], settings.nearest_k)
    if classifier:
      row["accuracy"] = metrics.accuracy(classifier.predict(x), labels)
  report = {
    "workdirs": list(experiments),
    "data": dataset.name,
    "num_samples": settings.num_samples,
    "num_real": len(real),
    "features": f"classifier, {settings.classifier_steps} steps" if classifier else "coordinates",
    "device": jax.devices()[0].device_kind,
    "rows": rows,
  }
  table = metrics.markdown_table(rows, {k: v for k, v in COLUMNS.items() if any(k in row for row in rows)})
  paths = {}
  if dataset.shape == (2,):
    paths = {s.name: s.path(noise[:64], cond[:64]) for s in samplers if s.is_student or s.nfe == REFERENCE_STEPS}
  if not is_first():
    return report
  out.mkdir(parents=True, exist_ok=True)
  for name, text in {"evaluation.json": json.dumps(report, indent=2) + "\n", "evaluation.md": table}.items():
    write_atomically(out / name, text)
  _pictures(experiment, samplers, samples, paths, labels, real, out)
  print(table)
  print(f"wrote {out}/evaluation.json, evaluation.md and samples.png")
  return report


def _draw(
  sampler: Sampler, layout: Layout, batch_size: int, noise: np.ndarray, cond: Any, keys: jax.Array
) -> tuple[np.ndarray, float]:
  """Samples, and images per second once compiled."""
  if is_first():
    print(f"sampling: {sampler.name}", flush=True)
  size = min(batch_size, len(noise))
  first = jax.tree.map(lambda a: a[:size], (noise, cond, keys))
  in_batches(sampler.run, layout, size, *first)
  start = time.perf_counter()
  samples = in_batches(sampler.run, layout, size, noise, cond, keys)
  return samples, -(-len(noise) // size) * size / (time.perf_counter() - start)


def _draw_once(
  draw: Callable[[], tuple[np.ndarray, float]], path: epath.Path, what: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, float]:
  """What `draw` returns; from the file `path` if it holds `what`, and there afterwards.

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
    except OSError as error:  # of a teacher that may only be read
      print(f"{path} cannot be written ({error}): the next evaluation draws these samples again", flush=True)
  return samples, speed


def _read_samples(path: epath.Path, what: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, float]:
  """Samples and speed in the file `path`, if it holds `what`; with a word where it is no such file."""
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
      return None, 0.0  # of other noise, or of the teacher that was here before
    if (samples.dtype, samples.shape) != (np.float32, shape) or not np.isfinite(samples).all():
      raise ValueError(f"expected {shape} finite numbers in float32, got {samples.dtype} {samples.shape}")
    if speed.shape != () or speed.dtype.kind != "f" or not 0 < speed < np.inf:
      raise ValueError(f"expected a number of images a second, got {foreign.shown(speed)}")
    return samples, float(speed)
  except Exception as error:  # a damaged zip or header fails in a dozen ways
    print(f"{path} cannot be used ({error}): these samples are drawn anew", flush=True)
    return None, 0.0


def _pictures(experiment, samplers, samples, paths, labels, real, out: pathlib.Path) -> None:
  """samples.png: teacher and students; for 2-D data trajectories.png as well."""
  shown = [s for s in samplers if s.is_student or s.nfe in (1, YARDSTICK_STEPS, REFERENCE_STEPS)]
  shown.sort(key=lambda s: (s.is_student, -s.nfe))
  if experiment.dataset.shape == (2,):
    figures.scatter_panels(out / "samples.png", {"data": real} | {s.name: samples[s.name] for s in shown})
    in_order = {s.name: paths[s.name] for s in shown if s.name in paths}
    figures.trajectory_plot(out / "trajectories.png", real, in_order)
    return
  count = min(len(labels), max(10, min(experiment.dataset.num_classes, 12)))
  save_picture(
    experiment.dataset, {s.name: samples[s.name][:count] for s in shown}, labels[:count], out / "samples.png"
  )


def _frechet(name: str, x: np.ndarray, reference: np.ndarray, real: np.ndarray, num_resamples: int) -> dict[str, Any]:
  """Distance to the real data and its ratio to the reference's; nothing for pixels where there are too few samples."""
  if name != "fd" and min(len(x), len(real)) < metrics.SAMPLES_PER_FEATURE * real.shape[1]:
    return {}
  if np.array_equal(x, reference):
    return {name: metrics.frechet_distance(x, real), f"{name}_ratio": 1.0}
  pair = metrics.paired_bootstrap(metrics.frechet_distance, x, reference, real, num_resamples=num_resamples)
  return {name: pair.value, f"{name}_ratio": (pair.ratio, pair.standard_error)}


def _check_count(count: int, dimension: int) -> None:
  fewest = metrics.SAMPLES_PER_FEATURE * dimension
  if count < fewest:
    raise ValueError(
      f"config.evaluate.num_samples: a Fréchet distance in {dimension} features needs at least {fewest} samples, "
      f"got {count}"
    )


def _check_teachers(experiments: dict[str, Experiment]) -> None:
  """Raises ValueError unless all runs have one teacher, guided and walked alike: the common reference."""
  references = {name: _reference(one) if one.teacher else f"itself, {name}" for name, one in experiments.items()}
  if len(set(references.values())) > 1:
    folders = {name: f" ({_owner(one, name)})" if one.teacher else "" for name, one in experiments.items()}
    listing = "".join(f"\n  {name}: {text}{folders[name]}" for name, text in references.items())
    raise ValueError(f"runs that are compared must share a teacher, got:{listing}")


def _owner(experiment: Experiment, folder: str | os.PathLike) -> str:
  """The workdir of a run's teacher, or that of the run, a teacher's."""
  return experiment.teacher.saved["strong"].workdir if experiment.teacher else str(folder)


def _reference(experiment: Experiment) -> str:
  """All that the samples of a run's teacher depend on, but for their number and noise; it is told by its content."""
  assert experiment.teacher is not None
  t = experiment.teacher.settings
  digests = {name: saved.digest for name, saved in experiment.teacher.saved.items()}
  shift = experiment.method.objective.shift
  how = f"guidance {t.guidance} in {tuple(t.interval)}, orthogonal {t.orthogonal}, shift {shift}"
  # A weak teacher guides nothing at strength 1.
  if t.autoguided and t.guidance != 1:
    how += f", weak teacher {digests['weak']}"
  return f"{digests['strong']}, {how}"


def _classifier(experiment, settings, real, real_labels, folder) -> Classifier | None:
  """The data set's classifier; kept in the teacher's folder, so that all its students are measured alike."""
  dataset = experiment.dataset
  if len(dataset.shape) != 3 or dataset.num_classes < 2:
    return None
  # The name says how it was trained: another setting trains another.
  path = epath.Path(_owner(experiment, folder)) / "evaluation" / f"classifier_{settings.classifier_steps}_steps.npz"
  if from_first(path.exists()):
    return Classifier.load(path, image_shape=dataset.shape, num_classes=dataset.num_classes)
  if is_first():
    print("training the classifier that features and class accuracy are measured with", flush=True)
  classifier = train_classifier(real, real_labels, dataset.num_classes, steps=settings.classifier_steps)
  if is_first():
    path.parent.mkdir(parents=True, exist_ok=True)
    classifier.save(path)
  return classifier
