"""Steps of the kernels of `networks.flash_jvp`: attention with its forward derivative, and its reverse derivative.

Attention, S = q k^T / sqrt(D), P = softmax(S), O = P v, is computed over blocks of keys: with the running maximum m of
a query's scores and p = exp(S - m), its sums l of p and o of p v are O = o / l at the end. Its derivative along
tangents dq, dk, dv needs two more sums in the same pass. With g = p (dq k^T + q dk^T) / sqrt(D), they are b of g and a
of g v + p dv, and

    dO = a / l - (b / l) O.

A number that is added to a query's row of dq k^T + q dk^T changes nothing of it. So k and dk are taken without their
means over the keys: what all keys have in common, such as a change of the time that all tokens feel, would otherwise
cancel only after it is rounded. The reverse derivative makes P again from lse = m + log(l).

Arrays in main memory are token-major, (B, T, H, D), and nothing of size T x S is there; nor are copies with padding or
with other axes. Kernels of TPUs have blocks of queries and of keys on the grid and read all columns of as many heads as
fill whole registers. Those of GPUs go through Triton and have a loop over the keys. Both call the same steps, in which
sums are float32 (float64 for inputs of float64) and the factors of a product have the dtype of the inputs.

References:
  FlashAttention-2, arXiv:2307.08691; the derivative, sCM, arXiv:2410.11081, App. F.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a key that is not attended to; the difference of two is 0


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a kernel.

  Attributes:
    precision: of products of float32.
    gpu: whether it is a GPU's.
    interpret: run in Pallas' interpreter, on any device.
  """

  precision: jax.lax.Precision = jax.lax.Precision.DEFAULT
  gpu: bool = False
  interpret: bool = False


def wide(dtype: Any) -> Any:
  """Dtype of sums."""
  return jnp.promote_types(dtype, jnp.float32)


def _product(a: Array, b: Array, axis_a: int, axis_b: int, precision: jax.lax.Precision) -> Array:
  """Matrix product over one axis of each."""
  dims = (((axis_a,), (axis_b,)), ((), ()))
  exact = precision if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(a, b, dims, precision=(exact, exact), preferred_element_type=wide(a.dtype))


def start(queries: int, width: int, dtype: Any, tangents: bool) -> tuple[Array, ...]:
  """Sums (m, l, o), l called total in what follows, and (b, a) where there are tangents, over no keys."""
  zero, rows = jnp.zeros((queries, 1), dtype), jnp.zeros((queries, width), dtype)
  return (jnp.full((queries, 1), NEVER, dtype), zero, rows, *((zero, rows) if tangents else ()))


def add_keys(state, q, k, v, valid, tangents, scale: float, precision) -> tuple[Array, ...]:
  """Adds a block of keys to the sums.

  Args:
    state: see `start`.
    q: block of queries, (queries, D).
    k: block of keys, (keys, D).
    v: block of values, (keys, D).
    valid: which keys are attended to, (1, keys), or None.
    tangents: of q; of S for q, and of S for k, both as `centred` makes them; of v. Or none.
    scale: of the scores.
    precision: see `Options`.
  """
  product = functools.partial(_product, precision=precision)
  m, total, o, *rest = state
  scores = product(q, k, 1, 1) * scale
  if valid is not None:
    scores = jnp.where(valid, scores, NEVER)
  top = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
  shrink, weights = jnp.exp(m - top), jnp.exp(scores - top)
  rounded = weights.astype(v.dtype)
  total = shrink * total + jnp.sum(weights, axis=1, keepdims=True)
  o = shrink * o + product(rounded, v, 1, 0)
  if not tangents:
    return top, total, o
  (dq, of_q, of_k, dv), (b, a) = tangents, rest
  # Both sums are of the same rounded numbers: their errors then cancel in dO for what all values have in common.
  change = (weights * (product(dq, of_q, 1, 1) + product(q, of_k, 1, 1))).astype(v.dtype)
  b = shrink * b + jnp.sum(change, axis=1, keepdims=True, dtype=b.dtype)
  a = shrink * a + product(change, v, 1, 0) + product(rounded, dv, 1, 0)
  return top, total, o, b, a


def centred(keys: Array, mean: Array, scale: float) -> Array:
  """Keys (keys, D) without their mean (1, D), scaled as scores are, which here costs less and is rounded once."""
  return ((keys.astype(mean.dtype) - mean) * scale).astype(keys.dtype)


def finish(state: tuple[Array, ...]) -> tuple[Array, ...]:
  """O, log-sum-exp as a column, and dO where there are tangents."""
  m, total, o, *rest = state
  o = o / total
  lse = m + jnp.log(total)
  if not rest:
    return o, lse
  b, a = rest
  return o, lse, a / total - (b / total) * o


def of_queries(q, k, v, do, lse, delta, valid, scale: float, precision) -> Array:
  """Part of a block of keys in the cotangent of queries, (queries, D); lse and delta are columns."""
  product = functools.partial(_product, precision=precision)
  scores = product(q, k, 1, 1) * scale
  if valid is not None:
    scores = jnp.where(valid, scores, NEVER)
  change = jnp.exp(scores - lse) * (product(do, v, 1, 1) - delta) * scale
  return product(change.astype(k.dtype), k, 1, 0)


def of_keys(q, k, v, do, lse, delta, scale: float, precision) -> tuple[Array, Array]:
  """Parts of a block of queries in the cotangents of keys and values, (keys, D); lse and delta are rows.

  Here the scores are keys by queries: their sums over queries are then products without a transposition.
  """
  product = functools.partial(_product, precision=precision)
  weights = jnp.exp(product(k, q, 1, 1) * scale - lse)
  change = weights * (product(v, do, 1, 1) - delta) * scale
  return product(change.astype(q.dtype), q, 1, 0), product(weights.astype(do.dtype), do, 1, 0)


def iota(shape: tuple[int, ...], axis: int) -> Array:
  """Places along an axis."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
