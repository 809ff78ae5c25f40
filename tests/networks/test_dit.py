"""DiT: its parts against the papers' formulas, its size, and that scan and remat engage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.networks import attention as module_of_attention
from pflow_jax.networks.dit import DIT_SIZES, DiT
from pflow_jax.networks.heads import GMFlowHead, VelocityHead
from pflow_jax.networks.layers import patchify, position_table, sinusoid, unpatchify
from pflow_jax.networks.short_attention import short_attention


def network(**fields):
  defaults = dict(channels=2, patch_size=2, width=16, depth=3, num_heads=2, num_classes=5)
  defaults |= fields
  head = VelocityHead(channels=defaults["channels"], patch_size=defaults["patch_size"])
  return DiT(head=head, **defaults)


def equations(jaxpr):
  """All equations of a jaxpr, those inside scans, remats and calls too."""
  for equation in jaxpr.eqns:
    yield equation
    for sub in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
      if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
        yield from equations(getattr(sub, "jaxpr", sub))


def batch(shape=(3, 4, 6, 2), key=0):
  x = jax.random.normal(jax.random.key(key), shape, jnp.float32)
  return x, jnp.linspace(0.1, 0.9, shape[0], dtype=jnp.float32), jnp.arange(shape[0]) % 5


def perturbed_params(module, *inputs, dtype=jnp.float32):
  """Normal values in every parameter: nothing stays hidden behind a zero gate, nothing compiles."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.2, a.shape), dtype), shapes)


def apply(module, params, *inputs):
  return jax.jit(module.apply)({"params": params}, *inputs)


def norm(a):
  return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)


def dense(params, a, index=...):
  return a @ params["kernel"][index] + params["bias"][index]


def silu(a):
  return a / (1 + np.exp(-a))


def numpy_dit(params, x, t, label, heads, patch):
  """The paper's network, one example at a time, in NumPy float64."""
  height, width_, channels = x.shape
  tokens = []
  for i in range(0, height, patch):
    for j in range(0, width_, patch):
      tokens.append(x[i : i + patch, j : j + patch].reshape(-1))
  h = dense(params["patch_embed"], np.stack(tokens))
  dim = h.shape[1]
  frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
  positions = [
    np.concatenate([f(p * frequencies) for p in (j, i) for f in (np.sin, np.cos)])
    for i in range(height // patch)
    for j in range(width_ // patch)
  ]
  h = h + np.stack(positions)
  angles = 1000 * t * 10_000.0 ** (-np.arange(128) / 128)
  sines = np.concatenate([np.cos(angles), np.sin(angles)])
  time = params["time_embed"]
  embedding = dense(time["out"], silu(dense(time["in"], sines)))
  embedding = embedding + params["class_embed"]["embedding"][label]
  blocks = params["blocks"]
  for i in range(blocks["qkv"]["kernel"].shape[0]):
    modulation = dense(blocks["adaln"], silu(embedding), i).reshape(6, dim)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    qkv = dense(blocks["qkv"], norm(h) * (1 + scale1) + shift1, i)
    q, k, v = qkv.reshape(len(h), 3, heads, dim // heads).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(dim // heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    mixed = (weights @ v).transpose(1, 0, 2).reshape(len(h), dim)
    h = h + gate1 * dense(blocks["proj"], mixed, i)
    g = dense(blocks["mlp_in"], norm(h) * (1 + scale2) + shift2, i)
    g = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    h = h + gate2 * dense(blocks["mlp_out"], g, i)
  shift, scale = dense(params["final_norm"]["adaln"], silu(embedding)).reshape(2, dim)
  rows = dense(params["head"]["proj_out"], norm(h) * (1 + scale) + shift)
  out = np.empty_like(x)
  for n, row in enumerate(rows):
    i, j = (patch * c for c in divmod(n, width_ // patch))
    out[i : i + patch, j : j + patch] = row.reshape(patch, patch, channels)
  return out


def test_matches_the_paper_in_numpy():
  module, (x, t, label) = network(dtype="float64"), batch()
  params = perturbed_params(module, x, t, label, dtype=jnp.float64)
  x = x.astype(jnp.float64)
  out = apply(module, params, x, t.astype(jnp.float64), label)
  host = jax.tree.map(np.asarray, params)
  for i in range(len(x)):
    want = numpy_dit(host, np.asarray(x[i]), np.float64(t.astype(jnp.float64)[i]), label[i], 2, 2)
    np.testing.assert_allclose(out[i], want, rtol=1e-9, atol=1e-10)


def test_starts_at_zero_with_identity_blocks():
  module, inputs = network(), batch()
  params = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
  out = apply(module, params, *inputs)
  assert out.shape == inputs[0].shape
  assert not np.any(out)
  zero = [params["blocks"]["adaln"], params["final_norm"]["adaln"], params["head"]["proj_out"]]
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(zero))
  for name in ("qkv", "proj", "mlp_in", "mlp_out"):
    kernel = params["blocks"][name]["kernel"]
    bound = np.sqrt(6 / (kernel.shape[1] + kernel.shape[2]))
    assert 0.9 * bound < np.abs(kernel).max() <= bound, name
    assert not np.allclose(kernel[0], kernel[1]), name
  assert np.std(params["class_embed"]["embedding"]) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_class_table_has_a_null_row(num_classes):
  module, (x, t, _) = network(num_classes=num_classes), batch()
  null = jnp.full(3, num_classes)
  params = perturbed_params(module, x, t, null)
  assert params["class_embed"]["embedding"].shape == (num_classes + 1, 16)
  out = apply(module, params, x, t, null)
  table = params["class_embed"]["embedding"].at[num_classes].add(1.0)
  moved = apply(module, params | {"class_embed": {"embedding": table}}, x, t, null)
  assert np.all(np.isfinite(out))
  assert np.abs(moved - out).max() > 1e-3


def test_blocks_are_scanned():
  inputs = batch()

  def size(**fields):
    module = network(**fields)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    jaxpr = jax.make_jaxpr(module.apply)({"params": params}, *inputs)
    assert all(a.shape[0] == module.depth for a in jax.tree.leaves(params["blocks"]))
    return len(str(jaxpr))

  assert size(depth=8) < 1.02 * size(depth=4)


def test_unrolled_scan_is_the_same_network():
  inputs = batch()
  params = perturbed_params(network(), *inputs)
  want = apply(network(), params, *inputs)
  got = apply(network(scan_unroll=3), params, *inputs)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def loss_gradient(remat, unroll=1):
  module, inputs = network(remat=remat, scan_unroll=unroll), batch((8, 16, 16, 2))
  params = perturbed_params(module, *inputs)

  def loss(params):
    return jnp.mean(jnp.square(module.apply({"params": params}, *inputs)))

  return jax.jit(jax.grad(loss)).trace(params), params


def test_remat_engages_and_keeps_the_gradient():
  compiled, gradients = {}, {}
  for remat in ("none", "dots", "layers", "full", "offload"):
    traced, params = loss_gradient(remat)
    assert ("remat" in str(traced.jaxpr)) == (remat != "none")
    compiled[remat] = traced.lower().compile()
    gradients[remat] = compiled[remat](params)
    assert ("<host>" in str(traced.jaxpr)) == (remat == "offload"), "kept in the host's memory"
  memory = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
  assert memory["full"] < 0.8 * memory["dots"]
  assert memory["full"] < 0.8 * memory["layers"]
  assert memory["dots"] < 0.9 * memory["none"]
  assert memory["layers"] < 0.9 * memory["none"]
  for remat in ("dots", "layers", "full", "offload"):
    for got, want in zip(*(jax.tree.leaves(gradients[r]) for r in (remat, "none")), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def gradient_of(module):
  """Function (params, inputs) -> loss, and gradients as one vector."""

  def loss(params, inputs):
    return jnp.mean(jnp.square(module.apply({"params": params}, *inputs)))

  gradient = jax.jit(jax.value_and_grad(loss))

  def run(params, inputs):
    value, gradients = gradient(params, inputs)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])

  return run


def error(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture
def interpreted(monkeypatch):
  """The TPU kernel in Pallas' interpreter."""
  kernel = lambda qkv, num_heads, _: short_attention(qkv, num_heads, True)
  monkeypatch.setattr(module_of_attention, "short_attention", kernel)


@pytest.mark.usefixtures("float32", "interpreted")
def test_the_fast_settings_are_the_same_network_in_float32():
  inputs = batch((2, 8, 8, 2))
  params = perturbed_params(network(), *inputs)
  value, gradient = gradient_of(network())(params, inputs)
  fast = network(attention="pallas", remat="layers", residual_dtype="bfloat16")  # no narrower than float32
  got, gradients = gradient_of(fast)(params, inputs)
  assert got == pytest.approx(value, rel=1e-6)
  assert error(gradients, gradient) < 1e-6


@pytest.mark.usefixtures("float32")
def test_a_residual_stream_in_bfloat16_errs_little_more_than_the_rest_does():
  """Against float32, over several draws: a stream is rounded once a sum, the rest of a block oftener."""
  exact, plain, half = (
    gradient_of(network(**fields))
    for fields in ({}, dict(dtype="bfloat16"), dict(dtype="bfloat16", residual_dtype="bfloat16"))
  )
  errors = []
  for key in range(4):
    inputs = batch((2, 8, 8, 2), key)
    params = perturbed_params(network(), *inputs)
    value, gradient = exact(params, inputs)
    pair = [program(params, inputs) for program in (plain, half)]
    errors.append([(abs(got - value) / value, error(gradients, gradient)) for got, gradients in pair])
  (plain_loss, plain_gradient), (loss, gradient) = np.mean(errors, axis=0)
  assert 1e-4 < plain_gradient < 0.03
  assert plain_gradient != gradient
  assert gradient < 1.5 * plain_gradient
  assert loss < 2 * plain_loss + 1e-3


def test_the_residual_stream_has_its_dtype():
  inputs = batch()
  for dtype, expected in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
    half = network(dtype="bfloat16", residual_dtype=dtype)
    params = perturbed_params(half, *inputs)
    traced = jax.make_jaxpr(half.apply)({"params": params}, *inputs)
    (scan,) = [e for e in traced.eqns if e.primitive.name == "scan"]
    streams = [v.aval for v in scan.outvars if v.aval.shape == (3, 6, 16)]
    assert [a.dtype for a in streams] == [expected]
    exponentials = [e.outvars[0].aval for e in equations(traced.jaxpr) if e.primitive.name in ("exp", "rsqrt")]
    assert exponentials
    assert all(a.dtype == jnp.float32 for a in exponentials), "softmax and norms"


@pytest.mark.parametrize("unroll", [1, 3])
def test_unrolled_remat_survives_common_subexpression_elimination(unroll):
  jaxpr = str(loss_gradient("full", unroll)[0].jaxpr)
  assert f"prevent_cse={unroll > 1}" in jaxpr


def test_bfloat16_computes_in_bfloat16_between_float32_ends():
  inputs = batch()
  exact, half = network(), network(dtype="bfloat16")
  params = perturbed_params(half, *inputs)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  out = apply(half, params, *inputs)
  assert out.dtype == jnp.float32
  want = apply(exact, params, *inputs)
  difference = np.abs(out - want).max() / np.abs(want).max()
  assert 1e-5 < difference < 0.05
  # What acts on tokens is bfloat16, what acts on the time is not: one row an example, against one a token.
  traced = jax.make_jaxpr(half.apply)({"params": params}, *inputs)
  dots = [e.invars[0].aval for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
  of_time = [a for a in dots if a.ndim == 2 and a.shape[0] == len(inputs[0])]
  of_tokens = [a for a in dots if a not in of_time]
  assert len(of_time) >= 4, "time embedding, adaLN of the blocks and of the end"
  assert all(a.dtype == jnp.float32 for a in of_time)
  assert len(of_tokens) >= 7, "patches, attention, MLP, head"
  assert sum(a.dtype == jnp.bfloat16 for a in of_tokens) >= len(of_tokens) - 1


def test_jvp_matches_finite_differences():
  module, (x, t, label) = network(dtype="float64"), batch()
  params = perturbed_params(module, x, t, label, dtype=jnp.float64)
  x, t = x.astype(jnp.float64), t.astype(jnp.float64)
  dx, dt = jnp.cos(3 * x), jnp.array([1.0, -0.5, 0.3])

  @jax.jit
  def f(x, t):
    return module.apply({"params": params}, x, t, label)

  _, tangent = jax.jvp(f, (x, t), (dx, dt))
  h = 1e-7  # The sinusoid turns at up to 1000 radians a unit of t.
  want = (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h)
  np.testing.assert_allclose(tangent, want, rtol=1e-5, atol=1e-5)


def test_xl_has_the_papers_parameter_count():
  head = VelocityHead(channels=4, patch_size=2)
  module = DiT(channels=4, patch_size=2, num_classes=1000, head=head, **DIT_SIZES["XL"])
  x, t = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  params = jax.eval_shape(module.init, jax.random.key(0), x, t, label)["params"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == pytest.approx(675e6, rel=0.005)


def test_any_size_that_the_patch_divides():
  module, inputs = network(), batch()
  params = perturbed_params(module, *inputs)
  x, t, label = batch((2, 8, 2, 2))
  assert apply(module, params, x, t, label).shape == (2, 8, 2, 2)


@pytest.mark.parametrize(
  ("fields", "shape", "match"),
  [
    ({}, (3, 4, 5, 2), "multiple of patch_size 2"),
    ({}, (3, 4, 4, 3), r"expected shape \(B, H, W, 2\), got \(3, 4, 4, 3\)"),
    ({}, (3, 4, 2), r"expected shape \(B, H, W, 2\), got \(3, 4, 2\)"),
    ({"num_heads": 3}, (3, 4, 4, 2), "num_heads 3, got 16"),
    ({"width": 6}, (3, 4, 4, 2), "multiple of 4"),
    ({"remat": "all"}, (3, 4, 4, 2), r"\['dots', 'full', 'layers', 'none', 'offload'\], got 'all'"),
    ({"attention": "flash"}, (3, 4, 4, 2), "got 'flash'"),
    ({"head": VelocityHead(channels=2, patch_size=4)}, (3, 4, 4, 2), r"\(2, 2\), got \(2, 4\)"),
  ],
)
def test_misfits_are_refused(fields, shape, match):
  fields = dict(fields)
  head = fields.pop("head", None)
  module = network(**fields)
  if head is not None:
    module = dataclasses.replace(module, head=head)
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(module.init, jax.random.key(0), *batch(shape))


@pytest.mark.parametrize("layout", ["dit", "flux"])
@pytest.mark.parametrize("space", [(), (6,), (4, 6), (2, 4, 6)])
def test_unpatchify_inverts_patchify(space, layout):
  p = 2 if space else 1
  x = jax.random.normal(jax.random.key(0), (3, *space, 5))
  rows = patchify(x, p, layout)
  assert rows.shape == (3, int(np.prod(space)) // p ** len(space), p ** len(space) * 5)
  back = unpatchify(rows, tuple(s // p for s in space), p, 1, layout)
  np.testing.assert_array_equal(back[:, 0], x)


def test_unknown_layout_is_refused():
  with pytest.raises(ValueError, match='expected "dit" or "flux", got \'sd3\''):
    patchify(jnp.zeros((1, 4, 4, 2)), 2, "sd3")


def test_position_table_puts_columns_first():
  table = position_table((2, 3), 8)
  # Row 1, column 2; frequencies 1 and 0.01.
  want = [f(p * w) for p in (2, 1) for f in (np.sin, np.cos) for w in (1, 0.01)]
  np.testing.assert_allclose(table[1 * 3 + 2], want, rtol=1e-12)


def test_sinusoid_is_cosine_first():
  out = sinusoid(jnp.array([0.0, 2.0]), 4)
  want = [[1, 1, 0, 0], [np.cos(2), np.cos(0.02), np.sin(2), np.sin(0.02)]]
  np.testing.assert_allclose(out, want, rtol=1e-6)


def test_policy_head_is_served():
  module = dataclasses.replace(network(), head=GMFlowHead(channels=2, patch_size=2, num_components=3))
  inputs = batch()
  out = apply(module, perturbed_params(module, *inputs), *inputs)
  shapes = {name: value.shape for name, value in out.items()}
  assert shapes == {"means": (3, 3, 4, 6, 2), "logits": (3, 3, 4, 6), "log_std": (3,)}


def flow_map_inputs():
  x, t, label = batch()
  return x, t, label, 0.4 * t, jnp.linspace(1.0, 3.0, len(t), dtype=t.dtype)


def test_branches_of_a_flow_map_start_neutral_and_then_count():
  x, t, label, s, strength = flow_map_inputs()
  params = perturbed_params(network(), x, t, label)
  fresh = jax.jit(network().init)(jax.random.key(1), x, t, label, s, strength)["params"]
  assert set(fresh) - set(params) == {"length_embed", "guidance_embed"}
  params |= {name: fresh[name] for name in ("length_embed", "guidance_embed")}
  f = jax.jit(lambda params, s, strength: network().apply({"params": params}, x, t, label, s, strength))
  plain = apply(network(), params, x, t, label)
  for inputs in ((0.9 * t, strength), (s, strength)):
    np.testing.assert_allclose(f(params, *inputs), plain, rtol=1e-5, atol=1e-6)
  moved = jax.tree.map(lambda p: p + 0.1, params)
  for other in ((0.9 * t, strength), (s, strength + 1)):
    assert np.all(np.abs(f(moved, *other) - f(moved, s, strength)).max((1, 2, 3)) > 1e-4)


@pytest.mark.parametrize("fields", [{}, dict(remat="full"), dict(remat="dots", scan_unroll=2)])
@pytest.mark.parametrize("side", ["eulerian", "lagrangian"])
def test_derivatives_of_a_flow_map_match_finite_differences(side, fields):
  """dF/dt along the flow and dF/ds, in float64, through scanned and rematerialised blocks."""
  module = network(dtype=jnp.float64, **fields)
  x, t, label, s, strength = (jnp.asarray(a, jnp.float64) if a.dtype != jnp.int32 else a for a in flow_map_inputs())
  label = label.astype(jnp.int32)
  params = perturbed_params(module, x, t, label, s, strength, dtype=jnp.float64)
  v = jnp.cos(x)
  tangent = (v, jnp.ones_like(t), 0 * s) if side == "eulerian" else (0 * x, 0 * t, jnp.ones_like(s))
  f = lambda x, t, s: module.apply({"params": params}, x, t, label, s, strength)
  _, derivative = jax.jit(lambda *a: jax.jvp(f, a, tangent))(x, t, s)
  step = 1e-7
  ahead, behind = (f(*(a + sign * step * d for a, d in zip((x, t, s), tangent, strict=True))) for sign in (1, -1))
  np.testing.assert_allclose(derivative, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)
