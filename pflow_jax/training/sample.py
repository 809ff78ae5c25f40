"""Samples of a run: their sampler, their noise and conditions, a batch at a time."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import data
from pflow_jax.files import foreign
from pflow_jax.files.nearest import did_you_mean
from pflow_jax.files.progress import SHOWN, progress
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout, to_host
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.methods import Method

Array = jax.Array | np.ndarray

logger = logging.getLogger(__name__)

LONG = 5000  # steps of a run that draws pictures by itself
PICTURES = 10  # of such a run
COST = 0.01  # share of its time that they may take


def evaluations(method: Method, settings: SampleSettings) -> tuple[int, ...]:
  """Numbers of network evaluations that `settings.nfe` stands for; warns of those a student was not trained for."""
  own = method.evaluations(settings)
  others = [nfe for nfe in settings.nfe if method.is_fixed and nfe not in own]
  if others:
    logger.warning("sampling with %s evaluations; this student was trained for objective.nfe=%s", others, own[0])
  return tuple(settings.nfe) or own


def make_sampler(method: Method, settings: SampleSettings, nfe: int) -> Callable[..., jax.Array]:
  """Returns a jitted (params, noise, conditions, keys) -> samples with `nfe` evaluations of a run's network."""
  return jax.jit(method.sampler(settings, nfe))


def with_guide(method: Method, settings: SampleSettings, params: Any, layout: Layout | None = None) -> Any:
  """Returns what a run's samplers take: the parameters of its network, and those of a weaker model that guides it.

  Args:
    method: of the run.
    settings: of its samples.
    params: all parameters of its network.
    layout: of the guide's; by default they stay on the host.
  """
  guide = method.guide(settings)
  if guide is None:
    return params
  assert guide.saved is not None
  return {"strong": params, "weak": guide.saved.load(layout)}


def in_batches(
  run: Callable[..., Any],
  layout: Layout,
  batch_size: int,
  *arrays: Any,
  what: tuple[str, str] = ("sampling", "samples"),
  whole: bool = False,
) -> Any:
  """Calls `run` on slices of pytrees of arrays, split over the mesh; slices have one length, so it compiles once.

  What takes longer than SHOWN seconds reports its progress.

  Args:
    run: returns an array, or a pytree of them, with a row for each of its arguments'.
    layout: of the mesh.
    batch_size: rows at a time, rounded up to what the mesh splits evenly.
    *arrays: arguments of `run`.
    what: words for the work and for its rows.
    whole: repeat rows that are fewer than a batch, where another size of it would be compiled for them alone.

  Returns:
    NumPy arrays as `run` returns them, of all rows, in every process.
  """
  count = len(jax.tree.leaves(arrays)[0])
  size = -(-(batch_size if whole else min(batch_size, count)) // layout.batch_parts) * layout.batch_parts
  outputs = []
  with layout.context(), progress(count, 0, what[0], not is_first(), unit=what[1], delay=SHOWN) as report:
    for start in range(0, count, size):
      rows = np.arange(start, start + size) % count  # the last batch wraps and is cut
      part = jax.tree.map(lambda a, rows=rows: layout.spread(a[rows]), arrays)
      outputs.append(jax.tree.map(to_host, run(*part)))
      report.update(min(start + size, count))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)


def draw_noise(
  dataset: data.Dataset, count: int, seed: int, labels: Sequence[int | str] | None = None
) -> tuple[np.ndarray, Any]:
  """Draws noise (count, *space, C) and makes as many conditions: the classes given, repeated, else all in turn.

  A set of prompts gives the same prompts whatever the seed, repeated if they are fewer.

  Args:
    dataset: gives shape and conditions.
    count: of samples.
    seed: of the noise.
    labels: classes, see `class_numbers`.
  """
  # JAX and NumPy each have copies of the noise, of the bits it is drawn from, and of the samples; 64 are for the rest.
  needed = count * (6 * 4 * math.prod(dataset.shape) + 64)
  foreign.check_memory(f"{count} samples", needed, "ask for fewer (--num, or config.evaluate.num_samples)")
  if dataset.embedding is not None and labels:
    raise ValueError(f"labels: this run is conditioned on texts ({dataset.name}), not on classes; leave them out")
  classes = [] if dataset.embedding is not None else class_numbers(labels or (), dataset)
  noise = np.asarray(jax.random.normal(jax.random.key(seed), (count, *dataset.shape), jnp.float32))
  if dataset.embedding is not None:
    try:
      size = min(count, dataset.num_records or count)
      cond = data.examples(dataset, size)[1]
    except ValueError as error:
      hint = "say where they are with --config.data.name, or give --prompt"
      raise ValueError(f"this run draws its own prompts: {str(error).rstrip('.')}; {hint}") from error
    return noise, jax.tree.map(lambda a: a[np.arange(count) % size], cond)
  turn = np.arange(count, dtype=np.int32) % (len(classes) or max(dataset.num_classes, 1))
  return noise, np.asarray(classes, np.int32)[turn] if classes else turn


def sample_keys(count: int, seed: int) -> jax.Array:
  """Returns a key a sample, for the draws of stochastic steps.

  Args:
    count: of samples.
    seed: of their noise. The keys come from the next one, so that a seed's noise is the same as in earlier runs.
  """
  return jax.random.split(jax.random.key(seed + 1), count)


def class_numbers(labels: Sequence[int | str], dataset: data.Dataset) -> list[int]:
  """Numbers of classes that are given by number or by name; a text that is both counts as a name.

  Raises:
    ValueError: there is no such class; the message has the nearest name.
  """
  names, count = dataset.class_names, max(dataset.num_classes, 1)
  known: dict[Any, int] = {}
  for spelling in (list(names), [name.casefold() for name in names]):
    known = {name: number for number, name in enumerate(spelling)} | known
  numbers = []
  for label in labels:
    number = known.get(label, known.get(label.casefold())) if isinstance(label, str) else label
    if number is None and not str(label).isdecimal():
      listed = f"one of {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}, or " if names else ""
      hint = did_you_mean(str(label), names)
      raise ValueError(f"labels: there is no class {label!r}{hint} (expected {listed}a number in [0, {count}))")
    numbers.append(int(label if number is None else number))
  bad = [number for number in numbers if not 0 <= number < count]
  if bad:
    raise ValueError(f"labels: expected classes in [0, {count}), got {bad}")
  return numbers


def check_room(dataset: data.Dataset, count: int, copies: int, flag: str) -> None:
  """Raises ValueError where the machine has no memory for `copies` of `count` samples, and one of their conditions."""
  cond = jax.tree.leaves(dataset.cond_shapes(1))
  one = 4 * math.prod(dataset.shape) * copies + sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in cond)
  foreign.check_memory(f"{flag}={count}", count * one, "ask for fewer at a time")


def warn_of_gaps(name: str, x: np.ndarray, params: Any) -> None:
  """Warns of samples x (N, ...) that are not finite, with their number and the likely cause.

  Args:
    name: of the sampler, for the warning.
    x: the samples.
    params: parameters that they were drawn with.
  """
  count = int(np.sum(~np.isfinite(x).reshape(len(x), -1).all(axis=1)))
  if not count:
    return
  sound = bool(jax.jit(lambda tree: jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])))(params))
  cause = (
    "the parameters are finite, so look at the settings of the sampler, config.sample (temperature, method, substeps)"
    if sound
    else "so are the run's parameters: its training went astray; sample an earlier checkpoint, or train anew"
  )
  logger.warning("%s: %d of %d samples are not finite (grey in pictures); %s", name, count, len(x), cause)


def labels_of(cond: Any, count: int) -> np.ndarray:
  """Classes (count,) of conditions; prompts all have class 0."""
  return np.zeros(count, np.int32) if isinstance(cond, dict) else cond


def picture_every(experiment: Experiment, count: int) -> int:
  """Steps between two pictures of a training's samples, 0 for none: config.train.sample_every where that is set.

  By itself a run of LONG steps or more draws PICTURES, if that takes at most COST of its time. A training step is taken
  for three evaluations of its batch, which it is without a teacher.

  Args:
    experiment: the run.
    count: samples in a picture.
  """
  length, settings = experiment.settings.need("train"), experiment.settings.sample
  if length.sample_every is not None:
    return length.sample_every
  drawn = PICTURES * count * sum(settings.nfe or experiment.method.evaluations(settings))
  affordable = drawn <= COST * 3 * length.batch_size * length.steps
  return length.steps // PICTURES if length.steps >= LONG and affordable else 0


def preview(experiment: Experiment, layout: Layout, draw: Callable[..., None], count: int) -> Callable[[Any, str], str]:
  """Returns (params, path) -> path, which draws a small picture of samples during training, for all processes.

  Args:
    experiment: the run.
    layout: of its parameters.
    draw: draws the picture, (dataset, rows of samples by name, classes, path).
    count: samples in it.
  """
  method, settings = experiment.method, experiment.settings.sample
  noise, cond = draw_noise(experiment.dataset, count, seed=0)
  samplers = {f"{n} NFE": make_sampler(method, settings, n) for n in evaluations(method, settings)}

  def picture(params, path):
    keys, params = sample_keys(count, seed=0), with_guide(method, settings, params, layout)
    rows = {
      name: in_batches(functools.partial(run, params), layout, count, noise, cond, keys)
      for name, run in samplers.items()
    }
    if is_first():
      draw(experiment.dataset, rows, labels_of(cond, count), path)
    return path

  return picture
