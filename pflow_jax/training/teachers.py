"""The teacher of a run: its folder, how it is guided, and that it fits its student."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.core import guidance
from pflow_jax.files.foreign import shown
from pflow_jax.mesh.partition import differing
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sections import call, check_sections
from pflow_jax.training import workdir
from pflow_jax.training.inputs import Inputs, is_run, locate, paths_of_data, read_inputs
from pflow_jax.training.network import VELOCITIES, Network, make_network, module_defaults, velocity_of
from pflow_jax.training.origins import Saved, inputs_of, use_teacher

Array = jax.Array
Params = Any

PRETRAINED = "pretrained"  # objective.kind of a teacher that was converted, not trained here
ROLES = {"strong": "teacher", "weak": "weak"}  # of a teacher's parts, as `inputs.Inputs` names them


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
  """The section `teacher` of a config.

  Attributes:
    workdir, step: of its run; step None is the newest checkpoint, and a student keeps the one it started with.
    which: "ema" or "params".
    guidance, interval, orthogonal: how it is guided, see `guidance.guided`.
    weak_workdir, weak_step: a weaker model, an early checkpoint or a smaller network, which guides it in place of the
      empty condition (autoguidance). weak_step alone is a checkpoint of the teacher's own run.
    bias_noise: of a student's start, see `heads.head_params_from_teacher`.
    dtype: that its parameters, and what of a student does not train, are kept in; None is as they were saved.
  """

  workdir: str | None = None
  step: int | None = None
  which: str = "ema"
  guidance: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  orthogonal: float = 0.0
  weak_workdir: str | None = None
  weak_step: int | None = None
  bias_noise: float = 0.05
  dtype: str | None = None

  def __post_init__(self):
    if self.which not in ("ema", "params"):
      raise ValueError(f"which: expected 'ema' or 'params', got {self.which!r}")
    if not self.guidance > 0:
      raise ValueError(f"guidance: expected a strength > 0, got {self.guidance}")
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise ValueError(f"interval: expected flow times (low, high), 0 <= low <= high <= 1, got {self.interval}")
    if self.bias_noise < 0:
      raise ValueError(f"bias_noise: expected at least 0, got {self.bias_noise}")
    if self.dtype not in (None, "float32", "bfloat16"):
      raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {self.dtype!r}")

  @property
  def autoguided(self) -> bool:
    return self.weak_workdir is not None or self.weak_step is not None


@dataclasses.dataclass(frozen=True)
class Part:
  """One of a teacher's models.

  Attributes:
    shapes: of its parameters.   saved: where they are; None of an abstract teacher.
  """

  network: Network
  shapes: Params
  saved: Saved | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A trained flow model.

  Attributes:
    find: looks for its parts, "strong" and, with autoguidance, "weak"; ValueError where one is not or does not fit.
  """

  settings: TeacherSettings
  dataset: data.Dataset
  find: Callable[[], dict[str, Part]]

  @functools.cached_property
  def parts(self) -> dict[str, Part]:
    return self.find()

  @property
  def shapes(self) -> Params:
    """Shapes of its parameters, by part."""
    return {name: part.shapes for name, part in self.parts.items()}

  @property
  def saved(self) -> dict[str, Saved]:
    """Where its parameters are, by part."""
    return {name: part.saved for name, part in self.parts.items() if part.saved}

  def load(self, layout: Layout | None = None) -> Params:
    """Its parameters, on the devices as `layout` says, without one on the host."""
    return {name: one.load(layout) for name, one in self.saved.items()}

  def velocity(self, params: Params, scale: Any = None) -> guidance.Velocity:
    """(x, t, cond) -> v, guided, by default at settings.guidance."""
    settings = self.settings
    options: dict[str, Any] = dict(interval=tuple(settings.interval), orthogonal=settings.orthogonal)
    scale = settings.guidance if scale is None else scale
    field = velocity_of(self.parts["strong"].network, params["strong"])
    if settings.autoguided:
      weak = velocity_of(self.parts["weak"].network, params["weak"])
      return guidance.autoguided(field, weak, scale=scale, **options)
    return guidance.guided(field, self.dataset.null_cond, scale=scale, **options)


def load_teacher(
  config: ConfigDict,
  dataset: data.Dataset,
  strengths: tuple[float, float] = (1.0, 1.0),
  abstract: bool = False,
  run: str | os.PathLike | None = None,
) -> Teacher:
  """The trained teacher that `config.teacher` names, for a student that asks for guidance of these strengths.

  Args:
    abstract: without reading anything: shapes of the parameters of a teacher as the student needs one, whether there
      is one or not, and a weak one of the same size.
    run: workdir of the student, which has been trained: its teacher is looked for when something needs it, and is
      found where it has moved together with the student.
  Raises: ValueError where there is none, or it does not fit the student, with all that differs.
  """
  settings = call(TeacherSettings, "teacher", config.get("teacher", {}))
  is_guided = settings.guidance != 1 or strengths != (1.0, 1.0)
  if settings.autoguided and not is_guided:
    raise ValueError(
      "config.teacher.weak_workdir, weak_step: a weak teacher guides nothing at strength 1; set "
      "config.teacher.guidance or config.objective.guidance"
    )
  names = ("strong", "weak") if settings.autoguided else ("strong",)

  def find() -> dict[str, Part]:
    if abstract:
      return {name: _assume(config, dataset, settings) for name in names}
    return {name: _find(config, dataset, settings, is_guided, run, weak=name == "weak") for name in names}

  teacher = Teacher(settings, dataset, find)
  if run is None or _is_moved_by_hand(settings, run):
    _ = teacher.parts  # what does not fit is better said before any work
  return teacher


def _is_moved_by_hand(settings: TeacherSettings, run: str | os.PathLike) -> bool:
  """Whether somebody says that the teacher of a run is elsewhere than it was."""
  inputs = read_inputs(run)
  known = inputs.models.get("teacher") if inputs else None
  return known is not None and settings.workdir != known.workdir


def _find(
  config: ConfigDict,
  dataset: data.Dataset,
  settings: TeacherSettings,
  is_guided: bool,
  run: str | os.PathLike | None,
  weak: bool = False,
) -> Part:
  """The teacher, or the weak one."""
  if not settings.workdir:
    raise ValueError(
      "config.teacher.workdir is not set: train a teacher first (`pflow train` with the config's teacher variant), or "
      "convert one (`pflow convert`), and pass --config.teacher.workdir=<its workdir>"
    )
  key, step = ("weak_workdir", settings.weak_step) if weak else ("workdir", settings.step)
  folder = (weak and settings.weak_workdir) or settings.workdir
  inputs = read_inputs(run) if run is not None else None
  if inputs is not None and run is not None:
    folder = locate(ROLES["weak" if weak else "strong"], folder, run, inputs)
  own = _config_of_a_teacher(folder, key)
  sections: tuple[str, ...] = ()
  if not weak:
    # The student starts from its teacher's parameters: same data, same network but for how it is computed.
    # A flow map starts as its teacher's velocity, which its output layer must then be; a policy has its own.
    is_velocity = config.policy.kind in VELOCITIES
    if not is_velocity and own.policy.get("kind") != "velocity":
      raise ValueError(
        f"config.teacher.workdir: {folder} holds a {shown(own.policy.get('kind'))}; a policy's output layer starts "
        "from that of a teacher with policy.kind='velocity'"
      )
    sections = ("model", "policy") if is_velocity else ("model",)
    # A run that has been trained passed this; what describes its data has no empty prompt.
    if is_guided and not settings.autoguided and inputs is None:
      _check_knows_nothing(own, dataset, settings)
  # A student that has been trained may be looked at beside other data.
  about_data = own.objective.kind != PRETRAINED and inputs is None
  _check_same(config, own, folder, ("data", *sections) if about_data else sections, dataset)
  network = make_network(_computed_as(config.model, own.model), own.policy, dataset)
  saved = Saved(folder, which_of(own, settings.which), step, settings.dtype)
  shapes = saved.shapes()
  # Attention has no parameters, and this machine need not have the kernels that the student attends with.
  portable = own.model.to_dict() | ({"attention": "xla"} if "attention" in own.model else {})
  if others := differing(shapes, make_network(portable, own.policy, dataset).shapes(dataset)):
    raise ValueError(
      f"{folder}: holds another network than the config beside it describes; parameters that differ: {others[:8]}; "
      f"restore the {workdir.CONFIG} that it was trained with"
    )
  return Part(network, shapes, saved)


def inputs_of_import(config: ConfigDict, folder: str | os.PathLike) -> Inputs | None:
  """The same of a run that was converted to the workdir `folder`; None of a teacher, which was made elsewhere."""
  if config.objective.kind == PRETRAINED:
    return None
  saved, t = {}, config.teacher
  if t.workdir:
    saved["teacher"] = Saved(t.workdir, which_of(workdir.load_config(t.workdir), t.which), t.step)
  return inputs_of(config, call(data.load, "data", config.data), saved, folder)


def at_hand(folder: str | os.PathLike, teacher: str | os.PathLike | None = None) -> ConfigDict:
  """The config of the run in `folder` with what it carries: shape and classes of its data, and where its teacher is.

  Args:
    teacher: workdir of its teacher, if that has moved.
  Raises: ValueError for a `teacher` that the run was not trained with.
  """
  config, inputs = workdir.load_config(folder), read_inputs(folder)
  use_teacher(config, teacher)
  if inputs is not None:
    description = inputs.data.description
    config.data = {**config.data, "shape": description.shape, "num_classes": description.num_classes}
    if teacher is not None:
      config.teacher.workdir = locate("teacher", config.teacher.workdir, folder, inputs)
  return config


def _computed_as(student: ConfigDict, own: ConfigDict) -> ConfigDict:
  """The section `model` of a teacher, its blocks computed as the student's: it need not run where it was trained."""
  keys = workdir.COMPUTED if own.get("kind") == student.get("kind") else ()
  return ConfigDict({**own, **{key: student[key] for key in keys if key in student}})


def which_of(config: Mapping[str, Any], which: str = "ema") -> str:
  """The parameters to read of a run: `which`, but for a converted teacher, which has no average."""
  return "params" if config["objective"]["kind"] == PRETRAINED else which


def _check_knows_nothing(own: ConfigDict, dataset: data.Dataset, settings: TeacherSettings) -> None:
  """Raises ValueError where there is no empty condition to guide the teacher away from."""
  if own.objective.kind != PRETRAINED and not own.objective.get("cond_dropout"):
    raise ValueError(
      f"config.teacher.guidance: {settings.guidance} needs a teacher that knows the empty condition; train it with "
      "objective.cond_dropout=0.1, or give a weak teacher (teacher.weak_workdir, weak_step)"
    )
  if dataset.null_cond is None:
    raise ValueError(
      f"config.teacher.guidance: {settings.guidance} needs the empty prompt's embedding, which {dataset.name} lacks; "
      "write it again with `pflow cache`"
    )


def _assume(config: ConfigDict, dataset: data.Dataset, settings: TeacherSettings) -> Part:
  """A teacher that would fit the student."""
  policy = config.policy if config.policy.kind in VELOCITIES else {"kind": "velocity"}
  network = make_network(config.model, policy, dataset)
  shapes = network.shapes(dataset)
  if settings.dtype:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, settings.dtype), shapes)
  return Part(network, shapes)


def _config_of_a_teacher(folder: str, key: str) -> ConfigDict:
  if not is_run(folder):
    raise ValueError(f"config.teacher.{key}: there is no run in {folder}; say where the teacher is with --teacher")
  own = workdir.load_config(folder)
  try:
    check_sections(own, list(own), required=("model", "policy", "objective"))
  except ValueError as error:
    raise ValueError(f"config.teacher.{key}: {folder} has no whole config ({error}); give a finished run") from error
  if own.objective.get("kind") not in ("flow_matching", PRETRAINED):
    raise ValueError(f"config.teacher.{key}: {folder} holds a student, expected a teacher")
  return own


def _check_same(
  config: ConfigDict, own: ConfigDict, folder: str, sections: tuple[str, ...], dataset: data.Dataset
) -> None:
  free: tuple[str, ...] = ("model.dtype", *(f"model.{key}" for key in workdir.COMPUTED), "data.max_length")
  starts = tuple(f"{section}." for section in sections)
  mine, teachers = (
    {k: v for k, v in workdir.flatten(_complete(workdir.as_plain(c))).items() if k.startswith(starts)}
    for c in (config, own)
  )
  places = tuple(paths_of_data(config.data))
  if any(mine.get(key) != teachers.get(key) for key in places if key.startswith(starts)):
    inputs = read_inputs(folder)
    if inputs is not None and inputs.data.fingerprint == data.fingerprint(dataset):
      free += places  # the same data, wherever they are
  differing = [
    f"\n  {key}: the teacher has {teachers.get(key, '(default)')!r}, the student {mine.get(key, '(default)')!r}"
    for key in sorted(mine.keys() | teachers.keys())
    if mine.get(key) != teachers.get(key) and key not in free
  ]
  if differing:
    raise ValueError(f"the teacher in {folder} was trained on other data or with another network:{''.join(differing)}")


def _complete(config: dict[str, Any]) -> dict[str, Any]:
  """A config in plain JSON whose section `model` has all its settings, the defaults too."""
  model = config.get("model", {})
  return config | {"model": json.loads(json.dumps(module_defaults(model) | model))}
