"""Samples of several samplers, measured against a teacher's and against the data."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pflow_jax import data
from pflow_jax.data.pictures import as_html
from pflow_jax.evaluation import metrics, plot
from pflow_jax.evaluation.feature_networks import PICTURES_AT_ONCE, open_feature_network
from pflow_jax.evaluation.features import Classifier, pixel_features, train_classifier
from pflow_jax.evaluation.pictures import as_pictures, to_pictures
from pflow_jax.evaluation.samplers import Sampler, teacher_name
from pflow_jax.evaluation.tables import html_table, markdown_table
from pflow_jax.files.progress import Progress, progress
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS, EvaluateSettings
from pflow_jax.training.sample import check_room, draw_noise, in_batches, labels_of, sample_keys

Drawn = tuple[np.ndarray, float]
"""Samples, and their number a second."""

SHOWN_IMAGES, SHOWN_POINTS = 10, 4096  # samples of a row in a notebook's picture

COLUMNS = {
  "name": "sampler",
  "nfe": "NFE",
  "alignment": "alignment error",
  "alignment_ratio": "alignment / teacher-4",
  "fd": "FD",
  "fd_ratio": "FD / teacher-128",
  "fd_pixels_ratio": "FD pixels / teacher-128",
  "diversity_ratio": "diversity / teacher-128",
  "precision": "precision",
  "recall": "recall",
  "accuracy": "class accuracy",
  "images_per_second": "images/s",
}


class Kept:
  """Results that evaluations of one teacher can share.

  This class keeps none; `evaluation.evaluate.KeptInFolder` does.
  """

  def samples(self, sampler: Sampler, draw: Callable[[], Drawn], shape: tuple[int, ...]) -> Drawn:
    """Returns samples of a teacher, which `draw` draws."""
    del sampler, shape
    return draw()

  def classifier(self, train: Callable[[], Classifier], dataset: data.Dataset, steps: int) -> Classifier:
    """Returns the data's classifier, which `train` trains in `steps` steps."""
    del dataset, steps
    return train()


@dataclasses.dataclass(frozen=True)
class Report:
  """Result of an evaluation.

  Attributes:
    rows: one a sampler, numbers by name; a ratio is (value, standard error).
    about: description of the evaluation: data, features, device, numbers of samples.
    samples: by sampler, (num_samples, *space, C).
    labels: of the samples.
    real: data, (num_real, *space, C).
    paths: states of 64 samples by sampler, if the data are points.
    students: names of the samplers that are students.
    dataset: the data set.
  """

  rows: list[dict[str, Any]]
  about: dict[str, Any]
  samples: dict[str, np.ndarray]
  labels: np.ndarray
  real: np.ndarray
  paths: dict[str, np.ndarray]
  students: set[str]
  dataset: data.Dataset

  @property
  def columns(self) -> dict[str, str]:
    """Headings of the measures that there are, by name; that of FD says which published network it is of."""
    network = self.about.get("feature_network")
    titles = COLUMNS | ({"fd": f"{COLUMNS['fd']} ({network})"} if network else {})
    return {key: title for key, title in titles.items() if any(key in row for row in self.rows)}

  @property
  def table(self) -> str:
    """The rows as a table in Markdown."""
    return markdown_table(self.rows, self.columns)

  def __repr__(self) -> str:
    return self.table

  def _repr_html_(self) -> str:
    return self._page

  @functools.cached_property
  def _page(self) -> str:
    """The table with samples of the teacher and the students, from the same noise; latents are decoded once."""
    table = html_table(self.rows, self.columns)
    if self.dataset.shape == (2,):
      rows = {name: x[:SHOWN_POINTS] for name, x in self.samples.items()}
    elif len(self.dataset.shape) == 3:
      rows = {name: as_pictures(self.dataset, x[:SHOWN_IMAGES]) for name, x in self.samples.items()}
    else:
      return table
    return f"{table}{as_html('', plot.samples(rows)._repr_png_(), width=800)}"


def measure(
  make_samplers: Callable[[], Sequence[Sampler]],
  dataset: data.Dataset,
  settings: EvaluateSettings,
  layout: Layout,
  *,
  batch_size: int,
  kept: Kept | None = None,
  quiet: bool = False,
) -> Report:
  """Measures samplers, the teacher at REFERENCE_STEPS and YARDSTICK_STEPS among them, on the same noise and conditions.

  Args:
    make_samplers: returns the samplers; it is called after all checks.
    dataset: the data that they were trained on.
    settings: of the evaluation, such as the number of samples.
    layout: of the mesh that the samples are drawn on.
    batch_size: samples at a time.
    kept: keeps results that other evaluations can use; by default nothing is kept.
    quiet: whether to print no progress.

  Raises:
    ValueError: there are no data to compare with, or fewer samples than a Fréchet distance needs.
  """
  # Network evaluations are counted: samplers differ a hundredfold in the time of a sample.
  with progress(1, 0, "evaluate", quiet or not is_first(), unit="evaluations") as report:
    return _measure(make_samplers, dataset, settings, layout, batch_size, kept or Kept(), report)


def _measure(
  make_samplers: Callable[[], Sequence[Sampler]],
  dataset: data.Dataset,
  settings: EvaluateSettings,
  layout: Layout,
  batch_size: int,
  kept: Kept,
  report: Progress,
) -> Report:
  if not dataset.has_x0:
    raise ValueError(f"{dataset.name} has prompts alone: there is no data to compare samples with; see `pflow sample`")
  copies = 1 + len(settings.teacher_steps) * (1 + len(settings.solvers))
  check_room(dataset, settings.num_samples, copies, "config.evaluate.num_samples")
  network = _Seen(settings, dataset, layout) if settings.features else None
  if network:
    _check_counts(dataset, settings, network.num_features)
  noise, cond = draw_noise(dataset, settings.num_samples, settings.seed)
  labels = labels_of(cond, settings.num_samples)
  # At most ten times as many data as samples; as many as samples for an endless set, or one with texts (large ones).
  most = settings.num_samples * (1 if isinstance(cond, dict) and "text" in cond else 10)
  real, real_labels = data.examples(dataset, min(dataset.num_records or settings.num_samples, most))
  classifier = None
  if len(dataset.shape) == 3 and dataset.num_classes > 1:

    def train() -> Classifier:
      report.say("training the classifier that features and class accuracy are measured with")
      return train_classifier(real, real_labels, dataset.num_classes, steps=settings.classifier_steps)

    classifier = kept.classifier(train, dataset, settings.classifier_steps)
  features = network or (classifier.features if classifier else pixel_features)
  real_features = features(real)
  real_spaces = {"fd": real_features} | ({"fd_pixels": pixel_features(real)} if network or classifier else {})
  if isinstance(cond, dict) and network is None:
    # A set with texts has pixels alone. They may outnumber the samples: the Fréchet distance is then left out.
    real_spaces = {"fd_pixels": real_features}
  else:
    _check_counts(dataset, settings, real_features.shape[1])
  samplers = make_samplers()
  report.total = settings.num_samples * sum(s.nfe for s in samplers)
  report.update(0)
  done = 0
  keys = sample_keys(settings.num_samples, settings.seed)
  samples: dict[str, np.ndarray] = {}
  rows: list[dict[str, Any]] = []
  for s in samplers:

    def draw(s: Sampler = s) -> Drawn:
      report.say(f"sampling: {s.name}")
      return _draw(s, layout, batch_size, noise, cond, keys)

    samples[s.name], speed = draw() if s.is_student else kept.samples(s, draw, noise.shape)
    report.update(done := done + s.nfe * settings.num_samples)
    rows.append({"name": s.name, "nfe": s.nfe, "images_per_second": speed})
  report.say("measuring")
  reference, yardstick = samples[teacher_name(REFERENCE_STEPS)], samples[teacher_name(YARDSTICK_STEPS)]
  yardstick_errors = metrics.alignment_errors(yardstick, reference)
  # Of more classes than samples, none has two: these are then all of one kind.
  kinds = labels if len(np.unique(labels)) < len(labels) else np.zeros_like(labels)
  spread = metrics.diversity(reference, kinds)
  reference_spaces = {"fd": features(reference), "fd_pixels": pixel_features(reference)}
  for row in rows:
    x = samples[row["name"]]
    spaces = {"fd": features(x), "fd_pixels": pixel_features(x)}
    row["diversity"] = metrics.diversity(x, kinds)
    row["diversity_ratio"] = row["diversity"] / spread
    if x is not reference:
      ratio = metrics.ratio_of_means(metrics.alignment_errors(x, reference), yardstick_errors)
      row["alignment"], row["alignment_ratio"] = ratio.value, (ratio.ratio, ratio.standard_error)
    for name, real_space in real_spaces.items():
      row |= _frechet(name, spaces[name], reference_spaces[name], real_space, settings.num_resamples)
    row["precision"], row["recall"] = metrics.precision_recall(real_features, spaces["fd"], settings.nearest_k)
    if classifier:
      row["accuracy"] = metrics.accuracy(classifier.predict(x), labels)
  report.say("")
  about = {
    "data": dataset.name,
    "num_samples": settings.num_samples,
    "num_real": len(real),
    "features": f"classifier, {settings.classifier_steps} steps" if classifier else "coordinates",
    "device": jax.devices()[0].device_kind,
  }
  if network:
    about |= {"features": network.name, "feature_network": network.name}
  paths = {}
  if dataset.shape == (2,):
    shown = [s for s in samplers if s.is_student or s.name == teacher_name(REFERENCE_STEPS)]
    paths = {s.name: s.path(noise[:64], cond[:64]) for s in shown}
  students = {s.name for s in samplers if s.is_student}
  return Report(rows, about, samples, labels, real, paths, students, dataset)


class _Seen:
  """Features of samples in a published network, which sees them as pictures."""

  def __init__(self, settings: EvaluateSettings, dataset: data.Dataset, layout: Layout):
    self._pictures = to_pictures(dataset, layout)
    self._network = open_feature_network(settings.features, layout, settings.width)
    self.name, self.num_features = self._network.name, self._network.num_features

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns the pooled features of samples (n, *space, C); the pictures are made a part at a time."""
    starts = range(0, len(x), PICTURES_AT_ONCE)
    return np.concatenate([self._network(self._pictures(x[i : i + PICTURES_AT_ONCE])).pool for i in starts])


def _draw(
  sampler: Sampler, layout: Layout, batch_size: int, noise: np.ndarray, cond: Any, keys: jax.Array
) -> tuple[np.ndarray, float]:
  """Draws samples; returns them and the images per second without the compilation."""
  size = min(batch_size, len(noise))
  first = jax.tree.map(lambda a: a[:size], (noise, cond, keys))
  in_batches(sampler.run, layout, size, *first)
  start = time.perf_counter()
  samples = in_batches(sampler.run, layout, size, noise, cond, keys)
  return samples, -(-len(noise) // size) * size / (time.perf_counter() - start)


def _frechet(name: str, x: np.ndarray, reference: np.ndarray, real: np.ndarray, num_resamples: int) -> dict[str, Any]:
  """Distance to the real data and its ratio to the reference's; {} for pixels if there are too few samples."""
  if name != "fd" and min(len(x), len(real)) < metrics.SAMPLES_PER_FEATURE * real.shape[1]:
    return {}
  if np.array_equal(x, reference):
    return {name: metrics.frechet_distance(x, real), f"{name}_ratio": 1.0}
  pair = metrics.paired_bootstrap(metrics.frechet_distance, x, reference, real, num_resamples=num_resamples)
  return {name: pair.value, f"{name}_ratio": (pair.ratio, pair.standard_error)}


def _check_counts(dataset: data.Dataset, settings: EvaluateSettings, dimension: int) -> None:
  """Raises ValueError for fewer samples, or data to compare them with, than a Fréchet distance needs."""
  fewest = metrics.SAMPLES_PER_FEATURE * dimension
  counts = {"config.evaluate.num_samples": settings.num_samples}
  if dataset.num_records is not None:
    counts[f"config.data: {dataset.name}"] = dataset.num_records
  for where, count in counts.items():
    if count < fewest:
      raise ValueError(
        f"{where}: a Fréchet distance in {dimension} features needs at least {fewest} samples, got {count}"
      )
