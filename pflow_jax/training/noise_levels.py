"""The loss by noise level: its mean in parts of flow time, which one mean over a batch hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PARTS = 4  # of flow time, from 0, data, to 1, noise
NAMES = tuple(f"loss_t{i / PARTS:.2f}-{(i + 1) / PARTS:.2f}" for i in range(PARTS))
SUMS = "loss_by_t"


def averaged(loss: Array, metrics: dict[str, Any]) -> dict[str, Any]:
  """Means of an objective's metrics over a batch, and sums of its loss by noise level.

  Args:
    loss: of the examples, (B,).
    metrics: of the objective. "t", where it has the shape of `loss`, are flow times; or it has that of the "loss_at_t"
      beside it.

  Returns:
    the means; in place of such times SUMS, (2, PARTS): the sum of the losses in every part of flow time, and their
      number.
  """
  t, values = metrics.get("t"), metrics.get("loss_at_t", loss)
  if t is None or jnp.shape(t) != jnp.shape(values):
    return jax.tree.map(jnp.mean, metrics)
  own = jnp.clip(jnp.floor(t * PARTS), 0, PARTS - 1)
  within = jnp.stack([own == part for part in range(PARTS)])
  axes = tuple(range(1, within.ndim))
  total, count = jnp.sum(jnp.where(within, values[None], 0), axes), jnp.sum(within, axes)
  others = {name: value for name, value in metrics.items() if name not in ("t", "loss_at_t")}
  return jax.tree.map(jnp.mean, others) | {SUMS: jnp.stack([total, count.astype(total.dtype)])}


def means_by_time(sums: Sequence[np.ndarray]) -> dict[str, float]:
  """Mean losses of several steps by name; a part of flow time that no example was in has none."""
  total, count = np.sum(sums, axis=0, dtype=float)
  return {name: float(total[i] / count[i]) for i, name in enumerate(NAMES) if count[i] and math.isfinite(total[i])}
