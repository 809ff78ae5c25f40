"""Parts of samples: drawn, made pictures, and given to the network of features."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pflow_jax import data
from pflow_jax.evaluation.feature_networks import FeatureNetwork
from pflow_jax.evaluation.protocol.draws import drawn_labels, draws, from_numbers
from pflow_jax.evaluation.protocol.kept import SHOWN, save_picture, save_pngs
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.settings import Protocol
from pflow_jax.evaluation.samplers import teacher_name, velocity_samplers
from pflow_jax.files.lock import Lock
from pflow_jax.files.progress import progress
from pflow_jax.mesh.distributed import agreed, is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS, EvaluateSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.sample import in_batches


class Drawing:
  """Draws parts of samples and their features.

  Args:
    run: (noise, classes, keys) -> samples.
    dataset: that they are like.
    protocol: what is drawn and kept.
    layout: of the mesh.
    batch_size: samples at a time.
    pictures: samples -> pictures of bytes.
    network: of features.
  """

  def __init__(
    self,
    run: Callable[..., Any],
    dataset: data.Dataset,
    protocol: Protocol,
    layout: Layout,
    batch_size: int,
    pictures: Callable[[np.ndarray], np.ndarray],
    network: FeatureNetwork,
  ):
    self._run, self._protocol, self._layout, self._batch_size = run, protocol, layout, batch_size
    self._pictures, self._network = pictures, network
    self._draw, self._labels = draws(dataset.shape, protocol.seed), drawn_labels(protocol, dataset.num_classes)

  def fill(self, parts: Parts, lock: Lock, name: str) -> float | None:
    """Makes the parts that are missing; returns samples a second, None where fewer than two were made."""
    todo = agreed(parts.missing)
    done, started = parts.count - sum(len(parts.rows_of(n)) for n in todo), None
    first = done
    with progress(parts.count, done, name, not is_first(), unit="samples") as report:
      for number in todo:
        rows = parts.rows_of(number)
        features, seen = self._features(rows)
        if is_first():
          with lock.writing():
            keep = functools.partial(save_pngs, seen, rows.start) if self._protocol.keep == "png" else None
            kept = {"pictures": seen} if self._protocol.keep == "npz" else {}
            if number == 0:  # before the part is there: it is not drawn again
              save_picture(seen[:SHOWN], parts.folder / "samples.png")
            parts.write(number, {"label": self._labels[rows.start : rows.stop], **features, **kept}, keep)
        report.update(done := done + len(rows))
        if started is None:  # the first part compiles
          started, first = time.perf_counter(), done
    return (done - first) / (time.perf_counter() - started) if started is not None and done > first else None

  def _features(self, rows: range) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features of samples by name, and the samples as pictures."""
    x = self.samples(rows)
    if bad := int(np.sum(~np.isfinite(x).reshape(len(x), -1).all(axis=1))):
      raise ValueError(
        f"{bad} of {len(x)} samples from number {rows.start} on are not finite; look at the run's parameters and at "
        "config.sample, samples that diverge have no score"
      )
    seen = self._pictures(x)
    found = self._network(seen)
    return {name: value for name, value in found._asdict().items() if value is not None}, seen

  def samples(self, rows: range) -> np.ndarray:
    """Draws the samples of these numbers."""
    run, labels = from_numbers(self._run, self._draw), self._labels[rows.start : rows.stop]
    return in_batches(run, self._layout, self._batch_size, np.arange(rows.start, rows.stop, dtype=np.int32), labels)


def drawn_pairs(
  experiment: Experiment,
  parts: Parts,
  protocol: Protocol,
  layout: Layout,
  runs: Mapping[int, Callable[..., Any]],
  lock: Lock,
) -> None:
  """Draws the samples that students and their teacher draw from the same noise, where they are missing.

  Args:
    experiment: the run, with a teacher.
    parts: place of the samples.
    protocol: number of pairs.
    layout: of the mesh.
    runs: (noise, classes, keys) -> samples, by numbers of evaluations.
    lock: of the folder that the parts lie in.
  """
  assert experiment.teacher is not None
  todo = agreed(parts.missing)
  if not todo:
    return
  dataset, settings, teachers = experiment.dataset, experiment.settings, (YARDSTICK_STEPS, REFERENCE_STEPS)
  frozen = experiment.load_frozen(layout)
  found = velocity_samplers(
    experiment.method, experiment.teacher.velocity, frozen, EvaluateSettings(teacher_steps=teachers)
  )
  named = {teacher_name(steps): f"teacher_{steps}" for steps in teachers}
  samplers = {named[one.name]: one.run for one in found if one.name in named}
  samplers |= {f"student_{n}": run for n, run in runs.items()}
  draw, labels = draws(dataset.shape, protocol.seed), drawn_labels(protocol, dataset.num_classes)
  done = protocol.num_paired - sum(len(parts.rows_of(n)) for n in todo)
  with progress(protocol.num_paired, done, "pairs", not is_first(), unit="samples") as report:
    for number in todo:
      rows = parts.rows_of(number)
      # They come after the others, so that no noise is drawn twice.
      own = protocol.num_samples + np.arange(rows.start, rows.stop, dtype=np.int32)
      x = {
        name: in_batches(from_numbers(run, draw), layout, settings.sample.batch_size, own, labels[own])
        for name, run in samplers.items()
      }
      if is_first():
        with lock.writing():
          parts.write(number, x)
      report.update(done := done + len(rows))
