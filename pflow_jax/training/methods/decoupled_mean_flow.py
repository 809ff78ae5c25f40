"""Decoupled MeanFlow: a flow map without a new parameter of its network."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pflow_jax.core.objectives.decoupled_mean_flow import DecoupledMeanFlow, decoupled_mean_flow_loss
from pflow_jax.networks.layers import sinusoid
from pflow_jax.training.methods.flow_map import JumpMethod

WIDTH = 128  # features of a time that the error's scale is linear in, as in the release


class DecoupledMeanFlowMethod(JumpMethod[DecoupledMeanFlow]):
  """A network whose last blocks see where the jump ends. The error's scale trains beside it, as "log_variance"."""

  @classmethod
  def bind(cls, settings, network, dataset, teachers):
    if not getattr(network.module, "late_blocks", 0):
      raise ValueError(
        f"config.objective.kind: {settings.kind!r} conditions the last blocks on where a jump ends; set "
        "config.model.kind='dit' and config.model.late_blocks, such as 8 of XL/2's 28"
      )
    return super().bind(settings, network, dataset, teachers)

  def _random(self, key):
    scale = {"kernel": jnp.zeros(2 * WIDTH), "bias": jnp.zeros(())}
    return {**super()._random(key), "log_variance": scale}

  def loss(self, params, frozen, batch, key, step):
    del step
    teacher = self.teacher
    key_loss, key_dropout = jax.random.split(key)

    def jump(network, params):
      def average_velocity(x, t, s, cond, strength):
        del strength
        return network(params, x, t, cond, s=s, key=key_dropout)

      return average_velocity

    def velocity(x, t, cond, strength):
      del strength
      assert teacher is not None
      return teacher.velocity(frozen)(x, t, cond)

    def log_variance(t, s):
      features = jnp.concatenate([sinusoid(t, WIDTH), sinusoid(s, WIDTH)], axis=1)
      return features @ params["log_variance"]["kernel"] + params["log_variance"]["bias"]

    return decoupled_mean_flow_loss(
      jump(self.network, params),
      log_variance,
      velocity if teacher and self.objective.target == "teacher" else None,
      batch["x0"],
      batch["cond"],
      key_loss,
      self.objective,
      null_cond=self.dataset.null_cond,
      precise=self.precise(jump, params),
    )
