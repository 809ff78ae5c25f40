"""A TPU kernel of attention among the tokens of one example, which reads them as the layer before wrote them.

The arrays in main memory are token-major, (B, T, H * D), and heads lie side by side: nothing is transposed or padded
there. One step of the grid has one example. Its queries, keys and values, and the scores of one head at a time, fit in
on-chip memory, where a head's columns are cut out and padded to the lanes. The backward kernel makes the scores again,
so that the queries, keys and values are all that is kept for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pflow_jax.core.batches import traced_device_kind
from pflow_jax.mesh.chips import vmem_bytes

# The kernels may ask for half of a core's on-chip memory. What they ask for is missing to the compiler, which keeps a
# layer's inputs and outputs there where they fit.
SHARE = 1 / 2
SCORES = 16  # arrays (T, T) in float32 that Mosaic holds at once, heads being unrolled; measured
LANES = 128

Arrays = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def short_attention(qkv: Arrays, num_heads: int, interpret: bool = False) -> jax.Array:
  """Full attention of T tokens on themselves, scores and softmax in float32.

  Args:
    qkv: queries, keys and values: one array (B, T, 3 * H * D), or three of (B, T, H * D).
    num_heads: H.
    interpret: run in Pallas' interpreter, on any device.

  Returns:
    (B, T, H * D), in the dtype of `qkv`.
  """
  return _call(_forward, 2, (qkv,), _width(qkv), num_heads, interpret)[0]


def _vjp_forward(qkv, num_heads, interpret):
  return short_attention(qkv, num_heads, interpret), qkv


def _vjp_backward(num_heads, interpret, qkv, cotangent):
  widths = tuple(a.shape[-1] for a in qkv)
  return (_call(_backward, 5, (qkv, (cotangent,)), widths, num_heads, interpret),)


short_attention.defvjp(_vjp_forward, _vjp_backward)


def _width(qkv: Arrays) -> tuple[int, ...]:
  return (sum(a.shape[-1] for a in qkv) // 3,)


def _call(
  body: Callable[..., None],
  products: int,
  inputs: Sequence[Arrays],
  widths: tuple[int, ...],
  num_heads: int,
  interpret: bool,
) -> Arrays:
  """Runs `body` on every example; results are (B, T, width) for each of `widths`, in the dtype of the inputs."""
  like = inputs[0][0]
  batch, tokens, _ = like.shape
  head = sum(a.shape[-1] for a in inputs[0]) // (3 * num_heads)
  sizes = tuple(len(group) for group in inputs)

  def kernel(*refs):
    rest, groups = list(refs), []
    for size in (*sizes, len(widths)):
      groups.append(_Columns(rest[:size], num_heads, head))
      del rest[:size]
    body(*groups, num_heads=num_heads, scale=1 / math.sqrt(head))

  def spec(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, tokens, width), lambda i: (i, 0, 0))

  row = (sum(a.shape[-1] for group in inputs for a in group) + sum(widths)) * like.dtype.itemsize
  cost = pl.CostEstimate(
    flops=2 * products * batch * num_heads * tokens**2 * head,
    transcendentals=batch * num_heads * tokens**2,
    bytes_accessed=batch * tokens * row,
  )
  return pl.pallas_call(
    kernel,
    grid=(batch,),
    in_specs=[spec(a.shape[-1]) for group in inputs for a in group],
    out_specs=[spec(width) for width in widths],
    out_shape=[jax.ShapeDtypeStruct((batch, tokens, width), like.dtype) for width in widths],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_on_chip(tokens, row)),
    cost_estimate=cost,
    interpret=interpret,
    name=f"short_attention{body.__name__}",
  )(*(a for group in inputs for a in group))


def is_short(tokens: int, width: int, dtype: Any) -> bool:
  """Returns whether the kernels take sequences of so many tokens of H * D = `width` channels.

  Of DiT-XL/2's width, 1152 in bfloat16, they take 768 on v5e and v6e, 384 on v5p and tpu7x, 128 on the others. It
  depends on the devices of the mesh that this is traced for, which for a plan are those of its topology.
  """
  needed = _on_chip(tokens, 7 * width * jnp.dtype(dtype).itemsize)
  return needed <= SHARE * vmem_bytes(traced_device_kind())


def _on_chip(tokens: int, row: int) -> int:
  """Bytes of on-chip memory for one example, of whose tokens `row` bytes are read and written.

  These are there twice, as the next example's are under way; the rest is for scores.
  """
  side = -(-tokens // LANES) * LANES
  return 2 * side * row + SCORES * 4 * side**2 + 2**20


class _Columns:
  """The columns of single heads in blocks (1, T, width) that hold one part each, or one after the other."""

  def __init__(self, refs, num_heads: int, head: int):
    self.refs, self.num_heads, self.head = refs, num_heads, head

  def _place(self, part: int, index: int):
    whole = self.num_heads * self.head
    ref, start = (self.refs[part], 0) if len(self.refs) > 1 else (self.refs[0], part * whole)
    start += index * self.head
    return ref, (0, slice(None), slice(start, start + self.head))

  def read(self, part: int, index: int) -> jax.Array:
    ref, place = self._place(part, index)
    return ref[place]

  def write(self, part: int, index: int, value: jax.Array) -> None:
    ref, place = self._place(part, index)
    ref[place] = value.astype(ref.dtype)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Matrix product over one axis of each, summed in float32."""
  dims = (((axis_a,), (axis_b,)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward(qkv: _Columns, out: _Columns, *, num_heads: int, scale: float) -> None:
  for h in range(num_heads):
    q, k, v = (qkv.read(part, h) for part in range(3))
    scores = _product(q, k, 1, 1) * scale  # (queries, keys)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    total = jnp.sum(weights, axis=1, keepdims=True)
    out.write(0, h, _product(weights.astype(v.dtype), v, 1, 0) / total)


def _backward(qkv: _Columns, cotangent: _Columns, gradients: _Columns, *, num_heads: int, scale: float) -> None:
  for h in range(num_heads):
    q, k, v = (qkv.read(part, h) for part in range(3))
    do = cotangent.read(0, h)
    # Keys by queries: sums over keys are then sums of rows, and three of the products need no transposition.
    scores = _product(k, q, 1, 1) * scale
    weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    weights /= jnp.sum(weights, axis=0, keepdims=True)
    change = _product(v, do, 1, 1)
    change = weights * (change - jnp.sum(weights * change, axis=0, keepdims=True)) * scale
    gradients.write(2, h, _product(weights.astype(v.dtype), do, 1, 0))
    change = change.astype(q.dtype)
    gradients.write(1, h, _product(change, q, 1, 0))
    gradients.write(0, h, _product(change, k, 0, 0))
