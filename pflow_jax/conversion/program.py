"""`pflow convert`: models of PyTorch as workdirs of ours, and runs of ours as folders for PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import newest_step, params_shapes
from pflow_jax.checkpoints.stream import Stored, open_leaves, save_leaves
from pflow_jax.conversion import students
from pflow_jax.conversion.leaves import Exporter, TensorLeaf
from pflow_jax.conversion.models import Model, classes_of, model_of_run, model_of_torch, read_config
from pflow_jax.conversion.runs import check_leaves, is_run, read_run
from pflow_jax.core.objectives import PRETRAINED, FlowMatching
from pflow_jax.families.head_names import policy_metadata, release_of, sampling_metadata
from pflow_jax.families.registry import FAMILIES, network_kind, sharding_rules
from pflow_jax.files import foreign
from pflow_jax.files.checksums import CHECKSUMS
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.partition import first_match
from pflow_jax.mesh.sharding import Layout, make_layout
from pflow_jax.settings.adapters import Adapter
from pflow_jax.settings.mesh import MeshSettings
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.shards import ModelFolder
from pflow_jax.torch_io.table import flat_shapes, is_lora, rows_for, strip_prefix
from pflow_jax.torch_io.tensors import open_tensors
from pflow_jax.training import workdir
from pflow_jax.training.network import head_class
from pflow_jax.training.teachers import at_hand, inputs_of_import, which_of
from pflow_jax.training.writer import progress

SOURCE = "source.json"  # of a workdir that was converted: of what
_MARK_BYTES = 2**16
_MB = 10**6
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def convert(
  source: str | os.PathLike,
  out: str | os.PathLike,
  *,
  base: str | os.PathLike | None = None,
  teacher: str | os.PathLike | None = None,
  which: str = "ema",
  dtype: str | None = None,
  max_shard_gb: float = 5.0,
  key: str = "",
  mesh: Mapping[str, int] | None = None,
) -> bool:
  """Converts a model in either direction, a tensor at a time; goes on where an interrupted call stopped.

  Args:
    source: a run of ours, or a model of PyTorch: a folder that diffusers wrote, a .safetensors or a .pth file with
      config.json beside it, or a student of π-Flow or ArcFlow.
    out: the new folder: for a run one that PyTorch reads, for anything else a workdir.
    base: workdir of the teacher that a student of PyTorch is an adapter for.
    teacher: workdir of a run's teacher, if that has moved.
    which: of a run's parameters, "ema" or "params".
    dtype: of floating tensors, "float32" or "bfloat16"; None is as they are stored.
    max_shard_gb: size of a file for PyTorch, in 10^9 bytes.
    key: of the state dict in a .pth file, where it holds several.
    mesh: sizes of the axes of a mesh whose devices' parts are to lie together in the checkpoint, see
      `sharding.MeshSettings`. In a job of several processes it is that of all their devices.
  Returns: whether anything was left to do.
  Raises: ValueError for what cannot be converted, before anything is written.
  """
  if dtype not in (None, "float32", "bfloat16"):
    raise ValueError(f"--dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
  if which not in ("ema", "params"):
    raise ValueError(f"--which: expected 'ema' or 'params', got {which!r}")
  if not max_shard_gb > 0:
    raise ValueError(f"--max_shard_gb: expected more than 0, got {max_shard_gb}")
  source, out = expanded(source, "--source"), checked_folder(out, "--out")
  base = None if base is None else expanded(base, "--base")
  _return_freed_memory()
  options = {"which": which, "dtype": dtype, "key": key}
  wanted = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
  if is_run(source):
    if base is not None or mesh:
      raise ValueError("--base and --mesh are for models of PyTorch, the source is a run; leave them out")
    max_bytes, known = int(max_shard_gb * 10**9), at_hand(source, teacher)
    return _to_torch(str(source), pathlib.Path(out), which, wanted, max_bytes, options, known)
  if teacher is not None:
    raise ValueError("--teacher is for a run, the source is a model of PyTorch; the teacher of its adapters is --base")
  path = pathlib.Path(source)
  if not path.exists():
    raise ValueError(f"--source: there is no file or folder {source}")
  if (path / "model_index.json").is_file() and (path / "transformer").is_dir():
    path = path / "transformer"  # of a pipeline
  return _to_jax(path, out, None if base is None else str(base), wanted, key, mesh, options)


# ---- From PyTorch ----


@dataclasses.dataclass(frozen=True)
class _Import:
  """What is to be written: state of the checkpoint, by part and path, and the settings of the workdir."""

  state: dict[str, dict[str, TensorLeaf]]
  settings: Settings
  title: str
  notes: tuple[str, ...] = ()


def _to_jax(
  path: pathlib.Path,
  out: str | os.PathLike,
  base: str | None,
  dtype: np.dtype | None,
  key: str,
  mesh: Mapping[str, int] | None,
  options: Mapping[str, Any],
) -> bool:
  config = read_config(path)
  tensors = open_tensors(path, key)
  tensors = tensors.renamed(strip_prefix(tensors.places))
  model = model_of_torch(config, tensors.metadata, tensors)
  name = (path if path.is_dir() else path.parent).resolve().name
  if not head_class(model.head).has_policy:
    if base is not None:
      raise ValueError("--base is for adapters, the source is a model of its own; leave it out")
    plan = _import_teacher(path, model, tensors, config, dtype, name)
  else:
    plan = _import_student(path, model, tensors, base, dtype, name)
  identity = {"tensors": tensors.identity(), "base": base and os.path.abspath(base), "mesh": mesh and dict(mesh)}
  source = _digest({"config": config, **identity, **options})
  if _is_finished(epath.Path(out), source):
    if is_first():
      print(f"{out} holds this model already")
    return False
  layout = _layout(mesh)
  if layout is not None:
    for part in plan.state.values():
      layout.shardings({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in part.items()})
  leaves = [leaf for part in plan.state.values() for leaf in part.values()]
  total = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
  if is_first():
    print(f"{plan.title}: {len(tensors.places)} tensors, {_in_words(tensors.nbytes)} -> {out}, {_in_words(total)}")
    for note in plan.notes:
      print(note)
  state = {
    part: unflatten_dict({tuple(p.split("/")): leaf for p, leaf in tree.items()}) for part, tree in plan.state.items()
  }
  mark = epath.Path(out) / SOURCE
  try:
    with Lock(out, "pflow convert", active=is_first()), _progress(total, "convert") as report:
      if is_first():
        mark.write_text(_mark(source))
      try:
        save_leaves(f"{out}/{workdir.CHECKPOINTS}", state, layout=layout, resume=True, report=report)
      except ValueError:  # of the tensors: a source that has been mended is another
        if is_first():
          mark.unlink(missing_ok=True)
        raise
      inputs = inputs_of_import(plan.settings, out)  # in all processes, which agree on it
      if is_first():
        workdir.claim(out, plan.settings, inputs)
  except ValueError:
    if is_first() and mark.parent.exists() and not any(mark.parent.iterdir()):
      mark.parent.rmdir()
    raise
  return True


def _import_teacher(
  path: pathlib.Path, model: Model, tensors: Tensors, config: Mapping[str, Any], dtype: np.dtype | None, name: str
) -> _Import:
  """A full model that predicts a velocity."""
  if any(map(is_lora, tensors.places)):
    raise ValueError(
      f"{path} holds adapters without the metadata policy_config of a student of π-Flow or ArcFlow; fuse them in their "
      "model first"
    )
  leaves = _all_leaves(path, model, tensors, dtype)
  walk = dict(FAMILIES[model.kind].teacher)
  source = {"class": config["_class_name"], "folder": name}
  if "sample_size" in model.attributes:
    source["sample_size"] = model.attributes["sample_size"]
  own = Settings(
    data=students.data_of(model),
    model=Choice(model.kind, model.options | {"dtype": _compute_dtype(leaves)}),
    head=model.head,
    kind=PRETRAINED,
    objective=FlowMatching(shift=walk.pop("shift", 1.0)),
    sample=SampleSettings(**walk),
    source=source,
  )
  notes = tuple(filter(None, [getattr(model.names, "time_note", lambda *_: "")(config, path.name)]))
  if model.learns_variance:
    channels = model.attributes["channels"]
    notes += (
      f"its variance is learned: of every sub-pixel's {model.attributes['out_channels']} outputs the first {channels} "
      "are kept; a model trained so predicts noise (DDPM), not a velocity, and is no teacher as it is",
    )
  return _Import({"params": leaves}, own, str(config["_class_name"]), notes)


def _import_student(
  path: pathlib.Path, model: Model, tensors: Tensors, base: str | None, dtype: np.dtype | None, name: str
) -> _Import:
  """An adapter on a teacher of ours, or a full model of a policy; its parameters and their average are the same."""
  base = base if base is None or "://" in base else os.path.abspath(base)
  adapters = None
  if base is not None:
    model = students.base_of(base, model)
  if any(map(is_lora, tensors.places)):
    if base is None:
      raise ValueError(f"{path} is an adapter: give --base, a workdir of its teacher, which `pflow convert` makes too")
    adapters = students.read_adapters(model, tensors, str(path), dtype)
    leaves = adapters.leaves
  else:
    leaves = _all_leaves(path, model, tensors, dtype)
  compute = read_run(base).model.get("dtype", "float32") if base else _compute_dtype(leaves)
  settings = students.student_settings(model, base, adapters, tensors.metadata, name, compute)
  objective = settings.objective
  notes = (
    f"taken to be trained for {objective.nfe} evaluations, the last {objective.final_scale} as long as the others, at "
    f"shift {objective.shift}; sample with --config.objective.nfe=... and so on if it was not",
  )
  return _Import({"params": leaves, "ema": leaves}, settings, f"a {model.head.kind} student", notes)


def _all_leaves(path: pathlib.Path, model: Model, tensors: Tensors, dtype: np.dtype | None) -> dict[str, TensorLeaf]:
  check_tensors(model.torch_shapes(), tensors.shapes, str(path))
  shapes = model.shapes()
  return {row.flax: students.leaf_of(row, shapes[row.flax], tensors, dtype) for row in model.rows}


def _compute_dtype(leaves: Mapping[str, TensorLeaf]) -> str:
  """What a network with these parameters computes in: what most of them are."""
  sizes: dict[str, int] = {}
  for leaf in leaves.values():
    sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + int(np.prod(leaf.shape))
  most = max(sizes, key=lambda name: sizes[name])
  return most if most in ("bfloat16", "float16") else "float32"


def _is_finished(out: epath.Path, source: str) -> bool:
  """Whether `out` holds this model already; ValueError if it holds another run, or part of another."""
  mark, content = out / SOURCE, _mark(source).encode()
  found = foreign.read_bytes(mark, _MARK_BYTES) if mark.exists() else None
  if (out / workdir.CONFIG).exists() or workdir.has_checkpoint(out):
    if found != content:
      raise ValueError(f"{out} holds a run that was not made from this source with these options; give another --out")
    return (out / workdir.CONFIG).exists() and workdir.has_checkpoint(out)
  if found is not None and not content.startswith(found):  # a conversion may be stopped while it writes the mark
    raise ValueError(f"{out} holds part of another model, not all of it; remove that, or give another --out")
  return False


def _mark(source: str) -> str:
  return json.dumps({"source": source}) + "\n"


def _layout(mesh: Mapping[str, int] | None) -> Layout | None:
  """The layout that `mesh` describes: of all devices in a job of several processes, else without devices."""
  if jax.process_count() > 1:
    return make_layout(call(MeshSettings, "mesh", mesh or {}), sharding_rules())
  if not mesh:
    return None
  settings = call(MeshSettings, "mesh", {"data": 1} | dict(mesh))
  if any(size < 1 for size in settings.sizes.values()):
    raise ValueError(f"--mesh: expected sizes of at least 1, got {dict(mesh)}")
  return make_layout(settings, sharding_rules(), int(np.prod(list(settings.sizes.values()))))


# ---- To PyTorch ----


def _to_torch(
  folder: str,
  out: pathlib.Path,
  which: str,
  dtype: np.dtype | None,
  max_bytes: int,
  options: Mapping[str, Any],
  known: Settings,
) -> bool:
  settings = read_run(folder)
  which = which_of(settings, which)
  checkpoints = f"{folder}/{workdir.CHECKPOINTS}"
  step = newest_step(checkpoints)
  leaves = open_leaves(checkpoints, which=which, step=step)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  model = model_of_run(settings, shapes, _data_of(known))
  check_leaves(model, shapes, folder)
  torch_config = model.torch_config
  rows = rows_for(model.rows, leaves)
  metadata: dict[str, str] = {}
  objective, sampling = settings.objective, settings.sample
  if head_class(model.head).has_policy:
    metadata = policy_metadata(model.head.plain(), objective.max_segment, objective.shift)
    grid = objective.nfe, objective.final_scale, objective.shift
    metadata |= sampling_metadata(*grid, sampling.temperature_of_segments, sampling.method)
  exporter = Exporter(leaves, rows, dtype, _scales(leaves, settings.adapters.rows), _unused(leaves))
  identity = {"folder": os.path.abspath(folder), "step": step, "sums": _sums(checkpoints, step)}
  source = _digest({"config": settings.plain(), **identity, **options, "max_bytes": max_bytes})
  target = ModelFolder(out, torch_config, exporter.planned, source, metadata, max_bytes)
  if target.is_complete():
    print(f"{out} holds this model already")
    return False
  total = sum(tensor.nbytes for tensor in exporter.planned)
  dtypes = {tensor.name: tensor.dtype for tensor in exporter.planned}
  files = len(target.shards)
  print(
    f"{torch_config['_class_name']}, {which} of step {step}: {len(dtypes)} tensors, {_in_words(total)} -> {out}, "
    f"{files} file{'s' * (files > 1)}"
  )
  if metadata:
    print(f"the samples that PyTorch draws of it: pflow sample --config.sample.method={release_of(sampling.method)}")
  with Lock(out, "pflow convert"), _progress(total, "convert") as report:
    target.write(lambda name: exporter.tensor(name, dtypes[name]), report)
  return True


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
  """What a DiT takes from its data: the side of its images, and its classes where the run or its teacher tells."""
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
  """What tells a checkpoint from another of the same step."""
  path = epath.Path(checkpoints) / str(step) / CHECKSUMS
  return foreign.read_text(path, foreign.MAX_JSON) if path.exists() else ""


# ---- Both ----


def _return_freed_memory() -> None:
  """Makes glibc's malloc give every large block back when it is freed.

  Left to itself it keeps, in an arena for each thread, as much as the largest block ever freed: several tensors' worth.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    mallopt(_MMAP_THRESHOLD, 2**20)


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _in_words(nbytes: int) -> str:
  return f"{nbytes / 10**9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 10**6:.2f} MB"


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
  """A function to report the bytes that are done since; it speaks of whole megabytes."""
  done, shown, whole = 0, 0, max(total // _MB, 1)
  with progress(whole, 0, what, not is_first(), unit="MB") as report:

    def add(nbytes: int) -> None:
      nonlocal done, shown
      done += nbytes
      now = whole if done >= total else done // _MB
      if now > shown:
        shown = now
        report.update(now)

    yield add
