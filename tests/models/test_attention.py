"""Attention against the formula, its derivatives, and its refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.models.attention import IMPLEMENTATIONS, attention, supports_jvp


def reference(q, k, v):
  scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bhqk,bkhd->bqhd", weights, v)


def draw(dtype, key=0):
  return jax.random.normal(jax.random.key(key), (3, 2, 5, 3, 8), dtype)


def test_matches_the_formula():
  q, k, v = draw(jnp.float32)
  want = reference(*(np.asarray(a, np.float64) for a in (q, k, v)))
  np.testing.assert_allclose(attention(q, k, v), want, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_a_float32_softmax():
  q, k, v = draw(jnp.bfloat16)
  out = attention(q, k, v)
  assert out.dtype == jnp.bfloat16
  jaxpr = str(jax.make_jaxpr(attention)(q, k, v))
  assert re.search(r"f32\[[\d,]*\] = exp ", jaxpr)
  assert not re.search(r"bf16\[[\d,]*\] = exp ", jaxpr)
  want = reference(*(np.asarray(a, np.float64) for a in (q, k, v)))
  np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.03)


def test_jvp_of_xla():
  (q, k, v), (dq, dk, dv) = draw(jnp.float32), draw(jnp.float32, 1)
  q, k, v, dq, dk, dv = (a.astype(jnp.float64) for a in (q, k, v, dq, dk, dv))
  _, tangent = jax.jvp(attention, (q, k, v), (dq, dk, dv))
  h = 1e-6
  after = reference(q + h * dq, k + h * dk, v + h * dv)
  before = reference(q - h * dq, k - h * dk, v - h * dv)
  np.testing.assert_allclose(tangent, (after - before) / (2 * h), rtol=1e-7, atol=1e-9)


def test_support_table():
  assert supports_jvp("xla")
  assert not supports_jvp("cudnn")


@pytest.mark.parametrize("call", [supports_jvp, lambda name: attention(*[None] * 3, implementation=name)])
def test_unknown_name_lists_the_choices(call):
  with pytest.raises(ValueError, match=r"expected one of \['cudnn', 'xla'\], got 'flash'"):
    call("flash")
  assert sorted(IMPLEMENTATIONS) == ["cudnn", "xla"]
