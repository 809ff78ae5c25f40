"""`pflow sample`: pictures and arrays from a trained run."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax import data
from pflow_jax.evaluation import figures, plot
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.files.folders import checked_file, expanded
from pflow_jax.mesh.distributed import is_first
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.origins import use_teacher, which_of
from pflow_jax.training.sample import (
  check_room,
  draw_noise,
  evaluations,
  in_batches,
  labels_of,
  make_sampler,
  sample_keys,
  warn_of_gaps,
  with_guide,
)

SHOWN = 128  # images of a row in a picture
PREVIEW_POINTS, PREVIEW_IMAGES = 4096, 10  # samples in the picture of a run that trains


def sample(
  config: Settings | Mapping[str, Any],
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
  """Samples the run in `folder`: writes <out>.npz with noise, label and x0_nfe<n> for each n, and <out>.png.

  A run on prompts adds the arrays of the condition to <out>.npz. The picture shows SHOWN samples at most.

  Args:
    config: of the run, perhaps with other settings for sampling.
    folder: its workdir.
    num: number of samples.
    nfe: network evaluations; by default those of config.sample.nfe.
    seed: of the noise.
    labels: classes by number or name, repeated; by default all in turn.
    which: "ema" or "params".
    teacher: workdir of its teacher, if that has moved; only adapters need it.
    out: path without its ending; by default <folder>/samples/seed<seed>.

  Returns:
    The path of the picture.
  """
  settings = use_teacher(Settings.of(config, converted=True), teacher)
  sampling = dataclasses.replace(settings.sample, nfe=(nfe,) if nfe else settings.sample.nfe)
  if num < 1:
    raise ValueError(f"num: expected at least 1 sample, got {num}")
  folder = expanded(folder)
  check_local(out, folder)
  out = checked_file(f"{folder}/samples/seed{seed}" if out is None else out, ending=".png")
  experiment = build(settings, run=folder)
  if sampling.guidance is not None and experiment.dataset.embedding is not None:
    # The description of a run's data has no empty prompt.
    experiment = build(settings, dataset=call(data.load, "data", settings.data), run=folder)
  method, dataset = experiment.method, experiment.dataset
  numbers = evaluations(method, sampling)
  check_room(dataset, num, 1 + len(numbers), "num")
  samplers = {n: make_sampler(method, sampling, n) for n in numbers}  # raises before any work if one does not fit
  layout = layout_of(settings)
  noise, cond = draw_noise(dataset, num, seed, labels)
  params = with_guide(method, sampling, experiment.load(folder, which_of(settings, which), layout), layout)
  classes = labels_of(cond, num)
  keys = sample_keys(num, seed)
  rows = {}
  for n in numbers:
    run = functools.partial(samplers[n], params)
    rows[f"{n} NFE"] = in_batches(run, layout, sampling.batch_size, noise, cond, keys)
    warn_of_gaps(f"{n} NFE", rows[f"{n} NFE"], params)
  picture = pathlib.Path(f"{out}.png")
  if not is_first():
    return picture
  picture.parent.mkdir(parents=True, exist_ok=True)
  arrays = {f"x0_nfe{name.split()[0]}": x for name, x in rows.items()} | {"label": classes, "noise": noise}
  np.savez(f"{out}.npz", **arrays, **(as_saved(cond) if isinstance(cond, dict) else {}))  # type: ignore[arg-type]
  shown = num if dataset.shape == (2,) else min(num, SHOWN)
  title = None if shown == num else f"the first {shown} of {num} samples"
  save_picture(dataset, {k: v[:shown] for k, v in rows.items()}, classes[:shown], picture, title)
  return picture


def save_picture(
  dataset: data.Dataset,
  rows: Mapping[str, np.ndarray],
  labels: np.ndarray,
  path: str | os.PathLike,
  title: str | None = None,
) -> None:
  """Writes a PNG of samples, one row (images) or panel (points) for each entry of `rows`; `path` may be on gs://."""
  names = dataset.class_names
  if dataset.shape != (2,):
    rows = {name: as_pictures(dataset, x) for name, x in rows.items()}
  labelled = names and dataset.shape != (2,)
  figures.save(plot.samples(rows, labels=[names[i] for i in labels] if labelled else None, title=title), path)


def preview_size(dataset: data.Dataset) -> int:
  """Samples in the picture of a run that trains."""
  return PREVIEW_POINTS if dataset.shape == (2,) else PREVIEW_IMAGES


def check_local(out: str | os.PathLike | None, folder: str | os.PathLike) -> None:
  """Raises ValueError if the results would be written to an object store."""
  place = folder if out is None else out
  if "://" in str(place):
    raise ValueError(f"out: expected a folder of this machine for the results, got {place}")


def as_saved(cond: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a condition's arrays in dtypes that NumPy's files know; bfloat16 is none of them."""
  return {name: value.astype(np.float32) if value.dtype != bool else value for name, value in cond.items()}
