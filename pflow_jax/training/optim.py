"""Optimizer, learning-rate schedule and exponential moving average of the parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from pflow_jax.mesh.partition import match, path_of
from pflow_jax.networks.layers import CONSTANTS
from pflow_jax.settings.optimizer import EmaSettings, OptimizerSettings

PyTree = Any

# optax.apply_if_finite applies a bad update after this many in a row. The counter saturates at this value, so it never
# does. Stopping is the trainer's decision, see `skipped`.
_NEVER_GIVE_IN = 2**31 - 1


def make_schedule(settings: OptimizerSettings, total_steps: int | None = None) -> optax.Schedule:
  """Linear warm-up, then a constant rate or a half cosine that reaches 0 at `total_steps`.

  The warm-up starts at learning_rate / warmup_steps and ends at update `warmup_steps - 1` (0-based), so that no update
  is lost to a rate of 0; with a `warmup_factor` it starts at that share of the rate and ends at update `warmup_steps`.

  Args:
    settings: the rate, the warm-up and the kind of schedule.
    total_steps: number of updates of the run; required by "cosine".

  Returns:
    A function: count of applied updates () int -> rate () float32.

  Raises:
    ValueError: steps do not fit together.
  """
  learning_rate, warmup_steps = settings.learning_rate, settings.warmup_steps
  if settings.schedule == "constant":
    main = optax.constant_schedule(learning_rate)
  else:
    if total_steps is None:
      raise ValueError("schedule='cosine' needs total_steps, got None")
    if total_steps <= warmup_steps:
      raise ValueError(
        f"config.optimizer.warmup_steps: {warmup_steps} is no part of a cosine schedule of "
        f"config.train.steps={total_steps}; set --config.optimizer.warmup_steps={total_steps // 10}, or "
        "--config.train.steps higher"
      )
    main = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)

  first = settings.warmup_factor

  def rate(count):
    count = jnp.asarray(count, jnp.int32)
    whole = max(warmup_steps, 1)
    warmup = learning_rate * ((count + 1) / whole if first is None else first + (1 - first) * count / whole)
    after = main(jnp.maximum(count - warmup_steps, 0))
    return jnp.asarray(jnp.where(count < warmup_steps, warmup, after), jnp.float32)

  return rate


def make_optimizer(settings: OptimizerSettings, total_steps: int | None = None) -> optax.GradientTransformation:
  """AdamW with warm-up, a global-norm clip from `clip_start` on, and skipped bad updates.

  A gradient with a NaN, an infinity or a norm that overflows changes nothing but the counters that `skipped` reads:
  parameters, moments and the schedule's count stay, however many come in a row.

  Args:
    settings: of the optimizer.
    total_steps: number of updates of the run, for its schedule.

  Raises:
    ValueError: steps do not fit together; on the first update, a table `rates` that does not fit the parameters.

  References:
    pi-Flow, arXiv:2510.14974 (its release: betas 0.9, 0.95, no decay); optax.
  """
  s, rate = settings, make_schedule(settings, total_steps)
  decay: dict[str, Any] = {"weight_decay": s.weight_decay}
  if s.weight_decay:
    decay["mask"] = lambda params: jax.tree_util.tree_map_with_path(
      lambda keys, _: re.fullmatch(CONSTANTS, path_of(keys)) is None, params
    )
  update = optax.adamw(rate, b1=s.b1, b2=s.b2, eps=s.eps, mu_dtype=s.mu_dtype, **decay)
  if s.clip_norm is not None:
    start = s.warmup_steps if s.clip_start is None else s.clip_start
    clip = optax.conditionally_transform(optax.clip_by_global_norm(s.clip_norm), lambda count: count >= start)
    update = optax.chain(clip, update)
  if s.rates:
    update = optax.chain(update, optax.stateless(lambda updates, params: _scaled(updates, s.rates)))
  return optax.chain(
    optax.stateless(lambda updates, params: _overflow_to_nan(updates)),
    optax.apply_if_finite(update, max_consecutive_errors=_NEVER_GIVE_IN),
  )


def _overflow_to_nan(updates: PyTree) -> PyTree:
  """Makes a gradient whose squared norm overflows non-finite; passes others unchanged.

  Its square would stay infinite in Adam's second moment, which kills the parameter silently.
  """
  finite = jnp.isfinite(optax.global_norm(updates))
  return jax.tree.map(lambda u: jnp.where(finite, u, jnp.nan), updates)


def _scaled(updates: PyTree, rates: Sequence[tuple[str, float]]) -> PyTree:
  """Multiplies every update by its row's factor."""
  return jax.tree.map(lambda update, factor: update * factor, updates, match(rates, updates))


def skipped(opt_state: optax.OptState) -> tuple[Array, Array]:
  """Skipped non-finite updates so far: (in a row up to now, in total), each () int32.

  Raises:
    ValueError: `opt_state` is not from `make_optimizer` (wrapped or not).
  """
  in_a_row = optax.tree_utils.tree_get(opt_state, "notfinite_count")
  total = optax.tree_utils.tree_get(opt_state, "total_notfinite")
  if in_a_row is None or total is None:
    raise ValueError("expected an optimizer state from make_optimizer, found no skip counters")
  return in_a_row, total


def make_ema_decay(settings: EmaSettings) -> Callable[[Array | int], Array]:
  """Share of the old average kept at a 0-based step; 0 up to and including step `start`.

  "karras": (1 - 1/k)^(gamma + 1), k = step - start + 1, a power function of time; "constant": `decay`.

  Args:
    settings: the kind of average and its numbers.

  Returns:
    A function: step (), TrainState.step before it advances, may be traced -> () float32.

  References:
    Karras et al., arXiv:2312.02696, Eq. 121, as used in the pi-Flow release.
  """

  def kept(step: Array | int) -> Array:
    after = jnp.asarray(step, jnp.int32) - settings.start
    k = jnp.maximum(after, 0).astype(jnp.float32) + 1.0
    share = (1.0 - 1.0 / k) ** (settings.exponent + 1.0) if settings.kind == "karras" else settings.decay
    return jnp.where(after > 0, share, 0.0).astype(jnp.float32)

  return kept


def make_profile_decays(settings: EmaSettings) -> tuple[Callable[[Array | int], Array], ...]:
  """The same for each of the profiles, which have no start: the parameters at step 0 weigh nothing."""
  return tuple(make_ema_decay(EmaSettings(sigma_rel=width)) for width in settings.profiles)


def update_ema(ema: PyTree, params: PyTree, decay: Array | float) -> PyTree:
  """decay * ema + (1 - decay) * params per leaf, in float32; decay 0 copies exactly."""
  new = 1.0 - jnp.asarray(decay, jnp.float32)

  def mix(old, param):
    old, param = jnp.asarray(old, jnp.float32), jnp.asarray(param, jnp.float32)
    mixed = old + new * (param - old)
    return jnp.where(new == 1.0, param, mixed)  # old + (param - old) may round

  return jax.tree.map(mix, ema, params)
