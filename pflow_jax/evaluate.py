"""`pflow evaluate`: a student beside its teacher, from the same noise and labels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pflow_jax import data, figures, metrics, workdir
from pflow_jax.checkpoint import load_params
from pflow_jax.experiment import Experiment, build, call
from pflow_jax.features import Classifier, pixel_features, train_classifier
from pflow_jax.integrate import rollout
from pflow_jax.sample import (
  SampleSettings,
  draw_noise,
  in_batches,
  make_sampler,
  make_teacher_sampler,
  save_picture,
)
from pflow_jax.sampler import sample_teacher
from pflow_jax.schedule import segment_grid, shift_time

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
REFERENCE_STEPS = 128


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
  """The section `evaluate` of a config.

  Attributes:
    num_samples: samples of every sampler.
    teacher_steps: Euler steps of the teacher; the largest is the reference.
    seed: of the noise.
    classifier_steps: training steps of the classifier whose features and classes are used (images with classes only).
    num_resamples: of the bootstrap errors.
  """

  num_samples: int = 2000
  teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 128)
  seed: int = 1234
  classifier_steps: int = 600
  num_resamples: int = 50

  def __post_init__(self):
    if REFERENCE_STEPS not in self.teacher_steps or 4 not in self.teacher_steps:
      raise ValueError(
        f"config.evaluate.teacher_steps: expected 4 and {REFERENCE_STEPS} among them (the yardsticks of every ratio), "
        f"got {tuple(self.teacher_steps)}"
      )


def evaluate(config: ConfigDict, folder: str | os.PathLike, *, out: str | os.PathLike | None = None) -> dict[str, Any]:
  """Measures the run in `folder`; writes evaluation.json, .md and pictures into <folder>/evaluation.

  Alignment, the primary measure, is the mean root-mean-square distance to the teacher's 128-step sample from the same noise.
  Ratios carry a standard error over the paired samples.

  Returns: what evaluation.json holds.
  Raises: ValueError for fewer samples than a Fréchet distance needs.
  """
  settings = call(EvaluateSettings, "evaluate", config.evaluate)
  sampling = call(SampleSettings, "sample", config.sample)
  experiment = build(config)
  out = pathlib.Path(out or pathlib.Path(folder) / "evaluation")
  out.mkdir(parents=True, exist_ok=True)
  noise, labels = draw_noise(experiment, settings.num_samples, settings.seed)
  real, real_labels = _real(experiment.dataset, settings.num_samples)
  classifier = _classifier(experiment, settings, real, real_labels, _owner(experiment, folder))
  features = classifier.features if classifier else pixel_features
  _check_count(settings.num_samples, features(real[:1]).shape[1])

  samples, speed = draw_all(experiment, folder, settings, sampling, noise, labels)
  rows = [{"name": name, "nfe": int(name.split()[1]), "images_per_second": speed[name]} for name in samples]
  reference, yardstick = samples[f"teacher {REFERENCE_STEPS}"], samples["teacher 4"]
  error_of = functools.partial(metrics.alignment_errors, reference=reference)
  spread = metrics.diversity(reference, labels)
  spaces = {"fd": features} if classifier is None else {"fd": features, "fd_pixels": pixel_features}
  for row in rows:
    x = samples[row["name"]]
    row["diversity"] = metrics.diversity(x, labels)
    row["diversity_ratio"] = row["diversity"] / spread
    if x is not reference:
      ratio = metrics.ratio_of_means(error_of(x), error_of(yardstick))
      row["alignment"], row["alignment_ratio"] = ratio.value, (ratio.ratio, ratio.standard_error)
    for name, space in spaces.items():
      row |= _frechet(name, space(x), space(reference), space(real), settings)
    near = metrics.precision_recall(features(real), features(x))
    row["precision"], row["recall"] = near.precision, near.recall
    if classifier:
      row["accuracy"] = metrics.accuracy(classifier.predict(x), labels)
  report = {
    "workdir": str(folder),
    "data": experiment.dataset.name,
    "num_samples": settings.num_samples,
    "num_real": len(real),
    "features": "classifier" if classifier else "coordinates",
    "device": jax.devices()[0].device_kind,
    "rows": rows,
  }
  columns = {k: v for k, v in COLUMNS.items() if any(k in row for row in rows)}
  table = metrics.markdown_table(rows, columns)
  (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
  (out / "evaluation.md").write_text(table)
  pictures(experiment, folder, samples, noise, labels, real, sampling, out)
  print(table)
  print(f"wrote {out}/evaluation.json, evaluation.md and samples.png")
  return report


def draw_all(
  experiment: Experiment,
  folder: str | os.PathLike,
  settings: EvaluateSettings,
  sampling: SampleSettings,
  noise: np.ndarray,
  labels: np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Samples and images per second of every sampler: "teacher 4", "student 1", ..."""
  params = load_params(f"{folder}/{workdir.CHECKPOINTS}")
  if experiment.teacher is None:
    teacher_params, velocity, shift = (
      params,
      experiment.velocity,
      experiment.config.objective.get("shift", 1.0),
    )
  else:
    assert experiment.imitation is not None
    teacher_params, velocity = experiment.teacher.params, experiment.teacher.velocity
    shift = experiment.imitation.shift
  runs = {
    f"teacher {n}": functools.partial(make_teacher_sampler(velocity, n, shift), teacher_params)
    for n in settings.teacher_steps
  }
  if experiment.teacher is not None:
    key = jax.random.key(settings.seed + 1)
    for n in sampling.nfe:
      student = functools.partial(make_sampler(experiment, sampling, n), params)
      runs[f"student {n}"] = lambda x, c, run=student: run(x, c, key)
  samples, speed = {}, {}
  for name, run in runs.items():
    print(f"sampling: {name}", flush=True)
    size = min(sampling.batch_size, len(noise))
    jax.block_until_ready(run(noise[:size], labels[:size]))  # compiles
    start = time.perf_counter()
    samples[name] = in_batches(run, sampling.batch_size, noise, labels)
    batches = -(-len(noise) // size)
    speed[name] = batches * size / (time.perf_counter() - start)
  return samples, speed


def pictures(experiment, folder, samples, noise, labels, real, sampling, out: pathlib.Path) -> None:
  """samples.png: data, teacher and student; for 2-D data trajectories.png as well."""
  titles = {}
  for name, x in samples.items():
    who, n = name.split()
    if who == "student" or n in ("1", "4", str(REFERENCE_STEPS)):
      titles[f"{who}, {n} {'NFE' if who == 'student' else 'step' + 's' * (n != '1')}"] = x
  order = sorted(titles, key=lambda t: (t.startswith("student"), -int(t.split()[1])))
  if experiment.dataset.shape == (2,):
    figures.scatter_panels(out / "samples.png", {"data": real} | {t: titles[t] for t in order})
    figures.trajectory_plot(
      out / "trajectories.png",
      real,
      trajectories(experiment, folder, noise[:64], labels[:64], sampling),
    )
    return
  count = max(10, min(experiment.dataset.num_classes, 12))
  save_picture(experiment, {t: titles[t][:count] for t in order}, labels[:count], out / "samples.png")


def trajectories(experiment, folder, noise, labels, sampling: SampleSettings) -> dict[str, np.ndarray]:
  """Paths (steps + 1, n, 2) of the teacher and of the student's policies from the same noise."""
  params = load_params(f"{folder}/{workdir.CHECKPOINTS}")
  if experiment.teacher is None:
    velocity, shift = experiment.velocity(params), experiment.config.objective.get("shift", 1.0)
  else:
    velocity, shift = (
      experiment.teacher.velocity(experiment.teacher.params),
      experiment.imitation.shift,
    )
  walk = functools.partial(sample_teacher, velocity, noise, labels, steps=REFERENCE_STEPS, shift=shift, trajectory=True)
  panels = {f"teacher, {REFERENCE_STEPS} steps": np.asarray(jax.jit(walk)())}
  if experiment.imitation is None:
    return panels
  student = experiment.student(params)
  for nfe in sampling.nfe:
    x, states = noise, [noise]
    grid = segment_grid(nfe, experiment.imitation.final_scale)
    for r_start, r_end in itertools.pairwise(grid):
      t = np.full(len(x), shift_time(r_start, shift), np.float32)
      policy = student(x, t, labels)
      for r in np.linspace(r_start, r_end, max(round(32 / nfe), 2) + 1)[1:]:
        roll = lambda p, x, a=r_start, b=r: rollout(p, x, a, b, shift=shift, method=sampling.method)
        states.append(np.asarray(jax.vmap(roll)(policy, x)))
      x = states[-1]
    panels[f"student, {nfe} NFE"] = np.stack(states)
  return panels


def _frechet(name, x, reference, real, settings) -> dict[str, Any]:
  """Distance to the real data, and its ratio to the reference's; nothing where N is too small for the space."""
  try:
    if x is reference or np.array_equal(x, reference):
      return {name: metrics.frechet_distance(x, real), f"{name}_ratio": 1.0}
    pair = metrics.paired_bootstrap(metrics.frechet_distance, x, reference, real, num_resamples=settings.num_resamples)
  except ValueError:
    if name == "fd":
      raise
    return {}  # many more pixels than samples: the features' distance stands alone
  return {name: pair.value, f"{name}_ratio": (pair.ratio, pair.standard_error)}


def _check_count(count: int, dimension: int) -> None:
  fewest = metrics.SAMPLES_PER_FEATURE * dimension
  if count < fewest:
    raise ValueError(
      f"config.evaluate.num_samples: a Fréchet distance in {dimension} features needs at least {fewest} samples, got {count}"
    )


def _real(dataset: data.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Real examples to compare with: the whole set, or 10 times the samples of an endless or large one."""
  limit = 10 * count
  return data.examples(dataset, min(dataset.num_records or limit, limit))


def _owner(experiment: Experiment, folder: str | os.PathLike) -> str | os.PathLike:
  """The teacher's folder: all students of a teacher are measured with one classifier, kept there."""
  return experiment.teacher.workdir if experiment.teacher else folder


def _classifier(experiment, settings, real, real_labels, folder) -> Classifier | None:
  dataset = experiment.dataset
  if len(dataset.shape) != 3 or dataset.num_classes < 2:
    return None
  path = pathlib.Path(folder) / "evaluation" / "classifier.npz"
  if path.exists():
    return Classifier.load(path, image_shape=dataset.shape, num_classes=dataset.num_classes)
  print("training the classifier that features and class accuracy are measured with", flush=True)
  classifier = train_classifier(real, real_labels, dataset.num_classes, steps=settings.classifier_steps)
  path.parent.mkdir(parents=True, exist_ok=True)
  classifier.save(path)
  return classifier
