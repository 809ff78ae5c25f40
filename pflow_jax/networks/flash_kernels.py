"""Pallas kernels of `networks.flash_jvp`: attention with its forward derivative, and its reverse derivative.

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
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

Array = jax.Array

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a key that is not attended to; the difference of two is 0
LANES = 128  # of a TPU's registers

# Tokens of a TPU's blocks, and what a block costs beside its tokens, in tokens: a guess.
BLOCKS = (512, 384, 256, 128)
BLOCK_COST = 64
MAX_BYTES = 40 * 2**20  # of on-chip memory that blocks may take; the smallest, TPU7x's and v5p's, has 64 MiB
SCORES = 12  # arrays of scores in float32 that Mosaic holds at once


@dataclasses.dataclass(frozen=True)
class Options:
  """How a kernel runs.

  Attributes:
    precision: of products of float32.
    gpu: whether it is a GPU's.
    interpret: run in Pallas' interpreter, on any device.
  """

  precision: jax.lax.Precision = jax.lax.Precision.DEFAULT
  gpu: bool = False
  interpret: bool = False


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
  run = _attend_gpu if options.gpu else _attend_tpu
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
  delta = jnp.einsum("bthd,bthd->bht", out, cotangent, preferred_element_type=lse.dtype)
  run = _backward_gpu if options.gpu else _backward_tpu
  return run(q, k, v, mask, cotangent, lse, delta, options)


def _mean(keys: Array, mask: Array | None) -> Array:
  """Mean over the keys that are attended to: (B, 1, H, D), float32 or wider."""
  wide = _wide(keys.dtype)
  where = None if mask is None else mask[:, :, None, None]
  return jnp.mean(keys, axis=1, keepdims=True, dtype=wide, where=where)


def _wide(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


# Steps of all kernels.


def _product(a: Array, b: Array, axis_a: int, axis_b: int, precision: jax.lax.Precision) -> Array:
  """Matrix product over one axis of each."""
  dims, wide = (((axis_a,), (axis_b,)), ((), ())), _wide(a.dtype)
  exact = precision if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(a, b, dims, precision=(exact, exact), preferred_element_type=wide)


def _start(queries: int, width: int, dtype: Any, tangents: bool) -> tuple[Array, ...]:
  """Sums (m, l, o), l called total in what follows, and (b, a) where there are tangents, over no keys."""
  zero, rows = jnp.zeros((queries, 1), dtype), jnp.zeros((queries, width), dtype)
  return (jnp.full((queries, 1), NEVER, dtype), zero, rows, *((zero, rows) if tangents else ()))


def _step(state, q, k, v, valid, tangents, scale: float, precision) -> tuple[Array, ...]:
  """Adds a block of keys to the sums.

  Args:
    state: see `_start`.
    q: block of queries, (queries, D).
    k: block of keys, (keys, D).
    v: block of values, (keys, D).
    valid: which keys are attended to, (1, keys), or None.
    tangents: of q; of S for q, and of S for k, both as `_centred` makes them; of v. Or none.
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
  change = weights * (product(dq, of_q, 1, 1) + product(q, of_k, 1, 1))
  b = shrink * b + jnp.sum(change, axis=1, keepdims=True)
  a = shrink * a + product(change.astype(v.dtype), v, 1, 0) + product(rounded, dv, 1, 0)
  return top, total, o, b, a


def _centred(keys: Array, mean: Array, scale: float) -> Array:
  """Keys (keys, D) without their mean (1, D), scaled as scores are, which here costs less and is rounded once."""
  return ((keys.astype(mean.dtype) - mean) * scale).astype(keys.dtype)


def _finish(state: tuple[Array, ...]) -> tuple[Array, ...]:
  """O, log-sum-exp as a column, and dO where there are tangents."""
  m, total, o, *rest = state
  o = o / total
  lse = m + jnp.log(total)
  if not rest:
    return o, lse
  b, a = rest
  return o, lse, a / total - (b / total) * o


def _of_queries(q, k, v, do, lse, delta, valid, scale: float, precision) -> Array:
  """Part of a block of keys in the cotangent of queries, (queries, D); lse and delta are columns."""
  product = functools.partial(_product, precision=precision)
  scores = product(q, k, 1, 1) * scale
  if valid is not None:
    scores = jnp.where(valid, scores, NEVER)
  change = jnp.exp(scores - lse) * (product(do, v, 1, 1) - delta) * scale
  return product(change.astype(k.dtype), k, 1, 0)


def _of_keys(q, k, v, do, lse, delta, scale: float, precision) -> tuple[Array, Array]:
  """Parts of a block of queries in the cotangents of keys and values, (keys, D); lse and delta are rows.

  Here the scores are keys by queries: their sums over queries are then products without a transposition.
  """
  product = functools.partial(_product, precision=precision)
  weights = jnp.exp(product(k, q, 1, 1) * scale - lse)
  change = weights * (product(v, do, 1, 1) - delta) * scale
  return product(change.astype(q.dtype), q, 1, 0), product(weights.astype(do.dtype), do, 1, 0)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


# TPU: blocks of queries and keys on the grid, sums in scratch memory.


class _Grid:
  """Blocks and grid of a TPU kernel; its axes are (example, heads, outer tokens, inner tokens).

  Attributes:
    heads: of one block: as many as fill whole registers, or all.
    queries: of one block.
    keys: of one block.
    q_blocks: number of blocks of queries.
    k_blocks: number of blocks of keys.
    bytes: of on-chip memory.
  """

  def __init__(self, q: Array, k: Array, of_queries: int, of_keys: int, sums: int, by_keys: bool = False):
    """Chooses blocks for a kernel that reads and writes so many arrays of queries, of keys, and sums so many."""
    batch, tokens, heads, width = q.shape
    self.tokens, self.limit, self.width, self.by_keys = tokens, k.shape[1], width, by_keys
    whole = [n for n in range(1, heads) if heads % n == 0 and n * width % LANES == 0]
    self.heads = min(whole, default=heads)
    self.columns = self.heads * width
    pad = -width % LANES
    for bound in BLOCKS:
      self.queries, self.keys = _block(tokens, bound), _block(self.limit, bound)
      rows = of_queries * self.queries + of_keys * self.keys
      summed = sums * self.heads * (self.keys if by_keys else self.queries) * (width + pad) * 4
      # Blocks are there twice, as the next one is under way.
      self.bytes = 2 * rows * self.columns * q.dtype.itemsize + summed + SCORES * 4 * self.queries * self.keys + 2**21
      if self.bytes <= MAX_BYTES:
        break
    self.q_blocks, self.k_blocks = pl.cdiv(tokens, self.queries), pl.cdiv(self.limit, self.keys)
    inner = (self.k_blocks, self.q_blocks) if by_keys else (self.q_blocks, self.k_blocks)
    self.grid = (batch, heads // self.heads, *inner)
    self.steps = self.grid[3]

  def of_queries(self) -> pl.BlockSpec:
    """Blocks of arrays (B, T, H * D)."""
    return pl.BlockSpec((None, self.queries, self.columns), lambda b, h, x, y: (b, y if self.by_keys else x, h))

  def of_keys(self) -> pl.BlockSpec:
    """Blocks of arrays (B, S, H * D)."""
    return pl.BlockSpec((None, self.keys, self.columns), lambda b, h, x, y: (b, x if self.by_keys else y, h))

  def of_means(self) -> pl.BlockSpec:
    """Blocks of arrays (B, 1, H * D)."""
    return pl.BlockSpec((None, 1, self.columns), lambda b, h, x, y: (b, 0, h))

  def of_rows(self) -> pl.BlockSpec:
    """Blocks of arrays (B, H, 1, T)."""
    index = lambda b, h, x, y: (b, h, 0, y if self.by_keys else x)
    return pl.BlockSpec((None, self.heads, 1, self.queries), index)

  def of_mask(self) -> pl.BlockSpec:
    """Blocks of arrays (B, 1, S)."""
    return pl.BlockSpec((None, 1, self.keys), lambda b, h, x, y: (b, 0, x if self.by_keys else y))

  def read(self, ref: Any, head: int, block: Any = None, tokens: int = 0) -> Array:
    """One head's columns of a block; if it is told which, rows beyond the tokens, which are anything, become 0."""
    rows = ref[:, self.place(head)]
    if block is None or tokens % rows.shape[0] == 0:
      return rows
    inside = _iota((rows.shape[0], 1), 0) < tokens - block * rows.shape[0]
    return jnp.where(inside, rows, jnp.zeros((), rows.dtype))

  def place(self, head: int) -> slice:
    """Columns of a head in a block."""
    return slice(head * self.width, (head + 1) * self.width)

  def valid(self, mask: Any, block: Any) -> Array | None:
    """Keys of a block that are attended to, (1, keys), or None for all."""
    valid = None if mask is None else mask[...] > 0
    if self.limit % self.keys:
      inside = _iota((1, self.keys), 1) < self.limit - block * self.keys
      valid = inside if valid is None else valid & inside
    return valid

  def call(
    self,
    body: Callable[[Any], None],
    inputs: dict[str, tuple[Array | None, pl.BlockSpec]],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, tuple[tuple[int, ...], Any]],
    name: str,
    interpret: bool,
  ) -> tuple[Array, ...]:
    """Runs `body` on a namespace of the blocks; an input that is None stays None."""
    given = {key: (array, spec) for key, (array, spec) in inputs.items() if array is not None}
    scratch = scratch if self.steps > 1 else {}
    names = [*given, *outputs, *scratch]

    def kernel(*refs):
      body(types.SimpleNamespace(**dict.fromkeys(inputs) | dict(zip(names, refs, strict=True))))

    return tuple(
      pl.pallas_call(
        kernel,
        grid=self.grid,
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=self.bytes
        ),
        interpret=interpret,
        name=name,
      )(*(array for array, _ in given.values()))
    )


def _block(tokens: int, bound: int) -> int:
  """Tokens of a block, of at most `bound`."""
  if tokens <= bound:
    return tokens
  return min((size for size in BLOCKS if size <= bound), key=lambda size: pl.cdiv(tokens, size) * (size + BLOCK_COST))


def _flat(a: Array) -> Array:
  return a.reshape(*a.shape[:2], -1)


def _flats(arrays: dict[str, Array | None], spec: pl.BlockSpec) -> dict[str, tuple[Array | None, pl.BlockSpec]]:
  """Inputs for `_Grid.call`: arrays (B, tokens, H, D) as (B, tokens, H * D)."""
  return {name: (None if a is None else _flat(a), spec) for name, a in arrays.items()}


def _attend_tpu(q, k, v, mask, tangents, means, options: Options) -> tuple[Array, ...]:
  wide, scale = _wide(q.dtype), 1 / math.sqrt(q.shape[-1])
  sums = 2 if tangents else 1
  grid = _Grid(q, k, of_queries=2 * sums, of_keys=2 * sums, sums=sums)
  dq, dk, dv = tangents or (None,) * 3
  k_mean, dk_mean = means or (None,) * 2

  def body(r):
    block = pl.program_id(3)

    def update(h, state):
      rows = functools.partial(grid.read, head=h, block=block, tokens=grid.limit)
      q, k = grid.read(r.q, h), rows(r.k)
      tangents: tuple[Array, ...] = ()
      if dq is not None:
        mean = functools.partial(grid.read, head=h)
        of_q, of_k = _centred(k, mean(r.k_mean), scale), _centred(rows(r.dk), mean(r.dk_mean), scale)
        tangents = (grid.read(r.dq, h), of_q, of_k, rows(r.dv))
      valid = grid.valid(r.mask, block)
      return _step(state, q, k, rows(r.v), valid, tangents, scale, options.precision)

    def write(h, state):
      out, lse, *derivative = _finish(state)
      r.out[:, grid.place(h)] = out.astype(r.out.dtype)
      r.lse[h] = lse.T
      for one in derivative:
        r.dout[:, grid.place(h)] = one.astype(r.dout.dtype)

    def load(h):
      m, total, *b = (r.columns[n, :, h : h + 1] for n in range(r.columns.shape[0]))
      o, *a = (r.sums[n, h] for n in range(sums))
      return m, total, o, *b, *a

    def store(h, state):
      m, total, o, *rest = state
      for n, value in enumerate((m, total, *rest[:1])):
        r.columns[n, :, h : h + 1] = value
      for n, value in enumerate((o, *rest[1:])):
        r.sums[n, h] = value

    _sweep(grid, lambda: _start(grid.queries, grid.width, wide, bool(tangents)), update, write, load, store)

  like = jax.ShapeDtypeStruct(_flat(q).shape, q.dtype)
  rows = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], 1, q.shape[1]), wide)
  outputs = {"out": (like, grid.of_queries()), "lse": (rows, grid.of_rows())}
  if tangents:
    outputs["dout"] = (like, grid.of_queries())
  inputs = _flats({"q": q, "dq": dq}, grid.of_queries()) | _flats({"k": k, "v": v, "dk": dk, "dv": dv}, grid.of_keys())
  inputs |= _flats({"k_mean": k_mean, "dk_mean": dk_mean}, grid.of_means()) | {"mask": (_row(mask), grid.of_mask())}
  out, lse, *derivative = grid.call(
    body,
    inputs,
    outputs,
    {
      "columns": ((1 + sums, grid.queries, grid.heads), wide),
      "sums": ((sums, grid.heads, grid.queries, grid.width), wide),
    },
    "flash_jvp" if tangents else "flash",
    options.interpret,
  )
  return out.reshape(q.shape), lse[:, :, 0], *(a.reshape(q.shape) for a in derivative)


def _row(mask: Array | None) -> Array | None:
  return None if mask is None else mask.astype(jnp.int32)[:, None]


def _sweep(grid: _Grid, start, update, write, load, store) -> None:
  """Sums over the inner axis of the grid, for each head: in registers where it has one step, else in scratch memory."""
  if grid.steps == 1:
    for h in range(grid.heads):
      write(h, update(h, start()))
    return
  step = pl.program_id(3)

  @pl.when(step == 0)
  def _():
    for h in range(grid.heads):
      store(h, start())

  for h in range(grid.heads):
    store(h, update(h, load(h)))

  @pl.when(step == grid.steps - 1)
  def _():
    for h in range(grid.heads):
      write(h, load(h))


def _backward_tpu(q, k, v, mask, do, lse, delta, options: Options) -> tuple[Array, Array, Array]:
  wide, scale = _wide(q.dtype), 1 / math.sqrt(q.shape[-1])

  def inputs(grid):
    return (
      _flats({"q": q, "do": do}, grid.of_queries())
      | _flats({"k": k, "v": v}, grid.of_keys())
      | {name: (a[:, :, None], grid.of_rows()) for name, a in dict(lse=lse, delta=delta).items()}
      | {"mask": (_row(mask), grid.of_mask())}
    )

  grid = _Grid(q, k, of_queries=3, of_keys=2, sums=1)

  def of_queries(r):
    block = pl.program_id(3)

    def update(h, state):
      (dq,) = state
      rows = functools.partial(grid.read, head=h, block=block, tokens=grid.limit)
      q, do = grid.read(r.q, h), grid.read(r.do, h)
      valid = grid.valid(r.mask, block)
      part = _of_queries(q, rows(r.k), rows(r.v), do, r.lse[h].T, r.delta[h].T, valid, scale, options.precision)
      return (dq + part,)

    def write(h, state):
      r.dq[:, grid.place(h)] = state[0].astype(r.dq.dtype)

    def store(h, state):
      r.sums[h] = state[0]

    _sweep(grid, lambda: (jnp.zeros((grid.queries, grid.width), wide),), update, write, lambda h: (r.sums[h],), store)

  like = jax.ShapeDtypeStruct(_flat(q).shape, q.dtype)
  scratch = {"sums": ((grid.heads, grid.queries, grid.width), wide)}
  outputs = {"dq": (like, grid.of_queries())}
  (dq,) = grid.call(of_queries, inputs(grid), outputs, scratch, "flash_dq", options.interpret)

  over = _Grid(q, k, of_queries=2, of_keys=4, sums=2, by_keys=True)

  def of_keys(r):
    block = pl.program_id(3)
    inside = None
    if over.tokens % over.queries:
      inside = _iota((1, over.queries), 1) < over.tokens - block * over.queries

    def update(h, state):
      rows = functools.partial(over.read, head=h, block=block, tokens=over.tokens)
      lse, delta = r.lse[h], r.delta[h]
      if inside is not None:
        lse, delta = jnp.where(inside, lse, -NEVER), jnp.where(inside, delta, 0)
      k, v = over.read(r.k, h), over.read(r.v, h)
      parts = _of_keys(rows(r.q), k, v, rows(r.do), lse, delta, scale, options.precision)
      return tuple(a + b for a, b in zip(state, parts, strict=True))

    def write(h, state):
      # A key has its own row, so that one that is not attended to may be anything before.
      kept = None if r.mask is None else r.mask[...].T > 0
      for ref, value in zip((r.dk, r.dv), state, strict=True):
        ref[:, over.place(h)] = (value if kept is None else jnp.where(kept, value, 0)).astype(ref.dtype)

    def store(h, state):
      for n, value in enumerate(state):
        r.sums[n, h] = value

    zero = lambda: (jnp.zeros((over.keys, over.width), wide),) * 2
    _sweep(over, zero, update, write, lambda h: (r.sums[0, h], r.sums[1, h]), store)

  like = jax.ShapeDtypeStruct(_flat(k).shape, k.dtype)
  scratch_of_keys = {"sums": ((2, over.heads, over.keys, over.width), wide)}
  outputs = {name: (like, over.of_keys()) for name in ("dk", "dv")}
  dk, dv = over.call(of_keys, inputs(over), outputs, scratch_of_keys, "flash_dkv", options.interpret)
  return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


# GPU: blocks of queries (or of keys) on the grid, and a loop over the others. Triton's blocks are powers of 2, and it
# reads what it is told to, so that each reading has a mask; what lies beyond is 0.


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
    # Rows of four bytes, or of more than 128 channels, take the place of two.
    inner //= max(1, q.dtype.itemsize // 2) * max(1, self.width // 128)
    outer, inner = max(16, outer), max(16, inner)
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
    """Which numbers of a block of an array (tokens, D) are there."""
    rows, columns = (_iota((size, self.width), axis) for axis in (0, 1))
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
    return plgpu.load(ref, mask=_iota((1, self.width), 1) < self.head, other=0.0)

  def numbers(self, ref: Any, block: Any, other: float) -> Array:
    """A number for each query of a block, (queries,), of an array (B, H, T)."""
    part = ref.at[pl.ds(block * self.queries, self.queries)] if self.by_keys else ref
    return plgpu.load(part, mask=_iota((self.queries,), 0) < self.tokens - block * self.queries, other=other)

  def valid(self, ref: Any, block: Any) -> Array | None:
    """Keys of a block that are attended to, (keys,), or None for all."""
    if ref is None and self.limit % self.keys == 0:
      return None
    inside = _iota((self.keys,), 0) < self.limit - block * self.keys
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


def _attend_gpu(q, k, v, mask, tangents, means, options: Options) -> tuple[Array, ...]:
  wide, scale = _wide(q.dtype), 1 / math.sqrt(q.shape[-1])
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
        of_q, of_k = _centred(k, k_mean, scale), _centred(loop.key_rows(r.dk, j), dk_mean, scale)
        tangents = (along, of_q, of_k, loop.key_rows(r.dv, j))
      return _step(state, q, k, v, None if valid is None else valid[None], tangents, scale, options.precision)

    state = _start(loop.queries, loop.width, wide, dq is not None)
    out, lse, *derivative = _finish(jax.lax.fori_loop(0, pl.cdiv(loop.limit, loop.keys), step, state))
    loop.write(r.out, out, own)
    there = _iota((loop.queries,), 0) < loop.tokens - own * loop.queries
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


def _backward_gpu(q, k, v, mask, do, lse, delta, options: Options) -> tuple[Array, Array, Array]:
  wide, scale = _wide(q.dtype), 1 / math.sqrt(q.shape[-1])

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
      return dq + _of_queries(q, k, v, do, lse, delta, None if valid is None else valid[None], scale, options.precision)

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
      lse, delta = over.numbers(r.lse, i, -NEVER)[None], over.numbers(r.delta, i, 0.0)[None]
      dk, dv = _of_keys(q, k, v, do, lse, delta, scale, options.precision)
      return state[0] + dk, state[1] + dv

    zero = jnp.zeros((over.keys, over.width), wide)
    state = jax.lax.fori_loop(0, pl.cdiv(over.tokens, over.queries), step, (zero, zero))
    for ref, value in zip((r.dk, r.dv), state, strict=True):
      over.write(ref, value if valid is None else jnp.where(valid[:, None], value, 0.0), own)

  like = jax.ShapeDtypeStruct(k.shape, k.dtype)
  outputs = {name: (like, over.of_keys()) for name in ("dk", "dv")}
  dk, dv = over.call(of_keys, inputs(over), outputs, "flash_dkv", options.interpret)
  return dq, dk, dv
