"""Students of PyTorch's releases as runs of ours: an adapter on a teacher, or a model of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pflow_jax.checkpoints.checkpoint import params_shapes
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.conversion.leaves import TensorLeaf, dtype_of
from pflow_jax.conversion.models import Model, model_of_run
from pflow_jax.conversion.runs import check_leaves, read_run
from pflow_jax.core.objectives import OBJECTIVES, settings_of
from pflow_jax.core.objectives.flow_map import FlowMap
from pflow_jax.core.objectives.imitation import Imitation
from pflow_jax.core.rollout import NEWEST
from pflow_jax.data.prompts.records import MAX_LENGTHS
from pflow_jax.families.metadata import FLOW_MAP, FlowMapStated, sampling_of
from pflow_jax.families.registry import FAMILIES, network_kind
from pflow_jax.files.foreign import shown
from pflow_jax.settings.adapters import AdapterSettings
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.teacher import TeacherSettings
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.table import Row, flat_shapes, is_lora, lora_rows, torch_shapes_of
from pflow_jax.training import workdir
from pflow_jax.training.network import COMPUTED, head_class, own_strength
from pflow_jax.training.origins import which_of

Shape = tuple[int, ...]
Leaves = dict[str, TensorLeaf]


@dataclasses.dataclass(frozen=True)
class Adapters:
  """An adapter on a network of ours.

  Attributes:
    leaves: that train, by path.
    table: as in the section `adapters` of a config.
    train: likewise.
  """

  leaves: Leaves
  table: tuple[tuple[Any, ...], ...]
  train: tuple[str, ...]


def read_adapters(model: Model, tensors: Tensors, where: str, dtype: np.dtype | None) -> Adapters:
  """Reads the leaves of an adapter.

  Args:
    model: the student.
    tensors: of the adapter.
    where: the file, for errors.
    dtype: of floating leaves; None is the tensors'.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape. All are named.
  """
  shapes, rows = model.shapes(), {row.flax: row for row in model.rows}
  owners = {name: path for path, row in rows.items() for name in torch_shapes_of(row, shapes[path])}
  new = {row.flax for row in model.branches}
  whole = {path for path in rows if path.startswith("head/")} | new
  whole |= {owners[name] for name in tensors.places if name in owners}
  of_path = {path: torch_shapes_of(rows[path], shapes[path]) for path in rows if path in whole}
  expected = {name: shape for names in of_path.values() for name, shape in names.items()}
  pairs = {name: _stem(name) for name in tensors.places if is_lora(name)}
  ranks: dict[str, int] = {}
  for name, stem in pairs.items():
    path = owners.get(f"{stem}.weight")
    if path is not None and name.endswith(".lora_A.weight"):
      ranks.setdefault(path, tensors.places[name].shape[0])
  low_rank: dict[str, tuple[Row, Shape]] = {}
  for path, rank in ranks.items():
    *lead, inputs, outputs = shapes[path]
    a, b = lora_rows(rows[path])
    low_rank |= {a.flax: (a, (*lead, inputs, rank)), b.flax: (b, (*lead, rank, outputs))}
    names = torch_shapes_of(a, low_rank[a.flax][1]) | torch_shapes_of(b, low_rank[b.flax][1])
    present = {stem for stem in pairs.values() if owners.get(f"{stem}.weight") == path}
    expected |= {name: shape for name, shape in names.items() if _stem(name) in present}
  check_tensors(expected, tensors.shapes, where)
  leaves = {path: leaf_of(rows[path], shapes[path], tensors, dtype) for path in rows if path in whole}
  leaves |= {path: leaf_of(row, shape, tensors, dtype, partly=True) for path, (row, shape) in low_rank.items()}
  table = tuple((re.escape(path.removesuffix("/kernel")), rank, float(rank), 0.0) for path, rank in ranks.items())
  body = [path for path in rows if path in whole - new and not path.startswith("head/")]
  norm = [path for path in rows if path.startswith("final_norm/")]
  return Adapters(leaves, table, ("final_norm/.*",) if body == norm else tuple(re.escape(path) for path in body))


def _stem(name: str) -> str:
  return re.sub(r"\.lora_[AB]\.weight$", "", name)


def leaf_of(row: Row, shape: Shape, tensors: Tensors, dtype: np.dtype | None, partly: bool = False) -> TensorLeaf:
  """Returns the leaf of a row.

  Args:
    row: of the leaf.
    shape: of the leaf.
    tensors: in the files.
    dtype: of floating leaves; None is the tensors'.
    partly: layers that the files lack are zeros.
  """
  layers: list[int | None] = list(range(shape[0])) if row.stacked else [None]
  absent = frozenset(i for i in layers if i is not None and partly and not any(n in tensors.places for n in row.at(i)))
  names = [name for i in layers if i not in absent for name in row.at(i)]
  return TensorLeaf(row, tensors, shape, dtype_of(row, names, tensors, dtype), absent)


def base_of(folder: str, model: Model) -> Model:
  """Returns a student with what its files do not tell of its network, from its teacher.

  Args:
    folder: workdir of the teacher.
    model: the student.

  Raises:
    ValueError: the teacher has another network.
  """
  settings = read_run(folder)
  if not head_class(settings.head).starts_policies:
    raise ValueError(f"base: {folder} holds a {settings.head.kind!r}, expected a teacher, whose head is 'velocity'")
  shapes = flat_shapes(params_shapes(f"{folder}/{workdir.CHECKPOINTS}", which=which_of(settings)))  # type: ignore[arg-type]
  teacher = model_of_run(settings, shapes)
  check_leaves(teacher, shapes, f"base: {folder}")
  # How it is computed may differ, and the scale and the direction of time are not in PyTorch's files.
  free = (*COMPUTED, "dtype", "out_channels", "per_block", "sample_size", "time_scale", "flip_time")
  theirs, ours = ({k: _plain(v) for k, v in one.attributes.items() if k not in free} for one in (teacher, model))
  ours = {k: _plain(v) for k, v in network_kind(model.kind).defaults.items() if k not in free} | ours
  differing = [
    f"{key}: the teacher has {theirs.get(key)!r}, the student {ours.get(key)!r}"
    for key in sorted(theirs | ours)
    if theirs.get(key) != ours.get(key)
  ]
  if teacher.kind != model.kind or differing:
    raise ValueError(f"base: {folder} is a {teacher.kind}, the student a {model.kind}; {'; '.join(differing)}")
  size = {"sample_size": model.attributes["sample_size"]} if "sample_size" in model.attributes else {}
  return dataclasses.replace(model, attributes={**teacher.attributes, **size})


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def data_of(model: Model) -> dict[str, Any]:
  """Returns the section `data` of a converted run: random data of the shapes that the network takes.

  Args:
    model: that was converted.
  """
  attributes = model.attributes
  family = FAMILIES[model.kind]
  side = attributes.get("sample_size", family.side)
  shape = (side, side, attributes["channels"])
  if "classes" in network_kind(model.kind).conditions:
    return {"name": "synthetic", "shape": shape, "num_classes": attributes["num_classes"]}
  prompts = {"name": "synthetic_prompts", "model": model.kind, "shape": shape, "num_records": 1}
  pooled = {"pooled": attributes["pooled_width"]} if attributes.get("pooled_width") else {}
  return prompts | {"text": (MAX_LENGTHS[model.kind], attributes["text_width"])} | pooled


def student_settings(
  model: Model, base: str | None, adapters: Adapters | None, metadata: Mapping[str, str], name: str, dtype: str
) -> Settings:
  """Returns the settings of a run that has this student.

  What the files do not tell is taken from the releases' recipes, and from the names of file and folder, such as
  "gmflux_k8_piid_8step"; the data are random ones of the network's shapes. All can be changed when it is used.

  Args:
    model: the student.
    base: workdir of its teacher.
    adapters: that it is, or None.
    metadata: of its files.
    name: of its file and its folder; the first number of steps in it counts.
    dtype: that it computes in.
  """
  teacher = TeacherSettings()
  if base is not None:
    teacher = TeacherSettings(base, step=newest_step(f"{base}/{workdir.CHECKPOINTS}"))
  own: dict[str, Any] = {
    "data": data_of(model),
    "model": Choice(model.kind, model.options | {"dtype": dtype}),
    "head": model.head,
    "adapters": AdapterSettings(adapters.table, adapters.train) if adapters else AdapterSettings(),
  }
  if model.inputs:
    return _flow_map_settings(own, teacher, FlowMapStated.read(metadata))
  recipe = FAMILIES[model.kind].students.get(head_class(model.head), {})
  told = sampling_of(metadata) or dict(recipe)
  stated = re.search(r"(\d+)[-_]?(?:step|nfe)", name)
  if stated and not sampling_of(metadata):
    told["nfe"] = int(stated[1])
  temperature = told.pop("temperature", recipe.get("temperature", 1.0))
  sampling: dict[str, Any] = {"auto_temperature": True} if temperature == "auto" else {"temperature": temperature}
  release = told.pop("release", NEWEST)
  if release != NEWEST:  # asked for by whoever exported it
    sampling["method"] = release
  return Settings(
    **own, kind="imitation", objective=Imitation(**told), teacher=teacher, sample=SampleSettings(**sampling)
  )


def _flow_map_settings(own: dict[str, Any], teacher: TeacherSettings, stated: FlowMapStated) -> Settings:
  """Returns the settings of a run that has a flow map.

  Args:
    own: sections of its network and its data.
    teacher: its teacher.
    stated: what its files tell.

  Raises:
    ValueError: there is no such objective.
  """
  kinds = [kind for kind in OBJECTIVES if settings_of(kind) is FlowMap]
  if stated.objective not in kinds:
    raise ValueError(f"metadata {FLOW_MAP}: objective: expected one of {kinds}, got {shown(stated.objective)}")
  strengths = {} if stated.guidance is None else {"guidance": stated.guidance}
  objective = OBJECTIVES[stated.objective](shift=stated.shift, **strengths)
  if own_strength(own["model"]) is None and stated.strength is not None:
    teacher = dataclasses.replace(teacher, guidance=stated.strength)
  return Settings(**own, kind=stated.objective, objective=objective, teacher=teacher)
