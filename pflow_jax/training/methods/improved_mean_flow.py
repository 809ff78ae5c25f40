"""Improved MeanFlow: a flow map that learns from data beside an instantaneous velocity."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from pflow_jax.core.objectives.improved_mean_flow import ImprovedMeanFlow, improved_mean_flow_loss
from pflow_jax.mesh.partition import combine, without
from pflow_jax.networks.dit import with_velocity_branch
from pflow_jax.training.methods.base import Teachers, copied
from pflow_jax.training.methods.flow_map import JumpMethod

logger = logging.getLogger(__name__)


class ImprovedMeanFlowMethod(JumpMethod[ImprovedMeanFlow]):
  """A network of two outputs, of which samples need the first."""

  network_options = ("velocity_depth",)

  @classmethod
  def bind(cls, settings, network, dataset, teachers):
    if getattr(network.module, "velocity_depth", None) is None:
      raise ValueError(
        f"config.objective.kind: {settings.kind!r} learns an instantaneous velocity beside the average one; set "
        "config.model.kind='dit' and config.model.velocity_depth, such as 8 of XL/2's 28 blocks, or 0"
      )
    if settings.adapters.table:
      raise ValueError("config.adapters: improved MeanFlow trains in full, expected no rows")
    # The teacher is where it starts; its guidance is not used.
    plain = Teachers(teachers.named, lambda strengths: teachers.find((1.0, 1.0)))
    method = super().bind(settings, network, dataset, plain)
    if method.objective.guided and settings.sample.guidance is None:
      _tell_strength(method.strength(), *method.objective.guidance)
    return method

  def init(self, key, frozen):
    params = self._random(key)
    if self.teacher is None or not self.teacher.has_network:
      return params
    teacher = with_velocity_branch(copied(frozen["strong"]), self.network.module.velocity_depth)
    return combine(without(params, teacher), jax.tree.map(jnp.array, teacher))

  def _random(self, key):
    ones = jnp.ones((1,))
    return self.network.init(key, self.dataset, s=ones, with_velocity=True, **self._inputs(1.0, ones))

  def _inputs(self, strength, t, interval=(0.0, 1.0)):
    if not self.objective.guided:
      return {}
    times = jnp.broadcast_to(jnp.asarray(interval, t.dtype), (*t.shape, 2))
    return {"guidance": jnp.full(t.shape, strength, t.dtype), "interval": times}

  def loss(self, params, frozen, batch, key, step):
    del frozen, step
    key_loss, key_dropout = jax.random.split(key)

    def both(network, params):
      def outputs(x, t, s, cond, strength, interval):
        inputs = {} if strength is None else {"guidance": strength, "interval": interval}
        return network(params, x, t, cond, s=s, key=key_dropout, with_velocity=True, **inputs)

      return outputs

    return improved_mean_flow_loss(
      both(self.network, params),
      batch["x0"],
      batch["cond"],
      key_loss,
      self.objective,
      null_cond=self.dataset.null_cond,
      precise=self.precise(both, params),
    )


@functools.cache  # a run is built several times by a program
def _tell_strength(strength: float, low: float, high: float) -> None:
  logger.warning(
    "config.sample.guidance: not set, so samples are drawn at strength %g (1 is no guidance); this network is trained "
    "for strengths from %g to %g",
    strength,
    low,
    high,
  )
