"""Rollouts: integrating a policy over schedule time. Knows of a policy only `velocity` and `integrate`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pflow_jax.core.policies.base import Array, Policy, check_range
from pflow_jax.core.schedule import shift_time

RELEASES = {"piflow-0.1": False, "lakonlab-0.2": True}
"""Versions of π-Flow's PyTorch release; True for those that round the number of a stretch's substeps up."""

NEWEST = "lakonlab-0.2"

METHODS = ("auto", "euler", "ab2", "exact", *RELEASES)

SAVING = 3
"""Euler substeps that one third-order step stands for in method "auto": benchmarks/rollout_order.py measures it."""

FEWEST = 10
"""Steps below which "auto" saves no work, except in windows: the first two are of lower order."""

MIN_STEP = 1e-4  # shortest stretch of flow time that an average velocity is divided by


def rollout(
  policy: Policy,
  x: Array,
  r_start: ArrayLike,
  r_end: ArrayLike,
  *,
  shift: ArrayLike = 1.0,
  substeps: int = 128,
  method: str = "auto",
  max_length: float = 1.0,
) -> Array:
  """State at schedule time `r_end` of the policy's ODE, from `x` at `r_start`.

  Args:
    policy: one policy (unbatched; batch with jax.vmap).
    x: state at `r_start`, (*space, C).
    r_start: schedule time of `x`, (), at most 1. May be traced.
    r_end: schedule time of the result, (), in [0, r_start]. May be traced.
    shift: time shift m between schedule and flow time.
    substeps: resolution, in substeps a unit of schedule time.
    method: the scheme. "piflow-0.1" and "lakonlab-0.2" do as those versions of the PyTorch release: (r_start - r_end)
      * substeps Euler steps, even in schedule time, at least 1; "piflow-0.1" rounds their number to the nearest, half
      to even, as the release until v0.1.2, "lakonlab-0.2" up, as since v0.2.0. Both take the closed form of a policy
      whose release has one (ArcFlow). "euler" takes the steps of "piflow-0.1" with every policy. "ab2" spreads
      substeps * max_length steps of a second-order two-step scheme over the stretch. "exact" is the policy's closed
      form. "auto" is exact where a closed form exists, else a third of ab2's steps at third order, at least 10 where
      there are so many: with 128 substeps its RMS error on random mixtures was 0.02 to 0.7 of Euler's with all of them.
    max_length: static bound on r_start - r_end; sets the length of the compiled loop. A longer stretch is still
      covered, with longer steps.

  Returns:
    (*space, C).

  Raises:
    ValueError: for an unknown method, `exact` without a closed form, or times out of order.

  References:
    pi-Flow, arXiv:2510.14974, Sec. 3.1.
  """
  _check(r_start, r_end, shift, substeps, method, max_length)
  x, r_start, r_end, shift = _in_one_type(policy, x, r_start, r_end, shift)
  r_end = jnp.minimum(r_end, r_start)  # traced times out of order: a stretch without length
  return _end(policy, x, r_start, r_end, shift, substeps, method, max_length)


def average_velocity(
  policy: Policy,
  x: Array,
  r_start: ArrayLike,
  r_end: ArrayLike,
  *,
  shift: ArrayLike = 1.0,
  substeps: int = 128,
  method: str = "auto",
  max_length: float = 1.0,
) -> Array:
  """Average over flow time of the policy's velocity along its own trajectory from `x` at `r_start` to `r_end`.

  Arguments are those of `rollout`. Of few substeps "auto" takes a half, and one more. A stretch that rounds to fewer
  than two substeps is represented by the velocity at its start, as in all PyTorch releases; with `max_length=0` every
  stretch is, and no loop is compiled.

  Returns:
    (*space, C), the velocity v with x(r_end) = x + v (t_end - t_start).
  """
  _check(r_start, r_end, shift, substeps, method, max_length)
  x, r_start, r_end, shift = _in_one_type(policy, x, r_start, r_end, shift)
  r_end = jnp.minimum(r_end, r_start)  # traced times out of order: a stretch without length
  t_start, t_end = shift_time(r_start, shift), shift_time(r_end, shift)
  start = _checkpointed(policy, x, t_start)
  if max_length == 0:
    return start
  end = _end(policy, x, r_start, r_end, shift, substeps, method, max_length, start)
  chord = (x - end) / jnp.maximum(t_start - t_end, MIN_STEP)
  return jnp.where(jnp.round((r_start - r_end) * substeps) < 2, start, chord)


def _check(r_start, r_end, shift, substeps, method, max_length) -> None:
  if method not in METHODS:
    raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
  if isinstance(substeps, bool) or not isinstance(substeps, (int, np.integer)) or substeps < 1:
    raise ValueError(f"substeps: expected an integer of at least 1, got {substeps!r}")
  if not 0 <= max_length <= 1:
    raise ValueError(f"max_length: expected a number in [0, 1], got {max_length!r}")
  check_range("shift", shift, 0.0, math.inf, open_low=True)
  for name, value in (("r_start", r_start), ("r_end", r_end)):
    if jnp.ndim(value) != 0:
      raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(value)}; use jax.vmap")
    check_range(name, value, 0.0, 1.0)
  if not isinstance(r_start, jax.core.Tracer):
    check_range("r_end (at most r_start)", r_end, 0.0, float(r_start))


def _in_one_type(policy: Policy, *arrays) -> list[Array]:
  """Casts arrays to the type of the policy's arrays and x together, float32 at least."""
  dtype = jnp.result_type(jnp.float32, arrays[0], *jax.tree.leaves(policy))
  return [jnp.asarray(a, dtype) for a in arrays]


def _end(policy, x, r_start, r_end, shift, substeps, method, max_length, start=None) -> Array:
  """`rollout` with checked arguments; `start` is the velocity at the start, given for a window."""
  if policy.has_closed_form and (method == "auto" or (method in RELEASES and policy.closed_form_in_release)):
    method = "exact"
  if method == "exact":
    return policy.integrate(x, shift_time(r_start, shift), shift_time(r_end, shift))
  window = start is not None
  if not window:
    start = _checkpointed(policy, x, shift_time(r_start, shift))
  most = substeps * max_length
  # A hair less than the product, lest 128 * (1 / 3.5 * 3.5) becomes 129 steps.
  bound = max(math.ceil(most - 1e-6), 1)
  if method == "ab2":
    return _multistep(policy, x, r_start, r_end, shift, bound, 2, start)
  if method == "auto":
    # The first steps are of lower order. They count where a stretch is all of a policy's way from its source to the
    # data. In a window, half of the steps and one more are better than all of Euler's.
    few = int(most / 2) + 1 if window else bound
    steps = max(math.ceil(most / SAVING - 1e-6), min(few, FEWEST))
    return _multistep(policy, x, r_start, r_end, shift, steps, 3, start)
  rounds_up = RELEASES.get(method, False)
  if rounds_up:
    # In float32 the difference of two times may exceed the length that it stands for, and take one step more.
    bound = min(math.floor(most + 1e-6 * substeps) + 1, substeps)
  length = (r_start - r_end) * substeps
  count = jnp.clip(jnp.ceil(length) if rounds_up else jnp.round(length), 1, bound)
  return _euler(policy, x, r_start, r_end, shift, count, bound, start)


def _checkpointed(policy, x, t) -> Array:
  """The velocity; the backward pass recomputes its (K, pixels) arrays instead of storing them."""
  return jax.checkpoint(policy.velocity)(x, t)


def _euler(policy, x, r_start, r_end, shift, count, bound, start):
  """`count` Euler steps, traced; the loop has the static length `bound` and idles when done."""

  def times(i):
    return (shift_time(r_start + (r_end - r_start) * (k / count), shift) for k in (i, i + 1))

  def step(x, i):  # checkpointed as a whole, like the multistep schemes' below
    # Idle steps re-evaluate the last one, where everything is finite, and are masked out.
    t, s = times(jnp.minimum(i, count - 1))
    return jnp.where(i < count, x + policy.velocity(x, t) * (s - t), x), None

  t, s = times(0)
  return jax.lax.scan(jax.checkpoint(step), x + start * (s - t), jnp.arange(1, bound, dtype=x.dtype))[0]


def _multistep(policy, x, r_start, r_end, shift, count, order, start):
  """`count` steps of a multistep scheme in (x / t, 1 / t), where only the posterior mean x0 = x - t v varies.

  dy / dlambda = x0 with y = x / t, lambda = 1 / t. x0 is extrapolated through the current and the last (order - 1)
  points, as a polynomial in t, and integrated exactly: a constant x0 is exact at any step length, and t = 0 is an
  ordinary end point. The first step has no past: a predicted end point takes its place, which makes it a Heun step.
  The second is of order 2.

  Steps are even in sqrt(t): x0 varies fastest near the source of a late segment and where t is of the order of the
  mixture's standard deviation, and this spacing was the best for every shift (benchmarks/rollout_order.py).
  """
  t_start, t_end = shift_time(r_start, shift), shift_time(r_end, shift)
  # Constant for derivatives: sqrt has none at t_end = 0, and where the points lie does not change what is approximated.
  t_mixed = jnp.sqrt(jax.lax.stop_gradient(t_start * t_end))
  tiny = jnp.finfo(x.dtype).tiny

  def time(k):
    u = k / count
    return (1 - u) ** 2 * t_start + 2 * u * (1 - u) * t_mixed + u**2 * t_end

  def moments(t, s):
    """s times the integral of (t' - t)^n dlambda from t to s, for n = 0, 1 and 2."""
    q = (t - s) / jnp.maximum(t, tiny)
    inside = q < 1
    log = jnp.where(inside, (1 - q) * jnp.log1p(-jnp.where(inside, q, 0.0)), 0.0)
    return q, -t * (log + q), t**2 * (2 * (log + q) - q**2)

  def inverse(gap):
    """1 / gap, 0 in a stretch of no length."""
    return jnp.where(gap == 0, 0.0, 1 / jnp.where(gap == 0, 1.0, gap))

  def step(carry, i):
    x, x0_last, x0_before = carry
    t, s, t_last, t_before = (time(k) for k in (i, i + 1, i - 1, jnp.maximum(i - 2, 0)))
    x0 = x - t * policy.velocity(x, t)
    q, first, second = moments(t, s)
    # Newton's form of the polynomial, as one weighted sum of the points; its second difference from the third step on,
    # when there are three.
    bend = jnp.where(i < 2, 0.0, ((t - t_last) * first + second) * inverse(t - t_before)) if order == 3 else 0.0
    a, b = (first + bend) * inverse(t - t_last), bend * inverse(t_last - t_before)
    return ((1 - q) * x + (q + a) * x0 - (a + b) * x0_last + b * x0_before, x0, x0_last), None

  t, s = t_start, time(1.0)
  x0, predicted = x - t * start, x + (s - t) * start
  slope = (x0 - (predicted - s * _checkpointed(policy, predicted, s))) * inverse(t - s)
  carry = (predicted + moments(t, s)[1] * slope, x0, x0)
  return jax.lax.scan(jax.checkpoint(step), carry, jnp.arange(1, count, dtype=x.dtype))[0][0]
