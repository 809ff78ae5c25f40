"""TPU kernels of `networks.flash_jvp`: blocks of queries and keys on the grid, sums in scratch memory."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pflow_jax.networks import flash_steps as steps
from pflow_jax.networks.flash_steps import Options

Array = jax.Array

LANES = 128  # of a TPU's registers

# Tokens of a TPU's blocks, and what a block costs beside its tokens, in tokens: a guess.
BLOCKS = (512, 384, 256, 128)
BLOCK_COST = 64
MAX_BYTES = 40 * 2**20  # of on-chip memory that blocks may take; the smallest, TPU7x's and v5p's, has 64 MiB
SCORES = 12  # arrays of scores in float32 that Mosaic holds at once
# With tangents it holds more where a block has many heads: they are unrolled, and none has what another needs no more.
# For each head so many arrays of scores and of rows, without tangents half of it, and that in float32 alone; bounds of
# what refusals told for 1 to 16 heads on v5e and v6e, of which v6e's are larger.
SCORES_OF_HEAD = 3
ROWS_OF_HEAD = 10


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

  def __init__(
    self,
    q: Array,
    k: Array,
    of_queries: int,
    of_keys: int,
    sums: int,
    *,
    by_keys: bool = False,
    tangents: bool = False,
  ):
    """Chooses blocks for a kernel that reads and writes so many arrays of queries, of keys, and sums so many."""
    batch, tokens, heads, width = q.shape
    self.tokens, self.limit, self.width, self.by_keys = tokens, k.shape[1], width, by_keys
    whole = [n for n in range(1, heads) if heads % n == 0 and n * width % LANES == 0]
    self.heads = min(whole, default=heads)
    self.columns = self.heads * width
    padded = width + -width % LANES
    for bound in BLOCKS:
      self.queries, self.keys = _block(tokens, bound), _block(self.limit, bound)
      rows = of_queries * self.queries + of_keys * self.keys
      summed = sums * self.heads * (self.keys if by_keys else self.queries) * padded * 4
      scores, row = 4 * self.queries * self.keys, padded * self.queries * q.dtype.itemsize
      of_heads = self.heads * (SCORES_OF_HEAD * scores + ROWS_OF_HEAD * row)
      if not tangents:
        of_heads = of_heads // 2 if q.dtype.itemsize > 2 else 0
      held = max(SCORES * scores, of_heads)
      # Blocks are there twice, as the next one is under way.
      self.bytes = 2 * rows * self.columns * q.dtype.itemsize + summed + held + 2**21
      if self.bytes <= MAX_BYTES:
        break
    self.q_blocks, self.k_blocks = pl.cdiv(tokens, self.queries), pl.cdiv(self.limit, self.keys)
    inner = (self.k_blocks, self.q_blocks) if by_keys else (self.q_blocks, self.k_blocks)
    self.grid = (batch, heads // self.heads, *inner)
    self.count = self.grid[3]

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
    inside = steps.iota((rows.shape[0], 1), 0) < tokens - block * rows.shape[0]
    return jnp.where(inside, rows, jnp.zeros((), rows.dtype))

  def place(self, head: int) -> slice:
    """Columns of a head in a block."""
    return slice(head * self.width, (head + 1) * self.width)

  def valid(self, mask: Any, block: Any) -> Array | None:
    """Keys of a block that are attended to, (1, keys), or None for all."""
    valid = None if mask is None else mask[...] > 0
    if self.limit % self.keys:
      inside = steps.iota((1, self.keys), 1) < self.limit - block * self.keys
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
    scratch = scratch if self.count > 1 else {}
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


def _precision(options: Options) -> jax.lax.Precision:
  """Precision of a kernel's products; Mosaic has two, and "high" is between them."""
  high = options.precision == jax.lax.Precision.HIGH
  return jax.lax.Precision.HIGHEST if high else options.precision


def _flat(a: Array) -> Array:
  return a.reshape(*a.shape[:2], -1)


def _flats(arrays: dict[str, Array | None], spec: pl.BlockSpec) -> dict[str, tuple[Array | None, pl.BlockSpec]]:
  """Inputs for `_Grid.call`: arrays (B, tokens, H, D) as (B, tokens, H * D)."""
  return {name: (None if a is None else _flat(a), spec) for name, a in arrays.items()}


def attend(q, k, v, mask, tangents, means, options: Options) -> tuple[Array, ...]:
  """Computes `networks.flash_kernels.attend`; means are those of k and its tangent, (B, 1, H, D), or none."""
  wide, scale, precision = steps.wide(q.dtype), 1 / math.sqrt(q.shape[-1]), _precision(options)
  sums = 2 if tangents else 1
  grid = _Grid(q, k, of_queries=2 * sums, of_keys=2 * sums, sums=sums, tangents=bool(tangents))
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
        of_q, of_k = steps.centred(k, mean(r.k_mean), scale), steps.centred(rows(r.dk), mean(r.dk_mean), scale)
        tangents = (grid.read(r.dq, h), of_q, of_k, rows(r.dv))
      valid = grid.valid(r.mask, block)
      return steps.add_keys(state, q, k, rows(r.v), valid, tangents, scale, precision)

    def write(h, state):
      out, lse, *derivative = steps.finish(state)
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

    _sweep(grid, lambda: steps.start(grid.queries, grid.width, wide, bool(tangents)), update, write, load, store)

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
  if grid.count == 1:
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

  @pl.when(step == grid.count - 1)
  def _():
    for h in range(grid.heads):
      write(h, load(h))


def backward(q, k, v, mask, do, lse, delta, options: Options) -> tuple[Array, Array, Array]:
  """Computes `networks.flash_kernels.backward`; do is O's cotangent, delta its products with O, (B, H, T)."""
  wide, scale, precision = steps.wide(q.dtype), 1 / math.sqrt(q.shape[-1]), _precision(options)

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
      part = steps.of_queries(q, rows(r.k), rows(r.v), do, r.lse[h].T, r.delta[h].T, valid, scale, precision)
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
      inside = steps.iota((1, over.queries), 1) < over.tokens - block * over.queries

    def update(h, state):
      rows = functools.partial(over.read, head=h, block=block, tokens=over.tokens)
      lse, delta = r.lse[h], r.delta[h]
      if inside is not None:
        lse, delta = jnp.where(inside, lse, -steps.NEVER), jnp.where(inside, delta, 0)
      k, v = over.read(r.k, h), over.read(r.v, h)
      parts = steps.of_keys(rows(r.q), k, v, rows(r.do), lse, delta, scale, precision)
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
