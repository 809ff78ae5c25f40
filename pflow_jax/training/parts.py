"""The models of a teacher, found in their folders, with the checks that they fit: a strong one, and a weak one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax

from pflow_jax import data
from pflow_jax.core import guidance
from pflow_jax.families.registry import knows_empty, network_kind
from pflow_jax.files.folders import expanded
from pflow_jax.mesh.partition import differing
from pflow_jax.settings.teacher import TeacherSettings
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.training import workdir as workdirs
from pflow_jax.training.inputs import check_scale, is_run, locate, paths_of_data, read_inputs
from pflow_jax.training.network import COMPUTED, OF_FLOW_MAPS, Network, head_class, make_network, velocity_of
from pflow_jax.training.origins import Saved, which_of

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


def find_part(
  settings: Settings,
  asked: TeacherSettings,
  dataset: data.Dataset,
  is_guided: bool,
  run: str | os.PathLike | None,
  weak: bool = False,
) -> Part:
  """Finds the teacher of a student, or the weak one that guides it.

  Args:
    settings: the student's.
    asked: the teacher's folders and guidance.
    dataset: the student's.
    is_guided: whether the teacher needs the empty condition, unless a weaker model guides it.
    run: workdir of the student, if it has been trained.
    weak: whether the weak one is meant.

  Raises:
    ValueError: it is missing, or does not fit.
  """
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
  own = _settings_of_a_teacher(folder, f"config.teacher.{key}")
  # A trained student may be sampled on other data, so these are not compared. Its guidance was checked before, and the
  # description of its data has no empty prompt to check again.
  about_data = not own.converted and inputs is None
  if weak:
    _check_same(settings, own, folder, ("data",) if about_data else (), dataset)
    _check_weak(settings, own, folder, dataset)
  else:
    check_fit(settings, own, folder, asked, dataset, is_guided and inputs is None, about_data=about_data)
  saved = Saved(folder, which_of(own, asked.which), step, asked.dtype)
  return _part(settings, own, saved, _as_known(own, folder, dataset, weak))


def find_guide(settings: Settings, dataset: data.Dataset, workdir: str, step: int | None) -> Part:
  """Finds the weaker model that guides the samples of a teacher's run.

  Args:
    settings: of the run.
    dataset: its data.
    workdir: of the weaker model.
    step: of its checkpoint; None is the newest.

  Raises:
    ValueError: it is missing, or of other data.
  """
  key = "config.sample.weak_workdir"
  folder = expanded(workdir, key)
  own = _settings_of_a_teacher(folder, key)
  _check_same(settings, own, folder, () if settings.converted or own.converted else ("data",), dataset)
  _check_weak(settings, own, folder, dataset)
  return _part(settings, own, Saved(folder, which_of(own), step), _as_known(own, folder, dataset, weak=True))


def _part(settings: Settings, own: Settings, saved: Saved, dataset: data.Dataset) -> Part:
  """Returns the model in a folder, computed as that of `settings` is."""
  network = make_network(_computed_as(settings.model, own.model), own.head, dataset)
  shapes = saved.shapes()
  # Attention has no parameters, and this machine need not have the kernels that the student attends with.
  portable = own.changed("model", attention="xla").model if own.model.get("attention") else own.model
  if others := differing(shapes, make_network(portable, own.head, dataset).shapes(dataset)):
    raise ValueError(
      f"{saved.workdir}: holds another network than the config beside it describes; parameters that differ: "
      f"{others[:8]}; restore the {workdirs.CONFIG} that it was trained with"
    )
  return Part(functools.partial(velocity_of, network), shapes, network, saved)


def _as_known(own: Settings, folder: str, dataset: data.Dataset, weak: bool) -> data.Dataset:
  """Returns the data as a converted model knows them; a weak one may know no classes.

  Raises:
    ValueError: they have other channels or classes.
  """
  shape, classes = own.data.get("shape"), own.data.get("num_classes")
  if not own.converted or shape is None or classes is None:
    return dataset  # of prompts, or of this package's own data, which are compared
  if weak and not classes:
    dataset = dataclasses.replace(dataset, num_classes=0, class_names=())
  if (shape[-1], classes) != (dataset.shape[-1], dataset.num_classes):
    raise ValueError(
      f"the {'weak ' * weak}teacher in {folder} is of {shape[-1]} channels and {classes} classes, {dataset.name} has "
      f"{dataset.shape[-1]} and {dataset.num_classes}"
    )
  return dataset


def _check_weak(settings: Settings, own: Settings, folder: str, dataset: data.Dataset) -> None:
  """Raises ValueError for a converted weak model of data of another scale than those of the model that it guides."""
  if not own.converted:
    return
  ours, theirs = (_deviation(one) for one in (settings, own))
  is_known = settings.converted or hasattr(head_class(settings.head), "sigma_data")
  if is_known and ours != theirs:
    raise ValueError(
      f"the weak teacher in {folder} takes data with a standard deviation of {theirs:g}, the model that it is to guide "
      f"{ours:g}"
    )
  check_scale(folder, theirs, own.source or {}, dataset)


def _deviation(settings: Settings) -> float:
  """Standard deviation of the data that a model takes, about."""
  default = getattr(head_class(settings.head), "sigma_data", 1.0)
  return settings.head.get("sigma_data", default)


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
    check_scale(folder, _deviation(own), own.source or {}, dataset)
  if is_guided and not asked.autoguided:
    _check_knows_nothing(own, dataset, asked)
  sections = ("model",) if has_policy else ("model", "head")
  _check_same(settings, own, folder, ("data", *sections) if about_data else sections, dataset)


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


def assumed_part(settings: Settings, dataset: data.Dataset) -> Part:
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
  """Loads the settings of a teacher's run.

  Args:
    folder: the workdir.
    key: of a config, that names it.

  Raises:
    ValueError: there is none, or it is a student.
  """
  if not is_run(folder):
    flag = "--teacher" if key == "config.teacher.workdir" else f"--{key}"
    raise ValueError(f"{key}: there is no run in {folder}; say where the teacher is with {flag}")
  try:
    own = workdirs.load_settings(folder)
  except ValueError as error:
    raise ValueError(f"{key}: {folder} has no whole config ({error}); give a finished run") from error
  if "teacher" in own.objective.sections:
    raise ValueError(f"{key}: {folder} holds a student, expected a teacher")
  return own


def _check_same(
  settings: Settings, own: Settings, folder: str, sections: tuple[str, ...], dataset: data.Dataset
) -> None:
  free: tuple[str, ...] = ("model.dtype", *(f"model.{key}" for key in (*COMPUTED, *OF_FLOW_MAPS)), "data.max_length")
  starts = tuple(f"{section}." for section in sections)
  mine, teachers = (
    {k: v for k, v in workdirs.flatten(_complete(one.plain())).items() if k.startswith(starts)}
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
