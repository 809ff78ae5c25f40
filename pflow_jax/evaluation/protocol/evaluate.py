"""`pflow evaluate --protocol adm`: a run's samples measured as papers on ImageNet report them.

ADM's protocol (Dhariwal and Nichol, arXiv:2105.05233): 50,000 samples of random classes, decoded to bytes, in the
features of Inception, against the moments of the training set and 10,000 of its features.

Sample i has noise and class of its own, from the seed and i alone. So numbers depend neither on the batch nor on the
devices, but for rounding, and samples can be drawn in parts. What is kept of a part is there whole or not at all: the
same command, killed at any moment, goes on with the part it was at, and ends with the same numbers.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pflow_jax.checkpoints.steps import newest_agreed, steps_of
from pflow_jax.evaluation.feature_networks import open_feature_network
from pflow_jax.evaluation.pictures import to_pictures
from pflow_jax.evaluation.protocol import about, report
from pflow_jax.evaluation.protocol.drawing import Drawing, Finished, teacher_samplers
from pflow_jax.evaluation.protocol.draws import drawn_labels, draws
from pflow_jax.evaluation.protocol.kept import bytes_of_samples, check_disk, gather
from pflow_jax.evaluation.protocol.parts import FORMAT, Parts
from pflow_jax.evaluation.protocol.reference import open_reference
from pflow_jax.evaluation.protocol.scores import NEAREST, check_count, measured, paired_measures
from pflow_jax.evaluation.protocol.settings import PAIRS_IN_PART, PART, Protocol
from pflow_jax.evaluation.sample import check_local
from pflow_jax.files.folders import absolute, checked_folder, expanded
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import agreed, is_first
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.origins import use_teacher, which_of
from pflow_jax.training.sample import evaluations, make_sampler, with_guide


def evaluate_by_protocol(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  reference: str | os.PathLike,
  *,
  protocol: Protocol | None = None,
  which: str = "ema",
  step: int | None = None,
  teacher: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Measures the run in `folder` against a reference; writes adm.json, adm.md and samples of each sampler.

  Rows of the same samples with other numbers of evaluations, of other draws, or against other references, stay in both
  files. A student is sampled with config.sample.nfe evaluations, a teacher by config.sample.solver and guidance. The
  features are those of the network in config.evaluate.features.

  Args:
    config: of the run, perhaps with other settings for samples.
    folder: its workdir.
    reference: file of moments and features, see `evaluation.references.load_reference`.
    protocol: number and kind of samples; by default those of ADM.
    which: "ema" or "params".
    step: of the checkpoint; by default that of an evaluation in `out` which was not finished, else the newest.
    teacher: workdir of its teacher, if that has moved.
    out: folder of the results and of parts; by default <folder>/adm.

  Returns:
    the content of adm.json.

  Raises:
    ValueError: the reference is of another network, there are too few samples for a metric, samples are not finite, the
      disk has no room, there is no such checkpoint, or `out` holds another evaluation.
  """
  protocol = protocol or Protocol()
  settings = use_teacher(Settings.of(config, converted=True), teacher)
  folder = expanded(folder)
  check_local(out, folder)
  path = pathlib.Path(checked_folder(f"{folder}/adm" if out is None else out, "out"))
  experiment = build(settings, run=folder)
  dataset, layout = experiment.dataset, layout_of(settings)
  if dataset.embedding is not None:
    raise ValueError(f"protocol: expected samples of classes, this run is conditioned on texts ({dataset.name})")
  if not settings.evaluate.features:
    raise ValueError(
      "features: expected the file of a feature network, such as StyleGAN's inception-2015-12-05.pt; without one there "
      "is `pflow evaluate` without a protocol, by a small classifier"
    )
  pictures = to_pictures(dataset, layout)
  network = open_feature_network(settings.evaluate.features, layout, settings.evaluate.width)
  check_count(protocol.num_samples, network.num_features)
  which = which_of(settings, which)
  numbers = evaluations(experiment.method, settings.sample)
  samplers = {n: make_sampler(experiment.method, settings.sample, n) for n in numbers}  # raises before any work
  lock = Lock(path, "pflow evaluate", active=is_first())
  with lock:
    step = _step(folder, step, path)
    own = about.of_sampler(experiment, folder, step, which, protocol)
    of_samples = {"format": FORMAT, **own, **about.of_features(experiment, network, protocol)}
    size = protocol.num_samples, PART
    rows = [*map(report.with_pairs, agreed(functools.partial(report.known_rows, path, of_samples)))]
    parts = {
      (n, seed): _parts(_folder(path, n, seed, protocol), {**of_samples, "seed": seed, "nfe": n}, *size)
      for n in numbers
      for seed in protocol.seeds
    }
    pairs, beside = dict[int, Parts](), None
    if protocol.num_paired and experiment.teacher is not None:
      common, sizes = {**own, **about.of_pairs(protocol)}, (protocol.num_paired, PAIRS_IN_PART)
      pairs = {n: _parts(path / "pairs" / f"{n}_nfe", {**common, "nfe": n}, *sizes) for n in numbers}
      beside = _parts(path / "pairs" / "teacher", about.of_teacher(experiment, protocol), *sizes)

    def check_room() -> None:
      needed = bytes_of_samples([*parts.values()], dataset, network, protocol.keep)
      arrays = [(one, 1) for one in pairs.values()] + ([(beside, 2)] if beside else [])
      needed += sum(4 * math.prod(dataset.shape) * count * one.num_missing() for one, count in arrays)
      check_disk(path, needed)

    agreed(check_room)
    known = open_reference(reference, network, protocol.num_samples, path, lock)
    if is_first() and known.notes:
      print("\n".join(known.notes), flush=True)

    def score(one: Parts) -> report.Row:
      assert known.reference is not None, "the first process measures"
      return measured(one, known.reference)

    def write(finished: bool) -> dict[str, Any]:
      device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
      content = {**of_samples, "workdir": str(folder), "nearest_k": NEAREST, "device": device}
      content |= {"finished": finished, "rows": rows}
      if is_first():
        with lock.writing():
          report.write(path, content)
      return content

    write(finished=False)
    params = experiment.load(folder, which, layout, step=step)
    params = with_guide(experiment.method, settings.sample, params, layout)
    runs = {n: functools.partial(run, params) for n, run in samplers.items()}
    labels = {seed: drawn_labels(protocol.of(seed), dataset.num_classes) for seed in protocol.seeds}
    drawings = {
      seed: Drawing(layout, settings.sample.batch_size, draws(dataset.shape, seed), labels[seed], lock)
      for seed in protocol.seeds
    }
    for (n, seed), samples in parts.items():
      told = f"{n} NFE" + (f", seed {seed}" if protocol.draws > 1 else "")
      finish = Finished(pictures, network, labels[seed], protocol.keep)
      speed = drawings[seed].fill(samples, told, {"x": runs[n]}, finish)
      row = report.row_of(rows, n, seed, known.digest)
      if row is None:
        row = agreed(functools.partial(score, samples))
        row |= {"reference_images": known.num_images, "notes": list(known.notes)}
      speeds = [speed, *(one.get("images_per_second") for one in rows if (one["nfe"], one["seed"]) == (n, seed))]
      found = [one for one in speeds if one is not None]
      row |= {"nfe": n, "seed": seed, "reference": os.fspath(reference), "reference_digest": known.digest}
      rows = report.joined(rows, report.with_pairs(row | ({"images_per_second": found[0]} if found else {})))
      write(finished=False)
    if beside is not None:
      first, drawing = protocol.num_samples, drawings[protocol.seed]
      if agreed(beside.missing):
        drawing.fill(beside, "pairs, teacher", teacher_samplers(experiment, layout), first=first)
      for n, one in pairs.items():
        drawing.fill(one, f"pairs, {n} NFE", {"x": runs[n]}, first=first)
        row = agreed(functools.partial(paired_measures, one, beside)) | {"num_paired": protocol.num_paired}
        before = report.row_of(rows, n, protocol.seed, known.digest) or {}
        rows = report.joined(rows, {**before, **report.with_pairs(row)})
    content = write(finished=True)
    if is_first():
      with lock.writing():
        for told in filter(None, [gather(one, protocol.keep) for one in parts.values()]):
          print(told)
      own_rows = [row for row in rows if (row["nfe"], row["seed"]) in parts and row["reference_digest"] == known.digest]
      print(report.table(own_rows))
      print(f"wrote {path}/adm.md and adm.json")
  return content


def _folder(path: pathlib.Path, nfe: int, seed: int, protocol: Protocol) -> pathlib.Path:
  """Folder of the samples of one draw."""
  return path / (f"{nfe}_nfe" if seed == protocol.seed else f"{nfe}_nfe_seed{seed}")


def _parts(folder: pathlib.Path, of: Mapping[str, Any], count: int, size: int) -> Parts:
  """Returns parts, where they are not of something else."""
  parts = Parts(folder, of, count=count, size=size)
  agreed(parts.check)
  return parts


def _step(folder: str, asked: int | None, out: pathlib.Path) -> int | None:
  """Returns the step of the checkpoint to evaluate, for all processes: a run may train on and save others meanwhile."""
  checkpoints = absolute(f"{folder}/{workdir.CHECKPOINTS}")
  begun = agreed(functools.partial(report.begun_step, out))
  if asked is None and begun in agreed(functools.partial(steps_of, checkpoints)):
    asked = begun
    if is_first():
      print(f"going on with the evaluation of step {begun} in {out}; for another give --step and --out", flush=True)
  return newest_agreed(checkpoints, asked)[0]
