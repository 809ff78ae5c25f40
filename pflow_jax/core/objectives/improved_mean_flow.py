"""Improved MeanFlow: the regression in the space of the velocity, with the network's own velocity as the tangent.

The network has two outputs: the average velocity u of a flow map, and an instantaneous velocity v. Both regress the
guided velocity of the data, u through its compound V = u + (t - s) du/dt. The strength of guidance and the flow times
between which it counts are inputs of the network.

References:
  Improved MeanFlow, arXiv:2512.02012, and its release.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_finite, check_names
from pflow_jax.core.guidance import broadcast_condition
from pflow_jax.core.objectives.flow_map import DERIVATIVE_DTYPES, FlowMap, regression, sample_interval
from pflow_jax.core.objectives.flow_matching import replace_condition
from pflow_jax.core.policies.base import as_float
from pflow_jax.core.schedule import add_noise, over_space

Array = jax.Array
# (x, t, s, cond, guidance, interval) -> (u, v), both like x; guidance (B,) and interval (B, 2), or None.
Network = Callable[[Array, Array, Array, Any, Array | None, Array | None], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class ImprovedMeanFlow:
  """Settings of improved MeanFlow; the defaults are the release's.

  Two things differ from it: every example draws by itself whether s = t and whether its label is dropped, where the
  release takes the first rows of a batch; and the network gets the strength w itself, not 1 - 1 / w.

  Attributes:
    time_mean: of the logit-normal from which t and s are drawn, and sorted.
    time_std: of that logit-normal.
    shift: time shift applied to the drawn times and to the sampler's grid.
    anchor: share of the examples with s = t.
    guidance: (low, high) strengths of guidance, in which each example draws its own, w; (1, 1) is none, and the network
      then has no input for it.
    guidance_power: the density of w falls as its power -`guidance_power`; 1 is uniform in log w.
    cond_dropout: share of all examples whose condition is replaced by the empty one; they are drawn among those with s
      = t, and their target is not guided.
    norm_power: exponent p of the weight of an example's loss, 1 / (squares + c)^p.
    norm_offset: c.
    derivative_dtype: see `core.objectives.flow_map.FlowMap`.
  """

  sections: ClassVar[tuple[str, ...]] = ("teacher", "adversarial")
  """Sections of a config that it uses beside those of every run."""

  time_mean: float = -0.4
  time_std: float = 1.0
  shift: float = 1.0
  anchor: float = 0.5
  guidance: tuple[float, float] = (1.0, 8.0)
  guidance_power: float = 1.0
  cond_dropout: float = 0.1
  norm_power: float = 1.0
  norm_offset: float = 0.01
  derivative_dtype: str = "float32"

  def __post_init__(self):
    check_finite(self)
    check_names(self, derivative_dtype=DERIVATIVE_DTYPES)
    if self.cond_dropout > 0 and not self.guided:
      raise ValueError("cond_dropout: conditions are dropped for guidance, expected 0 with guidance=(1, 1)")
    _ = self._draws  # raises on bad values

  @property
  def guided(self) -> bool:
    """Returns whether the student is conditioned on a guidance strength and its interval."""
    return tuple(self.guidance) != (1.0, 1.0)

  @property
  def target(self) -> str:
    """Returns where the velocity comes from that it learns: the data."""
    return "data"

  @property
  def _draws(self) -> FlowMap:
    """Returns MeanFlow's settings with the same times and weights."""
    if len(self.guidance) != 2 or not 1 <= self.guidance[0] <= self.guidance[1]:
      raise ValueError(f"guidance: expected (low, high) with 1 <= low <= high, got {self.guidance}")
    return FlowMap(
      target="data",
      times="pair",
      time_mean=self.time_mean,
      time_std=self.time_std,
      shift=self.shift,
      anchor=self.anchor,
      cond_dropout=self.cond_dropout,
      normalisation="adaptive",
      norm_power=self.norm_power,
      norm_offset=self.norm_offset,
    )


def sample_strength(key: Array, batch: int, settings: ImprovedMeanFlow) -> Array:
  """Draws strengths of guidance (batch,) in `guidance`, of density proportional to w^-guidance_power."""
  low, high = settings.guidance
  rest, u = 1 - settings.guidance_power, jax.random.uniform(key, (batch,))
  if abs(rest) < 1e-6:
    return low * jnp.exp(u * math.log(high / low))
  return low * (1 + u * ((high / low) ** rest - 1)) ** (1 / rest)


def sample_guided_times(key: Array, anchored: Array) -> Array:
  """Draws flow times (B, 2) between which guidance counts, in (0, 1/2) and (1/2, 1); 0 and 1 where s = t."""
  low, high = jax.random.uniform(key, (2, *anchored.shape)) / 2
  return jnp.stack([jnp.where(anchored, 0.0, low), jnp.where(anchored, 1.0, high + 0.5)], axis=1)


def improved_mean_flow_loss(
  network: Network,
  x0: Array,
  cond: Any,
  key: Array,
  settings: ImprovedMeanFlow,
  *,
  null_cond: Any = None,
  precise: Network | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Loss of both outputs, each with the weight of its example.

  Args:
    network: average and instantaneous velocity, see `Network`; must have a forward derivative.
    x0: data, (B, *space, C).
    cond: condition of the examples.
    key: a PRNG key.
    settings: the objective's.
    null_cond: the empty condition, see `core.objectives.flow_matching.replace_condition`.
    precise: see `core.objectives.flow_map.residual`.

  Returns:
    loss per example (B,), and metrics per example: those of `flow_map_loss`, and the rms "velocity_residual" of v.
  """
  (x0,) = as_float(x0)
  key_time, key_noise, key_drop, key_strength, key_interval = jax.random.split(key, 5)
  batch = x0.shape[0]
  t, s = (a.astype(x0.dtype) for a in sample_interval(key_time, batch, settings._draws))
  eps = jax.random.normal(key_noise, x0.shape, x0.dtype)
  strength = interval = None
  if settings.guided:
    strength = sample_strength(key_strength, batch, settings).astype(x0.dtype)
    interval = sample_guided_times(key_interval, s == t).astype(x0.dtype)
  dropped = jnp.zeros((batch,), bool)
  if settings.cond_dropout:
    dropped = jax.random.bernoulli(key_drop, settings.cond_dropout / settings.anchor, (batch,)) & (s == t)
  u, v, g, g_v, dF = residuals(
    network,
    add_noise(x0, eps, t),
    t,
    s,
    eps - x0,
    cond,
    strength,
    interval,
    dropped=dropped,
    null_cond=null_cond,
    precise=precise,
  )
  loss, metrics = regression(u, g, dF, settings._draws)
  of_velocity, velocity_metrics = regression(v, g_v, jnp.zeros_like(g_v), settings._draws)
  return loss + of_velocity, metrics | {"velocity_residual": velocity_metrics["residual"], "t": t}


def residuals(
  network: Network,
  x: Array,
  t: Array,
  s: Array,
  velocity: Array,
  cond: Any,
  strength: Array | None,
  interval: Array | None,
  *,
  dropped: Array,
  null_cond: Any = None,
  precise: Network | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
  """Residuals of both outputs at drawn states.

  Args:
    network: see `Network`.
    x: states at `t`, (B, *space, C).
    t: flow times, (B,).
    s: flow times s <= t, (B,).
    velocity: eps - x0 of the examples, like x.
    cond: condition of the examples.
    strength: of guidance, (B,), or None for none.
    interval: flow times between which it counts, (B, 2), or None.
    dropped: whether the condition is replaced by the empty one, (B,) bool.
    null_cond: the empty condition.
    precise: see `improved_mean_flow_loss`.

  Returns:
    u and v with their gradients; V - v_g, v - v_g and du/dt without one; all like x.
  """
  accurate = precise or network
  target = velocity
  if strength is None or interval is None:
    tangent = network(x, t, t, cond, None, None)[1]
  else:
    whole = jnp.broadcast_to(jnp.array([0.0, 1.0], x.dtype), interval.shape)
    inside = (interval[:, 0] <= t) & (t <= interval[:, 1])
    w = jnp.where(inside, strength, 1.0)
    null = jax.tree.map(broadcast_condition, cond, null_cond)
    # The two evaluations lie on a new axis, as in `core.guidance.guided`.
    pair = jax.tree.map(lambda *both: jnp.stack(both), (cond, w), (null, jnp.ones_like(w)))
    evaluate = lambda pair: network(x, t, t, pair[0], pair[1], whole)[1]
    tangent, without = jax.vmap(evaluate)(pair)
    guided = velocity + over_space(1 - 1 / w, x) * (tangent - without)
    target = jnp.where(over_space(dropped, x), velocity, guided)
    cond = replace_condition(dropped, cond, null_cond)
  tangent, target = jax.lax.stop_gradient((tangent, target))

  def jump(x, t):
    with jax.default_matmul_precision("highest"):  # see `core.objectives.flow_map.residual`
      return accurate(x, t, s, cond, strength, interval)

  u, dF, v = jax.jvp(jump, (x, t), (tangent, jnp.ones_like(t)), has_aux=True)
  dF = jax.lax.stop_gradient(dF)
  g = jax.lax.stop_gradient(u + over_space(t - s, x) * dF - target)
  g_v = jax.lax.stop_gradient(v - target)
  if precise is not None:
    u, v = network(x, t, s, cond, strength, interval)
  return u, v, g, g_v, dF
