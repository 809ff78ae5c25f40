"""FreeFlow's correction: a network that learns the velocity of the student's own samples, in the same step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pflow_jax.settings.optimizer import OptimizerSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.methods.base import copied
from pflow_jax.training.methods.free_flow import FreeFlowMethod
from pflow_jax.training.optim import make_optimizer, skipped

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Follower:
  """State of the network that learns the samples' velocity: its parameters and its optimizer's state."""

  network: Any
  moments: Any


@dataclasses.dataclass(frozen=True)
class Corrector:
  """The correction, and the step of the network that it needs.

  Attributes:
    weight: of the correction.
    correct: (params, frozen, own, batch, key) -> loss (B,), metrics (B,) and samples, see `FreeFlowMethod.correct`.
    follow: (own, samples, cond, key) -> loss (B,) of the network of the samples' velocity.
    optimizer: of that network.
  """

  weight: float
  correct: Callable[..., tuple[Array, dict[str, Array], Array]]
  follow: Callable[..., Array]
  optimizer: optax.GradientTransformation

  def init(self, key: Array, frozen: Any) -> Follower:
    """Starts as the teacher: so far the student's samples are as if they were its own."""
    del key
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), copied(frozen["strong"]))
    return Follower(params, self.optimizer.init(params))

  def step(
    self, follower: Follower, params: Any, frozen: Any, grads: Any, batch: dict[str, Array], key: Array
  ) -> tuple[Any, Follower, dict[str, Array]]:
    """Adds the correction's gradient to `grads`, and trains the follower on the same samples."""
    key_correct, key_follow = jax.random.split(key)

    def correction_of(params):
      loss, metrics, samples = self.correct(params, frozen, follower.network, batch, key_correct)
      return jnp.mean(loss), (jax.tree.map(jnp.mean, metrics), samples)

    (_, (metrics, samples)), correction = jax.value_and_grad(correction_of, has_aux=True)(params)
    grads = jax.tree.map(lambda g, c: g + self.weight * c, grads, correction)

    def following_of(own):
      return jnp.mean(self.follow(own, samples, batch["cond"], key_follow))

    following, gradient = jax.value_and_grad(following_of)(follower.network)
    updates, moments = self.optimizer.update(gradient, follower.moments, follower.network)
    network = optax.apply_updates(follower.network, updates)
    metrics |= {"own_velocity_loss": following, "own_velocity_skipped": skipped(moments)[1]}
    return grads, Follower(network, moments), metrics


def make_corrector(experiment: Experiment) -> Corrector | None:
  """The corrector of a run of FreeFlow; None for other runs, and where its weight is 0."""
  method = experiment.method
  if not isinstance(method, FreeFlowMethod) or method.objective.correction == 0:
    return None

  def correct(params, frozen, own, batch, key):
    return method.correct(experiment.complete(params, frozen), frozen, own, batch, key)

  def follow(own, samples, cond, key):
    return method.follow(own, samples, cond, key)

  optimizer = make_optimizer(OptimizerSettings(method.objective.learning_rate))
  return Corrector(method.objective.correction, correct, follow, optimizer)
