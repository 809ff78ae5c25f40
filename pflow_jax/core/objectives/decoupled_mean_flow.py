"""Decoupled MeanFlow: a trained flow becomes a flow map without a new parameter of its network.

The last blocks of the network see s in place of t (`late_blocks` of `networks.dit.DiT`), so that s = t gives the flow
back. Every example has two terms, flow matching at a time of its own and MeanFlow at a pair of times, both under the
logarithm, with a learned scale of the error at (t, s).

References:
  Decoupled MeanFlow, arXiv:2510.24474, and its release.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_finite, check_names, checked
from pflow_jax.core.guidance import broadcast_condition
from pflow_jax.core.objectives.flow_map import DERIVATIVE_DTYPES, TARGETS, Network, Teacher, residual
from pflow_jax.core.objectives.flow_matching import replace_condition, sample_time
from pflow_jax.core.policies.base import as_float
from pflow_jax.core.schedule import add_noise, over_space, shift_time

Array = jax.Array
LogVariance = Callable[[Array, Array], Array]  # (t, s) -> logarithm of the error's scale, all (B,)


@dataclasses.dataclass(frozen=True)
class DecoupledMeanFlow:
  """Settings of decoupled MeanFlow; the defaults are those of the release's XL/2 on ImageNet 256.

  Attributes:
    target: the velocity that is learned: that of the "data", eps - x0, guided by the network itself, or the "teacher"'s
      with its guidance (the release's "distill").
    time_mean: of the logit-normal of the times of flow matching.
    time_std: of that logit-normal.
    pair_means: of the two logit-normals from which t and s are drawn, and sorted.
    pair_stds: of these.
    shift: time shift applied to all drawn times and to the sampler's grid.
    omega: strength of the network's guidance of its own target, v + omega (F(x, t, t, cond) - F(x, t, t, empty)), by
      its current parameters as in the release's code. It is 0 with target="teacher".
    interval: flow times (low, high) of t, inclusive, in which it counts.
    cond_dropout: share of the examples whose condition is replaced by the empty one; their target is not guided. It is
      0 with target="teacher".
    offset: of the mean square under the logarithm.
    derivative_dtype: see `core.objectives.flow_map.FlowMap`; the release's is "network".
  """

  sections: ClassVar[tuple[str, ...]] = ("teacher", "adapters", "adversarial")
  """Sections of a config that it uses beside those of every run."""

  target: str = "data"
  time_mean: float = 0.0
  time_std: float = 1.0
  pair_means: tuple[float, float] = (0.4, -1.2)
  pair_stds: tuple[float, float] = (1.0, 1.0)
  shift: float = 1.0
  omega: float = 0.6
  interval: tuple[float, float] = (0.0, 0.7)
  cond_dropout: float = 0.1
  offset: float = 0.01
  derivative_dtype: str = "float32"

  guidance: ClassVar[tuple[float, float]] = (1.0, 1.0)
  """Strengths of guidance that the network is conditioned on: none."""

  guided: ClassVar[bool] = False
  """Whether the network is conditioned on a strength."""

  def __post_init__(self):
    check_finite(self)
    check_names(self, target=TARGETS, derivative_dtype=DERIVATIVE_DTYPES)
    if len(self.pair_means) != 2 or len(self.pair_stds) != 2 or min(self.time_std, *self.pair_stds) <= 0:
      raise ValueError(
        "pair_means, pair_stds and time_std: expected two numbers, two > 0 and one > 0, got "
        f"{self.pair_means}, {self.pair_stds} and {self.time_std}"
      )
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise ValueError(f"interval: expected flow times (low, high), 0 <= low <= high <= 1, got {self.interval}")
    if not (self.shift > 0 and self.offset > 0 and 0 <= self.cond_dropout <= 1):
      raise ValueError(
        "shift, offset and cond_dropout: expected > 0, > 0 and a share in [0, 1], got "
        f"{self.shift}, {self.offset} and {self.cond_dropout}"
      )
    if self.target == "teacher" and (self.omega, self.cond_dropout) != (0, 0):
      raise ValueError(
        "omega and cond_dropout: expected 0 with target='teacher', whose guidance counts, got "
        f"{self.omega} and {self.cond_dropout}"
      )


def sample_times(key: Array, batch: int, settings: DecoupledMeanFlow) -> tuple[Array, Array, Array]:
  """Draws the time of flow matching, and t and s <= t of MeanFlow, each (batch,)."""
  means = (settings.time_mean, *settings.pair_means)
  stds = (settings.time_std, *settings.pair_stds)
  time, first, second = (
    shift_time(sample_time(k, (batch,), mean=mean, std=std), settings.shift)
    for k, mean, std in zip(jax.random.split(key, 3), means, stds, strict=True)
  )
  return time, jnp.maximum(first, second), jnp.minimum(first, second)


def decoupled_mean_flow_loss(
  network: Network,
  log_variance: LogVariance,
  teacher: Teacher | None,
  x0: Array,
  cond: Any,
  key: Array,
  settings: DecoupledMeanFlow,
  *,
  null_cond: Any = None,
  precise: Network | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Mean of the two terms of every example.

  Args:
    network: average velocity, see `core.objectives.flow_map.Network`; must have a forward derivative.
    log_variance: see `LogVariance`, with a gradient.
    teacher: velocity, see `core.objectives.flow_map.Teacher`; None with target="data".
    x0: data, (B, *space, C).
    cond: condition of the examples.
    key: a PRNG key.
    settings: the objective's.
    null_cond: the empty condition.
    precise: see `core.objectives.flow_map.residual`.

  Returns:
    loss per example (B,), which has no lower bound, and metrics per example: rms of both residuals and of the
      derivative, share left out, and the flow time "t" of MeanFlow's.

  Raises:
    ValueError: for a network or teacher that returns anything but an array like x.
  """
  network = checked("decoupled_mean_flow_loss: network(x, t, s, cond, guidance)", network)
  teacher = teacher and checked("decoupled_mean_flow_loss: teacher(x, t, cond, guidance)", teacher)
  (x0,) = as_float(x0)
  if settings.target == "teacher" and teacher is None:
    raise ValueError("decoupled_mean_flow_loss: target='teacher' needs a teacher, got None")
  key_time, key_noise, key_drop = jax.random.split(key, 3)
  batch = x0.shape[0]
  time, t, s = (a.astype(x0.dtype) for a in sample_times(key_time, batch, settings))
  dropped, given = jnp.zeros((batch,), bool), cond
  if settings.cond_dropout:
    dropped = jax.random.bernoulli(key_drop, settings.cond_dropout, (batch,))
    given = replace_condition(dropped, cond, null_cond)

  def term(key: Array, t: Array, s: Array, jump: bool) -> tuple[Array, Array, Array, Array]:
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    x = add_noise(x0, eps, t)
    if settings.target == "teacher":
      assert teacher is not None
      v = jax.lax.stop_gradient(teacher(x, t, cond, None))
    else:
      v = guided_target(network, eps - x0, x, t, given, null_cond, dropped, settings)
    return error(network, log_variance, x, t, s, v, given, offset=settings.offset, jump=jump, precise=precise)

  keys = jax.random.split(key_noise)
  flow, flow_squares, _, _ = term(keys[0], time, time, jump=False)
  map_, map_squares, dF, masked = term(keys[1], t, s, jump=True)
  metrics = {"residual": jnp.sqrt(map_squares), "flow_residual": jnp.sqrt(flow_squares)}
  return (flow + map_) / 2, metrics | {"derivative": jnp.sqrt(_mean(dF**2)), "masked": masked, "t": t}


def guided_target(
  network: Network,
  v: Array,
  x: Array,
  t: Array,
  cond: Any,
  null_cond: Any,
  dropped: Array,
  settings: DecoupledMeanFlow,
) -> Array:
  """Returns the velocity v of the data, guided by the network itself where t lies in the interval.

  Args:
    network: average velocity.
    v: eps - x0, (B, *space, C).
    x: states, like v.
    t: flow times, (B,).
    cond: condition, in which that of the examples `dropped` is the empty one.
    null_cond: the empty condition.
    dropped: examples that are not guided, (B,) bool.
    settings: the objective's.
  """
  if settings.omega == 0:
    return v
  null = jax.tree.map(broadcast_condition, cond, null_cond)
  pair = jax.tree.map(lambda c, n: jnp.stack([c, n]), cond, null)  # as in `core.guidance.guided`
  with_cond, without = jax.lax.stop_gradient(jax.vmap(lambda c: network(x, t, t, c, None))(pair))
  low, high = settings.interval
  counts = (low <= t) & (t <= high) & ~dropped
  return v + jnp.where(over_space(counts, v), settings.omega * (with_cond - without), 0.0)


def error(
  network: Network,
  log_variance: LogVariance,
  x: Array,
  t: Array,
  s: Array,
  v: Array,
  cond: Any,
  *,
  offset: float,
  jump: bool,
  precise: Network | None = None,
) -> tuple[Array, Array, Array, Array]:
  """One term: log(mean square / exp(l) + offset) + l, l = log_variance(t, s).

  Args:
    network: average velocity.
    log_variance: see `LogVariance`.
    x: states at t, (B, *space, C).
    t: flow times, (B,).
    s: flow times s <= t, (B,).
    v: velocity at (x, t), like x, which is learned and is the derivative's tangent.
    cond: condition.
    offset: under the logarithm.
    jump: whether s differs from t; without, no derivative is taken.
    precise: see `core.objectives.flow_map.residual`.

  Returns:
    the term, and its mean squares, both (B,); the derivative, like x; 1 for an example that is left out because its
      target is not finite, (B,).
  """
  if jump:
    F, g, dF = residual(network, lambda x, t: v, x, t, s, cond, None, side="eulerian", warmup=1.0, precise=precise)
    target = jax.lax.stop_gradient(F) - g
  else:
    F, target, dF = network(x, t, s, cond, None), jax.lax.stop_gradient(v), jnp.zeros_like(x)
  finite = jnp.all(jnp.isfinite(target), axis=tuple(range(1, x.ndim)))
  F, target, dF = (jnp.where(over_space(finite, a), a, 0.0) for a in (F, target, dF))
  squares, scale = _mean((F - target) ** 2), log_variance(t, s)
  term = jnp.log(squares * jnp.exp(-scale) + offset) + scale
  return jnp.where(finite, term, 0.0), squares, dF, 1.0 - finite


def _mean(x: Array) -> Array:
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))
