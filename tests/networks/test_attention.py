"""Attention against the formula, its derivatives, and its refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pflow_jax.mesh.sharding import make_layout
from pflow_jax.networks import attention as module
from pflow_jax.networks.attention import IMPLEMENTATIONS, attention, check_platform, supports_jvp


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


LENGTHS = np.array([200, 150, 3, 77])


@pytest.fixture
def ragged():
  """Queries, keys and values (4, 200, 2, 16), and a mask of the keys that stand for something."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 200, 2, 16), jnp.float32)
  return q, k, v, jnp.asarray(np.arange(200) < LENGTHS[:, None])


def test_masked_keys_are_as_if_cut_off(ragged):
  q, k, v, mask = ragged
  out = attention(q, k, v, mask)
  for i, length in enumerate(LENGTHS):
    np.testing.assert_allclose(out[i], attention(q, k[:, :length], v[:, :length])[i], rtol=1e-5, atol=1e-6)
  gradient = jax.grad(lambda v: jnp.sum(attention(q, k, v, mask)))(v)
  assert np.all((np.abs(gradient).max((2, 3)) > 0) == mask)


@pytest.fixture
def interpreted(monkeypatch):
  """TPU kernels in Pallas' interpreter."""
  kernel = module._splash_kernel
  monkeypatch.setattr(module, "_splash_kernel", lambda heads, queries, keys, _: kernel(heads, queries, keys, True))


@pytest.mark.usefixtures("float32", "interpreted")
@pytest.mark.parametrize("masked", [False, True])
def test_splash_is_the_formula_with_its_gradients(masked, ragged):
  *qkv, mask = ragged
  mask = mask if masked else None

  def value_and_gradients(implementation):
    def f(*qkv):
      out = attention(*qkv, mask, implementation=implementation)
      return jnp.sum(out * jnp.cos(out)), out

    return jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(*qkv)

  (got, out), (want, expected) = value_and_gradients("splash"), value_and_gradients("xla")
  np.testing.assert_allclose(out, expected, atol=2e-6)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.usefixtures("float32", "interpreted")
def test_splash_stays_where_its_examples_and_heads_are(ragged):
  """On a mesh, under the vmap of a guidance pair too."""
  layout = make_layout(dict(data=2, fsdp=2, tensor=2), ())
  *qkv, mask = ragged

  def pair(q, k, v, mask):
    both = jax.vmap(lambda m: attention(q, k, v, m, implementation="splash"))(jnp.stack([mask, mask[:, ::-1]]))
    return both[0], both[1]

  expected = [attention(*qkv, m) for m in (mask, mask[:, ::-1])]
  with layout.context():
    program = jax.jit(pair).lower(*(layout.spread(a) for a in ragged)).compile()
    got = program(*(layout.spread(a) for a in ragged))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)
  assert not re.search(r"all-gather|all-reduce|all-to-all|permute", program.as_text())


def test_splash_lowers_for_tpus():
  """The kernel as a TPU gets it, forward and backward, with a head's real width."""
  q = jax.ShapeDtypeStruct((2, 300, 3, 128), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((2, 300), bool)
  loss = lambda q, mask: jnp.sum(attention(q, q, q, mask, implementation="splash").astype(jnp.float32))
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    text = jax.jit(jax.grad(loss)).trace(q, mask).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 3


def test_support_table():
  assert supports_jvp("xla")
  assert not supports_jvp("cudnn")
  assert not supports_jvp("splash")


@pytest.mark.parametrize("call", [supports_jvp, lambda name: attention(*[None] * 3, implementation=name)])
def test_unknown_name_lists_the_choices(call):
  with pytest.raises(ValueError, match=r"expected one of \['cudnn', 'splash', 'xla'\], got 'flash'"):
    call("flash")
  assert sorted(IMPLEMENTATIONS) == ["cudnn", "splash", "xla"]


def test_kernels_are_refused_where_they_are_not():
  check_platform("xla", "cpu")
  check_platform("splash", "tpu")
  check_platform("cudnn", "gpu")
  with pytest.raises(ValueError, match=r"'splash' is for TPUs, and this runs on gpu; .* one of \['xla', 'cudnn'\]"):
    check_platform("splash", "gpu")
  with pytest.raises(ValueError, match=r"'cudnn' is for GPUs, and this runs on cpu; .* one of \['xla'\]"):
    check_platform("cudnn", "cpu")


def test_splash_is_made_within_any_trace():
  """Its tables are no values of the trace that asked first, be it within a scan of a network."""
  module._splash_kernel.cache_clear()

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return attention(x, x, x, implementation="splash"), None

  layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
  x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    text = jax.jit(lambda x: layers.apply({}, x, None)[0]).trace(x).lower(lowering_platforms=("tpu",)).as_text()
  assert "tpu_custom_call" in text
