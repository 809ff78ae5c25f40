"""Samplers: from noise to data with a student (a policy a segment) or a teacher (a velocity an evaluation).

All take callables and a batch; nothing here knows a network. Random keys are needed only for stochastic steps: one a
sample, so that samples do not depend on their batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.batches import per_example
from pflow_jax.core.checks import checked, checked_student
from pflow_jax.core.policies import Policy
from pflow_jax.core.policies import temperature as with_temperature
from pflow_jax.core.policies.base import Array, as_float
from pflow_jax.core.rollout import rollout
from pflow_jax.core.schedule import longest_segment, segment_grid, shift_time, unshift_time
from pflow_jax.core.solvers import NOISE_LEVELS, RHO, Scheme, check_solver, make_scheme

MIN_PRODUCT = 1e-6  # lower bound of denominators, as in the PyTorch release


def kept_noise(t: Array, t_next: Array, h: float, xp: Any = jnp) -> Array:
  """Share m in [0, 1] of the present noise that a stochastic step from `t` to `t_next` keeps.

  Args:
    t: flow times in [0, 1], any shape.
    t_next: flow times in [0, t], the same shape.
    h: noise level of the sampler: 0 keeps all noise (deterministic), inf replaces all of it.
    xp: the array library, jax.numpy or NumPy.
  """
  _check_level(h)
  if h == 0:
    return xp.ones_like(t)
  if np.isinf(h):
    return xp.zeros_like(t)
  ratio = t_next * (1 - t) / xp.maximum(t * (1 - t_next), MIN_PRODUCT)
  return ratio ** (float(h) * float(h))  # h**2 raises where it overflows


def flow_map_sde_target(t: Array, t_next: Array, h: float, xp: Any = jnp) -> tuple[Array, Array]:
  """Landing time of the flow map from which re-noising ends at `t_next` (FlowMapSDE); arguments as in `kept_noise`.

  Returns:
    the landing time t_dst <= t_next, and the share m of noise that is kept.

  References:
    pi-Flow, arXiv:2510.14974, and its release.
  """
  m = kept_noise(t, t_next, h, xp)
  return t_next * m / xp.maximum(1 - t_next + t_next * m, MIN_PRODUCT), m


def flow_map_sde_renoise(x: Array, noise: Array, t_next: Array, m: Array) -> Array:
  """State at `t_next` from the state `x` at the landing time of `flow_map_sde_target`; `noise` like `x`."""
  return (1 - t_next + t_next * m) * x + t_next * jnp.sqrt(jnp.maximum(1 - m**2, 0)) * noise


def flow_sde_step(x: Array, v: Array, noise: Array, t: Array, t_next: Array, h: float) -> Array:
  """One step of a velocity sampler that renews part of the noise (FlowSDE); h = 0 is the Euler step.

  Args:
    x: state at `t`, of any shape.
    v: velocity there, like x.
    noise: unit normal, like x.
    t: flow time, ().
    t_next: flow time of the result, ().
    h: noise level.
  """
  m = kept_noise(t, t_next, h)
  x0, eps = x - t * v, x + (1 - t) * v
  return (1 - t_next) * x0 + t_next * (m * eps + jnp.sqrt(jnp.maximum(1 - m**2, 0)) * noise)


def sample_student(
  student: Callable[[Array, Array, Any], Policy],
  noise: Array,
  cond: Any,
  keys: Array | None = None,
  *,
  nfe: int,
  final_scale: float = 1.0,
  shift: float = 1.0,
  h: float = 0.0,
  temperature: float | Array = 1.0,
  substeps: int = 128,
  method: str = "auto",
) -> Array:
  """Samples of a policy student.

  Args:
    student: (x, t, cond) -> batch of policies; one network evaluation.
    noise: initial states at t = 1, (B, *space, C).
    cond: condition, passed on.
    keys: PRNG keys (B,); needed when h > 0.
    nfe: network evaluations, see `segment_grid`.
    final_scale: length of the last segment relative to the others, see `segment_grid`.
    shift: time shift m of the grid, see `shift_time`.
    h: noise level between segments (FlowMapSDE).
    temperature: of the policies of every segment but the last; may be traced.
    substeps: of the rollouts, see `rollout`.
    method: of the rollouts, see `rollout`; "lakonlab-0.2" draws the samples that the PyTorch releases draw.

  Returns:
    (B, *space, C).
  """
  if h > 0 and keys is None and nfe > 1:
    raise ValueError("sample_student: h > 0 renews noise between segments and needs `keys`, one a sample")
  _check_level(h)
  student = checked_student("sample_student: student(x, t, cond)", student)
  (noise,) = as_float(noise)
  reach = longest_segment(nfe, final_scale) if h == 0 else 1.0
  batch = noise.shape[:1]

  def step(x, inputs):
    i, t, t_next, m, r, r_dst = inputs
    policy = tempered(student(x, jnp.broadcast_to(t, batch), cond), temperature, i == nfe - 1)

    def roll(p, x):
      return rollout(p, x, r, r_dst, shift=shift, substeps=substeps, method=method, max_length=reach)

    x = per_example(jax.vmap(roll))(policy, x)
    if keys is not None and h > 0:
      x = flow_map_sde_renoise(x, _fresh_noise(keys, i, x), t_next, m)  # adds no noise at t_next = 0
    return x.astype(noise.dtype), None

  # A loop, whatever its length: a thousand evaluations compile as one does.
  stops = map(jnp.asarray, _stops(nfe, final_scale, shift, h, noise.dtype))
  return jax.lax.scan(step, noise, (jnp.arange(nfe), *stops))[0]


def tempered(policy: Policy, temperature: float | Array, is_last: Array) -> Policy:
  """Policies (B,) of a segment with their temperature, which that of the last segment leaves as they are.

  Args:
    policy: a batch of policies.
    temperature: see `sample_student`.
    is_last: whether the segment is the last one, ().
  """
  other = per_example(jax.vmap(lambda p: with_temperature(p, temperature)))(policy)
  return jax.tree.map(lambda own, sharper: jnp.where(is_last, own, sharper), policy, other)


def _stops(nfe: int, final_scale: float, shift: float, h: float, dtype) -> tuple[Any, ...]:
  """Times of every segment: t, t_next, the share m, see `flow_map_sde_target`, and r at its rollout's ends.

  They are in `dtype`, NumPy's where `shift` is known. They follow the steps of the PyTorch release's pipelines, which
  keep 1000 t: a segment of 64 substeps may come out a hair longer and, where they are rounded up, be one of 65.
  """
  xp: Any = jnp if isinstance(shift, jax.core.Tracer) else np
  t = shift_time(segment_grid(nfe, final_scale).astype(dtype), shift)
  t_dst, m = flow_map_sde_target(t[:-1], t[1:], h, xp)
  r, r_dst = (xp.minimum(unshift_time(a * 1000 / 1000, shift), 1) for a in (t[:-1], t_dst))
  return t[:-1], t[1:], m, r, r_dst


def sample_teacher(
  teacher: Callable[[Array, Array, Any], Array],
  noise: Array,
  cond: Any,
  keys: Array | None = None,
  *,
  steps: int,
  shift: float = 1.0,
  h: float = 0.0,
  solver: str = "euler",
  diffusion: str = "sigma",
  terminal: float = 0.04,
  sigmas: tuple[float, float] = NOISE_LEVELS,
  rho: float = RHO,
  trajectory: bool = False,
) -> Array:
  """Samples of a velocity field, by steps even in schedule time.

  Args:
    teacher: (x, t, cond) -> v; one network evaluation (two when guided).
    noise: initial states at t = 1, (B, *space, C).
    cond: condition, passed on.
    keys: PRNG keys (B,); needed by "sde" and when h > 0.
    steps: number of steps. "heun" and "edm" evaluate the teacher 2 steps - 1 times, the others once a step.
    shift: time shift m, see `shift_time`.
    h: noise level of FlowSDE, which renews noise between Euler's steps; 0 is deterministic.
    solver: one of `core.solvers.SOLVERS`: "euler", "heun", "dpmpp_2m", "sde" or "edm", which has times of its own.
    diffusion: coefficient of "sde", one of `core.solvers.DIFFUSIONS`.
    terminal: flow time at which the last step of "sde" begins, see `core.solvers.make_scheme`.
    sigmas: noise levels of "edm", lowest and highest, see `core.solvers.edm`.
    rho: exponent of the grid of "edm".
    trajectory: return all states, (steps + 1, B, *space, C), from noise to data.

  Returns:
    (B, *space, C).

  Raises:
    ValueError: the settings do not fit together.
  """
  if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
    raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")
  _check_level(h)
  check_solver(solver, diffusion, terminal, h, sigmas, rho)
  teacher = checked("sample_teacher: teacher(x, t, cond)", teacher)
  (noise,) = as_float(noise)
  scheme = make_scheme(
    solver, steps, shift, noise.dtype, diffusion=diffusion, terminal=terminal, sigmas=sigmas, rho=rho
  )
  if h > 0:
    scheme = _with_renewed_noise(scheme, h)
  if scheme.is_stochastic and keys is None:
    raise ValueError("sample_teacher: solver='sde' and h > 0 add noise and need `keys`, one a sample")
  batch = noise.shape[:1]

  def evaluate(carry, inputs):
    (x, memory), (i, row) = carry, inputs
    v = teacher(x, jnp.broadcast_to(row[0], batch), cond)
    fresh = _fresh_noise(keys, i, x) if keys is not None and scheme.is_stochastic else None
    x, memory = scheme.step(x, memory, v, row, fresh)
    return (x, memory), x if trajectory else None

  first = noise * scheme.scale
  start = (first, scheme.remember(first))
  (x, _), states = jax.lax.scan(evaluate, start, (jnp.arange(len(scheme.rows[0])), scheme.rows))
  return jnp.concatenate([noise[None], states[scheme.ends]]) if trajectory else x


def _with_renewed_noise(euler: Scheme, h: float) -> Scheme:
  """FlowSDE with the times of Euler's method."""

  def step(x, memory, v, row, noise):
    t, t_next = row
    return flow_sde_step(x, v, noise, t, t_next, h), memory

  return dataclasses.replace(euler, step=step, is_stochastic=True)


def sample_flow_map(
  flow_map: Callable[[Array, Array, Array, Any], Array],
  noise: Array,
  cond: Any,
  keys: Array | None = None,
  *,
  grid: Sequence[float],
  gamma: float = 0.0,
  trajectory: bool = False,
) -> Array:
  """Samples of a flow map: jumps down a grid of flow times, for any number of steps.

  With gamma > 0 a jump to level s lands lower, at u < s, and noise is added up to s: with sigma = time / (1 - time),
  sigma_u = sqrt(1 - gamma^2) sigma_s. The last jump, to the data, gets none.

  Args:
    flow_map: (x, t, s, cond) -> average velocity between t and s; one network evaluation.
    noise: initial states at grid[0], (B, *space, C).
    cond: condition, passed on.
    keys: PRNG keys (B,); needed when gamma > 0 and there is more than one step.
    grid: decreasing flow times, from 1 to 0 as a rule.
    gamma: in [0, 1]: 0 is deterministic, 1 jumps to the data and noises anew, like a consistency model.
    trajectory: return all states, (steps + 1, B, *space, C).

  Returns:
    (B, *space, C).

  References:
    Align Your Flow, arXiv:2506.14603 (gamma-sampling, after CTM, arXiv:2310.02279).
  """
  steps = len(grid) - 1
  if steps < 1 or any(t <= s for t, s in itertools.pairwise(grid)) or grid[0] > 1 or grid[-1] < 0:
    raise ValueError(f"grid: expected flow times that decrease within [0, 1], got {tuple(grid)}")
  if not 0 <= gamma <= 1:
    raise ValueError(f"gamma: expected a number in [0, 1], got {gamma}")
  if gamma > 0 and steps > 1 and keys is None:
    raise ValueError("sample_flow_map: gamma > 0 adds noise between steps and needs `keys`, one a sample")
  flow_map = checked("sample_flow_map: flow_map(x, t, s, cond)", flow_map)
  (x,) = as_float(noise)
  # A row is a step's start, landing time, length, and the factors on state and noise; no noise after the last step.
  table = []
  for i, (t, s) in enumerate(itertools.pairwise(grid)):
    u = gamma_landing(s, gamma) if i < steps - 1 else s
    a = (1 - s) / (1 - u) if u < 1 else 1.0
    table.append((t, u, u - t, a, math.sqrt(max(s**2 - (a * u) ** 2, 0.0))))

  def step(x, inputs):
    i, (t, u, length, a, added) = inputs
    jump = flow_map(x, jnp.broadcast_to(t, x.shape[:1]), jnp.broadcast_to(u, x.shape[:1]), cond)
    x = a * (x + length * jump)
    if keys is not None and gamma > 0:
      x = x + added * _fresh_noise(keys, i, x)
    return x, x if trajectory else None

  last, states = jax.lax.scan(step, x, (jnp.arange(steps), tuple(jnp.asarray(np.array(table).T, x.dtype))))
  return jnp.concatenate([x[None], states]) if trajectory else last


def gamma_landing(s: float, gamma: float) -> float:
  """Flow time u <= s from which adding noise leads to level `s`, see `sample_flow_map`."""
  sigma = math.sqrt(1 - gamma**2) * s / (1 - s) if s < 1 else math.inf
  return sigma / (1 + sigma) if sigma < math.inf else 1.0


def _check_level(h: float) -> None:
  if not h >= 0:
    raise ValueError(f"noise level h: expected a number of at least 0, got {h}")


def _fresh_noise(keys: Array, i, x: Array) -> Array:
  """Noise like `x` (B, ...) for step `i`, each sample from its own key."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)
