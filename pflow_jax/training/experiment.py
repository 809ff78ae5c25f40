"""From a config to the pieces of a run: data set, network, teacher, objective.

Every section of a config is the keyword arguments of one function or class; a key that its owner does not take is an
error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.core import guidance
from pflow_jax.core.objectives import flow_map
from pflow_jax.core.objectives.flow_matching import FlowMatching, flow_matching_loss
from pflow_jax.core.objectives.imitation import Imitation, imitation_loss, imitation_loss_data_free
from pflow_jax.core.policies import ArcPolicy, DXPolicy, GMFlowPolicy, Policy
from pflow_jax.files.foreign import check_arguments, check_memory
from pflow_jax.mesh.partition import combine, differing, without
from pflow_jax.mesh.sharding import Layout, MeshSettings, make_layout, per_example
from pflow_jax.networks import heads
from pflow_jax.networks.attention import IMPLEMENTATIONS, check_platform, supports_jvp
from pflow_jax.settings.sections import as_section, call, check_sections, choose
from pflow_jax.training import optim, workdir
from pflow_jax.training.inputs import read_inputs
from pflow_jax.training.network import SHARDING, VELOCITIES, AdapterSettings, Network, make_network, velocity_of
from pflow_jax.training.origins import Saved
from pflow_jax.training.teachers import PRETRAINED, ROLES, Teacher, load_teacher

Array = jax.Array
Params = Any
Objective = FlowMatching | Imitation | flow_map.FlowMap
LossFn = Callable[[Params, Params, Mapping[str, Array], Array, Array], tuple[Array, dict[str, Array]]]

# Numbers of keys folded from one that is also split: beyond those that split makes.
DROPOUT, ADAPTERS = 0xD0, 0xAA

SECTIONS = (
  *("seed", "data", "model", "policy", "adapters", "teacher", "start", "objective", "adversarial"),
  *("optimizer", "ema", "train", "sample", "evaluate", "mesh"),
)

# Settings of an objective with the defaults of its kind, by `config.objective.kind`.
FLOW_MAPS = {
  "ayf_emd": flow_map.ayf_emd,
  "ayf_lmd": flow_map.ayf_lmd,
  "mean_flow": flow_map.mean_flow,
  "consistency": flow_map.consistency,
}
OBJECTIVES: dict[str, Callable[..., Objective]] = {
  "flow_matching": FlowMatching,
  "imitation": Imitation,
  "imitation_data_free": Imitation,
  **FLOW_MAPS,
}


@dataclasses.dataclass(frozen=True)
class StartSettings:
  """The section `start` of a config: a finished run of the same network whose parameters a new run starts from."""

  workdir: str | None = None
  step: int | None = None
  which: str = "ema"

  def __post_init__(self):
    if self.which not in ("ema", "params"):
      raise ValueError(f"which: expected 'ema' or 'params', got {self.which!r}")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The pieces of a run. `network` is the one that trains; a teacher's own run has no `teacher`."""

  dataset: data.Dataset
  network: Network
  objective: Objective
  teacher: Teacher | None
  start: StartSettings
  loss_fn: LossFn

  @property
  def frozen(self) -> Params:
    """Shapes of the parameters that the loss takes beside those that train: the teacher's."""
    return self.teacher.shapes if self.teacher else {}

  @property
  def saved(self) -> dict[str, Saved]:
    """Where the models are that it is made from, as `inputs.Inputs` names them."""
    return {ROLES[name]: one for name, one in self.teacher.saved.items()} if self.teacher else {}

  def load_frozen(self, layout: Layout | None = None) -> Params:
    """Those parameters, on the devices as `layout` says, without one on the host."""
    return self.teacher.load(layout) if self.teacher else {}

  def init(self, key: Array, frozen: Params, start: Params = ()) -> Params:
    """What trains, at the start: `start` if given, random, or for a student made from its teacher's."""
    if start:
      return jax.tree.map(jnp.array, start)
    return self.network.trained(self._init(key, frozen), frozen.get("strong", {}), jax.random.fold_in(key, ADAPTERS))

  def start_params(self) -> Params:
    """What trains, from the run that config.start names; () where it names none.

    Raises: ValueError if that run trained something else.
    """
    if not self.start.workdir:
      return ()
    folder = f"{self.start.workdir}/{workdir.CHECKPOINTS}"
    params = load_params(folder, which=self.start.which, step=self.start.step)  # type: ignore[arg-type]
    if others := differing(params, self._trained_shapes()):
      raise ValueError(
        f"config.start.workdir: {self.start.workdir} trained another network than this run will; parameters that "
        f"differ: {others[:8]}; start from a run with the same model, policy, adapters and guidance"
      )
    if self.network.adapters.table:
      self._check_base_of_start()
    return params

  def _trained_shapes(self) -> Params:
    """Shapes of what trains; of a network that trains in full they are known without its teacher."""
    if self.network.adapters.table:
      return jax.eval_shape(self.init, jax.random.key(0), self.frozen)
    return jax.eval_shape(self._random, jax.random.key(0))

  def _check_base_of_start(self) -> None:
    """Raises ValueError if the adapters to start from were trained on another teacher's weights."""
    assert self.teacher is not None
    inputs = read_inputs(self.start.workdir)  # type: ignore[arg-type]
    if inputs and "teacher" in inputs.models:
      there, here = inputs.models["teacher"].parameters, self.teacher.saved["strong"].digest
    else:
      theirs = workdir.load_config(self.start.workdir).teacher  # type: ignore[arg-type]
      there, here = (
        f"{os.path.realpath(str(t.workdir))} at step {t.step} ({t.which})" for t in (theirs, self.teacher.settings)
      )
    if there != here:
      raise ValueError(
        f"config.start.workdir: the adapters there were trained on the teacher {there}, this run's is {here}; give it "
        "their teacher"
      )

  def _init(self, key: Array, frozen: Params) -> Params:
    module = self.network.module
    if isinstance(self.objective, Imitation):
      assert self.teacher is not None
      noise = self.teacher.settings.bias_noise
      return heads.student_params_from_teacher(frozen["strong"], module, key, bias_noise=noise)
    params = self._random(key)
    if "strong" not in frozen:
      return params
    # A flow map starts as its teacher's velocity: what it has besides, for s and the guidance, starts neutral.
    teacher = jax.tree.map(jnp.array, frozen["strong"])
    return combine(without(params, teacher), teacher)

  def _random(self, key: Array) -> Params:
    """Random parameters of the network, all that its objective asks it for."""
    ones, named = jnp.ones((1,)), {}
    if isinstance(self.objective, flow_map.FlowMap):
      named = {"s": ones} | ({"guidance": ones} if self.objective.guided else {})
    return self.network.init(key, self.dataset, **named)

  def load(
    self, folder: str | os.PathLike, which: str = "ema", layout: Layout | None = None, frozen: Params | None = None
  ) -> Params:
    """All parameters of the network as the run in `folder` saved them, on the devices as `layout` says.

    Args:
      frozen: what `load_frozen` gave, where it has been called already: its leaves are shared. Adapters alone need it.
    Raises: ValueError for a checkpoint of another network than the config describes.
    """
    trained = load_params(f"{folder}/{workdir.CHECKPOINTS}", which=which, layout=layout)  # type: ignore[arg-type]
    if others := differing(trained, self._trained_shapes()):
      raise ValueError(
        f"{folder}: its checkpoint holds another network than its config describes; parameters that differ: "
        f"{others[:8]}; restore the {workdir.CONFIG} that it was trained with"
      )
    if frozen is None:
      frozen = self.load_frozen(layout) if self.network.adapters.table else {}
    return self.complete(trained, frozen)

  def complete(self, trained: Params, frozen: Params) -> Params:
    """All parameters of the network, from those that train and those that do not."""
    return self.network.complete(trained, frozen.get("strong", {}))

  def velocity(self, params: Params) -> guidance.Velocity:
    """Velocity field of this run's network; a flow map's is its jump of length 0."""
    if isinstance(self.objective, flow_map.FlowMap):
      jump = self.flow_map(params)
      return lambda x, t, cond: jump(x, t, t, cond)
    return velocity_of(self.network, params)

  def student(self, params: Params) -> Callable[[Array, Array, Any], Policy]:
    """(x, t, cond) -> batch of policies, from a policy student's network."""
    assert isinstance(self.objective, Imitation)
    return make_student(self.network, self.objective, params)

  def flow_map(self, params: Params, strength: float | None = None) -> Callable[[Array, Array, Array, Any], Array]:
    """(x, t, s, cond) -> average velocity, at one strength of guidance, by default the teacher's.

    Raises: ValueError for a strength that the network was not trained for.
    """
    assert isinstance(self.objective, flow_map.FlowMap)
    guided, (low, high) = self.objective.guided, self.objective.guidance
    if strength is None:
      strength = self.teacher.settings.guidance if guided and self.teacher else low
    if not low <= strength <= high:
      raise ValueError(
        f"config.sample.guidance (where that is not set, config.teacher.guidance): expected a strength in [{low}, "
        f"{high}], which this flow map was trained for, got {strength}"
      )

    def jump(x, t, s, cond):
      given = jnp.full(t.shape, strength, t.dtype) if guided else None
      return self.network(params, x, t, cond, s=s, guidance=given)

    return jump


def layout_of(config: ConfigDict, devices: Sequence[Any] | int | None = None) -> Layout:
  """Where a run's arrays lie: `config.mesh` over `devices`, see `make_layout`, and the networks' table.

  Raises: ValueError for sizes that do not fit, or attention that these devices do not have.
  """
  layout = make_layout(call(MeshSettings, "mesh", config.get("mesh", {})), SHARDING, devices)
  implementation = config.model.get("attention")
  if layout.platform is not None and implementation is not None:
    check_platform(implementation, layout.platform)
  return layout


def build(
  config: ConfigDict,
  abstract: bool = False,
  dataset: data.Dataset | None = None,
  run: str | os.PathLike | None = None,
) -> Experiment:
  """Reads the sections that shape a run; see the module's docstring.

  Args:
    abstract: of the teacher take the shapes that it must have, without reading one: to plan a run, not to train it.
    dataset: in place of that of config.data, to sample other shapes than a run was trained on.
    run: workdir of the run, which has been trained. What it carries (inputs.json) stands in for its data, of which no
      record is read before it is asked for, and its teacher is looked for when something needs it.
  Raises: ValueError for anything in the config that does not fit, before any work is done.
  """
  converted = run is not None and config.get("objective", {}).get("kind") == PRETRAINED
  # A converted teacher has besides where it is from.
  known = (*SECTIONS, "source") if converted else SECTIONS
  check_sections(config, known, required=("data", "model", "policy", "objective"))
  objectives = {PRETRAINED: FlowMatching, **OBJECTIVES} if converted else OBJECTIVES
  make_settings, values = choose(objectives, "objective", config.objective)
  kind = config.objective.kind
  if kind.startswith("imitation") == (config.policy.get("kind") in VELOCITIES):
    raise ValueError(
      f"config.objective.kind {kind!r} does not train the policy {config.policy.get('kind')!r}: imitation needs "
      f"policy.kind 'gmflow', 'dx' or 'arc', the others one of {VELOCITIES}"
    )
  # A flow map's settings are an instance with the defaults of its kind.
  settings = flow_map.FlowMap if kind in FLOW_MAPS else None
  objective = call(make_settings, "objective", values, settings=settings)
  inputs = read_inputs(run) if run is not None else None
  dataset = dataset or (inputs and inputs.dataset(config.data.to_dict())) or call(data.load, "data", config.data)
  check_memory("config.data: one example", 4 * math.prod(dataset.shape), "make it smaller")
  adapters = call(AdapterSettings, "adapters", config.get("adapters", {}))
  network = make_network(config.model, config.policy, dataset, adapters)
  start = call(StartSettings, "start", config.get("start", {}))
  if isinstance(objective, FlowMatching):
    if adapters.table:
      raise ValueError("config.adapters: a teacher trains in full, expected no rows")
    if converted:  # it knows the empty condition, whatever share of its examples had it
      objective = dataclasses.replace(objective, cond_dropout=objective.cond_dropout or 0.1)
    return Experiment(dataset, network, objective, None, start, _flow_matching(network, dataset, objective))
  if isinstance(objective, Imitation):
    if kind == "imitation" and not dataset.has_x0:
      raise ValueError(
        f"config.objective.kind: {kind!r} starts from data, and {dataset.name} has none; train without (a config's "
        "variant gm_data_free, or objective.kind='imitation_data_free'), or write prompts with `pflow cache --images`"
      )
    teacher = load_teacher(config, dataset, abstract=abstract, run=run)
    loss = imitation_loss_data_free if kind == "imitation_data_free" else imitation_loss
    return Experiment(
      dataset, network, objective, teacher, start, _imitation(network, dataset, teacher, objective, loss)
    )
  _check_jvp(network)
  own_start = objective.target == "data" and not config.get("teacher", {}).get("workdir")
  if own_start and adapters.table:
    raise ValueError("config.adapters: they sit on a teacher's weights; set config.teacher.workdir")
  student_of = None if own_start else load_teacher(config, dataset, tuple(objective.guidance), abstract, run)
  if student_of and objective.guided:
    low, high = objective.guidance
    if not low <= student_of.settings.guidance <= high:
      raise ValueError(
        f"config.teacher.guidance: expected a strength in config.objective.guidance, [{low}, {high}], which this "
        f"student is trained for and compared at, got {student_of.settings.guidance}"
      )
  return Experiment(dataset, network, objective, student_of, start, _flow_map(network, dataset, student_of, objective))


def _check_jvp(network: Network) -> None:
  implementation = getattr(network.module, "attention", None)
  if implementation is not None and not supports_jvp(implementation):
    able = [name for name, has_jvp in IMPLEMENTATIONS.items() if has_jvp]
    raise ValueError(
      f"config.model.attention: {implementation!r} has no forward derivative, which flow maps need; set "
      f"config.model.attention to one of {able}"
    )


def make_student(
  network: Network, imitation: Imitation, params: Params, key: Array | None = None
) -> Callable[[Array, Array, Any], Policy]:
  """The network as a student: (x, t, cond) -> batch of policies; `key` is for the adapters' dropout."""
  head: nn.Module = network.module.head  # type: ignore[attr-defined]
  create: Callable[..., Policy]
  if isinstance(head, heads.DXHead):
    segment, shift = imitation.max_segment, imitation.shift
    create = functools.partial(DXPolicy.create, segment=segment, shift=shift, basis=head.basis, compat=head.compat)
  else:
    create = GMFlowPolicy.create if isinstance(head, heads.GMFlowHead) else ArcPolicy.create

  def student(x, t, cond):
    outputs = network(params, x, t, cond, key=key)
    return per_example(jax.vmap(lambda x, t, out: create(x, t, **out)))(x, t, outputs)

  return student


def _flow_matching(network: Network, dataset: data.Dataset, settings: FlowMatching) -> LossFn:
  def loss_fn(params, frozen, batch, key, step):
    del frozen, step
    return flow_matching_loss(
      velocity_of(network, params), batch["x0"], batch["cond"], key, settings, null_cond=dataset.null_cond
    )

  return loss_fn


def _imitation(
  network: Network, dataset: data.Dataset, teacher: Teacher, settings: Imitation, loss: Callable
) -> LossFn:
  def loss_fn(params, frozen, batch, key, step):
    full = network.complete(params, frozen["strong"])
    student = make_student(network, settings, full, jax.random.fold_in(key, DROPOUT))
    if loss is imitation_loss_data_free:
      if settings.nfe > 1 and getattr(network.module, "remat", "none") != "none":
        # A segment's source is detached from the segment before. So the backward pass evaluates the student again, an
        # eighth of a FLUX.1 step, rather than have every segment keep its blocks' inputs at once.
        student = jax.checkpoint(student, prevent_cse=False)
      # Of the batch only the conditions are used.
      key_noise, key = jax.random.split(key)
      x = jax.random.normal(key_noise, (jax.tree.leaves(batch)[0].shape[0], *dataset.shape), jnp.float32)
    else:
      x = batch["x0"]
    return loss(student, teacher.velocity(frozen), x, batch["cond"], key, step, settings)

  return loss_fn


def _flow_map(network: Network, dataset: data.Dataset, teacher: Teacher | None, settings: flow_map.FlowMap) -> LossFn:
  precise = network.float32

  def loss_fn(params, frozen, batch, key, step):
    full = network.complete(params, frozen.get("strong", {}))
    # One key: the dropout of both evaluations of a step is the same.
    key_dropout = jax.random.fold_in(key, DROPOUT)

    def jump(network, params):
      def average_velocity(x, t, s, cond, strength):
        return network(params, x, t, cond, s=s, guidance=strength, key=key_dropout)

      return average_velocity

    def velocity(x, t, cond, strength):
      assert teacher is not None
      return teacher.velocity(frozen, strength)(x, t, cond)

    return flow_map.flow_map_loss(
      jump(network, full),
      velocity if teacher else None,
      batch["x0"],
      batch["cond"],
      key,
      step,
      settings,
      null_cond=dataset.null_cond,
      precise=jump(precise, jax.lax.stop_gradient(full)) if precise else None,
    )

  return loss_fn


def make_optimizer(config: ConfigDict):
  """Optimizer and learning-rate schedule of a run."""
  steps = config.train.steps
  values = {**as_section(config.get("optimizer", {}), "config.optimizer"), "total_steps": steps}
  keys = inspect.signature(optim.make_schedule).parameters
  schedule_values = {k: v for k, v in values.items() if k in keys}
  warmup = check_arguments(optim.make_schedule, schedule_values, where="config.optimizer").get("warmup_steps") or 0
  if values.get("schedule") == "cosine" and warmup >= steps:
    raise ValueError(
      f"config.optimizer.warmup_steps: {warmup} is no part of a cosine schedule of config.train.steps={steps}; set "
      f"--config.optimizer.warmup_steps={steps // 10}, or --config.train.steps higher"
    )
  schedule = call(optim.make_schedule, "optimizer", schedule_values)
  return call(optim.make_optimizer, "optimizer", values), schedule
