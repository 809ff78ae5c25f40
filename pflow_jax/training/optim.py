"""Optimizer, learning-rate schedule and exponential moving average of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from pflow_jax.mesh.partition import match

PyTree = Any

# optax.apply_if_finite gives in and applies a bad update after this many in a row; the counter
# saturates at this value, so it never does. Stopping is the trainer's decision, see `skipped`.
_NEVER_GIVE_IN = 2**31 - 1


def make_schedule(
  *,
  learning_rate: float,
  warmup_steps: int = 0,
  schedule: Literal["constant", "cosine"] = "constant",
  total_steps: int | None = None,
) -> optax.Schedule:
  """Linear warm-up, then a constant rate or a half cosine that reaches 0 at `total_steps`.

  The warm-up ends at update `warmup_steps - 1` (0-based) and starts at learning_rate /
  warmup_steps, so that no update is lost to a rate of 0.

  Args:
    learning_rate: the rate after the warm-up, > 0.
    total_steps: number of updates of the run; required by "cosine".
  Returns: count of applied updates () int -> rate () float32.
  Raises: ValueError for an unknown schedule or steps that do not fit together.
  """
  if learning_rate <= 0:
    raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
  if schedule == "constant":
    main = optax.constant_schedule(learning_rate)
  elif schedule == "cosine":
    if total_steps is None or total_steps <= warmup_steps:
      raise ValueError(f"schedule='cosine' needs total_steps > warmup_steps ({warmup_steps}), got {total_steps}")
    main = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
  else:
    raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")

  def rate(count):
    count = jnp.asarray(count, jnp.int32)
    warmup = learning_rate * (count + 1) / max(warmup_steps, 1)
    after = main(jnp.maximum(count - warmup_steps, 0))
    return jnp.asarray(jnp.where(count < warmup_steps, warmup, after), jnp.float32)

  return rate


def make_optimizer(
  *,
  learning_rate: float,
  warmup_steps: int = 0,
  schedule: Literal["constant", "cosine"] = "constant",
  total_steps: int | None = None,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  rates: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
  """AdamW with warm-up, a global-norm clip once the warm-up is over, and skipped bad updates.

  A gradient with a NaN, an infinity or a norm that overflows changes nothing but the counters that
  `skipped` reads: parameters, moments and the schedule's count stay, however many come in a row.

  Args:
    clip_norm: largest global norm of the gradient after `warmup_steps` updates (the release uses
      50); None never clips. During the warm-up gradients pass unclipped.
    weight_decay: decoupled decay of every parameter. The others: see `make_schedule`.
    rates: table of (pattern, factor on the learning rate, and with it on the decay) on the parameter's
      path, see `pflow_jax.mesh.partition.match`; empty is a factor of 1 for all.
  Raises: ValueError for settings out of range; on the first update for a table that does not fit.
  References: pi-Flow, arXiv:2510.14974 (its release: betas 0.9, 0.95, no decay); optax.
  """
  if clip_norm is not None and clip_norm <= 0:
    raise ValueError(f"clip_norm must be > 0, or None for no clipping, got {clip_norm}")
  if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0 and weight_decay >= 0):
    raise ValueError(
      f"b1, b2, eps, weight_decay: expected decay rates in [0, 1), > 0 and >= 0, got {b1}, {b2}, {eps}, {weight_decay}"
    )
  if not all(isinstance(row, Sequence) and len(row) == 2 for row in rates):
    raise ValueError(
      f"rates: expected rows (pattern, factor), got {rates!r}; quote patterns within quotes on the shell"
    )
  for pattern, factor in rates:
    if not factor > 0:
      raise ValueError(
        f"rates: expected a factor > 0 for {pattern!r}, got {factor}; to freeze parameters, keep them out of the "
        "optimizer with partition.split"
      )
  rate = make_schedule(
    learning_rate=learning_rate,
    warmup_steps=warmup_steps,
    schedule=schedule,
    total_steps=total_steps,
  )
  update = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  if clip_norm is not None:
    clip = optax.conditionally_transform(optax.clip_by_global_norm(clip_norm), lambda count: count >= warmup_steps)
    update = optax.chain(clip, update)
  if rates:
    update = optax.chain(update, optax.stateless(lambda updates, params: _scaled(updates, rates)))
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

  Raises: ValueError if `opt_state` is not from `make_optimizer` (wrapped or not).
  """
  in_a_row = optax.tree_utils.tree_get(opt_state, "notfinite_count")
  total = optax.tree_utils.tree_get(opt_state, "total_notfinite")
  if in_a_row is None or total is None:
    raise ValueError("expected an optimizer state from make_optimizer, found no skip counters")
  return in_a_row, total


def make_ema_decay(
  *,
  kind: Literal["karras", "constant"] = "karras",
  start: int = 0,
  gamma: float = 7.0,
  decay: float = 0.9999,
) -> Callable[[Array | int], Array]:
  """Share of the old average kept at a 0-based step; 0 up to and including step `start`.

  "karras": (1 - 1/k)^(gamma + 1), k = step - start + 1; "constant": `decay`.

  Returns: step (), TrainState.step before it advances, may be traced -> () float32.
  Raises: ValueError for settings out of range.
  References: Karras et al., arXiv:2312.02696, Eq. 121, as used in the pi-Flow release.
  """
  if kind not in ("karras", "constant"):
    raise ValueError(f"ema: kind must be 'karras' or 'constant', got {kind!r}")
  if start < 0 or gamma <= 0 or not 0 <= decay < 1:
    raise ValueError(f"ema: expected start >= 0, gamma > 0, decay in [0, 1), got {start}, {gamma}, {decay}")

  def kept(step: Array | int) -> Array:
    after = jnp.asarray(step, jnp.int32) - start
    k = jnp.maximum(after, 0).astype(jnp.float32) + 1.0
    share = (1.0 - 1.0 / k) ** (gamma + 1.0) if kind == "karras" else decay
    return jnp.where(after > 0, share, 0.0).astype(jnp.float32)

  return kept


def update_ema(ema: PyTree, params: PyTree, decay: Array | float) -> PyTree:
  """decay * ema + (1 - decay) * params per leaf, in float32; decay 0 copies exactly."""
  new = 1.0 - jnp.asarray(decay, jnp.float32)

  def mix(old, param):
    old, param = jnp.asarray(old, jnp.float32), jnp.asarray(param, jnp.float32)
    mixed = old + new * (param - old)
    return jnp.where(new == 1.0, param, mixed)  # old + (param - old) may round

  return jax.tree.map(mix, ema, params)
