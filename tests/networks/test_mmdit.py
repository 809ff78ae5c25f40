"""Blocks of FLUX and Qwen-Image: rotary positions, refusals, and how they lie on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pflow_jax.core.batches import current_mesh
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.families.registry import sharding_rules
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.networks import layers, mmdit
from pflow_jax.networks.heads import VelocityHead

SIZE = dict(num_heads=4, head_dim=16, text_width=12, rope_axes=(4, 6, 6))
HEAD = VelocityHead(channels=4, patch_size=2, layout="flux")


def flux(**changes):
  return Flux(HEAD, channels=4, depth=1, single_depth=2, pooled_width=10, **(SIZE | changes))


def qwen(**changes):
  return QwenImage(HEAD, channels=4, depth=2, **(SIZE | changes))


NETWORKS = {"flux": flux, "qwen_image": qwen}


def inputs(batch=8, length=5):
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (batch, 4, 6, 4), jnp.float32)
  cond = {
    "text": jax.random.normal(keys[1], (batch, length, 12), jnp.float32),
    "pooled": jax.random.normal(keys[2], (batch, 10), jnp.float32),
    "mask": jnp.asarray(np.arange(length) < np.arange(batch)[:, None] % length + 1),
  }
  return x, jax.random.uniform(keys[3], (batch,), jnp.float32), cond


def random_params(network, *args):
  """No parameter at its neutral value."""
  shapes = jax.eval_shape(network.init, jax.random.key(0), *args)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def test_rotary_positions_turn_pairs_of_channels():
  """Against multiplication by complex numbers."""
  positions, axes = np.array([[0, 3, -2], [1, 0, 7]]), (2, 4, 6)
  x = np.random.default_rng(0).normal(size=(2, 2, 3, 12))
  angles = np.concatenate(
    [positions[:, i, None] * 10_000.0 ** (-np.arange(0, width, 2) / width) for i, width in enumerate(axes)], axis=1
  )
  turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
  expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
  np.testing.assert_allclose(mmdit.rotate(jnp.asarray(x), mmdit.rope_tables(positions, axes)), expected, atol=1e-6)


def test_positions_are_row_major():
  np.testing.assert_array_equal(mmdit.image_positions((2, 3))[[0, 2, 3]], [[0, 0, 0], [0, 0, 2], [0, 1, 0]])


@pytest.mark.usefixtures("float32")
def test_masked_text_changes_nothing():
  x, t, cond = inputs()
  network = qwen()
  params = random_params(network, x, t, cond)
  apply = jax.jit(network.apply)
  other = cond | {"text": jnp.where(cond["mask"][..., None], cond["text"], 7.0)}
  np.testing.assert_allclose(apply({"params": params}, x, t, cond), apply({"params": params}, x, t, other), atol=1e-6)
  changed = apply({"params": params}, x, t, cond | {"text": cond["text"] + 1})
  assert float(jnp.max(jnp.abs(changed - apply({"params": params}, x, t, cond)))) > 1e-3


@pytest.mark.usefixtures("float32")
def test_strength_of_guidance_is_an_input():
  x, t, cond = inputs(2)
  params = random_params(flux(), x, t, cond)
  default, same, other = (
    jax.jit(flux().apply)({"params": params}, x, t, cond, guidance=g)
    for g in (None, jnp.full(2, 3.5), jnp.full(2, 1.0))
  )
  np.testing.assert_array_equal(default, same)
  assert float(jnp.max(jnp.abs(default - other))) > 1e-3
  schnell = jax.eval_shape(flux(guidance=None).init, jax.random.key(0), x, t, cond)["params"]
  assert "guidance_embed" in params
  assert "guidance_embed" not in schnell


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_computes_in_bfloat16_and_returns_float32(network):
  x, t, cond = inputs(2)
  make = NETWORKS[network]
  params = random_params(make(), x, t, cond)
  exact, rounded = (jax.jit(make(dtype=d).apply)({"params": params}, x, t, cond) for d in ("float32", "bfloat16"))
  assert rounded.dtype == jnp.float32
  assert 1e-5 < float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) < 0.03
  jaxpr = str(jax.make_jaxpr(make(dtype="bfloat16").apply)({"params": params}, x, t, cond))
  width = SIZE["num_heads"] * SIZE["head_dim"]
  assert re.search(rf"bf16\[2,\d+,{4 * width}\] = dot_general", jaxpr)
  assert not re.search(rf"f32\[2,\d+,{4 * width}\] = dot_general", jaxpr.replace("bf16", "b"))


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
  x, t, cond = inputs(2)
  params = random_params(flux(), x, t, cond)

  def gradient(**changes):
    loss = lambda p: jnp.sum(flux(**changes).apply({"params": p}, x, t, cond) ** 2)
    return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))

  (plain, without), (again, text) = gradient(), gradient(remat=remat)
  assert "remat" in text
  assert "remat" not in without
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), plain, again)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("network", NETWORKS)
def test_sharded_equals_whole(network):
  """Values and gradients on slice x data x fsdp x tensor, and what travels."""
  network = NETWORKS[network]()
  args = inputs()
  params = random_params(network, *args)

  def loss(params, x, t, cond):
    return jnp.mean(network.apply({"params": params}, x, t, cond) ** 2)

  expected = jax.jit(jax.value_and_grad(loss))(params, *args)
  layout = make_layout(dict(data=2, fsdp=2, tensor=2), sharding_rules("flux"), min_size=0)
  with layout.context():
    placed, spread = layout.place(params), jax.tree.map(layout.spread, args)
    got = jax.jit(jax.value_and_grad(loss))(placed, *spread)
  for (keys, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.max(jnp.abs(b))), 1e-3), err_msg=str(keys))
  kernel = placed["double_blocks"]["img_mod"]["kernel"]
  assert kernel.addressable_shards[0].data.shape[-1] == kernel.shape[-1] // 4


@pytest.mark.usefixtures("float32")
def test_modulation_is_contracted_in_parts():
  """The kernel of a layer on one vector an example is never whole on a device."""
  layout = make_layout(dict(data=2, fsdp=4), ((".*/kernel", (None, layers.COLUMNS)), (".*", ())), min_size=0)
  dense = nn.Dense(1024, dot_general=layers.in_parts)
  x = jnp.ones((8, 64))
  params = {"kernel": jnp.ones((64, 1024)), "bias": jnp.zeros(1024)}
  with layout.context():
    args = layout.place({"mod": params}), layout.spread(x)
    loss = lambda p, x: jnp.sum(jnp.sin(dense.apply({"params": p["mod"]}, x)))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile().as_text()
  shapes = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
  assert shapes
  assert "64,1024" not in shapes


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x, t, c: (x[..., :3], t, c), r"x: expected shape \(B, H, W, 4\)"),
    (lambda x, t, c: (x[:, :3], t, c), "multiple of patch_size 2"),
    (lambda x, t, c: (x, t, c["text"]), "expected a dict of arrays"),
    (lambda x, t, c: (x, t, c | {"text": c["text"][..., :5]}), r"expected a dict .*'text': \(8, 5, 12\)"),
    (lambda x, t, c: (x, t, c | {"text": c["text"][:3]}), "expected a dict of arrays"),
    (lambda x, t, c: (x, t, c | {"mask": c["mask"][:, :2]}), "expected a dict of arrays"),
  ],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_does_not_fit_is_refused(network, change, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(NETWORKS[network]().init, jax.random.key(0), *change(*inputs()))


def test_sizes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="three even widths that sum to head_dim 16"):
    jax.eval_shape(flux(rope_axes=(4, 4, 4)).init, jax.random.key(0), *inputs())
  with pytest.raises(ValueError, match="remat: expected one of"):
    jax.eval_shape(flux(remat="some").init, jax.random.key(0), *inputs())
  assert current_mesh() is None
