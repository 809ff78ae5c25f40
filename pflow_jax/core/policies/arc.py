"""ArcFlow policy: a mixture of momentum processes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pflow_jax.core.policies.base import Array, Mixture, as_float, check_shape, check_source, check_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArcPolicy(Mixture):
  """Velocity that depends on time alone: v(t) = sum_k w_k v_k exp(g_k (t_s - t)), with g_0 = 0.

  Each component is a velocity that grows or decays exponentially; the trajectory is closed form. `ArcPolicy.create`
  makes one.

  References:
    ArcFlow, arXiv:2602.09014.
  """

  velocities: Array  # (K, *space, C)
  logits: Array  # (K, *space), log-softmaxed over K
  log_gammas: Array  # (K, *space), the first 0
  t_s: Array  # ()

  closed_form_in_release = True

  @classmethod
  def create(
    cls, x_s: ArrayLike, t_s: ArrayLike, velocities: ArrayLike, logits: ArrayLike, log_gammas: ArrayLike
  ) -> ArcPolicy:
    """Policy from a network's output.

    Args:
      x_s: state where the network was evaluated, (*space, C); gives the shape.
      t_s: flow time of `x_s`, (), in (0, 1].
      velocities: v_k of the components, (K, *space, C).
      logits: unnormalised log-weights of the components, (K, *space).
      log_gammas: growth rates g_k of components 1..K-1, (K - 1, *space).

    Raises:
      ValueError: for shapes that do not fit or a t_s outside (0, 1].
    """
    x_s, t_s, velocities, logits, log_gammas = as_float(x_s, t_s, velocities, logits, log_gammas)
    check_source(x_s, t_s)
    if velocities.ndim != x_s.ndim + 1:
      raise ValueError(
        f"velocities: expected (K, *space, C) = (K, {', '.join(map(str, x_s.shape))}), got {velocities.shape}"
      )
    k, space = velocities.shape[0], x_s.shape[:-1]
    check_shape("velocities", velocities, (k, *x_s.shape), "(K, *space, C), x_s (*space, C)")
    check_shape("logits", logits, (k, *space), "(K, *space)")
    check_shape("log_gammas", log_gammas, (k - 1, *space), "(K - 1, *space)")
    return cls(
      velocities=velocities,
      logits=jax.nn.log_softmax(logits, axis=0),
      log_gammas=jnp.concatenate([jnp.zeros_like(logits[:1]), log_gammas]),
      t_s=t_s,
    )

  @property
  def has_closed_form(self) -> bool:  # type: ignore[override]
    return True

  def _mixture(self, factors: Array) -> Array:
    """sum_k w_k factors_k v_k; factors (K, *space), result (*space, C)."""
    weights = jax.nn.softmax(self.logits, axis=0) * factors
    return jnp.sum(weights[..., None] * self.velocities, axis=0)

  def velocity(self, x: Array, t: Array) -> Array:
    check_state(x, self.velocities.shape[1:])
    return self._mixture(jnp.exp(self.log_gammas * (self.t_s - t)))

  def integrate(self, x: Array, t: Array, s: Array) -> Array:
    check_state(x, self.velocities.shape[1:])
    dt = t - s
    growth = jnp.exp(self.log_gammas * (self.t_s - t))
    return x - self._mixture(growth * dt * phi(self.log_gammas * dt))


def phi(z: Array) -> Array:
  """(exp(z) - 1) / z, 1 at 0, with derivatives that stay right near 0.

  expm1(z) / z is accurate, but its derivative cancels: a series replaces it for |z| < 0.1, where nine terms reach
  float64.
  """
  small = jnp.abs(z) < 0.1
  w = jnp.where(small, z, 0.0)
  series = jnp.zeros_like(w)
  for n in range(9, -1, -1):
    series = series * w + 1.0 / math.factorial(n + 1)
  safe = jnp.where(small, 1.0, z)
  return jnp.where(small, series, jnp.expm1(safe) / safe)
