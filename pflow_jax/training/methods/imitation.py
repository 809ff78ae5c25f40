"""π-ID: a student whose output layer predicts a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import data
from pflow_jax.core.batches import per_example
from pflow_jax.core.guidance import Velocity
from pflow_jax.core.objectives.imitation import Imitation, imitation_loss, imitation_loss_data_free
from pflow_jax.core.policies import Policy
from pflow_jax.core.rollout import rollout
from pflow_jax.core.samplers import sample_student, tempered
from pflow_jax.core.schedule import segment_grid, shift_time, unshift_time
from pflow_jax.mesh.partition import combine, without
from pflow_jax.networks.heads import student_params_from_teacher
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training.methods.base import Method, Teachers
from pflow_jax.training.network import Network, head_class

Array = jax.Array
WAYPOINTS = 32  # states on the trajectory of a sample, over all its segments


class ImitationMethod(Method[Imitation]):
  """A policy a segment, rolled out without the network."""

  has_policy = True

  @classmethod
  def bind(cls, settings: Settings, network: Network, dataset: data.Dataset, teachers: Teachers):
    objective = settings.objective
    if not objective.data_free and not dataset.has_x0:
      raise ValueError(
        f"config.objective.kind: {settings.kind!r} starts from data, and {dataset.name} has none; train without (a "
        "config's variant gm_data_free, or objective.data_free=True), or write prompts with `pflow cache --images`"
      )
    return cls(objective, network, dataset, teachers.find((1.0, 1.0)))

  def init(self, key, frozen):
    assert self.teacher is not None
    if not self.teacher.has_network:
      return self._random(key)
    params = self._from_velocity(frozen["strong"], key)
    # Its own part, for the end of a segment, starts neutral.
    return combine(without(self._random(key), params), params) if self.objective.takes_end else params

  def shapes(self):
    return jax.eval_shape(self._random, jax.random.key(0))

  def start(self, params, head, key):
    """Starts from a policy as it is, and from a flow map with its velocity as the policy's."""
    return params if head_class(head).has_policy else self._from_velocity(params, key)

  def _random(self, key):
    inputs = {"s": jnp.zeros((1,))} if self.objective.takes_end else {}
    return self.network.init(key, self.dataset, **inputs)

  def _from_velocity(self, params, key):
    assert self.teacher is not None
    noise = self.teacher.settings.bias_noise
    return student_params_from_teacher(params, self.network.module, key, bias_noise=noise)

  def loss(self, params, frozen, batch, key, step):
    assert self.teacher is not None
    settings, teacher = self.objective, self.teacher.velocity(frozen)
    key_loss, key_dropout, key_noise = jax.random.split(key, 3)
    student = self.student(params, key_dropout)
    if not settings.data_free:
      return imitation_loss(student, teacher, batch["x0"], batch["cond"], key_loss, step, settings)
    if settings.nfe > 1 and getattr(self.network.module, "remat", "none") != "none":
      # A segment's source is detached from the segment before. So the backward pass evaluates the student again, an
      # eighth of a FLUX.1 step, rather than have every segment keep its blocks' inputs at once.
      student = jax.checkpoint(student, prevent_cse=False)
    count = jax.tree.leaves(batch)[0].shape[0]
    noise = jax.random.normal(key_noise, (count, *self.dataset.shape), jnp.float32)
    return imitation_loss_data_free(student, teacher, noise, batch["cond"], key_loss, step, settings)

  def student(self, params: Any, key: Array | None = None) -> Callable[[Array, Array, Any], Policy]:
    """The network as a student: (x, t, cond) -> batch of policies; `key` is for the adapters' dropout."""
    head, segment, shift = self.network.head, self.objective.max_segment, self.objective.shift

    def student(x, t, cond):
      inputs = {"s": self._end(t)} if self.objective.takes_end else {}
      outputs = self.network(params, x, t, cond, key=key, **inputs)
      create = jax.vmap(lambda x, t, out: head.policy(x, t, out, segment=segment, shift=shift))
      return per_example(create)(x, t, outputs)

    return student

  def velocity(self, params) -> Velocity:
    """Velocity of a policy at the state and time at which it was predicted."""
    student = self.student(params)
    return lambda x, t, cond: jax.vmap(lambda p, x, t: p.velocity(x, t))(student(x, t, cond), x, t)

  def _end(self, t: Array) -> Array:
    """Flow times (B,) at which the segments end that begin at flow times t (B,)."""
    grid = jnp.asarray(segment_grid(self.objective.nfe, self.objective.final_scale), t.dtype)
    # The last point of the grid that is clearly before t.
    r = unshift_time(t, self.objective.shift)[:, None]
    ends = jnp.max(jnp.where(grid[None] < r - 1e-4, grid[None], 0.0), axis=1)
    return shift_time(ends, self.objective.shift)

  @property
  def can_generate(self) -> bool:
    return self.objective.nfe == 1

  def generate(self, params, x0, cond, key):
    """The policy's walk from noise to data."""
    objective = self.objective
    key_noise, key_dropout = jax.random.split(key)
    noise = jax.random.normal(key_noise, x0.shape, x0.dtype)
    policies = self.student(params, key_dropout)(noise, jnp.ones(x0.shape[:1], x0.dtype), cond)

    @per_example
    @jax.vmap
    def walk(policy, x):
      shift, substeps, method = objective.shift, objective.substeps, objective.method
      return rollout(policy, x, 1.0, 0.0, shift=shift, substeps=substeps, method=method)

    return walk(policies, noise)

  def evaluations(self, sampling: SampleSettings) -> tuple[int, ...]:
    return (self.objective.nfe,)

  @property
  def is_fixed(self) -> bool:
    return True

  def sampler(self, sampling: SampleSettings, nfe: int):
    objective, own = self.objective, sampling.temperature_at(nfe)

    def run(params, noise, cond, keys, temperature=own):
      return sample_student(
        self.student(params),
        noise,
        cond,
        keys,
        nfe=nfe,
        final_scale=objective.final_scale,
        shift=objective.shift,
        h=sampling.h,
        temperature=temperature,
        substeps=sampling.substeps,
        method=sampling.method,
      )

    return run

  def trajectory(self, sampling: SampleSettings, nfe: int):
    shift, own = self.objective.shift, sampling.temperature_at(nfe)
    grid, count = segment_grid(nfe, self.objective.final_scale), max(WAYPOINTS // nfe, 2)
    # The ends of every segment are exact: there is no velocity at a time a hair below 0.
    points = np.linspace(grid[:-1], grid[1:], count + 1, axis=1, dtype=np.float32)

    def roll(policy, x, r_start, r_end):
      one = lambda p, x: rollout(p, x, r_start, r_end, shift=shift, substeps=sampling.substeps, method=sampling.method)
      return jax.vmap(one)(policy, x)

    def run(params, noise, cond, temperature=own):
      student = self.student(params)

      def segment(source, inputs):
        i, times = inputs
        t = jnp.broadcast_to(shift_time(times[0], shift), noise.shape[:1])
        policy = tempered(student(source, t, cond), temperature, i == nfe - 1)
        states = jax.lax.map(lambda r: roll(policy, source, times[0], r), times[1:])
        return states[-1], states

      _, states = jax.lax.scan(segment, noise, (jnp.arange(nfe), points))
      return jnp.concatenate([noise[None], states.reshape(-1, *noise.shape)])

    return run
