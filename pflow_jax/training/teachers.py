"""The teacher of a run: its models and its guidance."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax import data
from pflow_jax.core import guidance
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.teacher import TeacherSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.inputs import locate, read_inputs
from pflow_jax.training.network import own_strength
from pflow_jax.training.origins import Saved, use_teacher
from pflow_jax.training.parts import Part, assumed_part, find_part

Params = Any


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
      return {name: assumed_part(settings, dataset) for name in names}
    return {name: find_part(settings, own, dataset, is_guided, run, weak=name == "weak") for name in names}

  teacher = FoundTeacher(find, own, dataset.null_cond)
  if run is None or _is_moved_by_hand(own, run):
    _ = teacher.parts  # raises before any work if something does not fit
  return teacher


def _is_moved_by_hand(settings: TeacherSettings, run: str | os.PathLike) -> bool:
  """Returns whether the user has given the teacher of a run another folder than it had."""
  inputs = read_inputs(run)
  known = inputs.models.get("teacher") if inputs else None
  return known is not None and settings.workdir != known.workdir


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
