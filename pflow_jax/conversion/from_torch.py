"""Models of PyTorch as workdirs of ours."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from pflow_jax.checkpoints.stream import save_leaves
from pflow_jax.conversion import students
from pflow_jax.conversion.leaves import TensorLeaf
from pflow_jax.conversion.models import Model, model_of_torch, read_config, recognise
from pflow_jax.conversion.origin import told_by_folder
from pflow_jax.conversion.progress import digest, in_words, megabytes
from pflow_jax.conversion.runs import read_run
from pflow_jax.core.objectives import PRETRAINED, FlowMatching
from pflow_jax.families.autoencoder import SD_SCALE
from pflow_jax.families.names import Source
from pflow_jax.families.registry import FAMILIES, sharding_rules
from pflow_jax.files import foreign
from pflow_jax.files.lock import Lock
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout, make_layout
from pflow_jax.settings.mesh import MeshSettings
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.pickled import CHOSEN
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.table import is_lora, strip_prefix
from pflow_jax.torch_io.tensors import WEIGHTS, open_tensors
from pflow_jax.training import workdir
from pflow_jax.training.network import head_class
from pflow_jax.training.origins import inputs_of_import

SOURCE = "source.json"  # of a workdir that was converted: of what
_MARK_BYTES = 2**16
# Classes of ImageNet, whose published DiTs are all of the latents of Stable Diffusion's autoencoders, of 4 channels.
_IMAGENET = 1000
# Fields of a config.json about the file, which a run's source has too.
_SAID = ("_encoder", "_file", "_latent_scale", "_latent_shift", "_license")


@dataclasses.dataclass(frozen=True)
class _Import:
  """A workdir to be written.

  Attributes:
    state: of the checkpoint, by part and path.
    settings: of the run.
    title: of what is converted, for messages.
    notes: that are printed, after those of the source.
  """

  state: dict[str, dict[str, TensorLeaf]]
  settings: Settings
  title: str
  notes: tuple[str, ...] = ()


def to_jax(
  path: pathlib.Path,
  out: str | os.PathLike,
  base: str | None,
  dtype: np.dtype | None,
  key: str,
  mesh: Mapping[str, int] | None,
  convention: str | None,
  options: Mapping[str, Any],
) -> bool:
  """Writes a model of PyTorch as a workdir, see `conversion.program.convert`.

  Args:
    path: folder or file of the model.
    out: the workdir.
    base: workdir of the teacher of an adapter.
    dtype: of floating leaves; None is the tensors'.
    key: of the state dict in a file that holds several.
    mesh: sizes of the mesh whose devices' parts lie together.
    convention: of a DiT's time, where its files do not tell it.
    options: that tell this conversion from another of the same source.

  Returns:
    Whether anything was left to do.
  """
  given = open_source(path, key, convention, base is not None)
  source = recognise(given)
  config, tensors = source.config, source.tensors
  model = model_of_torch(config, tensors.metadata, tensors)
  name = (path if path.is_dir() else path.parent).resolve().name
  if not head_class(model.head).has_policy and not model.inputs:
    if base is not None:
      raise ValueError("base: expected adapters, the source is a model of its own; leave it out")
    plan = _import_teacher(path, model, tensors, config, dtype, name)
  else:
    plan = _import_student(path, model, tensors, base, dtype, f"{given.published} {name}")
  identity = {"tensors": given.tensors.identity(), "base": base and os.path.abspath(base), "mesh": mesh and dict(mesh)}
  made_of = digest({"config": given.config, **identity, **options})
  if _is_finished(epath.Path(out), made_of):
    if is_first():
      print(f"{out} holds this model already")
    return False
  layout = _layout(mesh, model.kind)
  if layout is not None:
    for part in plan.state.values():
      layout.shardings({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in part.items()})
  leaves = [leaf for part in plan.state.values() for leaf in part.values()]
  total = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
  if is_first():
    print(f"{plan.title}: {len(tensors.places)} tensors, {in_words(tensors.nbytes)} -> {out}, {in_words(total)}")
    for note in (*source.notes, *plan.notes):
      print(note)
  state = {
    part: unflatten_dict({tuple(p.split("/")): leaf for p, leaf in tree.items()}) for part, tree in plan.state.items()
  }
  mark = epath.Path(out) / SOURCE
  try:
    with Lock(out, "pflow convert", active=is_first()), megabytes(total, "convert") as report:
      if is_first():
        mark.write_text(_mark(made_of))
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


def open_source(path: pathlib.Path, key: str = "", convention: str | None = None, has_base: bool = False) -> Source:
  """Opens the files of a model, as they came; the arguments are those of `to_jax`.

  Raises:
    ValueError: a file is damaged, or its config.json is of no known class.
  """
  config, tensors = read_config(path), open_tensors(path, key)
  chosen = tensors.metadata.get(CHOSEN)
  notes = () if chosen is None else (f"of its state dicts {chosen!r} is taken; --key names another",)
  tensors = tensors.renamed(strip_prefix(tensors.places))
  return Source(tensors, config, str(path), _published(path), convention, has_base, notes)


def _published(path: pathlib.Path) -> str:
  """Returns the name by which a published model is known: its file's, or its folder's where all files have one name."""
  if path.is_file() and not path.stem.startswith(WEIGHTS.partition(".")[0]):
    return path.stem
  return (path.parent if path.is_file() else path).absolute().name


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
  source = {"class": config["_class_name"], "folder": name, **told_by_folder(path)}
  if "sample_size" in model.attributes:
    source["sample_size"] = model.attributes["sample_size"]
  source |= {key.removeprefix("_"): config[key] for key in _SAID if key in config}
  data = students.data_of(model)
  if model.kind == "dit" and (data.get("num_classes"), data["shape"][-1]) == (_IMAGENET, 4):
    source |= {"latent_shift": 0.0, "latent_scale": SD_SCALE}
  own = Settings(
    data=data,
    model=Choice(model.kind, model.options | {"dtype": _compute_dtype(leaves)}),
    head=model.head,
    kind=PRETRAINED,
    objective=FlowMatching(shift=walk.pop("shift", 1.0)),
    sample=SampleSettings(**walk),
    source=source,
  )
  return _Import({"params": leaves}, own, str(config["_class_name"]))


def _import_student(
  path: pathlib.Path, model: Model, tensors: Tensors, base: str | None, dtype: np.dtype | None, name: str
) -> _Import:
  """An adapter on a teacher of ours, or a full model; its parameters and their average are the same."""
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
  if model.inputs:
    return _Import({"params": leaves, "ema": leaves}, settings, "a flow map")
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
  """Returns the dtype that a network with these parameters computes in: that of most of them."""
  sizes: dict[str, int] = {}
  for leaf in leaves.values():
    sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + int(np.prod(leaf.shape))
  most = max(sizes, key=lambda name: sizes[name])
  return most if most in ("bfloat16", "float16") else "float32"


def _is_finished(out: epath.Path, source: str) -> bool:
  """Returns whether `out` holds this model already.

  Raises:
    ValueError: it holds another run, or part of another.
  """
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


def _layout(mesh: Mapping[str, int] | None, kind: str) -> Layout | None:
  """The layout that `mesh` describes: of all devices in a job of several processes, else without devices."""
  together = jax.process_count() > 1
  if not together and not mesh:
    return None
  settings = call(MeshSettings, "mesh", ({} if together else {"data": 1}) | dict(mesh or {}))
  sizes = settings.sizes
  if not together and any(size < 1 for size in sizes.values()):
    raise ValueError(f"mesh: expected sizes of at least 1, got {dict(mesh or {})}")
  devices = None if together else math.prod(sizes.values())
  return make_layout(sizes, (*settings.table, *sharding_rules(kind)), devices, min_size=settings.min_size)
