"""GPU kernels of `networks.flash_jvp`: blocks of queries, or of keys, on the grid, and a loop over the others.

They go through Triton. Its blocks are powers of 2, and it reads what it is told to, so that each reading has a mask;
what lies beyond is 0.
"""

from __future__ import annotations

import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pflow_jax.networks import flash_steps as steps
from pflow_jax.networks.flash_steps import Options

Array = jax.Array


class _Loop:
  """Blocks of a GPU kernel; its grid is (blocks of tokens, heads, examples).

  Attributes:
    width: of a head in a block.
    queries: of one block.
    keys: of one block.
  """

  def __init__(self, q: Array, k: Array, outer: int, inner: int, by_keys: bool = False):
    """Chooses blocks of at most `outer` tokens, over which the grid goes, and `inner`, over which the loop goes."""
    self.batch, self.tokens, self.heads, self.head = q.shape
    self.limit, self.by_keys = k.shape[1], by_keys
    # A product has sides of 16 at least.
    power = lambda n: max(16, pl.next_power_of_2(n))
    self.width = power(self.head)
    # Rows of four bytes, or of more than 128 channels, take the place of two. That goes for the own rows too, which lie
    # in registers with their float32 sums: 128 queries of 128 channels and four bytes, their tangents and two sums
    # would take 256 registers of a thread, which has 255.
    size = max(1, q.dtype.itemsize // 2) * max(1, self.width // 128)
    outer, inner = max(16, min(outer, 128 // size)), max(16, inner // size)
    self.queries = min(inner if by_keys else outer, power(self.tokens))
    self.keys = min(outer if by_keys else inner, power(self.limit))

  def spec(self, tokens: int, size: int, whole: bool) -> pl.BlockSpec:
    """Blocks of `size` tokens of arrays (B, tokens, H, D), or all of them."""
    if whole:
      return pl.BlockSpec((None, pl.cdiv(tokens, size) * size, None, self.width), lambda i, h, b: (b, 0, h, 0))
    return pl.BlockSpec((None, size, None, self.width), lambda i, h, b: (b, i, h, 0))

  def of_queries(self) -> pl.BlockSpec:
    """Those of arrays (B, T, H, D)."""
    return self.spec(self.tokens, self.queries, self.by_keys)

  def of_keys(self) -> pl.BlockSpec:
    """Those of arrays (B, S, H, D)."""
    return self.spec(self.limit, self.keys, not self.by_keys)

  def of_means(self) -> pl.BlockSpec:
    """Those of arrays (B, 1, H, D)."""
    return pl.BlockSpec((None, 1, None, self.width), lambda i, h, b: (b, 0, h, 0))

  def of_rows(self) -> pl.BlockSpec:
    """Those of arrays (B, H, T)."""
    if self.by_keys:
      size = pl.cdiv(self.tokens, self.queries) * self.queries
      return pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, 0))
    return pl.BlockSpec((None, None, self.queries), lambda i, h, b: (b, h, i))

  def of_mask(self) -> pl.BlockSpec:
    """Those of arrays (B, S)."""
    if self.by_keys:
      return pl.BlockSpec((None, self.keys), lambda i, h, b: (b, i))
    return pl.BlockSpec((None, pl.cdiv(self.limit, self.keys) * self.keys), lambda i, h, b: (b, 0))

  def inside(self, block: Any, size: int, tokens: int) -> Array:
    """Tells the numbers of a block that an array (tokens, D) has."""
    rows, columns = (steps.iota((size, self.width), axis) for axis in (0, 1))
    return (rows < tokens - block * size) & (columns < self.head)

  def read(self, ref: Any, block: Any, size: int, tokens: int, whole: bool) -> Array:
    """Rows of a block, of the one that a kernel has or of a whole array."""
    part = ref.at[pl.ds(block * size, size), :] if whole else ref
    return plgpu.load(part, mask=self.inside(block, size, tokens), other=0.0)

  def query_rows(self, ref: Any, block: Any) -> Array:
    """Rows of an array (B, T, H, D)."""
    return self.read(ref, block, self.queries, self.tokens, self.by_keys)

  def key_rows(self, ref: Any, block: Any) -> Array:
    """Rows of an array (B, S, H, D)."""
    return self.read(ref, block, self.keys, self.limit, not self.by_keys)

  def mean_row(self, ref: Any) -> Array:
    """The row of an array (B, 1, H, D)."""
    return plgpu.load(ref, mask=steps.iota((1, self.width), 1) < self.head, other=0.0)

  def numbers(self, ref: Any, block: Any, other: float) -> Array:
    """A number for each query of a block, (queries,), of an array (B, H, T)."""
    part = ref.at[pl.ds(block * self.queries, self.queries)] if self.by_keys else ref
    return plgpu.load(part, mask=steps.iota((self.queries,), 0) < self.tokens - block * self.queries, other=other)

  def valid(self, ref: Any, block: Any) -> Array | None:
    """Keys of a block that are attended to, (keys,), or None for all."""
    if ref is None and self.limit % self.keys == 0:
      return None
    inside = steps.iota((self.keys,), 0) < self.limit - block * self.keys
    if ref is None:
      return inside
    part = ref if self.by_keys else ref.at[pl.ds(block * self.keys, self.keys)]
    return plgpu.load(part, mask=inside, other=0) > 0

  def write(self, ref: Any, value: Array, block: Any) -> None:
    """Writes the rows of a block that the kernel has."""
    size, tokens = (self.keys, self.limit) if self.by_keys else (self.queries, self.tokens)
    plgpu.store(ref, value.astype(ref.dtype), mask=self.inside(block, size, tokens))

  def call(self, body, inputs, outputs, name: str, interpret: bool) -> tuple[Array, ...]:
    """Runs `body` on a namespace of the blocks; an input that is None stays None."""
    given = {key: (array, spec) for key, (array, spec) in inputs.items() if array is not None}
    names = [*given, *outputs]

    def kernel(*refs):
      body(types.SimpleNamespace(**dict.fromkeys(inputs) | dict(zip(names, refs, strict=True))))

    blocks = pl.cdiv(self.limit, self.keys) if self.by_keys else pl.cdiv(self.tokens, self.queries)
    return tuple(
      pl.pallas_call(
        kernel,
        grid=(blocks, self.heads, self.batch),
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=plgpu.CompilerParams(num_warps=8 if self.width > 64 else 4, num_stages=2),
        interpret=interpret,
        name=name,
      )(*(array for array, _ in given.values()))
    )


def attend(q, k, v, mask, tangents, means, options: Options) -> tuple[Array, ...]:
  """Computes `networks.flash_kernels.attend`; means are those of k and its tangent, (B, 1, H, D), or none."""
  wide, scale = steps.wide(q.dtype), 1 / math.sqrt(q.shape[-1])
  loop = _Loop(q, k, outer=128, inner=32 if tangents else 64)
  dq, dk, dv = tangents or (None,) * 3
  k_mean, dk_mean = means or (None,) * 2

  def body(r):
    own = pl.program_id(0)
    q = loop.query_rows(r.q, own)
    if dq is not None:
      along, k_mean, dk_mean = loop.query_rows(r.dq, own), loop.mean_row(r.k_mean), loop.mean_row(r.dk_mean)

    def step(j, state):
      k, v, valid = loop.key_rows(r.k, j), loop.key_rows(r.v, j), loop.valid(r.mask, j)
      tangents: tuple[Array, ...] = ()
      if dq is not None:
        of_q, of_k = steps.centred(k, k_mean, scale), steps.centred(loop.key_rows(r.dk, j), dk_mean, scale)
        tangents = (along, of_q, of_k, loop.key_rows(r.dv, j))
      return steps.add_keys(state, q, k, v, None if valid is None else valid[None], tangents, scale, options.precision)

    state = steps.start(loop.queries, loop.width, wide, dq is not None)
    out, lse, *derivative = steps.finish(jax.lax.fori_loop(0, pl.cdiv(loop.limit, loop.keys), step, state))
    loop.write(r.out, out, own)
    there = steps.iota((loop.queries,), 0) < loop.tokens - own * loop.queries
    plgpu.store(r.lse, lse.reshape(loop.queries), mask=there)
    for one in derivative:
      loop.write(r.dout, one, own)

  like = jax.ShapeDtypeStruct(q.shape, q.dtype)
  rows = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), wide)
  outputs = {"out": (like, loop.of_queries()), "lse": (rows, loop.of_rows())}
  if tangents:
    outputs["dout"] = (like, loop.of_queries())
  inputs = (
    {name: (a, loop.of_queries()) for name, a in dict(q=q, dq=dq).items()}
    | {name: (a, loop.of_keys()) for name, a in dict(k=k, v=v, dk=dk, dv=dv).items()}
    | {name: (a, loop.of_means()) for name, a in dict(k_mean=k_mean, dk_mean=dk_mean).items()}
    | {"mask": (None if mask is None else mask.astype(jnp.int32), loop.of_mask())}
  )
  return loop.call(body, inputs, outputs, "flash_jvp" if tangents else "flash", options.interpret)


def backward(q, k, v, mask, do, lse, delta, options: Options) -> tuple[Array, Array, Array]:
  """Computes `networks.flash_kernels.backward`; do is O's cotangent, delta its products with O, (B, H, T)."""
  wide, scale = steps.wide(q.dtype), 1 / math.sqrt(q.shape[-1])

  def inputs(loop):
    return (
      {name: (a, loop.of_queries()) for name, a in dict(q=q, do=do).items()}
      | {name: (a, loop.of_keys()) for name, a in dict(k=k, v=v).items()}
      | {name: (a, loop.of_rows()) for name, a in dict(lse=lse, delta=delta).items()}
      | {"mask": (None if mask is None else mask.astype(jnp.int32), loop.of_mask())}
    )

  loop = _Loop(q, k, outer=64, inner=64)

  def of_queries(r):
    own = pl.program_id(0)
    q, do = loop.query_rows(r.q, own), loop.query_rows(r.do, own)
    lse, delta = (loop.numbers(ref, own, 0.0)[:, None] for ref in (r.lse, r.delta))

    def step(j, dq):
      k, v, valid = loop.key_rows(r.k, j), loop.key_rows(r.v, j), loop.valid(r.mask, j)
      return dq + steps.of_queries(
        q, k, v, do, lse, delta, None if valid is None else valid[None], scale, options.precision
      )

    zero = jnp.zeros((loop.queries, loop.width), wide)
    loop.write(r.dq, jax.lax.fori_loop(0, pl.cdiv(loop.limit, loop.keys), step, zero), own)

  outputs = {"dq": (jax.ShapeDtypeStruct(q.shape, q.dtype), loop.of_queries())}
  (dq,) = loop.call(of_queries, inputs(loop), outputs, "flash_dq", options.interpret)

  over = _Loop(q, k, outer=64, inner=64, by_keys=True)

  def of_keys(r):
    own = pl.program_id(0)
    k, v, valid = over.key_rows(r.k, own), over.key_rows(r.v, own), over.valid(r.mask, own)

    def step(i, state):
      q, do = over.query_rows(r.q, i), over.query_rows(r.do, i)
      # Of a query that is not there, all weights are 0.
      lse, delta = over.numbers(r.lse, i, -steps.NEVER)[None], over.numbers(r.delta, i, 0.0)[None]
      dk, dv = steps.of_keys(q, k, v, do, lse, delta, scale, options.precision)
      return state[0] + dk, state[1] + dv

    zero = jnp.zeros((over.keys, over.width), wide)
    state = jax.lax.fori_loop(0, pl.cdiv(over.tokens, over.queries), step, (zero, zero))
    for ref, value in zip((r.dk, r.dv), state, strict=True):
      over.write(ref, value if valid is None else jnp.where(valid[:, None], value, 0.0), own)

  like = jax.ShapeDtypeStruct(k.shape, k.dtype)
  outputs = {name: (like, over.of_keys()) for name in ("dk", "dv")}
  dk, dv = over.call(of_keys, inputs(over), outputs, "flash_dkv", options.interpret)
  return dq, dk, dv
