"""Guidance of the teacher: classifier-free or by a weaker model, in an interval of time, with an orthogonal part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_range, checked
from pflow_jax.core.policies.base import Array
from pflow_jax.core.schedule import over_space

MAX_SCALE = 1e6  # beyond it float32 has no digit left of the velocity

Velocity = Callable[[Array, Array, Any], Array]


def guidance_bias(
  v_pos: Array, v_neg: Array, scale: Array, *, orthogonal: float = 0.0, axis: Array | None = None
) -> Array:
  """Guidance's addition to the positive branch: (scale - 1) (v_pos - v_neg), per example.

  Args:
    v_pos: velocity with the condition, (B, *space, C).
    v_neg: velocity without it, (B, *space, C).
    scale: guidance scale w, (B,); 1 is none.
    orthogonal: o in [0, 1]: how much of the bias's projection on `axis` is removed. 0 is plain guidance.
    axis: (B, *space, C); needed when `orthogonal` is not 0. The release uses the positive branch's x0 estimate.

  Returns:
    (B, *space, C).

  References:
    Adaptive projected guidance, arXiv:2410.02416; pi-Flow release.
  """
  over = tuple(range(1, v_pos.ndim))
  bias = (v_pos - v_neg) * over_space(scale - 1, v_pos)
  if orthogonal:
    if axis is None:
      raise ValueError("guidance: orthogonal guidance needs `axis`, the direction to project on")
    along = jnp.sum(bias * axis, over, keepdims=True)
    norm = jnp.maximum(jnp.sum(axis**2, over, keepdims=True), 1e-6)
    bias = bias - orthogonal * (along / norm) * axis
  return bias


def broadcast_condition(c: Array, n: Any) -> Array:
  """The empty condition's leaf `n`, without a batch axis, in the shape of `c`; axes in which it is longer are cut."""
  n = jnp.asarray(n, c.dtype)
  n = n[tuple(slice(0, size) for size in c.shape[c.ndim - n.ndim :])]
  return jnp.broadcast_to(n, c.shape)


def guided(
  velocity: Velocity,
  null_cond: Any,
  *,
  scale: float | Array = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  orthogonal: float = 0.0,
) -> Velocity:
  """A velocity field with classifier-free guidance.

  Args:
    velocity: (x, t, cond) -> v, all with a leading batch axis.
    null_cond: the empty condition, broadcast against every leaf of `cond`; of a longer text, as many tokens as it has.
    scale: w, a number or one an example (B,); the number 1 returns `velocity` itself, at one evaluation instead of two.
    interval: flow times [low, high] where guidance acts.
    orthogonal: see `guidance_bias`; the axis is the positive branch's x0 = x - t v.

  References:
    Classifier-free guidance, arXiv:2207.12598; limited interval, arXiv:2404.07724.
  """

  field = checked("guided: velocity(x, t, cond)", velocity)

  def branches(x, t, cond):
    null = jax.tree.map(broadcast_condition, cond, null_cond)
    # The two branches lie on a new axis: concatenated along the batch they would not stay in place on a sharded one.
    pair = jax.tree.map(lambda c, n: jnp.stack([c, n]), cond, null)
    return jax.vmap(field, in_axes=(None, None, 0))(x, t, pair)

  return _guided(velocity, branches, scale, interval, orthogonal)


def autoguided(
  velocity: Velocity,
  weak: Velocity,
  *,
  scale: float | Array = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  orthogonal: float = 0.0,
) -> Velocity:
  """A velocity field guided away from a weaker model's: scale v + (1 - scale) v_weak. Arguments as for `guided`.

  References:
    Autoguidance, arXiv:2406.02507.
  """
  strong = checked("autoguided: velocity(x, t, cond)", velocity)
  weak = checked("autoguided: weak(x, t, cond)", weak)
  return _guided(velocity, lambda x, t, cond: (strong(x, t, cond), weak(x, t, cond)), scale, interval, orthogonal)


def _guided(
  velocity: Velocity,
  branches: Callable[[Array, Array, Any], tuple[Array, Array]],
  scale: float | Array,
  interval: tuple[float, float],
  orthogonal: float,
) -> Velocity:
  low, high = interval
  if not 0 <= low <= high <= 1:
    raise ValueError(f"guidance interval: expected 0 <= low <= high <= 1, got {interval}")
  check_range("guidance scale", scale, -MAX_SCALE, MAX_SCALE)
  if isinstance(scale, (int, float)) and scale == 1:
    return velocity

  def field(x, t, cond):
    v_pos, v_neg = branches(x, t, cond)
    w = jnp.where((t >= low) & (t <= high), scale, 1.0)
    x0 = x - over_space(t, x) * v_pos if orthogonal else None
    return v_pos + guidance_bias(v_pos, v_neg, w, orthogonal=orthogonal, axis=x0)

  return field
