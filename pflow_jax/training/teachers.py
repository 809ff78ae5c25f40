"""The teacher of a run: its folder, its guidance, and the checks that it fits its student."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax import data
from pflow_jax.core import guidance
from pflow_jax.families.registry import knows_empty, network_kind
from pflow_jax.mesh.partition import differing
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.teacher import TeacherSettings
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.training import workdir
from pflow_jax.training.inputs import check_scale, is_run, locate, paths_of_data, read_inputs
from pflow_jax.training.network import (
  COMPUTED,
  OF_FLOW_MAPS,
  Network,
  head_class,
  make_network,
  own_strength,
  velocity_of,
)
from pflow_jax.training.origins import Saved, use_teacher, which_of

Params = Any

ROLES = {"strong": "teacher", "weak": "weak"}  # names in `inputs.Inputs` of a teacher's parts
VELOCITY = Choice("velocity")


@dataclasses.dataclass(frozen=True)
class Part:
  """One of a teacher's models.

  Attributes:
    field: parameters -> velocity field (x, t, cond) -> v. That of a network takes a strength too, see `velocity_of`.
    shapes: of its parameters.
    network: the network that a student can start from; None for a function.
    saved: place of its parameters in a workdir, or None.
    values: its parameters, if they are in no workdir.
  """

  field: Callable[..., guidance.Velocity]
  shapes: Params
  network: Network | None = None
  saved: Saved | None = None
  values: Params = None


class Teacher:
  """A flow model whose velocity a student learns from: a plain function, or the models that `load_teacher` finds.

  Args:
    velocity: (x, t, cond) -> v, all with a leading batch axis: states (B, *space, C), flow times (B,), 1 is noise. With
      `params` it is (params, x, t, cond) -> v.
    params: arrays that the function needs, which are laid out on the mesh; without them it has none, or its own.
    settings: its guidance. The keys `workdir` and `step` are not used.
    null_cond: the empty condition, for guidance; by default that of the data it is used with.

  References:
    pi-Flow, arXiv:2510.14974, whose objective needs a teacher's velocity alone.
  """

  def __init__(
    self,
    velocity: Callable[..., Any],
    params: Params = None,
    *,
    settings: TeacherSettings = TeacherSettings(),
    null_cond: Any = None,
  ):
    if not callable(velocity):
      raise ValueError(f"Teacher: expected a function (x, t, cond) -> v, got {type(velocity).__name__}")
    self.settings, self.null_cond = settings, null_cond
    self._about = f"function {getattr(velocity, '__name__', type(velocity).__name__)}"

    def field(values: Params) -> guidance.Velocity:
      return functools.partial(velocity, values) if params is not None else velocity

    values = {} if params is None else params
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), values)
    self._own = {"strong": Part(field, shapes, values=values)}

  def __repr__(self) -> str:
    guidance = self.settings.guidance
    return f"Teacher({self._about}{f', guidance {guidance:g}' if guidance != 1 else ''})"

  @property
  def parts(self) -> dict[str, Part]:
    """Its models: "strong" and, with autoguidance, "weak"."""
    return self._own

  @property
  def has_network(self) -> bool:
    """Returns whether a student can start from its parameters."""
    return self.parts["strong"].network is not None

  @property
  def shapes(self) -> Params:
    """Shapes of its parameters, by part."""
    return {name: part.shapes for name, part in self.parts.items()}

  @property
  def saved(self) -> dict[str, Saved]:
    """Places of its parameters, by part."""
    return {name: part.saved for name, part in self.parts.items() if part.saved}

  def load(self, layout: Layout | None = None) -> Params:
    """Loads its parameters, to the devices as `layout` says, without one to the host."""
    place = layout.place if layout else lambda values: values
    own = place({name: part.values for name, part in self.parts.items() if not part.saved})
    return {name: part.saved.load(layout) if part.saved else own[name] for name, part in self.parts.items()}

  def velocity(self, params: Params, scale: Any = None) -> guidance.Velocity:
    """Returns (x, t, cond) -> v, guided, by default at settings.guidance; `scale` is a number, or one an example (B,).

    A guidance-distilled network takes `scale` as its input. It is then guided at settings.guidance on top of that.
    """
    settings, strong = self.settings, self.parts["strong"]
    options: dict[str, Any] = dict(interval=tuple(settings.interval), orthogonal=settings.orthogonal)
    is_input = scale is not None and strong.network is not None and strong.network.strength is not None
    field = strong.field(params["strong"], **({"guidance": scale} if is_input else {}))
    scale = settings.guidance if is_input or scale is None else scale
    if settings.autoguided:
      return guidance.autoguided(field, self.parts["weak"].field(params["weak"]), scale=scale, **options)
    return guidance.guided(field, self.null_cond, scale=scale, **options)

  def check(self, settings: Settings, dataset: data.Dataset, strengths: tuple[float, float]) -> None:
    """Raises ValueError unless it fits a student that asks for guidance of these strengths."""
    asked = settings.teacher or TeacherSettings()
    if asked.is_guided(strengths) and self.null_cond is None and dataset.null_cond is None:
      raise ValueError("teacher: guidance needs the empty condition, which these data lack; give null_cond")

  def on(self, dataset: data.Dataset, settings: TeacherSettings | None = None) -> Teacher:
    """Returns this teacher for a student on these data, with other guidance if settings are given."""
    one = copy.copy(self)
    one.settings = settings or self.settings
    one.null_cond = dataset.null_cond if self.null_cond is None else self.null_cond
    return one


class FoundTeacher(Teacher):
  """A teacher whose models are looked for when they are needed.

  Args:
    find: returns its parts; ValueError where one is missing or does not fit.
    settings: its guidance and its folders.
    null_cond: the empty condition.
  """

  def __init__(self, find: Callable[[], dict[str, Part]], settings: TeacherSettings, null_cond: Any):
    self.settings, self.null_cond = settings, null_cond
    self._find, self._about = functools.cache(find), f"run in {settings.workdir}"

  @property
  def parts(self) -> dict[str, Part]:
    return self._find()


def load_teacher(
  settings: Settings,
  dataset: data.Dataset,
  strengths: tuple[float, float] = (1.0, 1.0),
  abstract: bool = False,
  run: str | os.PathLike | None = None,
) -> Teacher:
  """Loads the trained teacher that `settings.teacher` names, for a student that asks for guidance of these strengths.

  Args:
    settings: of the student.
    dataset: the student's.
    strengths: lowest and highest strength of guidance that the student asks for.
    abstract: read nothing and return shapes: those of a teacher that the student needs, whether there is one or not,
      and of a weak one of the same size.
    run: workdir of the student, if it has been trained: its teacher is then looked for when it is needed, and is found
      where it has moved together with the student.

  Raises:
    ValueError: there is no teacher, or it does not fit the student; the message lists all differences.
  """
  own = settings.teacher or TeacherSettings()
  is_input = own_strength(settings.model) is not None  # the student's strength, of a guidance-distilled network
  is_guided = own.is_guided((1.0, 1.0) if is_input else strengths)
  if own.autoguided and not is_guided:
    raise ValueError(
      "config.teacher.weak_workdir, weak_step: a weak teacher guides nothing at strength 1; set "
      "config.teacher.guidance or config.objective.guidance"
    )
  names = ("strong", "weak") if own.autoguided else ("strong",)

  def find() -> dict[str, Part]:
    if abstract:
      return {name: _assume(settings, dataset) for name in names}
    return {name: _find(settings, own, dataset, is_guided, run, weak=name == "weak") for name in names}

  teacher = FoundTeacher(find, own, dataset.null_cond)
  if run is None or _is_moved_by_hand(own, run):
    _ = teacher.parts  # raises before any work if something does not fit
  return teacher


def _is_moved_by_hand(settings: TeacherSettings, run: str | os.PathLike) -> bool:
  """Returns whether the user has given the teacher of a run another folder than it had."""
  inputs = read_inputs(run)
  known = inputs.models.get("teacher") if inputs else None
  return known is not None and settings.workdir != known.workdir


def _find(
  settings: Settings,
  asked: TeacherSettings,
  dataset: data.Dataset,
  is_guided: bool,
  run: str | os.PathLike | None,
  weak: bool = False,
) -> Part:
  """Finds the teacher, or the weak one."""
  if not asked.workdir:
    raise ValueError(
      "config.teacher.workdir is not set: train a teacher first (`pflow train` with the config's teacher variant), or "
      "convert one (`pflow convert`), and pass --config.teacher.workdir=<its workdir>"
    )
  key, step = ("weak_workdir", asked.weak_step) if weak else ("workdir", asked.step)
  folder = (weak and asked.weak_workdir) or asked.workdir
  inputs = read_inputs(run) if run is not None else None
  if inputs is not None and run is not None:
    folder = locate(ROLES["weak" if weak else "strong"], folder, run, inputs)
  own = _settings_of_a_teacher(folder, key)
  # A trained student may be sampled on other data, so these are not compared. Its guidance was checked before, and the
  # description of its data has no empty prompt to check again.
  about_data = not own.converted and inputs is None
  if weak:
    _check_same(settings, own, folder, ("data",) if about_data else (), dataset)
  else:
    check_fit(settings, own, folder, asked, dataset, is_guided and inputs is None, about_data=about_data)
  network = make_network(_computed_as(settings.model, own.model), own.head, dataset)
  saved = Saved(folder, which_of(own, asked.which), step, asked.dtype)
  shapes = saved.shapes()
  # Attention has no parameters, and this machine need not have the kernels that the student attends with.
  portable = own.changed("model", attention="xla").model if own.model.get("attention") else own.model
  if others := differing(shapes, make_network(portable, own.head, dataset).shapes(dataset)):
    raise ValueError(
      f"{folder}: holds another network than the config beside it describes; parameters that differ: {others[:8]}; "
      f"restore the {workdir.CONFIG} that it was trained with"
    )
  return Part(functools.partial(velocity_of, network), shapes, network, saved)


def check_fit(
  settings: Settings,
  own: Settings,
  folder: str,
  asked: TeacherSettings,
  dataset: data.Dataset,
  is_guided: bool,
  *,
  about_data: bool,
) -> None:
  """Raises ValueError unless a student can start from a teacher, and be guided by it.

  The student starts from its teacher's parameters: same data, same network; only its computation may differ.

  Args:
    settings: the student's.
    own: the teacher's.
    folder: of the teacher, for errors.
    asked: its guidance.
    dataset: the student's.
    is_guided: whether it needs the empty condition, unless a weaker model guides it.
    about_data: whether it must have been trained on the same data.
  """
  # A flow map starts as its teacher's velocity, so its output layer must be the teacher's; a policy has its own.
  has_policy = head_class(settings.head).has_policy
  if has_policy and not head_class(own.head).starts_policies:
    raise ValueError(
      f"config.teacher.workdir: {folder} holds a {own.head.kind!r}; a policy's output layer starts from that of a "
      "teacher with head.kind='velocity'"
    )
  if own.converted:
    kind = head_class(own.head)
    check_scale(folder, own.head.get("sigma_data", getattr(kind, "sigma_data", 1.0)), own.source or {}, dataset)
  if is_guided and not asked.autoguided:
    _check_knows_nothing(own, dataset, asked)
  sections = ("model",) if has_policy else ("model", "head")
  _check_same(settings, own, folder, ("data", *sections) if about_data else sections, dataset)


def at_hand(folder: str | os.PathLike, teacher: str | os.PathLike | None = None) -> Settings:
  """Loads the settings of the run in `folder` with its inputs: shape and classes of its data, folder of its teacher.

  Args:
    folder: the workdir.
    teacher: workdir of its teacher, if that has moved.

  Raises:
    ValueError: the run was not trained with `teacher`.
  """
  inputs = read_inputs(folder)
  settings = use_teacher(workdir.load_settings(folder), teacher)
  if inputs is not None:
    description = inputs.data.description
    settings = settings.changed("data", shape=description.shape, num_classes=description.num_classes)
    if teacher is not None:
      place = locate("teacher", str(settings.need("teacher").workdir), folder, inputs)
      settings = settings.changed("teacher", workdir=place)
  return settings


def _computed_as(student: Choice, own: Choice) -> Choice:
  """The network of a teacher with the student's way of computing blocks: it need not run where it was trained."""
  keys = COMPUTED if own.kind == student.kind else ()
  return Choice(own.kind, {**own.options, **{key: student.options[key] for key in keys if key in student.options}})


def _check_knows_nothing(own: Settings, dataset: data.Dataset, asked: TeacherSettings) -> None:
  """Raises ValueError unless there is an empty condition to guide the teacher away from."""
  if not (knows_empty(own.model.kind) if own.converted else own.objective.cond_dropout):
    raise ValueError(
      f"config.teacher.guidance: {asked.guidance} needs a teacher that knows the empty condition; train it with "
      "objective.cond_dropout=0.1, or give a weak teacher (teacher.weak_workdir, weak_step)"
    )
  if dataset.null_cond is None:
    raise ValueError(
      f"config.teacher.guidance: {asked.guidance} needs the empty prompt's embedding, which {dataset.name} lacks; "
      "write it again with `pflow cache`"
    )


def _assume(settings: Settings, dataset: data.Dataset) -> Part:
  """Makes a teacher of shapes alone that fits the student."""
  head = VELOCITY if head_class(settings.head).has_policy else settings.head
  own = {key: value for key, value in settings.model.options.items() if key not in OF_FLOW_MAPS}
  network = make_network(Choice(settings.model.kind, own), head, dataset)
  shapes = network.shapes(dataset)
  dtype = settings.teacher and settings.teacher.dtype
  if dtype:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
  return Part(functools.partial(velocity_of, network), shapes, network)


def _settings_of_a_teacher(folder: str, key: str) -> Settings:
  if not is_run(folder):
    raise ValueError(f"config.teacher.{key}: there is no run in {folder}; say where the teacher is with --teacher")
  try:
    own = workdir.load_settings(folder)
  except ValueError as error:
    raise ValueError(f"config.teacher.{key}: {folder} has no whole config ({error}); give a finished run") from error
  if "teacher" in own.objective.sections:
    raise ValueError(f"config.teacher.{key}: {folder} holds a student, expected a teacher")
  return own


def _check_same(
  settings: Settings, own: Settings, folder: str, sections: tuple[str, ...], dataset: data.Dataset
) -> None:
  free: tuple[str, ...] = ("model.dtype", *(f"model.{key}" for key in (*COMPUTED, *OF_FLOW_MAPS)), "data.max_length")
  starts = tuple(f"{section}." for section in sections)
  mine, teachers = (
    {k: v for k, v in workdir.flatten(_complete(one.plain())).items() if k.startswith(starts)}
    for one in (settings, own)
  )
  places = tuple(paths_of_data(settings.data))
  if any(mine.get(key) != teachers.get(key) for key in places if key.startswith(starts)):
    inputs = read_inputs(folder)
    if inputs is not None and inputs.data.fingerprint == data.fingerprint(dataset):
      free += places  # the same data may be elsewhere
  differing = [
    f"\n  {key}: the teacher has {teachers.get(key, '(default)')!r}, the student {mine.get(key, '(default)')!r}"
    for key in sorted(mine.keys() | teachers.keys())
    if mine.get(key) != teachers.get(key) and key not in free
  ]
  if differing:
    raise ValueError(f"the teacher in {folder} was trained on other data or with another network:{''.join(differing)}")


def _complete(config: dict[str, Any]) -> dict[str, Any]:
  """Returns a config in plain JSON with all settings of the section `model`, the defaults too."""
  model = config.get("model", {})
  defaults = network_kind(model["kind"]).defaults
  return config | {"model": json.loads(json.dumps(defaults | model))}
