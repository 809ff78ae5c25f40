"""FreeFlow: a flow map from noise, learned without data, and the network that learns its samples' own velocity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pflow_jax.core.objectives.free_flow import (
  FreeFlow,
  correction_loss,
  jump_from_noise,
  own_velocity_loss,
  prediction_loss,
)
from pflow_jax.training.methods.flow_map import JumpMethod


class FreeFlowMethod(JumpMethod[FreeFlow]):
  """A flow map whose jumps begin at t = 1: it samples in one evaluation."""

  data_free = True

  @classmethod
  def bind(cls, settings, network, dataset, teachers):
    if settings.adapters.table:
      raise ValueError("config.adapters: FreeFlow trains in full, expected no rows")
    if network.project is not None and settings.objective.correction:
      raise ValueError(
        f"config.model.kind: {settings.model.kind!r} trains on normalised weights, which the network of the samples' "
        "own velocity does not; set objective.correction=0"
      )
    method = super().bind(settings, network, dataset, teachers)
    if settings.objective.correction and not (method.teacher and method.teacher.has_network):
      raise ValueError(
        "config.objective.correction: the network of the samples' own velocity starts as the teacher's, expected a "
        "teacher with a network; set objective.correction=0 for a plain function"
      )
    return method

  def evaluations(self, sampling):
    return (1,)

  @property
  def is_fixed(self) -> bool:
    return True

  @property
  def can_generate(self) -> bool:
    return False

  def loss(self, params, frozen, batch, key, step):
    assert self.teacher is not None
    teacher = self.teacher.velocity(frozen)
    key_loss, key_noise = jax.random.split(key)
    return prediction_loss(
      self._average(self.network, params),
      lambda x, t, cond, strength: teacher(x, t, cond),
      self._noise(batch, key_noise),
      batch["cond"],
      key_loss,
      step,
      self.objective,
      precise=self.precise(self._average, params),
    )

  def correct(self, params, frozen, own, batch, key):
    """The correction of one batch of samples from noise.

    Args:
      params: all parameters of the network.
      frozen: the teacher's parameters, by part.
      own: parameters of the network of the samples' own velocity.
      batch: with "cond".
      key: of this step.

    Returns:
      loss (B,), metrics (B,), and the samples without a gradient.
    """
    assert self.teacher is not None
    key_noise, key_loss = jax.random.split(key)
    noise, cond = self._noise(batch, key_noise), batch["cond"]
    teacher = self.teacher.velocity(frozen)
    return correction_loss(
      lambda: jump_from_noise(self._average(self.network, params), noise, cond),
      lambda x, t: self.network(own, x, t, cond),
      lambda x, t: teacher(x, t, cond),
      key_loss,
      self.objective,
    )

  def follow(self, own, samples, cond, key):
    """The loss (B,) of the network of the samples' own velocity."""
    return own_velocity_loss(lambda x, t: self.network(own, x, t, cond), samples, key, self.objective)

  def _average(self, network, params):
    def average(x, t, s, cond, strength):
      del strength
      return network(params, x, t, cond, s=s)

    return average

  def _noise(self, batch, key):
    count = jax.tree.leaves(batch)[0].shape[0]
    return jax.random.normal(key, (count, *self.dataset.shape), jnp.float32)
