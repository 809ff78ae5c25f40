"""Attention against the formula, its derivatives, and its refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pflow_jax.core.batches import traced_device_kind
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.networks import attention as module
from pflow_jax.networks import short_attention as module_of_kernel
from pflow_jax.networks.attention import IMPLEMENTATIONS, attention, check_platform, self_attention, supports_jvp
from pflow_jax.networks.short_attention import is_short, short_attention


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


@pytest.fixture
def short(monkeypatch):
  """This package's kernel in Pallas' interpreter, and the shapes of its calls."""
  shapes = []

  def interpreted(qkv, num_heads, interpret):
    shapes.append([a.shape for a in qkv])
    return short_attention(qkv, num_heads, True)

  monkeypatch.setattr(module, "short_attention", interpreted)
  return shapes


def of_one_layer(qkv, heads, implementation):
  """Output of attention on the output of one layer, and its gradients."""

  def f(qkv):
    out = self_attention(qkv, heads, implementation=implementation)
    return jnp.sum(jnp.cos(out.astype(jnp.float32))), out

  gradient, out = jax.jit(jax.grad(f, has_aux=True))(qkv)
  return np.asarray(out, np.float64), np.asarray(gradient, np.float64)


# Heads of DiT-XL/2; tokens that fill whole tiles of a TPU's registers, and some that do not.
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("tokens", "heads", "width"), [(64, 3, 72), (77, 2, 72), (16, 2, 128)])
def test_pallas_is_the_formula_with_its_gradients(short, tokens, heads, width):
  qkv = 2 * jax.random.normal(jax.random.key(0), (2, tokens, 3 * heads * width), jnp.float32)
  got, want = (of_one_layer(qkv, heads, name) for name in ("pallas", "xla"))
  assert short[0] == [qkv.shape], "the layer's output as it is"
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.usefixtures("float32", "short")
def test_pallas_errs_no_more_in_bfloat16_than_xla():
  qkv = jax.random.normal(jax.random.key(1), (2, 77, 3 * 2 * 72), jnp.bfloat16)
  exact = of_one_layer(qkv.astype(jnp.float32), 2, "xla")
  errors = {
    name: [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(of_one_layer(qkv, 2, name), exact, strict=True)]
    for name in ("pallas", "xla")
  }
  for got, usual, scale in zip(errors["pallas"], errors["xla"], exact, strict=True):
    assert 0 < got < 1.1 * usual < 0.01 * np.abs(scale).max()


@pytest.mark.usefixtures("float32")
def test_pallas_takes_queries_keys_and_values_apart(short):
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 40, 2, 24), jnp.float32)

  def gradients(implementation):
    loss = lambda *qkv: jnp.sum(jnp.cos(attention(*qkv, implementation=implementation)))
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  for a, b in zip(gradients("pallas"), gradients("xla"), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))
  assert short[0] == [(2, 40, 48)] * 3


@pytest.mark.usefixtures("float32", "interpreted")
def test_pallas_leaves_masks_and_long_sequences_to_splash(short, ragged, monkeypatch):
  q, k, v, mask = ragged
  want = attention(q, k, v, mask)
  np.testing.assert_allclose(attention(q, k, v, mask, implementation="pallas"), want, atol=2e-6)
  monkeypatch.setattr(module, "is_short", lambda *size: False)
  np.testing.assert_allclose(attention(q, k, v, implementation="pallas"), attention(q, k, v), atol=2e-6)
  assert not short


def test_sequences_are_short_that_fit_on_the_chip():
  assert is_short(256, 1152, jnp.float32)
  assert is_short(512, 1152, jnp.bfloat16)
  assert not is_short(1024, 1152, jnp.bfloat16), "latents of 512 x 512 pixels"
  assert not is_short(4608, 3072, jnp.bfloat16)


@pytest.mark.parametrize(
  ("kind", "most"),
  [("TPU v5 lite", 768), ("TPU v6 lite", 768), ("TPU v5p", 384), ("TPU7x", 384), ("TPU v4", 128), ("TPU v3", 128)],
)
def test_the_chip_that_this_is_traced_for_says_how_long_is_short(monkeypatch, kind, most):
  """Half of the on-chip memory of its core, which a plan knows as well as a run."""
  with make_layout(dict(data=8), ()).context():
    assert traced_device_kind() == jax.devices()[0].device_kind
  monkeypatch.setattr(module_of_kernel, "traced_device_kind", lambda: kind)
  assert max(tokens for tokens in range(128, 2048, 128) if is_short(tokens, 1152, jnp.bfloat16)) == most


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("implementation", ["pallas", "splash", "flash_jvp"])
def test_heads_that_the_mesh_does_not_divide_are_refused(implementation):
  """6 heads in 4 parts would be 4 of 12 columns."""
  qkv = np.zeros((8, 24, 3 * 6 * 8), np.float32)
  with make_layout(dict(data=2, tensor=4), ()).context(), pytest.raises(ValueError, match="divides 6 heads, got 4"):
    jax.eval_shape(lambda qkv: self_attention(qkv, 6, implementation=implementation), qkv)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(
  ("sizes", "calls"),
  [(dict(data=4, fsdp=2), [(1, 24, 48)]), (dict(data=2, fsdp=2, tensor=2), [(2, 24, 8)] * 3)],
)
def test_pallas_stays_where_its_examples_and_heads_are(short, sizes, calls):
  """On a mesh, under the vmap of a guidance pair too."""
  layout = make_layout(sizes, ())
  qkv = np.asarray(jax.random.normal(jax.random.key(0), (8, 24, 3 * 2 * 8), jnp.float32))

  def pair(qkv, implementation="pallas"):
    return jax.vmap(lambda x: self_attention(x, 2, implementation=implementation), out_axes=1)(
      jnp.stack([qkv, qkv[:, ::-1]])
    )

  with layout.context():
    program = jax.jit(pair).lower(layout.spread(qkv)).compile()
    got = program(layout.spread(qkv))
  np.testing.assert_allclose(got, pair(qkv, "xla"), atol=2e-6)
  assert short[0] == calls
  if "tensor" not in sizes:
    assert not re.search(r"all-gather|all-reduce|all-to-all|permute", program.as_text())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_pallas_lowers_for_tpus(dtype):
  """The kernel as a TPU gets it, forward and backward, at the size of DiT-XL/2."""
  qkv = jax.ShapeDtypeStruct((2, 256, 3 * 1152), dtype)
  loss = lambda qkv: jnp.sum(self_attention(qkv, 16, implementation="pallas").astype(jnp.float32))
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    text = jax.jit(jax.value_and_grad(loss)).trace(qkv).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 2


def test_support_table():
  assert supports_jvp("xla")
  assert supports_jvp("flash_jvp")
  assert not supports_jvp("cudnn")
  assert not supports_jvp("splash")
  assert not supports_jvp("pallas")


@pytest.mark.parametrize("call", [supports_jvp, lambda name: attention(*[None] * 3, implementation=name)])
def test_unknown_name_lists_the_choices(call):
  with pytest.raises(
    ValueError, match=r"expected one of \['cudnn', 'flash_jvp', 'pallas', 'splash', 'xla'\], got 'flash'"
  ):
    call("flash")
  assert sorted(IMPLEMENTATIONS) == ["cudnn", "flash_jvp", "pallas", "splash", "xla"]


def test_kernels_are_refused_where_they_are_not():
  check_platform("xla", "cpu")
  check_platform("splash", "tpu")
  check_platform("pallas", "tpu")
  check_platform("cudnn", "gpu")
  check_platform("flash_jvp", "tpu")
  check_platform("flash_jvp", "cuda")
  with pytest.raises(
    ValueError, match=r"'splash' is for TPUs, and this runs on gpu; .* one of \['xla', 'cudnn', 'flash_jvp'\]"
  ):
    check_platform("splash", "gpu")
  with pytest.raises(ValueError, match=r"'pallas' is for TPUs, and this runs on cpu; .* one of \['xla'\]"):
    check_platform("pallas", "cpu")
  with pytest.raises(ValueError, match=r"'cudnn' is for GPUs, and this runs on cpu; .* one of \['xla'\]"):
    check_platform("cudnn", "cpu")
  with pytest.raises(ValueError, match=r"'flash_jvp' is for TPUs and GPUs, and this runs on cpu; .* one of \['xla'\]"):
    check_platform("flash_jvp", "cpu")


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
