"""From a config to the pieces of a run: data set, networks, policy, objective.

Every section of a config is the keyword arguments of one function or class, named here; a key that its owner does not
take is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from pflow_jax import data, guidance, optim, workdir
from pflow_jax.checkpoint import load_params
from pflow_jax.models import heads
from pflow_jax.models.dit import DiT
from pflow_jax.models.mlp import MLP
from pflow_jax.objectives.flow_matching import FlowMatching, flow_matching_loss
from pflow_jax.objectives.imitation import Imitation, imitation_loss, imitation_loss_data_free
from pflow_jax.policies import ArcPolicy, DXPolicy, GMFlowPolicy, Policy

Array = jax.Array
Params = Any
LossFn = Callable[[Params, Params, Mapping[str, Array], Array, Array], tuple[Array, dict[str, Array]]]

NETWORKS: dict[str, type[nn.Module]] = {"dit": DiT, "mlp": MLP}
HEADS: dict[str, type[heads.Head]] = {
  "velocity": heads.VelocityHead,
  "gmflow": heads.GMFlowHead,
  "dx": heads.DXHead,
  "arc": heads.ArcHead,
}
SECTIONS = (
  *("seed", "data", "model", "policy", "teacher", "objective"),
  *("optimizer", "ema", "train", "sample", "evaluate", "mesh"),
)


def call(function: Callable, section: str, values: Mapping[str, Any], **given: Any) -> Any:
  """`function(**values, **given)`; a key that it does not take, or needs and does not get, is a ValueError.

  A key whose value is None is one that is not set.
  """
  known = {
    name: p.default is p.empty
    for name, p in inspect.signature(function).parameters.items()
    if name not in given and name not in ("parent", "name") and p.kind is not p.VAR_KEYWORD
  }
  _refuse_unknown(values, list(known), f"config.{section}")
  values = {key: value for key, value in values.items() if value is not None}
  missing = [name for name, required in known.items() if required and name not in values]
  if missing:
    raise ValueError(f"config.{section}: {', '.join(missing)} must be set")
  return function(**values, **given)


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
  for key in values:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"{where} has no key {key!r}{hint} (it takes: {', '.join(sorted(known))})")


def _choose(table: Mapping[str, Any], section: str, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The entry that `kind` names, and the other keys."""
  rest = dict(values)
  kind = rest.pop("kind", None)
  if kind not in table:
    raise ValueError(f"config.{section}.kind: expected one of {sorted(table)}, got {kind!r}")
  return table[kind], rest


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
  """The teacher of a student: a run's folder, and how it is guided (see `guidance.guided`)."""

  workdir: str | None = None
  step: int | None = None  # of its checkpoint; None is the newest, and a run keeps the one it started with
  which: str = "ema"
  guidance: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  orthogonal: float = 0.0
  bias_noise: float = 0.05  # of the student's initialisation, see `heads.head_params_from_teacher`


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A trained flow model."""

  settings: TeacherSettings
  network: nn.Module
  params: Params
  velocity: Callable[[Params], guidance.Velocity]  # params -> (x, t, cond) -> v, guided


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The pieces of a run. `network` is the one that trains; a teacher's own run has no `teacher`."""

  dataset: data.Dataset
  network: nn.Module
  objective: FlowMatching | Imitation
  teacher: Teacher | None
  loss_fn: LossFn

  def init(self, key: Array, teacher_params: Params) -> Params:
    """Parameters at the start: random, or for a student made from its teacher's."""
    if self.teacher is not None:
      noise = self.teacher.settings.bias_noise
      return heads.student_params_from_teacher(teacher_params, self.network, key, bias_noise=noise)
    x = jnp.zeros((1, *self.dataset.shape), jnp.float32)
    return self.network.init(key, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]

  def velocity(self, params: Params) -> guidance.Velocity:
    """Velocity field of this run's network (a teacher's run)."""
    return velocity_of(self.network, params)

  def student(self, params: Params) -> Callable[[Array, Array, Any], Policy]:
    """(x, t, cond) -> batch of policies, from this run's network (a student's run)."""
    assert isinstance(self.objective, Imitation)
    return make_student(self.network, self.objective, params)


def build(config: ConfigDict) -> Experiment:
  """Reads the sections that shape a run; see the module's docstring.

  Raises: ValueError for anything in the config that does not fit, before any work is done.
  """
  _refuse_unknown(config, SECTIONS, "config")
  missing = [name for name in ("data", "model", "policy", "objective") if name not in config]
  if missing:
    raise ValueError(f"config: the sections {missing} must be set")
  make_loss, values = _choose(OBJECTIVES, "objective", config.objective)
  if (make_loss is _flow_matching) != (config.policy.get("kind") == "velocity"):
    raise ValueError(
      f"config.objective.kind {config.objective.kind!r} does not train the policy {config.policy.get('kind')!r}: flow "
      "matching needs policy.kind 'velocity', imitation one of 'gmflow', 'dx', 'arc'"
    )
  dataset = data.load(**config.data)
  network = make_network(config.model, config.policy, dataset)
  if make_loss is _flow_matching:
    settings = call(FlowMatching, "objective", values)
    return Experiment(dataset, network, settings, None, _flow_matching(network, dataset, settings))
  imitation = call(Imitation, "objective", values)
  teacher = load_teacher(config, dataset)
  return Experiment(dataset, network, imitation, teacher, make_loss(network, teacher, imitation))


def make_network(model: Mapping[str, Any], policy: Mapping[str, Any], dataset: data.Dataset) -> nn.Module:
  """The network that `config.model` and `config.policy` describe, for the data's channels and classes."""
  network, model_values = _choose(NETWORKS, "model", model)
  head, head_values = _choose(HEADS, "policy", policy)
  channels = dataset.shape[-1]
  patch_size = model_values.get("patch_size", 1)
  head_module = call(
    head,
    "policy",
    head_values,
    channels=channels,
    patch_size=patch_size,
    layout="dit",
    use_bias=True,
  )
  return call(
    network,
    "model",
    model_values,
    channels=channels,
    num_classes=dataset.num_classes,
    head=head_module,
  )


def velocity_of(network: nn.Module, params: Params) -> guidance.Velocity:
  """The network with a velocity head as a velocity field."""

  def velocity(x: Array, t: Array, cond: Any) -> Array:
    v = network.apply({"params": params}, x, t, cond)
    assert isinstance(v, Array)
    return v

  return velocity


def make_student(network: nn.Module, imitation: Imitation, params: Params) -> Callable[[Array, Array, Any], Policy]:
  """The network as a student: (x, t, cond) -> batch of policies."""
  head = network.head
  create: Callable[..., Policy]
  if isinstance(head, heads.DXHead):
    segment, shift, basis = imitation.max_segment, imitation.shift, head.basis

    def create(x, t, **out):
      return DXPolicy.create(x, t, **out, segment=segment, shift=shift, basis=basis)
  else:
    create = GMFlowPolicy.create if isinstance(head, heads.GMFlowHead) else ArcPolicy.create

  def student(x, t, cond):
    outputs = network.apply({"params": params}, x, t, cond)
    return jax.vmap(lambda x, t, out: create(x, t, **out))(x, t, outputs)

  return student


def load_teacher(config: ConfigDict, dataset: data.Dataset) -> Teacher:
  """The trained teacher that `config.teacher` names.

  Raises: ValueError where there is none, or it does not fit the student, with all that differs.
  """
  settings = call(TeacherSettings, "teacher", config.get("teacher", {}))
  if not settings.workdir:
    raise ValueError(
      "config.teacher.workdir is not set: train a teacher first (`pflow train` with the config's teacher variant) and "
      "pass --config.teacher.workdir=<its workdir>"
    )
  own = workdir.load_config(settings.workdir)
  if own.objective.kind != "flow_matching":
    raise ValueError(f"config.teacher.workdir: {settings.workdir} holds a student, expected a teacher")
  _check_fits(config, own, settings)
  network = make_network(own.model, own.policy, dataset)
  folder = f"{settings.workdir}/{workdir.CHECKPOINTS}"
  params = load_params(folder, which=settings.which, step=settings.step)  # type: ignore[arg-type]

  def velocity(params):
    return guidance.guided(
      velocity_of(network, params),
      dataset.num_classes,
      scale=settings.guidance,
      interval=tuple(settings.interval),  # type: ignore[arg-type]
      orthogonal=settings.orthogonal,
    )

  return Teacher(settings, network, params, velocity)


def _check_fits(config: ConfigDict, own: ConfigDict, settings: TeacherSettings) -> None:
  """The student starts from its teacher's parameters: same data, same network but for how it is computed."""
  computed = ("model.dtype", "model.remat", "model.attention", "model.scan_unroll")
  mine, teachers = (
    {k: v for k, v in workdir.flatten(workdir.as_plain(c)).items() if k.startswith(("data.", "model."))}
    for c in (config, own)
  )
  differing = [
    f"\n  {key}: the teacher has {teachers.get(key, '(default)')!r}, the student {mine.get(key, '(default)')!r}"
    for key in sorted(mine.keys() | teachers.keys())
    if mine.get(key) != teachers.get(key) and key not in computed
  ]
  if differing:
    raise ValueError(
      f"the teacher in {settings.workdir} was trained on other data or with another network:{''.join(differing)}"
    )
  if settings.guidance != 1 and not own.objective.cond_dropout:
    raise ValueError(
      f"config.teacher.guidance: {settings.guidance} needs a teacher that knows the empty condition; train it with "
      "objective.cond_dropout=0.1"
    )


def _flow_matching(network: nn.Module, dataset: data.Dataset, settings: FlowMatching) -> LossFn:
  def loss_fn(params, teacher_params, batch, key, step):
    del teacher_params, step
    null_cond = dataset.num_classes
    return flow_matching_loss(
      velocity_of(network, params), batch["x0"], batch["label"], key, settings, null_cond=null_cond
    )

  return loss_fn


def _imitation(network: nn.Module, teacher: Teacher, imitation: Imitation) -> LossFn:
  def loss_fn(params, teacher_params, batch, key, step):
    student = make_student(network, imitation, params)
    velocity = teacher.velocity(teacher_params)
    return imitation_loss(student, velocity, batch["x0"], batch["label"], key, step, imitation)

  return loss_fn


def _imitation_data_free(network: nn.Module, teacher: Teacher, imitation: Imitation) -> LossFn:
  def loss_fn(params, teacher_params, batch, key, step):
    student = make_student(network, imitation, params)
    velocity = teacher.velocity(teacher_params)
    key_noise, key_loss = jax.random.split(key)
    # Of the batch only the shape and the conditions are used.
    noise = jax.random.normal(key_noise, batch["x0"].shape, batch["x0"].dtype)
    return imitation_loss_data_free(student, velocity, noise, batch["label"], key_loss, step, imitation)

  return loss_fn


OBJECTIVES: dict[str, Callable] = {
  "flow_matching": _flow_matching,
  "imitation": _imitation,
  "imitation_data_free": _imitation_data_free,
}


def make_optimizer(config: ConfigDict):
  """Optimizer and learning-rate schedule of a run."""
  keys = inspect.signature(optim.make_schedule).parameters
  values = dict(config.optimizer, total_steps=config.train.steps)
  schedule = call(optim.make_schedule, "optimizer", {k: v for k, v in values.items() if k in keys})
  return call(optim.make_optimizer, "optimizer", values), schedule
