"""One optimizer step, pure, and the program that runs it on a mesh, which `train` and `plan` compile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from pflow_jax.families.registry import sharding_rules
from pflow_jax.files import foreign
from pflow_jax.mesh.sharding import DATA_PARALLEL, Layout, make_layout
from pflow_jax.settings.tree import Settings
from pflow_jax.training import optim
from pflow_jax.training.adversary import Adversary, make_adversary
from pflow_jax.training.corrector import Corrector, make_corrector
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.flops import count_flops
from pflow_jax.training.noise_levels import averaged
from pflow_jax.training.state import TrainState, create_state

Loss = Callable[[Any, Any, dict[str, Array], Array, Array], tuple[Array, dict[str, Array]]]

POSITION_BYTES = 64  # bytes of an example's place in a batch while batches are made


@dataclasses.dataclass(frozen=True)
class Step:
  """The parts of a step; a call is one step, a pure function of arrays.

  Attributes:
    loss_fn: (params, frozen, batch, key, step) -> loss (B,) and metrics.
    optimizer: of the parameters that train.
    ema_decay: step -> share of the old average that is kept.
    accumulation: micro-batches that the batch is cut into, one after the other.
    project: projection of the parameters after an update, for a network whose parameters stay on a surface; or None.
    adversary: adds a loss of the student's samples, and trains the network that it needs, in the same step.
    schedule: learning rate by the number of updates, for the metrics.
    profile_decays: as ema_decay, of each of the state's profiles.
  """

  loss_fn: Loss
  optimizer: optax.GradientTransformation
  ema_decay: Callable[[Array], Array]
  accumulation: int = 1
  project: Callable[[Any], Any] | None = None
  adversary: Adversary | Corrector | None = None
  schedule: optax.Schedule | None = None
  profile_decays: tuple[Callable[[Array], Array], ...] = ()

  def init(self, key: Array, params: Any, frozen: Any = None) -> TrainState:
    """Makes the state at step 0; `key`, and the teacher's parameters, are for the adversary's network."""
    opponent = self.adversary.init(key, frozen) if self.adversary else None
    return create_state(params, self.optimizer, opponent, len(self.profile_decays))

  def __call__(
    self, state: TrainState, frozen: Any, batch: dict[str, Array], key: Array
  ) -> tuple[TrainState, dict[str, Array]]:
    """Takes one optimizer step.

    Args:
      state: all that trains.
      frozen: the teacher's parameters: an argument, not part of the state.
      batch: pytree of arrays with a leading axis of examples.
      key: the run's key; the step's own is folded from it, so a resumed run draws the same numbers.

    Returns:
      the new state, and metrics: scalars, and the loss by noise level, see `noise_levels`.
    """
    key_loss, key_opponent = jax.random.split(jax.random.fold_in(key, state.step))
    loss, aux, grads = self._gradient(state, frozen, batch, key_loss)
    opponent = state.opponent
    if self.adversary is not None:
      grads, opponent, more = self.adversary.step(opponent, state.params, frozen, grads, batch, key_opponent)
      aux = aux | more
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if self.project is not None:
      params = self.project(params)
    ema = optim.update_ema(state.ema, params, self.ema_decay(state.step))
    averages = zip(state.profiles or (), self.profile_decays, strict=True)
    profiles = tuple(optim.update_ema(average, params, decay(state.step)) for average, decay in averages)
    in_a_row, total = optim.skipped(opt_state)
    metrics = {
      "loss": loss,
      **aux,
      "gradient_norm": optax.global_norm(grads),
      "skipped_in_a_row": in_a_row,
      "skipped": total,
    }
    if self.schedule is not None:
      # On the host this would be one more program, which waits for the steps in progress.
      metrics["learning_rate"] = self.schedule(jnp.maximum(state.step - total, 0))
    new: dict[str, Any] = {"step": state.step + 1, "params": params, "ema": ema, "opt_state": opt_state}
    new |= {"opponent": opponent} | ({"profiles": profiles} if profiles else {})
    return dataclasses.replace(state, **new), metrics

  def _gradient(self, state, frozen, batch, key):
    """Mean loss, mean metrics and gradient over the batch."""

    def mean_loss(params, batch, key):
      loss, aux = self.loss_fn(params, frozen, batch, key, state.step)
      return jnp.mean(loss), averaged(loss, aux)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    if self.accumulation == 1:
      (loss, aux), grads = gradient(state.params, batch, key)
      return loss, aux, grads
    # Every micro-batch takes every accumulation-th example, so that examples stay on their devices.
    micro = jax.tree.map(lambda x: x.reshape(-1, self.accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def micro_step(total, inputs):
      told, grads = gradient(state.params, *inputs)
      return jax.tree.map(lambda a, b: a + b / self.accumulation, total, grads), told

    start = jax.tree.map(jnp.zeros_like, state.params)
    grads, told = jax.lax.scan(micro_step, start, (micro, jax.random.split(key, self.accumulation)))
    loss, aux = jax.tree.map(lambda each: jnp.mean(each, axis=0), told)
    return loss, aux, grads


def make_step(experiment: Experiment) -> Step:
  """Makes the step of a run."""
  settings = experiment.settings
  accumulation, steps = settings.need("train").accumulation, settings.need("train").steps
  optimizer = optim.make_optimizer(settings.need("optimizer"), steps)
  schedule = optim.make_schedule(settings.need("optimizer"), steps)
  ema_decay = optim.make_ema_decay(settings.ema)
  adversary = make_adversary(experiment) or make_corrector(experiment)
  if adversary and accumulation > 1:
    raise ValueError(
      "config.train.accumulation: a run with an adversary or a correction takes its batch whole, expected 1, got "
      f"{accumulation}"
    )
  project = experiment.network.project
  profiles = optim.make_profile_decays(settings.ema)
  return Step(experiment.loss, optimizer, ema_decay, accumulation, project, adversary, schedule, profiles)


@dataclasses.dataclass(frozen=True)
class Program:
  """A run's step laid out over a mesh.

  Attributes:
    experiment: the pieces of the run.
    step: the pure step.
    layout: placement of the arrays.
    state: shapes of the state, with their shardings.
    frozen: shapes of the teacher's parameters, with their shardings.
    batch: shapes of a batch with the longest texts, with their shardings.
  """

  experiment: Experiment
  step: Step
  layout: Layout
  state: TrainState
  frozen: Any
  batch: dict[str, Any]

  def init(self, key: Array, frozen: Any, start: Any = ()) -> TrainState:
    """Makes the state at step 0 on its devices; `start` is the parameters to start from, on the devices."""
    shardings = jax.tree.map(lambda s: s.sharding, self.state)
    with self.layout.context():
      return jax.jit(_init(self.step, self.experiment), out_shardings=shardings)(key, frozen, start)

  def check_memory(self) -> None:
    """Raises ValueError if this machine cannot hold the arguments of a step, let alone its temporaries."""
    devices: Any = self.layout.mesh.local_devices  # type: ignore[union-attr]
    size = jax.tree.leaves(self.batch)[0].shape[0]
    batch = len(devices) * bytes_of_device(self.batch)
    # The reader holds a batch's records, NumPy its arrays and JAX a copy; every process holds all positions in it.
    foreign.check_memory(f"config.train.batch_size={size}", 3 * batch + POSITION_BYTES * size, "lower it")
    arguments, have = bytes_of_device((self.state, self.frozen, self.batch)), None
    if devices[0].platform == "cpu":  # CPU devices share the machine's memory
      arguments *= len(devices)
    elif (have := (devices[0].memory_stats() or {}).get("bytes_limit")) is None:
      return  # the device does not report its memory
    advice = "make the network or the batch smaller, or split it over more devices (config.mesh.fsdp)"
    foreign.check_memory("config.model: what is trained, the teacher and a batch", arguments, advice, have=have)

  def trace(self, length: int | None = None) -> jax.stages.Traced:
    """Traces the step as (state, frozen, batch, key) -> (state, metrics), for all devices; the old state is donated.

    Args:
      length: of the batch's texts, by default the longest.
    """
    batch = self.batch
    if length is not None:
      size = jax.tree.leaves(batch)[0].shape[0]
      batch = abstract_batch(self.experiment, size, self.layout.batch, length)
    shardings = jax.tree.map(lambda s: s.sharding, self.state), self.layout.replicated
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self.layout.replicated)
    with self.layout.context():
      step = jax.jit(self.step, donate_argnums=0, out_shardings=shardings)
      return step.trace(self.state, self.frozen, batch, key)


def make_program(experiment: Experiment, layout: Layout | None = None) -> Program:
  """Lays the step of a run out over a mesh.

  Args:
    experiment: the pieces of the run.
    layout: by default that of the section `mesh` over this machine's devices, which must be able to hold it.

  Raises:
    ValueError: a mesh, a table or a batch does not fit.
  """
  here, layout = layout is None, layout or layout_of(experiment.settings)
  batch_size = experiment.settings.need("train").batch_size
  step = make_step(experiment)
  if batch_size % (layout.batch_parts * step.accumulation):
    raise ValueError(
      "config.train.batch_size: expected a multiple of the mesh's slice x data x fsdp x accumulation = "
      f"{layout.batch_parts} x {step.accumulation}, got {batch_size}"
    )
  key = jax.random.key(0)
  state = jax.eval_shape(_init(step, experiment), key, experiment.frozen)
  batch = abstract_batch(experiment, batch_size, layout.batch)
  program = Program(experiment, step, layout, layout.abstract(state), layout.abstract(experiment.frozen), batch)
  if here:
    program.check_memory()
  return program


def _init(step: Step, experiment: Experiment) -> Callable[..., TrainState]:
  """Returns (key, frozen parameters, parameters to start from) -> the state at step 0."""

  def init(key: Array, frozen: Any, start: Any = ()) -> TrainState:
    key_params, key_opponent = jax.random.split(key)
    return step.init(key_opponent, experiment.init(key_params, frozen, start), frozen)

  return init


def abstract_batch(
  experiment: Experiment, batch_size: int, sharding: Any = None, length: int | None = None
) -> dict[str, Any]:
  """Shapes of a batch; its texts, if it has any, have `length` tokens, by default the longest."""
  dataset = experiment.dataset
  shapes: dict[str, Any] = {"cond": dataset.cond_shapes(batch_size, length)}
  if dataset.has_x0:
    shapes["x0"] = jax.ShapeDtypeStruct((batch_size, *dataset.shape), jnp.float32)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def step_flops(settings: Settings) -> int:
  """Operations of one optimizer step of the run that `settings` describe, teacher included; see `count_flops`."""
  single = make_layout(DATA_PARALLEL, sharding_rules(settings.model.kind), jax.local_devices()[:1])
  program = make_program(build(settings), single)
  program.check_memory()
  return count_flops(program.trace().jaxpr)


def bytes_of_device(tree: Any) -> int:
  """Bytes of a tree of shapes with shardings on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
  )
