"""Attention behind one dispatch function, so that a network never names a kernel.

"xla" runs everywhere and has derivatives of every order and mode. "cudnn" is the fused kernel of
NVIDIA GPUs: reverse mode only, so a program whose objective differentiates forward (jvp) asks
`supports_jvp` first.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Implementation -> whether jvp works. The fused kernel carries a custom_vjp and nothing else.
IMPLEMENTATIONS = {"xla": True, "cudnn": False}


def _check(implementation: str) -> None:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention implementation: expected one of {sorted(IMPLEMENTATIONS)}, got {implementation!r}")


def supports_jvp(implementation: str) -> bool:
  """Returns whether `jax.jvp` works through `attention(..., implementation=implementation)`."""
  _check(implementation)
  return IMPLEMENTATIONS[implementation]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "xla") -> jax.Array:
  """Full (bidirectional) scaled dot-product attention, softmax in float32 (or wider).

  Args:
    q: queries, (B, T, H, D).   k, v: keys and values, (B, S, H, D).
    implementation: "xla" anywhere; "cudnn" on NVIDIA GPUs, float16 or bfloat16 inputs only.

  Returns: (B, T, H, D) in the dtype of `q`.
  Raises: ValueError for an unknown implementation.
  """
  _check(implementation)
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  # Not jax.nn's "xla" path: it is the same formula and as fast, but rounds a float64 softmax to
  # float32, which spoils every check of a derivative.
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
  weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
