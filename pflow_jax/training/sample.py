"""`pflow sample`: pictures and arrays from a trained run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.core.guidance import Velocity, guided
from pflow_jax.core.objectives.flow_map import FlowMap
from pflow_jax.core.objectives.flow_matching import FlowMatching
from pflow_jax.core.objectives.imitation import MAX_SUBSTEPS, Imitation
from pflow_jax.core.policies import auto_temperature
from pflow_jax.core.samplers import sample_flow_map, sample_student, sample_teacher
from pflow_jax.core.schedule import segment_grid, shift_time
from pflow_jax.evaluation import figures
from pflow_jax.files import foreign
from pflow_jax.files.folders import checked_file, expanded
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout, to_host
from pflow_jax.settings.sections import call
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.origins import use_teacher
from pflow_jax.training.teachers import which_of

Array = jax.Array | np.ndarray

logger = logging.getLogger(__name__)

MAX_EVALUATIONS = 10_000
COLUMNS = 16  # images side by side in a picture
SHOWN = 128  # images of a row in a picture


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """The section `sample` of a config.

  Attributes:
    nfe: numbers of network evaluations to sample with; () is the one that a policy student was trained for, 1, 2, 4
      and 8 of a flow map, 128 Euler steps of a teacher.
    h: noise level between segments, 0 is deterministic.
    temperature: of the policies of every segment but the last.
    auto_temperature: take the release's temperature for each nfe instead, see `policies.auto_temperature`.
    substeps, method: of the rollouts, see `integrate.rollout`.
    gamma: noise that a flow map renews between its steps, see `sampler.sample_flow_map`.
    guidance: strength that a flow map trained for several is asked for; None is its teacher's (teacher.guidance), which
      evaluation compares with whatever is set here. Of a teacher that is sampled itself, the strength of
      classifier-free guidance; None is none.
    batch_size: samples at a time.
  """

  nfe: tuple[int, ...] = ()
  h: float = 0.0
  temperature: float = 1.0
  auto_temperature: bool = False
  substeps: int = 128
  method: str = "auto"
  gamma: float = 0.0
  guidance: float | None = None
  batch_size: int = 256

  @property
  def temperature_of_segments(self) -> float | str:
    """The temperature, or "auto"."""
    return "auto" if self.auto_temperature else self.temperature

  def __post_init__(self):
    if min(self.nfe, default=1) < 1 or self.batch_size < 1:
      raise ValueError(f"config.sample: expected nfe and batch_size of at least 1, got {self.nfe}, {self.batch_size}")
    if max(self.nfe, default=1) > MAX_EVALUATIONS or not 1 <= self.substeps <= MAX_SUBSTEPS:
      raise ValueError(
        f"config.sample: expected at most {MAX_EVALUATIONS:,} evaluations and 1 to {MAX_SUBSTEPS:,} substeps, got "
        f"{self.nfe} and {self.substeps}"
      )
    if not (self.h >= 0 and self.temperature >= 0 and 0 <= self.gamma <= 1):
      raise ValueError(
        "config.sample: expected h and temperature of at least 0 and gamma in [0, 1], got "
        f"{self.h}, {self.temperature}, {self.gamma}"
      )


def evaluations(experiment: Experiment, settings: SampleSettings) -> tuple[int, ...]:
  """The numbers of network evaluations that `settings.nfe` stands for; warns of those a student was not trained for."""
  own = experiment.objective.nfe if isinstance(experiment.objective, Imitation) else None
  others = [nfe for nfe in settings.nfe if own and nfe != own]
  if others:
    logger.warning("sampling with %s evaluations; this student was trained for objective.nfe=%s", others, own)
  if settings.nfe:
    return tuple(settings.nfe)
  if isinstance(experiment.objective, FlowMap):
    return (1, 2, 4, 8)
  return (own or 128,)


def flow_map_grid(objective: FlowMap, nfe: int) -> list[float]:
  """Flow times that a flow map jumps between with `nfe` evaluations."""
  return [float(shift_time(r, objective.shift)) for r in segment_grid(nfe)]


def make_sampler(experiment: Experiment, settings: SampleSettings, nfe: int) -> Callable[..., jax.Array]:
  """Jitted (params, noise, conditions, keys) -> samples with `nfe` evaluations of this run's network."""
  objective = experiment.objective

  @jax.jit
  def run(params, noise, cond, keys):
    if isinstance(objective, FlowMap):
      jump = experiment.flow_map(params, settings.guidance)
      grid = flow_map_grid(objective, nfe)
      return sample_flow_map(jump, noise, cond, keys, grid=grid, gamma=settings.gamma)
    if not isinstance(objective, Imitation):
      velocity = _guided(experiment, params, settings.guidance)
      return sample_teacher(velocity, noise, cond, keys, steps=nfe, shift=objective.shift, h=settings.h)
    return sample_student(
      experiment.student(params),
      noise,
      cond,
      keys,
      nfe=nfe,
      final_scale=objective.final_scale,
      shift=objective.shift,
      h=settings.h,
      temperature=auto_temperature(nfe) if settings.auto_temperature else settings.temperature,
      substeps=settings.substeps,
      method=settings.method,
    )

  return run


def _guided(experiment: Experiment, params: Any, strength: float | None) -> Velocity:
  """The velocity field of a teacher's own run, with classifier-free guidance where a strength is asked for."""
  velocity, null_cond = experiment.velocity(params), experiment.dataset.null_cond
  if strength is None or strength == 1:
    return velocity
  if not (isinstance(experiment.objective, FlowMatching) and experiment.objective.cond_dropout):
    raise ValueError(
      f"config.sample.guidance: {strength} needs a model that was trained with the empty condition too "
      "(objective.cond_dropout above 0)"
    )
  if null_cond is None:
    raise ValueError(
      f"config.sample.guidance: {strength} needs the empty prompt's embedding, which {experiment.dataset.name} lacks; "
      "write it again with `pflow cache`"
    )
  return guided(velocity, null_cond, scale=strength)


def in_batches(run: Callable[..., Any], layout: Layout, batch_size: int, *arrays: Any) -> np.ndarray:
  """`run` on slices of pytrees of arrays, all of one length, split over the mesh; whole ones, so it compiles once."""
  count = len(jax.tree.leaves(arrays)[0])
  size = -(-min(batch_size, count) // layout.batch_parts) * layout.batch_parts
  outputs = []
  with layout.context():
    for start in range(0, count, size):
      rows = np.arange(start, start + size) % count  # the last batch wraps and is cut
      part = jax.tree.map(lambda a, rows=rows: layout.spread(a[rows]), arrays)
      outputs.append(to_host(run(*part)))
  return np.concatenate(outputs)[:count]


def draw_noise(
  experiment: Experiment, count: int, seed: int, labels: Sequence[int | str] | None = None
) -> tuple[np.ndarray, Any]:
  """Noise (count, *space, C) and as many conditions: the classes given, repeated, else all in turn.

  Of a set of prompts: the same prompts of it whatever the seed, repeated if they are fewer.

  Args:
    labels: classes, see `class_numbers`.
  """
  dataset = experiment.dataset
  # Noise, what it is drawn from, and samples, of all of which JAX and NumPy have their own; keys and conditions.
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


def class_numbers(labels: Sequence[int | str], dataset: data.Dataset) -> list[int]:
  """Numbers of classes that are given by number or by name; a text that is both is the name.

  Raises: ValueError for a class that there is not, with the nearest name.
  """
  names, count = dataset.class_names, max(dataset.num_classes, 1)
  known: dict[Any, int] = {}
  for spelling in (list(names), [name.casefold() for name in names]):
    known = {name: number for number, name in enumerate(spelling)} | known
  numbers = []
  for label in labels:
    number = known.get(label, known.get(label.casefold())) if isinstance(label, str) else label
    if number is None and not str(label).isdecimal():
      near = difflib.get_close_matches(str(label).casefold(), [name.casefold() for name in names], n=1, cutoff=0.4)
      hint = f"; did you mean {names[known[near[0]]]!r}?" if near else ""
      listed = f"one of {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}, or " if names else ""
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
  """Says how many of the samples x (N, ...) are not finite, and what is most likely at fault.

  Args:
    params: that they were drawn with.
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
  """Classes (count,) of conditions; of prompts all are one."""
  return np.zeros(count, np.int32) if isinstance(cond, dict) else cond


def save_picture(
  experiment: Experiment,
  rows: dict[str, np.ndarray],
  labels: np.ndarray,
  path: str | os.PathLike,
  title: str | None = None,
) -> None:
  """A PNG of samples, one row (images) or panel (points) for each entry of `rows`; `path` may be on gs://."""
  if "://" in str(path):
    with tempfile.TemporaryDirectory() as folder:
      save_picture(experiment, rows, labels, f"{folder}/picture.png", title)
      epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
      epath.Path(path).write_bytes(pathlib.Path(folder, "picture.png").read_bytes())
    return
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  if experiment.dataset.shape == (2,):
    figures.scatter_panels(path, rows, title=title)
    return
  if next(iter(rows.values())).shape[-1] not in (1, 3):
    # Latents: without their decoder the first channels show at least where something is.
    rows = {name: x[..., :3] if x.shape[-1] > 3 else x[..., :1] for name, x in rows.items()}
  names = experiment.dataset.class_names
  titles = [names[i] for i in labels] if names else None
  figures.image_grid(path, rows, column_labels=titles, title=title, columns=COLUMNS)


def check_local(out: str | os.PathLike | None, folder: str | os.PathLike) -> None:
  """Raises ValueError for results that would be written to an object store."""
  place = folder if out is None else out
  if "://" in str(place):
    raise ValueError(f"--out: expected a folder of this machine for the results, got {place}")


def preview(experiment: Experiment, config: ConfigDict, layout: Layout, columns: int = 10) -> Callable[[Any, str], str]:
  """A function (params, path) -> path that draws a small picture of samples during training, for all processes."""
  settings = call(SampleSettings, "sample", config.get("sample", {}))
  count = 4096 if experiment.dataset.shape == (2,) else columns
  noise, cond = draw_noise(experiment, count, seed=0)
  samplers = {f"{n} NFE": make_sampler(experiment, settings, n) for n in evaluations(experiment, settings)}

  def draw(params, path):
    keys = jax.random.split(jax.random.key(0), count)
    rows = {
      name: in_batches(functools.partial(run, params), layout, count, noise, cond, keys)
      for name, run in samplers.items()
    }
    if is_first():
      save_picture(experiment, rows, labels_of(cond, count), path)
    return path

  return draw


def sample(
  config: ConfigDict,
  folder: str | os.PathLike,
  *,
  num: int,
  nfe: int | None = None,
  seed: int = 0,
  labels: Sequence[int | str] | None = None,
  which: str = "ema",
  teacher: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Samples of the run in `folder`: <out>.npz with their noise, label and x0_nfe<n> for each n, and <out>.png.

  Of a run on prompts the arrays of the condition are in <out>.npz too. The picture shows SHOWN at most, and says so.

  Args:
    num: number of samples.   nfe: network evaluations; by default those of config.sample.nfe.
    labels: classes by number or name, repeated; by default all in turn.   which: "ema" or "params".
    teacher: workdir of its teacher, if that has moved; only adapters need it.
    out: path without its ending; by default <folder>/samples/seed<seed>.
  Returns: the path of the picture.
  """
  settings = call(SampleSettings, "sample", config.get("sample", {}))
  settings = dataclasses.replace(settings, nfe=(nfe,) if nfe else settings.nfe)
  if num < 1:
    raise ValueError(f"num: expected at least 1 sample, got {num}")
  folder = expanded(folder)
  check_local(out, folder)
  out = checked_file(f"{folder}/samples/seed{seed}" if out is None else out, ending=".png")
  use_teacher(config, teacher)
  experiment = build(config, run=folder)
  if settings.guidance is not None and experiment.dataset.embedding is not None:
    # What a run carries of its data has no empty prompt.
    experiment = build(config, dataset=call(data.load, "data", config.data), run=folder)
  numbers = evaluations(experiment, settings)
  check_room(experiment.dataset, num, 1 + len(numbers), "num")
  layout = layout_of(config)
  noise, cond = draw_noise(experiment, num, seed, labels)
  params = experiment.load(folder, which_of(config, which), layout)
  classes = labels_of(cond, num)
  keys = jax.random.split(jax.random.key(seed + 1), num)
  rows = {}
  for n in numbers:
    run = functools.partial(make_sampler(experiment, settings, n), params)
    rows[f"{n} NFE"] = in_batches(run, layout, settings.batch_size, noise, cond, keys)
    warn_of_gaps(f"{n} NFE", rows[f"{n} NFE"], params)
  picture = pathlib.Path(f"{out}.png")
  if not is_first():
    return picture
  picture.parent.mkdir(parents=True, exist_ok=True)
  arrays = {f"x0_nfe{name.split()[0]}": x for name, x in rows.items()} | {"label": classes, "noise": noise}
  np.savez(f"{out}.npz", **arrays, **(as_saved(cond) if isinstance(cond, dict) else {}))  # type: ignore[arg-type]
  shown = num if experiment.dataset.shape == (2,) else min(num, SHOWN)
  title = None if shown == num else f"the first {shown} of {num} samples"
  save_picture(experiment, {k: v[:shown] for k, v in rows.items()}, classes[:shown], picture, title)
  return picture


def as_saved(cond: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A condition's arrays as they are kept beside samples: NumPy's files know no bfloat16."""
  return {name: value.astype(np.float32) if value.dtype != bool else value for name, value in cond.items()}
