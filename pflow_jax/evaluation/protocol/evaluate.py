"""`pflow evaluate --protocol adm`: a run's samples measured as papers on ImageNet report them.

ADM's protocol (Dhariwal and Nichol, arXiv:2105.05233): 50,000 samples of random classes, decoded to bytes, in the
features of Inception, against the moments of the training set and 10,000 of its features.

Sample i has noise and class of its own, from the seed and i alone. So numbers depend neither on the batch nor on the
devices, but for rounding, and samples can be drawn in parts. What is kept of a part is there whole or not at all: the
same command, killed at any moment, goes on with the part it was at, and ends with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.evaluation.evaluate import described_teacher
from pflow_jax.evaluation.feature_networks import FeatureNetwork, open_feature_network
from pflow_jax.evaluation.pictures import to_pictures
from pflow_jax.evaluation.protocol.drawing import Drawing, drawn_pairs
from pflow_jax.evaluation.protocol.kept import check_disk, gather
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.scores import NEAREST, as_markdown, check_counts, measured, paired_measures, table
from pflow_jax.evaluation.protocol.settings import PAIRS_IN_PART, PART, Protocol
from pflow_jax.evaluation.references import load_reference
from pflow_jax.evaluation.sample import check_local
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import agreed, is_first
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.inputs import digest_of_parameters
from pflow_jax.training.origins import use_teacher
from pflow_jax.training.sample import evaluations, make_sampler
from pflow_jax.training.teachers import which_of


def evaluate_by_protocol(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  reference: str | os.PathLike,
  *,
  protocol: Protocol | None = None,
  which: str = "ema",
  teacher: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Measures the run in `folder` against a reference; writes adm.json, adm.md and samples of each sampler.

  A student is sampled with config.sample.nfe evaluations, a teacher by config.sample.solver and guidance. The features
  are those of the network in config.evaluate.features.

  Args:
    config: of the run, perhaps with other settings for samples.
    folder: its workdir.
    reference: file of moments and features, see `evaluation.references.load_reference`.
    protocol: number and kind of samples; by default those of ADM.
    which: "ema" or "params".
    teacher: workdir of its teacher, if that has moved.
    out: folder of the results and of parts; by default <folder>/adm.

  Returns:
    the content of adm.json.

  Raises:
    ValueError: the reference is of another network, there are too few samples for a metric, samples are not finite, the
      disk has no room, or `out` holds parts of another evaluation.
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
  known = load_reference(reference, network)
  check_counts(protocol, known, network.num_features)
  which = which_of(settings, which)
  about = _about(experiment, folder, which, network, protocol)
  numbers = evaluations(experiment.method, settings.sample)
  samplers = {n: make_sampler(experiment.method, settings.sample, n) for n in numbers}  # raises before any work
  lock = Lock(path, "pflow evaluate", active=is_first())
  with lock:
    count = protocol.num_samples
    parts = {n: Parts(path / f"{n}_nfe", {**about, "nfe": n}, count=count, size=PART) for n in numbers}
    paired = None
    if protocol.num_paired and experiment.teacher is not None:
      of_pairs = {**about, "students": list(numbers), "teacher": described_teacher(experiment)}
      paired = Parts(path / "pairs", of_pairs, count=protocol.num_paired, size=PAIRS_IN_PART)
    for one in (*parts.values(), *([] if paired is None else [paired])):
      agreed(one.check)
    agreed(functools.partial(check_disk, path, dataset, network, protocol, len(numbers)))
    params = experiment.load(folder, which, layout)
    runs = {n: functools.partial(run, params) for n, run in samplers.items()}
    rows = []
    for n in numbers:
      drawn = Drawing(runs[n], dataset, protocol, layout, settings.sample.batch_size, pictures, network)
      speed = drawn.fill(parts[n], lock, f"{n} NFE")
      row = _row(agreed(functools.partial(measured, parts[n], known)))
      rows.append({"nfe": n, **row, **({} if speed is None else {"images_per_second": speed})})
      if is_first():
        with lock.writing():
          gather(parts[n], path / f"samples_{n}_nfe", protocol.keep)
    if paired is not None:
      drawn_pairs(experiment, paired, protocol, layout, runs, lock)
      for row in rows:
        row |= _row(agreed(functools.partial(paired_measures, paired, row["nfe"])))
    report = {
      **about,
      "workdir": str(folder),
      "reference": os.fspath(reference),
      "reference_images": known.num_images,
      "nearest_k": NEAREST,
      "num_paired": 0 if paired is None else protocol.num_paired,
      "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
      "rows": rows,
    }
    if is_first():
      with lock.writing():
        write_atomically(path / "adm.json", json.dumps(report, indent=2) + "\n")
        write_atomically(path / "adm.md", as_markdown(report, protocol))
      print(table(rows))
      print(f"wrote {path}/adm.md and adm.json")
  return report


def _about(
  experiment: Experiment, folder: str, which: str, network: FeatureNetwork, protocol: Protocol
) -> dict[str, Any]:
  """Returns all that samples and their features depend on."""
  settings = experiment.settings
  step = newest_step(f"{folder}/{workdir.CHECKPOINTS}")
  plain = settings.plain()
  sampling = dataclasses.asdict(settings.sample)
  for name in ("nfe", "batch_size", "autoencoder"):
    del sampling[name]
  codec = codec_of(experiment.dataset)
  return {
    "parameters": digest_of_parameters(folder, step, which),
    "step": step,
    "which": which,
    "model": plain["model"],
    "sample": sampling,
    "autoencoder": "" if codec is None else codec.folder,
    "network": network.name,
    "num_samples": protocol.num_samples,
    "seed": protocol.seed,
    "labels": protocol.labels,
    "keep": protocol.keep,
  }


def _row(row: dict[str, Any]) -> dict[str, Any]:
  """Returns a row with pairs of a value and its error as tuples, which another process gets as lists."""
  return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
