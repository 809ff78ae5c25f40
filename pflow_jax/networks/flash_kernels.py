"""Kernels of `networks.flash_jvp` on TPUs and GPUs, see `networks.flash_steps` for what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pflow_jax.networks import flash_gpu, flash_tpu
from pflow_jax.networks.flash_steps import Options, wide

Array = jax.Array


def attend(
  q: Array, k: Array, v: Array, mask: Array | None, tangents: Sequence[Array], options: Options
) -> tuple[Array, ...]:
  """Attention, and its derivative along tangents.

  Args:
    q: queries, (B, T, H, D).
    k: keys, (B, S, H, D).
    v: values, (B, S, H, D).
    mask: True for the keys that are attended to, (B, S), or None.
    tangents: of q, k and v, or none.
    options: see `Options`.

  Returns:
    O (B, T, H, D); log-sum-exp of the scores (B, H, T), float32 or wider; dO like O, where there are tangents.
  """
  means = [_mean(a, mask) for a in (k, tangents[1])] if tangents else []
  run = (flash_gpu if options.gpu else flash_tpu).attend
  return run(q, k, v, mask, tuple(tangents), means, options)


def backward(
  q: Array, k: Array, v: Array, mask: Array | None, out: Array, lse: Array, cotangent: Array, options: Options
) -> tuple[Array, Array, Array]:
  """Cotangents of q, k and v, for one of O.

  Args:
    q: as in `attend`.
    k: as in `attend`.
    v: as in `attend`.
    mask: as in `attend`.
    out: O, a result of `attend`.
    lse: a result of `attend`.
    cotangent: of O, (B, T, H, D).
    options: see `Options`.

  Returns:
    arrays like q, k and v.
  """
  # Not a product, whose factors an accelerator may round: what it is taken from is exact. And the kernels read a
  # rounded cotangent, which XLA, fusing this with what made it, would not round: the difference would be an error.
  kept = jnp.finfo(cotangent.dtype)
  rounded = jax.lax.reduce_precision(cotangent.astype(lse.dtype), kept.nexp, kept.nmant)
  delta = jnp.sum(out.astype(lse.dtype) * rounded, axis=3).swapaxes(1, 2)
  run = (flash_gpu if options.gpu else flash_tpu).backward
  return run(q, k, v, mask, cotangent, lse, delta, options)


def _mean(keys: Array, mask: Array | None) -> Array:
  """Mean over the keys that are attended to: (B, 1, H, D), float32 or wider."""
  where = None if mask is None else mask[:, :, None, None]
  return jnp.mean(keys, axis=1, keepdims=True, dtype=wide(keys.dtype), where=where)
