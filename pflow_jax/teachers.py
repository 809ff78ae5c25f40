"""The teacher of a run: its folder, how it is guided, and that it fits its student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from pflow_jax import data, guidance, workdir
from pflow_jax.checkpoint import load_params
from pflow_jax.networks import VELOCITIES, Network, make_network, velocity_of
from pflow_jax.sections import call

Array = jax.Array
Params = Any


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

  def __post_init__(self):
    if self.which not in ("ema", "params"):
      raise ValueError(f"which: expected 'ema' or 'params', got {self.which!r}")
    if not self.guidance > 0:
      raise ValueError(f"guidance: expected a strength > 0, got {self.guidance}")
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise ValueError(f"interval: expected flow times (low, high), 0 <= low <= high <= 1, got {self.interval}")
    if self.bias_noise < 0:
      raise ValueError(f"bias_noise: expected at least 0, got {self.bias_noise}")

  @property
  def autoguided(self) -> bool:
    return self.weak_workdir is not None or self.weak_step is not None


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A trained flow model. `params` has the entry "strong" and, with autoguidance, "weak"."""

  settings: TeacherSettings
  params: Params
  velocity: Callable[..., guidance.Velocity]  # (params, scale=settings.guidance) -> (x, t, cond) -> v, guided


def load_teacher(
  config: ConfigDict,
  dataset: data.Dataset,
  strengths: tuple[float, float] = (1.0, 1.0),
  abstract: bool = False,
) -> Teacher:
  """The trained teacher that `config.teacher` names, for a student that asks for guidance of these strengths.

  Args:
    abstract: without reading anything: shapes of the parameters of a teacher as the student needs one, whether there
      is one or not, and a weak one of the same size.
  Raises: ValueError where there is none, or it does not fit the student, with all that differs.
  """
  settings = call(TeacherSettings, "teacher", config.get("teacher", {}))
  is_guided = settings.guidance != 1 or strengths != (1.0, 1.0)
  read = _assume if abstract else _read
  strong, params = read(config, dataset, settings, is_guided)
  networks, weights = {"strong": strong}, {"strong": params}
  if settings.autoguided:
    networks["weak"], weights["weak"] = read(config, dataset, settings, is_guided, weak=True)
    if not is_guided:
      raise ValueError(
        "config.teacher.weak_workdir, weak_step: a weak teacher guides nothing at strength 1; set "
        "config.teacher.guidance or config.objective.guidance"
      )
  options: dict[str, Any] = dict(interval=tuple(settings.interval), orthogonal=settings.orthogonal)

  def velocity(params, scale=None):
    scale = settings.guidance if scale is None else scale
    field = velocity_of(networks["strong"], params["strong"])
    if settings.autoguided:
      return guidance.autoguided(field, velocity_of(networks["weak"], params["weak"]), scale=scale, **options)
    return guidance.guided(field, dataset.num_classes, scale=scale, **options)

  return Teacher(settings, weights, velocity)


def _read(
  config: ConfigDict, dataset: data.Dataset, settings: TeacherSettings, is_guided: bool, weak: bool = False
) -> tuple[Network, Params]:
  """Network and parameters of the teacher, or of the weak one, from their workdirs."""
  if not settings.workdir:
    raise ValueError(
      "config.teacher.workdir is not set: train a teacher first (`pflow train` with the config's teacher variant) and "
      "pass --config.teacher.workdir=<its workdir>"
    )
  if weak:
    folder, step = settings.weak_workdir or settings.workdir, settings.weak_step
    own = _config_of_a_teacher(folder, "weak_workdir")
    _check_same(config, own, folder, sections=("data",))
  else:
    folder, step = settings.workdir, settings.step
    own = _config_of_a_teacher(folder, "workdir")
    # The student starts from its teacher's parameters: same data, same network but for how it is computed.
    # A flow map starts as its teacher's velocity, which its output layer must then be; a policy has its own.
    is_velocity = config.policy.kind in VELOCITIES
    if not is_velocity and own.policy.kind != "velocity":
      raise ValueError(
        f"config.teacher.workdir: {folder} holds a {own.policy.kind}; a policy's output layer starts from that of a "
        "teacher with policy.kind='velocity'"
      )
    _check_same(config, own, folder, sections=("data", "model", *(["policy"] if is_velocity else [])))
    if is_guided and not settings.autoguided and not own.objective.cond_dropout:
      raise ValueError(
        f"config.teacher.guidance: {settings.guidance} needs a teacher that knows the empty condition; train it with "
        "objective.cond_dropout=0.1, or give a weak teacher (teacher.weak_workdir, weak_step)"
      )
  network = make_network(own.model, own.policy, dataset)
  return network, load_params(f"{folder}/{workdir.CHECKPOINTS}", which=settings.which, step=step)  # type: ignore[arg-type]


def _assume(
  config: ConfigDict, dataset: data.Dataset, settings: TeacherSettings, is_guided: bool, weak: bool = False
) -> tuple[Network, Params]:
  """The network of a teacher that would fit the student, and the shapes of its parameters."""
  policy = config.policy if config.policy.kind in VELOCITIES else {"kind": "velocity"}
  network = make_network(config.model, policy, dataset)
  return network, network.shapes(dataset.shape)


def _config_of_a_teacher(folder: str, key: str) -> ConfigDict:
  own = workdir.load_config(folder)
  if own.objective.kind != "flow_matching":
    raise ValueError(f"config.teacher.{key}: {folder} holds a student, expected a teacher")
  return own


def _check_same(config: ConfigDict, own: ConfigDict, folder: str, sections: tuple[str, ...]) -> None:
  computed = ("model.dtype", "model.remat", "model.attention", "model.scan_unroll")
  starts = tuple(f"{section}." for section in sections)
  mine, teachers = (
    {k: v for k, v in workdir.flatten(workdir.as_plain(c)).items() if k.startswith(starts)} for c in (config, own)
  )
  differing = [
    f"\n  {key}: the teacher has {teachers.get(key, '(default)')!r}, the student {mine.get(key, '(default)')!r}"
    for key in sorted(mine.keys() | teachers.keys())
    if mine.get(key) != teachers.get(key) and key not in computed
  ]
  if differing:
    raise ValueError(f"the teacher in {folder} was trained on other data or with another network:{''.join(differing)}")
