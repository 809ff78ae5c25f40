"""Heads that make a velocity: a teacher's, and a flow map's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.networks.denoiser import denoiser_velocity, edm_denoiser
from pflow_jax.networks.heads.base import Head, Params


class VelocityHead(Head):
  """The velocity itself: (B, *space, C), float32. A teacher's head; zero at the start."""

  starts_policies = True
  torch_prefix: ClassVar[str | None] = ""
  torch_extends = True

  @property
  def maps(self) -> int:
    return 1

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    shape = (1, self.channels)
    return self._maps("proj_out", tokens, grid, shape, use_bias=self.use_bias)[:, 0]

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """Returns the teacher's layer."""
    return {"proj_out": layer}


class DenoiserHead(VelocityHead):
  """A network in EDM's preconditioning, whose velocity is that of its denoised image.

  A teacher of EDM or EDM2 has it, and a flow map of such a teacher.

  Attributes:
    sigma_data: standard deviation of the data, see `networks.denoiser`.
    max_sigma: highest noise level that the network was trained for.
    min_sigma: lowest one.
  """

  sigma_data: float = 0.5
  max_sigma: float = 80.0
  min_sigma: float = 0.002

  starts_policies = False
  torch_prefix = None

  @nn.nowrap
  def field(self, apply: Callable[[jax.Array, jax.Array, Any], Any]) -> Callable[[jax.Array, jax.Array, Any], Any]:
    low, high = (sigma / (1 + sigma) for sigma in (self.min_sigma, self.max_sigma))

    def velocity(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
      # The modules take flow time, whose logit is log sigma; on the way back from that, float32 loses digits of 1 - t.
      time = jnp.clip(t, low, high)
      denoise = edm_denoiser(lambda x, _, cond: apply(x, time, cond), self.sigma_data)
      return denoiser_velocity(denoise, self.max_sigma, self.min_sigma)(x, t, cond)

    return velocity
