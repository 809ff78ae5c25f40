"""Parts of samples: drawn, made pictures, and given to the network of features."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pflow_jax.evaluation.feature_networks import FeatureNetwork
from pflow_jax.evaluation.protocol.draws import from_numbers
from pflow_jax.evaluation.protocol.kept import SHOWN, save_picture, save_pngs
from pflow_jax.evaluation.protocol.parts import Extra, Parts
from pflow_jax.evaluation.protocol.settings import Keep
from pflow_jax.evaluation.samplers import teacher_name, velocity_samplers
from pflow_jax.files.lock import Lock
from pflow_jax.files.progress import progress
from pflow_jax.mesh.distributed import agreed, is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS, EvaluateSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.sample import in_batches

Run = Callable[..., Any]
Arrays = Mapping[str, np.ndarray]


class Drawing:
  """Draws samples by their numbers into parts.

  Args:
    layout: of the mesh.
    batch_size: samples at a time, on all devices. One that is greater than a part draws several parts at once.
    draw: numbers of samples -> their noise and keys.
    labels: classes by the samples' numbers.
    lock: of the folder that the parts lie in.
  """

  def __init__(self, layout: Layout, batch_size: int, draw: Run, labels: np.ndarray, lock: Lock):
    self._layout, self._batch_size = layout, batch_size
    self._draw, self._labels, self._lock = draw, labels, lock

  def fill(
    self,
    parts: Parts,
    name: str,
    samplers: Mapping[str, Run],
    finish: Callable[[Arrays, range], tuple[Arrays, Extra | None]] = lambda x, rows: (x, None),
    first: int = 0,
  ) -> float | None:
    """Makes the parts that are missing.

    Args:
      parts: to be made.
      name: of the work, for its progress.
      samplers: (noise, classes, keys) -> samples, by the names of their arrays.
      finish: (samples by name, rows) -> what a part is written of, see `Parts.write`; by default the samples.
      first: number of the first row's sample.

    Returns:
      samples a second, None where no more were made than those that compile.
    """
    todo = agreed(parts.missing)
    at_once = max(self._batch_size // parts.size, 1)
    missing = sum(len(parts.rows_of(number)) for number in todo)
    # One size for all batches, whatever is missing: another would be compiled by itself, and rounds otherwise.
    size = min(self._batch_size, at_once * parts.size, parts.count)
    done, started = parts.count - missing, None
    begun = done
    with progress(parts.count, done, name, not is_first(), unit="samples") as report:
      for start in range(0, len(todo), at_once):
        group = [parts.rows_of(number) for number in todo[start : start + at_once]]
        numbers = first + np.concatenate([np.arange(rows.start, rows.stop, dtype=np.int32) for rows in group])
        drawn = {key: self._samples(run, numbers, size) for key, run in samplers.items()}
        place = 0
        for number, rows in zip(todo[start:], group, strict=False):
          own = {key: x[place : place + len(rows)] for key, x in drawn.items()}
          arrays, extra = finish(own, rows)
          if is_first():
            with self._lock.writing():
              parts.write(number, arrays, extra)
          place += len(rows)
          report.update(done := done + len(rows))
        if started is None:  # the first batches compile
          started, begun = time.perf_counter(), done
    return (done - begun) / (time.perf_counter() - started) if started is not None and done > begun else None

  def _samples(self, run: Run, numbers: np.ndarray, size: int) -> np.ndarray:
    run = from_numbers(run, self._draw)
    return in_batches(run, self._layout, size, numbers, self._labels[numbers], whole=True)


class Finished:
  """Features of samples, and what is kept of them as pictures.

  Args:
    pictures: samples -> pictures of bytes.
    network: of features.
    labels: classes of all samples.
    keep: what is kept.
  """

  def __init__(
    self,
    pictures: Callable[[np.ndarray], np.ndarray],
    network: FeatureNetwork,
    labels: np.ndarray,
    keep: Keep,
  ):
    self._pictures, self._network, self._labels, self._keep = pictures, network, labels, keep

  def __call__(self, drawn: Arrays, rows: range) -> tuple[Arrays, Extra | None]:
    """Returns the arrays of a part, and what writes its other files."""
    x = drawn["x"]
    if bad := int(np.sum(~np.isfinite(x).reshape(len(x), -1).all(axis=1))):
      raise ValueError(
        f"{bad} of {len(x)} samples from number {rows.start} on are not finite; look at the run's parameters and at "
        "config.sample, samples that diverge have no score"
      )
    seen = self._pictures(x)
    features = {name: value for name, value in self._network(seen)._asdict().items() if value is not None}
    kept = {"pictures": seen} if self._keep == "npz" else {}
    own = {"label": self._labels[rows.start : rows.stop], **features, **kept}
    return own, functools.partial(self._save_pictures, seen, rows.start)

  def _save_pictures(self, seen: np.ndarray, start: int, part: pathlib.Path) -> None:
    """Writes pictures before their part is there: it is not drawn again."""
    if start == 0:
      save_picture(seen[:SHOWN], part.parent / "samples.png")
    if self._keep == "png":
      save_pngs(seen, start, part)


def teacher_samplers(experiment: Experiment, layout: Layout) -> dict[str, Run]:
  """Returns samplers of a run's teacher by their numbers of Euler steps, those that students are measured beside."""
  assert experiment.teacher is not None
  teachers = (YARDSTICK_STEPS, REFERENCE_STEPS)
  settings, frozen = EvaluateSettings(teacher_steps=teachers), experiment.load_frozen(layout)
  found = velocity_samplers(experiment.method, experiment.teacher.velocity, frozen, settings)
  named = {teacher_name(steps): str(steps) for steps in teachers}
  return {named[one.name]: one.run for one in found if one.name in named}
