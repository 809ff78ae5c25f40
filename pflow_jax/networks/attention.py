"""Attention behind one dispatch function, so that a network never names a kernel.

"xla" runs everywhere and has derivatives of every order and mode. The fused kernels never hold the scores. Those of
others, "cudnn" for NVIDIA GPUs and "splash" for TPUs, are reverse mode only, so a program whose objective
differentiates forward (jvp) asks `supports_jvp` first. Two are this package's own, and read and write tokens as the
layers around them have them, where splash has them transposed and padded. "flash_jvp" has a forward derivative too, on
TPUs and GPUs, see `networks.flash_jvp`. "pallas" is for TPUs and for attention of tokens on themselves, without a mask,
where an example fits in on-chip memory, see `networks.short_attention` and `is_short`; other calls of it are splash's.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from pflow_jax.core.batches import BATCH, current_mesh
from pflow_jax.mesh.sharding import constrain
from pflow_jax.networks.flash_jvp import flash_jvp
from pflow_jax.networks.short_attention import is_short, short_attention

# Implementation -> whether jvp works. Those without have a custom_vjp and nothing else.
IMPLEMENTATIONS = {"xla": True, "cudnn": False, "splash": False, "pallas": False, "flash_jvp": True}
# Implementation -> JAX's names of the devices that have it.
GPU = ("gpu", "cuda")
PLATFORMS = {"cudnn": GPU, "splash": ("tpu",), "pallas": ("tpu",), "flash_jvp": ("tpu", *GPU)}

LANES = 128  # lanes of a TPU register; the blocks of splash are multiples of it
BLOCKS = (512, 384, 256, 128)  # sizes of splash's blocks, the largest that divides a sequence first


def _check(implementation: str) -> None:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention implementation: expected one of {sorted(IMPLEMENTATIONS)}, got {implementation!r}")


def supports_jvp(implementation: str) -> bool:
  """Returns whether `jax.jvp` works through `attention(..., implementation=implementation)`."""
  _check(implementation)
  return IMPLEMENTATIONS[implementation]


def check_platform(implementation: str, platform: str) -> None:
  """Raises ValueError if devices of `platform` do not have this implementation."""
  _check(implementation)
  if platform not in PLATFORMS.get(implementation, (platform,)):
    able = [name for name in IMPLEMENTATIONS if platform in PLATFORMS.get(name, (platform,))]
    made_for = " and ".join(f"{name.upper()}s" for name in PLATFORMS[implementation] if name != "cuda")
    raise ValueError(
      f"config.model.attention: {implementation!r} is for {made_for}, and this runs on {platform}; set "
      f"config.model.attention to one of {able}"
    )


@jax.named_scope("attention")
def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, *, implementation: str = "xla"
) -> jax.Array:
  """Full (bidirectional) scaled dot-product attention, softmax in float32 (or wider).

  Args:
    q: queries, (B, T, H, D).
    k: keys, (B, S, H, D).
    v: values, (B, S, H, D).
    mask: True for the keys that are attended to, (B, S) bool, at least one an example; None is all.
    implementation: "xla" anywhere; "cudnn" on NVIDIA GPUs, float16 or bfloat16 inputs only; "splash" or "pallas" on
      TPUs; "flash_jvp" on both.

  Returns:
    (B, T, H, D) in the dtype of `q`.

  Raises:
    ValueError: the implementation is unknown.
  """
  _check(implementation)
  if (
    implementation == "pallas"
    and mask is None
    and q.shape == k.shape
    and is_short(q.shape[1], math.prod(q.shape[2:]), q.dtype)
  ):
    return _short(tuple(a.reshape(*a.shape[:2], -1) for a in (q, k, v)), q.shape[2]).reshape(q.shape)
  if implementation in ("splash", "pallas"):
    return _splash(q, k, v, mask)
  if implementation == "flash_jvp":
    return _flash_jvp(q, k, v, mask)
  if implementation == "cudnn":
    keys = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=keys, implementation="cudnn")
  # jax.nn's "xla" path has the same formula and is as fast, but rounds a float64 softmax to float32, which spoils every
  # check of a derivative.
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
  if mask is not None:
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
  weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@jax.named_scope("attention")
def self_attention(qkv: jax.Array, num_heads: int, *, implementation: str = "xla") -> jax.Array:
  """Attention of the tokens of an example on themselves, from the output of one layer.

  Args:
    qkv: queries, keys and values of all heads, one after the other, (B, T, 3 * H * D).
    num_heads: H.
    implementation: see `attention`.

  Returns:
    (B, T, H * D) in the dtype of `qkv`.

  Raises:
    ValueError: the implementation is unknown.
  """
  mesh = current_mesh()
  whole = mesh is None or mesh.shape["tensor"] == 1
  if implementation == "pallas" and whole and is_short(qkv.shape[1], qkv.shape[2] // 3, qkv.dtype):
    return _short((qkv,), num_heads)
  heads = qkv.reshape(*qkv.shape[:2], 3, num_heads, -1)
  heads = constrain(heads, BATCH, None, None, "tensor", None)
  q, k, v = (heads[:, :, i] for i in range(3))
  return attention(q, k, v, implementation=implementation).reshape(*qkv.shape[:2], -1)


def _short(qkv: tuple[jax.Array, ...], num_heads: int, interpret: bool = False) -> jax.Array:
  """Calls this package's kernel on each device's examples, and heads where there is an array for each part."""
  mesh = current_mesh()
  if mesh is None:
    return short_attention(qkv, num_heads, interpret)
  columns = "tensor" if len(qkv) > 1 else None
  own = _heads_of_device(num_heads, mesh) if columns else num_heads
  spec = PartitionSpec(BATCH, None, columns)

  def local(*qkv: jax.Array) -> jax.Array:
    return short_attention(qkv, own, interpret)

  return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * len(qkv), out_specs=spec, check_vma=False)(*qkv)


def _heads_of_device(num_heads: int, mesh: AbstractMesh) -> int:
  """Returns the number of heads that each device has.

  Raises:
    ValueError: the mesh does not divide them.
  """
  parts = mesh.shape["tensor"]
  if num_heads % parts:
    raise ValueError(f"mesh.tensor: expected a number that divides {num_heads} heads, got {parts}; give another")
  return num_heads // parts


def _flash_jvp(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Calls the kernels with a forward derivative on each device's examples and heads."""
  mesh = current_mesh()
  if mesh is None:
    return flash_jvp(q, k, v, mask)
  _heads_of_device(q.shape[2], mesh)
  heads = PartitionSpec(BATCH, None, "tensor")
  specs = (heads, heads, heads, None if mask is None else PartitionSpec(BATCH))
  return jax.shard_map(flash_jvp, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, mask)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, interpret: bool = False) -> jax.Array:
  """Calls the TPU kernel on each device's examples and heads; sequences are padded to whole blocks and masked."""
  mesh = current_mesh()
  batch, queries, _, width = q.shape
  keys = k.shape[1]
  q_pad, k_pad = -queries % LANES, -keys % LANES
  if mask is None and k_pad:
    mask = jnp.ones((batch, keys), bool)
  segments = None if mask is None else jnp.pad(mask, ((0, 0), (0, k_pad))).astype(jnp.int32)
  # The kernel does not scale the scores.
  q, k, v = (
    jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)
    for a, pad in ((q * width**-0.5, q_pad), (k, k_pad), (v, k_pad))
  )

  def local(q, k, v, segments):
    kernel = _splash_kernel(q.shape[1], q.shape[2], k.shape[2], interpret)
    return jax.vmap(kernel)(q, k, v, _segment_ids(q.shape[2], segments))

  if mesh is not None:
    # GSPMD cannot split a kernel; heads of an example are as independent as examples.
    _heads_of_device(q.shape[1], mesh)
    heads = PartitionSpec(BATCH, "tensor")
    specs = (heads, heads, heads, None if segments is None else PartitionSpec(BATCH))
    local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
  return local(q, k, v, segments).swapaxes(1, 2)[:, :queries]


def _segment_ids(queries: int, segments: jax.Array | None) -> Any:
  """Segment ids, of which queries see their own: 1 for all queries and keys, 0 for the keys that no query sees."""
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  return None if segments is None else SegmentIds(jnp.ones((segments.shape[0], queries), jnp.int32), segments)


@functools.lru_cache(maxsize=16)
def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool) -> Any:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  block_q, block_kv = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
  blocks = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  mask = splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads)

  def make() -> Any:
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret)
    return jax.tree.map(np.asarray, kernel)

  # Its tables have to be constants, not values of the trace in progress: another thread has no trace.
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    return thread.submit(make).result()
