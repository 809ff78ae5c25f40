"""Attention with a forward derivative against plain attention in float64, under JAX's transformations, and refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.objectives.flow_map import residual
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.networks import flash_gpu, flash_tpu
from pflow_jax.networks.attention import attention
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.flash_jvp import flash_jvp
from pflow_jax.networks.heads import VelocityHead
from pflow_jax.training.flops import count_flops

flash = lambda *args: attention(*args, implementation="flash_jvp")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of few tokens, so that few tokens make several."""
  monkeypatch.setattr(flash_tpu, "BLOCKS", (16,))


def draw(seed, tokens, keys, heads, width, masked, dtype=jnp.float64, batch=2):
  """Queries, keys and values, their tangents, a cotangent, and a mask of the keys, the first example's of one key."""
  rng = np.random.default_rng(seed)
  lengths = [tokens, keys, keys]
  values, tangents = ([rng.normal(size=(batch, n, heads, width)) for n in lengths] for _ in range(2))
  tangents[1] += 2  # a part that all keys have in common
  mask = rng.random((batch, keys)) < 0.5
  mask[0], mask[:, -1] = False, True
  cast = lambda arrays: tuple(jnp.asarray(a, dtype) for a in arrays)
  cotangent = jnp.asarray(rng.normal(size=values[0].shape), dtype)
  return cast(values), cast(tangents), cotangent, jnp.asarray(mask) if masked else None


def both(implementation):
  """Program of value, forward derivative, and gradients of the value with the forward derivative beside it."""

  def loss(qkv, tangents, cotangent, mask):
    out, dout = jax.jvp(lambda *qkv: implementation(*qkv, mask), qkv, tangents)
    return jnp.sum((cotangent + jax.lax.stop_gradient(dout)) * out), (out, dout)

  program = jax.jit(jax.grad(loss, has_aux=True))

  def run(drawn):
    gradients, (out, dout) = program(*drawn)
    return [np.asarray(a, np.float64) for a in (out, dout, *gradients)]

  return run


def exact(drawn):
  """The same by plain attention in float64."""
  return both(attention)(jax.tree.map(lambda a: a if a.dtype == bool else a.astype(jnp.float64), drawn))


SHAPES = [  # queries, keys, heads, width, masked
  (24, 24, 3, 72, False),
  (9, 37, 1, 16, True),
  (32, 16, 2, 128, True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gpu", [False, True])
def test_is_the_formula_with_its_derivatives(gpu, shape):
  """Value, forward derivative, and reverse derivative beside it, in the kernels of both platforms."""
  run, plain = both(lambda *args: flash_jvp(*args, gpu_kernel=gpu)), both(attention)
  for seed in range(3):
    drawn = draw(seed, *shape)
    for got, want in zip(run(drawn), plain(drawn), strict=True):
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * (1 + np.abs(want).max()))


@pytest.mark.parametrize("gpu", [False, True])
def test_float32_errs_by_its_rounding(gpu):
  drawn = draw(0, *SHAPES[1], dtype=jnp.float32)
  got, want = both(lambda *args: flash_jvp(*args, gpu_kernel=gpu))(drawn), exact(drawn)
  for a, b, limit in zip(got, want, (1e-5, 1e-4, 1e-4, 1e-4, 1e-4), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.abs(b).max())


def rounded(drawn):
  """What `both` returns, by the formulas in float64 with bfloat16 where a kernel has it: factors and results."""
  near = lambda a: np.asarray(a, jnp.bfloat16).astype(np.float64)
  (q, k, v), (dq, dk, dv), cotangent = jax.tree.map(lambda a: np.asarray(a, np.float64), drawn[:3])
  scale = q.shape[-1] ** -0.5
  centred = lambda a: near((a - a.mean(1, keepdims=True)) * scale)
  of_scores = lambda a, b: np.einsum("bqhd,bkhd->bhqk", a, b)
  over_keys = lambda p, a: np.einsum("bhqk,bkhd->bqhd", p, a)
  over_queries = lambda p, a: np.einsum("bhqk,bqhd->bkhd", p, a)
  column = lambda p: p.swapaxes(1, 2)  # (B, H, T, 1) -> (B, T, H, 1)

  scores = of_scores(q, k) * scale
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  change = near(weights * (of_scores(dq, centred(k)) + of_scores(q, centred(dk))))
  out = over_keys(near(weights), v) / column(total)
  dout = (over_keys(change, v) + over_keys(near(weights), dv) - column(change.sum(-1, keepdims=True)) * out) / column(
    total
  )
  do = near(cotangent + near(dout))
  delta = np.sum(near(out) * do, axis=-1, keepdims=True).swapaxes(1, 2)
  weights = weights / total
  change = near(weights * (of_scores(do, v) - delta) * scale)
  gradients = over_keys(change, k), over_queries(change, q), over_queries(near(weights), do)
  return [near(a) for a in (out, dout, *gradients)]


def test_errs_in_bfloat16_as_the_rounded_formula_does():
  """Also where all keys change alike, which changes nothing, and where all values have a part in common."""
  (q, k, v), (dq, dk, dv), cotangent, _ = draw(0, 48, 48, 2, 32, False, jnp.bfloat16)
  run, plain = both(flash), both(attention)
  error = lambda a, b: np.sqrt(np.mean((a - b) ** 2))
  for of_keys, of_values in ((0, 0), (8, 0), (0, 4)):
    drawn = (q, k, v + of_values), (dq, dk + of_keys, dv), cotangent, None
    exact = plain(jax.tree.map(lambda a: a.astype(jnp.float64), drawn))
    for got, like, want in zip(run(drawn), rounded(drawn), exact, strict=True):
      assert 0 < error(got, want) < 1.1 * error(like, want)


def layers(implementation, wrap):
  """A scan over three layers of attention: (weights, x) -> y."""

  def layer(x, weights):
    q, k, v = (jnp.einsum("bthd,de->bthe", x, w) for w in weights)
    return x + implementation(q, k, v), None

  return lambda weights, x: jax.lax.scan(wrap(layer), x, weights)[0]


def calls(jaxpr, found=()):
  """How often each primitive of the kernels is there, with its number of results."""
  found = dict(found)
  for eqn in jaxpr.eqns:
    if eqn.primitive.name.startswith("flash_jvp"):
      key = eqn.primitive.name.removeprefix("flash_jvp").lstrip("_"), len(eqn.outvars)
      found[key] = found.get(key, 0) + 1
    for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
        found = calls(getattr(leaf, "jaxpr", leaf), found)
  return found


VALUE, JOINT, BACKWARD = ("", 2), ("", 3), ("backward", 3)
PLAIN = {"jvp": {JOINT: 1}, "grad": {VALUE: 1, BACKWARD: 1}, "both": {JOINT: 1, BACKWARD: 1}}
# What is computed again is the value alone.
AGAIN = {"jvp": {JOINT: 1}, "grad": {VALUE: 2, BACKWARD: 1}, "both": {JOINT: 1, VALUE: 1, BACKWARD: 1}}
WRAPS = {
  "plain": (lambda f: f, PLAIN),
  "jit": (jax.jit, PLAIN),
  "remat": (lambda f: jax.checkpoint(f, prevent_cse=False), AGAIN),
  "dots": (lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable), AGAIN),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("derivative", ["jvp", "grad", "both"])
def test_every_derivative_goes_through_scan_jit_and_remat(derivative, wrap):
  """Each computes what it needs: one pass over the keys for a jvp, no tangent where there is none."""
  x, dx = jax.random.normal(jax.random.key(0), (2, 2, 10, 2, 8), jnp.float64)
  weights = jax.random.normal(jax.random.key(1), (3, 3, 8, 8), jnp.float64) / 4
  wrap, expected = WRAPS[wrap]

  def function(implementation):
    f = layers(implementation, wrap)
    if derivative == "jvp":
      return lambda w: jax.jvp(lambda x: f(w, x), (x,), (dx,))
    if derivative == "grad":
      return jax.grad(lambda w: jnp.sum(jnp.cos(f(w, x))))

    def loss(w):
      y, dy = jax.jvp(lambda x: f(w, x), (x,), (dx,))
      return jnp.sum(y * jax.lax.stop_gradient(y + dy))

    return jax.grad(loss)

  traced = jax.jit(function(flash)).trace(weights)
  assert calls(traced.jaxpr.jaxpr) == expected[derivative]
  got, want = traced.lower().compile()(weights), jax.jit(function(attention))(weights)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * float(jnp.max(jnp.abs(b)))), got, want)


def test_linearize_and_eager_calls():
  qkv, tangents, _, mask = draw(0, 9, 9, 1, 8, True)
  f = lambda *qkv: flash(*qkv, mask)
  want, dwant = jax.jvp(lambda *qkv: attention(*qkv, mask), qkv, tangents)
  out, along = jax.linearize(f, *qkv)
  np.testing.assert_allclose(out, want, atol=1e-12)
  np.testing.assert_allclose(along(*tangents), dwant, atol=1e-11)
  np.testing.assert_allclose(jax.jvp(f, qkv, tangents)[1], dwant, atol=1e-11)
  grad = lambda f: jax.grad(lambda q: jnp.sum(jnp.cos(f(q, *qkv[1:]))))(qkv[0])
  np.testing.assert_allclose(grad(f), grad(lambda *qkv: attention(*qkv, mask)), atol=1e-11)


@pytest.mark.parametrize("which", [(0,), (1, 2), (2,), ()])
def test_some_tangents_may_be_zero(which):
  qkv, tangents, _, mask = draw(1, 9, 12, 1, 8, True)

  def derivative(implementation):
    def f(*some):
      given = dict(zip(which, some, strict=True))
      return implementation(*(given.get(i, a) for i, a in enumerate(qkv)), mask)

    if not which:
      return jax.jvp(lambda x: x + f(), (1.0,), (1.0,))[1]
    return jax.jvp(f, tuple(qkv[i] for i in which), tuple(tangents[i] for i in which))[1]

  np.testing.assert_allclose(derivative(flash), derivative(attention), atol=1e-11)


def test_a_derivative_of_the_forward_derivative_is_refused():
  x, dx = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 8), jnp.float64)
  along = lambda x: jnp.sum(jax.jvp(lambda x: flash(x, x, x), (x,), (dx,))[1])
  scanned = layers(flash, lambda f: jax.checkpoint(f, prevent_cse=False))
  weights = jnp.ones((2, 3, 8, 8))
  for f in (
    lambda: jax.grad(along)(x),
    lambda: jax.jit(jax.grad(along)).lower(x),
    lambda: jax.jvp(along, (x,), (dx,)),
    lambda: jax.jit(lambda x: jax.jvp(along, (x,), (dx,))).lower(x),
    lambda: jax.jit(jax.hessian(lambda x: jnp.sum(flash(x, x, x) ** 2))).lower(x),
    lambda: jax.jit(jax.grad(lambda w: jnp.sum(jax.jvp(lambda x: scanned(w, x), (x,), (dx,))[1]))).lower(weights),
  ):
    with pytest.raises(ValueError, match=r'"flash_jvp" has no derivative of its forward derivative.*stop_gradient'):
      f()
  unused = lambda x: jnp.sum(x * jax.lax.stop_gradient(jax.jvp(lambda x: flash(x, x, x), (x,), (dx,))[1]))
  jax.jit(lambda x: jax.jvp(unused, (x,), (dx,))).lower(x)
  with pytest.raises(ValueError, match="outside jax.jit also where nothing uses it.*use jax.jit"):
    jax.jvp(unused, (x,), (dx,))


def test_a_jvp_around_a_jvp_is_taken_where_nothing_depends_on_the_derivative_of_the_tangent():
  x, dx = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 8), jnp.float64)
  one, inner = jnp.ones(()), lambda x: jax.jvp(lambda x: flash(x, x, x), (x,), (dx,))
  around = lambda f: jax.jvp(f, (one,), (one,))[1]
  np.testing.assert_allclose(around(lambda c: c * inner(x)[1]), inner(x)[1], atol=1e-12)
  for f in (lambda c: inner(c * x)[0], lambda c: inner(c * x)[0] + jax.lax.stop_gradient(inner(c * x)[1])):
    got = jax.jit(lambda f=f: around(f))()
    np.testing.assert_allclose(got, jax.jvp(lambda c: flash(c * x, c * x, c * x), (one,), (one,))[1], atol=1e-12)
    with pytest.raises(ValueError, match="use jax.jit"):
      around(f)


@pytest.mark.usefixtures("float32")
def test_stays_where_its_examples_and_heads_are():
  """On a mesh, under the vmap of a guidance pair, with both derivatives: no device waits for another."""
  layout = make_layout(dict(data=2, fsdp=2, tensor=2), ())
  qkv, _, _, mask = draw(0, 12, 20, 2, 8, True, np.float32, batch=4)
  arrays = jax.tree.map(np.asarray, (*qkv, mask))

  def pair(implementation):
    def f(q, k, v, mask):
      one = lambda mask: jax.jvp(lambda *qkv: implementation(*qkv, mask), (q, k, v), (q, k, v))
      out, dout = jax.vmap(one, out_axes=1)(jnp.stack([mask, mask[:, ::-1]]))
      return jnp.sum(out * jax.lax.stop_gradient(out + dout), axis=(1, 2, 4)), dout

    def gradients(q, k, v, mask):
      out, pull, dout = jax.vjp(lambda *qkv: f(*qkv, mask), q, k, v, has_aux=True)
      return out, dout, pull(jnp.ones_like(out))

    return gradients

  with layout.context():
    placed = [layout.spread(a) for a in arrays]
    program = jax.jit(pair(flash)).lower(*placed).compile()
    got = program(*placed)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(pair(attention))(*arrays)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))
  assert not re.search(r"all-gather|all-to-all|permute", program.as_text())
  with (
    layout.context(),
    pytest.raises(ValueError, match=r"mesh\.tensor: expected a number that divides 3 heads, got 2"),
  ):
    flash(*[jnp.ones((4, 8, 3, 8))] * 3)


@pytest.mark.usefixtures("float32")
def test_a_flow_map_s_residual_and_its_gradient_are_plain_attention_s():
  x, eps = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 1))
  t, s, label = jnp.array([0.9, 0.6]), jnp.array([0.2, 0.6]), jnp.array([0, 1])

  def run(implementation):
    net = DiT(
      channels=1, num_classes=2, patch_size=2, width=16, depth=2, num_heads=2, remat="full", time_scale=1.0,
      attention=implementation, head=VelocityHead(channels=1, patch_size=2),
    )  # fmt: skip
    params = net.init(jax.random.key(1), x, t, label, s)["params"]
    draws = iter(jax.random.split(jax.random.key(2), 100))  # nothing stays at its zero
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(draws), a.shape), params)

    def loss(params):
      network = lambda x, t, s, cond, _: net.apply({"params": params}, x, t, cond, s)
      F, g, dF = residual(network, lambda x, t: eps - x, x, t, s, label, None, side="eulerian", warmup=1.0)
      return jnp.mean(F * g), dF

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  for a, b in zip(jax.tree.leaves(run("flash_jvp")), jax.tree.leaves(run("xla")), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.max(jnp.abs(b))))


def shapes(tokens, heads, width, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((1, tokens, heads, width), dtype), jax.ShapeDtypeStruct((1, tokens), bool)


def step(q, mask):
  """Gradient of the output with its forward derivative beside it."""

  def loss(q):
    out, dout = jax.jvp(lambda q: flash(q, q, q, mask), (q,), (q,))
    return jnp.sum((out * jax.lax.stop_gradient(dout)).astype(jnp.float32))

  return jax.grad(loss)(q)


SIZES = [  # tokens, heads, width
  (4608, 24, 128, jnp.bfloat16),  # FLUX.1
  (4608, 24, 128, jnp.float32),
  (4429, 24, 128, jnp.bfloat16),  # Qwen-Image with a text of 333 tokens: no whole number of blocks
  (256, 16, 72, jnp.bfloat16),  # DiT-XL/2
  (1000, 16, 72, jnp.float32),
  (64, 4, 64, jnp.bfloat16),  # EDM2
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("platform", "target"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")])
def test_lowers_for_tpus_and_gpus(platform, target, size, monkeypatch):
  """Three kernels, masked, and nothing of tokens by tokens, whatever precision is asked for."""
  monkeypatch.undo()
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("high"):
    text = jax.jit(step).trace(*shapes(*size)).lower(lowering_platforms=(platform,)).as_text()
  assert text.count(f"custom_call @{target}(") == 3
  assert f"x{size[0]}x{size[0]}x" not in text


@pytest.mark.parametrize(
  ("dtype", "width", "expected"),
  [
    (jnp.bfloat16, 128, (128, 32)),
    (jnp.float32, 128, (64, 16)),
    (jnp.float32, 64, (64, 16)),
    (jnp.bfloat16, 256, (64, 16)),
  ],
)
def test_blocks_of_gpus_leave_room_in_registers(dtype, width, expected):
  """For the queries of a block, their tangents, and two sums in float32: a thread has 255."""
  q, _ = shapes(4608, 24, width, dtype)
  loop = flash_gpu._Loop(q, q, outer=128, inner=32)
  assert (loop.queries, loop.keys) == expected
  threads = 32 * (8 if width > 64 else 4)
  assert loop.queries * width * (2 * q.dtype.itemsize + 2 * 4) / 4 / threads <= 192


def test_blocks_of_many_heads_are_smaller_where_there_are_tangents(monkeypatch):
  """Mosaic refused DiT-XL/2's 16 heads of 1,024 tokens in blocks of 512: it wanted 64 MiB."""
  monkeypatch.undo()
  queries = lambda size, dtype, **kind: (
    flash_tpu._Grid(*[jax.ShapeDtypeStruct((1, *size), dtype)] * 2, of_queries=4, of_keys=4, sums=2, **kind).queries
  )
  assert queries((1024, 16, 72), jnp.bfloat16, tangents=True) == 256
  assert queries((1024, 16, 72), jnp.float32, tangents=True) == 128
  assert queries((1024, 24, 128), jnp.bfloat16, tangents=True) == 512


@pytest.mark.usefixtures("float32")
def test_operations_are_counted():
  q, mask = shapes(100, 2, 64)
  whole = 2 * 2 * 100**2 * 64
  assert count_flops(jax.jit(lambda q, mask: flash(q, q, q, mask)).trace(q, mask).jaxpr) == 2 * whole
  assert count_flops(jax.jit(step).trace(q, mask).jaxpr) == (6 + 7) * whole


@pytest.mark.usefixtures("float32")
def test_products_are_as_precise_as_those_around():
  q, _ = shapes(16, 1, 8, jnp.float32)

  def precision_of_backward(precision):
    with jax.default_matmul_precision(precision):
      traced = jax.jit(lambda q: jax.vjp(lambda q: flash(q, q, q), q)[1](q)).trace(q)
    return str(traced.jaxpr).count("HIGHEST")

  assert precision_of_backward("highest") == precision_of_backward("F32_F32_F32") == 2
  assert precision_of_backward("default") == precision_of_backward("high") == 0
