"""Runs of ours as folders for PyTorch."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import params_shapes
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.checkpoints.stream import Stored, open_leaves
from pflow_jax.conversion.card import README, card, write_card
from pflow_jax.conversion.leaves import Exporter
from pflow_jax.conversion.models import classes_of, model_of_run
from pflow_jax.conversion.progress import digest, in_words, megabytes
from pflow_jax.conversion.runs import check_leaves, read_run
from pflow_jax.families.metadata import FlowMapStated, policy_metadata, release_of, sampling_metadata
from pflow_jax.families.registry import network_kind
from pflow_jax.files import foreign
from pflow_jax.files.checksums import CHECKSUMS
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.partition import first_match
from pflow_jax.settings.adapters import Adapter
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Settings
from pflow_jax.torch_io.shards import ModelFolder
from pflow_jax.torch_io.table import flat_shapes, rows_for
from pflow_jax.training import workdir
from pflow_jax.training.network import own_strength
from pflow_jax.training.origins import which_of

SHARD_BYTES = 5 * 10**9
TOLD = ("nfe", "max_segment", "final_scale", "shift")  # what a policy's files tell of its objective


def to_torch(
  folder: str,
  out: pathlib.Path,
  which: str,
  dtype: np.dtype | None,
  max_bytes: int | None,
  format: str,
  options: Mapping[str, Any],
  known: Settings,
) -> bool:
  """Writes a run as a folder for PyTorch, see `conversion.program.convert`.

  Args:
    folder: workdir of the run.
    out: the folder.
    which: "ema" or "params".
    dtype: of floating tensors; None is the leaves'.
    max_bytes: of a file; None is one file for a student with a policy, and SHARD_BYTES for any other network.
    format: of the names, see `conversion.models.model_of_run`.
    options: that tell this conversion from another of the same source.
    known: settings of the run with what it carries of its data.

  Returns:
    Whether anything was left to do.

  Raises:
    ValueError: PyTorch has no such model, or the objective does not tell what the files of a policy do.
  """
  settings = read_run(folder)
  which = which_of(settings, which)
  checkpoints = f"{folder}/{workdir.CHECKPOINTS}"
  step = newest_step(checkpoints)
  leaves = open_leaves(checkpoints, which=which, step=step)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  model = model_of_run(settings, shapes, _data_of(known), format)
  check_leaves(model, shapes, folder)
  torch_config = model.torch_config
  rows = rows_for(model.rows, leaves)
  metadata: dict[str, str] = {}
  objective, sampling = settings.objective, settings.sample
  if model.output.has_policy:
    if lacking := [name for name in TOLD if not hasattr(objective, name)]:
      raise ValueError(
        f"{folder}: PyTorch's files of a policy tell {', '.join(TOLD)} of its objective, and {settings.kind!r} has no "
        f"{', '.join(lacking)}; give it such fields"
      )
    metadata = policy_metadata(model.output, objective.max_segment, objective.shift)
    grid = objective.nfe, objective.final_scale, objective.shift
    metadata |= sampling_metadata(*grid, sampling.temperature_of_segments, sampling.method)
  elif model.inputs:
    metadata = _stated(settings).metadata
  exporter = Exporter(leaves, rows, dtype, _scales(leaves, settings.adapters.rows), _unused(leaves), model.constants)
  identity = {"folder": os.path.abspath(folder), "step": step, "sums": _sums(checkpoints, step)}
  config = foreign.read_json(epath.Path(folder) / workdir.CONFIG)
  if max_bytes is None:  # the readers of policies open one file, and no index
    max_bytes = sys.maxsize if metadata else SHARD_BYTES
  source = digest({"config": config, **identity, **options, "max_bytes": max_bytes})
  target = ModelFolder(out, torch_config, exporter.planned, source, metadata, max_bytes)
  about = card(folder, known, torch_config, model.output.policy_name(), which, step)
  if target.is_complete():
    print(f"{out} holds this model already")
    _describe(out, about)
    return False
  total = sum(tensor.nbytes for tensor in exporter.planned)
  dtypes = {tensor.name: tensor.dtype for tensor in exporter.planned}
  files = len(target.shards)
  print(
    f"{torch_config['_class_name']}, {which} of step {step}: {len(dtypes)} tensors, {in_words(total)} -> {out}, "
    f"{files} file{'s' * (files > 1)}"
  )
  if model.output.has_policy:
    print(f"the samples that PyTorch draws of it: pflow sample --config.sample.method={release_of(sampling.method)}")
  with Lock(out, "pflow convert"), megabytes(total, "convert") as report:
    target.write(lambda name: exporter.tensor(name, dtypes[name]), report)
  _describe(out, about)
  return True


def _describe(out: pathlib.Path, text: str) -> None:
  if not write_card(out, text):
    print(f"{out / README} was edited, or is not of pflow_jax: it is left as it is; remove it for a new card")


def _stated(settings: Settings) -> FlowMapStated:
  """Returns what the files of a flow map tell of its training."""
  objective = settings.objective
  if not objective.guided:
    return FlowMapStated(settings.kind, objective.shift)
  strength = own_strength(settings.model)
  if strength is None:
    strength = settings.need("teacher").guidance
  return FlowMapStated(settings.kind, objective.shift, tuple(objective.guidance), strength)


def _scales(leaves: Mapping[str, Any], table: tuple[Adapter, ...]) -> dict[str, float]:
  """Factors of the leaves "lora_b": PyTorch adds A B as it is."""
  scales = {}
  for path in leaves:
    layer, _, leaf = path.rpartition("/")
    if leaf == "lora_b":
      row = first_match((adapter.pattern for adapter in table), layer)
      if row is not None and table[row].scale != 1:
        scales[path] = table[row].scale
  return scales


def _unused(leaves: Mapping[str, Stored]) -> set[tuple[str, int]]:
  """Layers, (path, index), of adapters that are zeros in both factors: those that an imported adapter did not have."""
  unused = set()
  for path, a in leaves.items():
    if path.endswith("/lora_a") and len(a.shape) == 3:
      b = leaves[f"{path.removesuffix('a')}b"]
      for i in range(a.shape[0]):
        one = lambda leaf, i=i: leaf.read((slice(i, i + 1), *(slice(0, size) for size in leaf.shape[1:])))
        if not one(a).any() and not one(b).any():
          unused |= {(path, i), (f"{path.removesuffix('a')}b", i)}
  return unused


def _data_of(settings: Settings) -> dict[str, Any]:
  """Returns the side of a DiT's images, and its classes where the run or its teacher tells."""
  if "classes" not in network_kind(settings.model.kind).conditions:
    return {}
  if settings.converted:
    side = (settings.source or {}).get("sample_size")
    return {} if side is None else {"sample_size": side}
  own = settings.data
  shape = own.get("shape") or call(data.load, "data", own).shape
  if len(shape) != 3 or shape[0] != shape[1]:
    raise ValueError(f"config.data: PyTorch's DiT is for square images, these are of shape {tuple(shape)}")
  known, teacher = own.get("num_classes"), settings.teacher and settings.teacher.workdir
  if known is None and teacher:
    which = which_of(read_run(teacher), settings.need("teacher").which)
    shapes = params_shapes(f"{teacher}/{workdir.CHECKPOINTS}", which=which)  # type: ignore[arg-type]
    known = classes_of(flat_shapes(shapes))
  return {"sample_size": shape[0], "num_classes": known}


def _sums(checkpoints: str, step: int | None) -> str:
  """Returns a text that tells a checkpoint from another of the same step."""
  path = epath.Path(checkpoints) / str(step) / CHECKSUMS
  return foreign.read_text(path, foreign.MAX_JSON) if path.exists() else ""
