"""Adapters: equal to the merged network without ever merging, their start, gradients, dropout, and size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

from pflow_jax.mesh.partition import combine, match, split
from pflow_jax.networks.dit import DIT_SIZES, DiT
from pflow_jax.networks.heads import ArcHead, VelocityHead
from pflow_jax.networks.lora import Adapter, adapted, init_adapters, merge_adapters
from pflow_jax.networks.mlp import MLP
from tests.networks.test_dit import equations, perturbed_params

DIT_TABLE = (Adapter("blocks/(mlp_in|mlp_out)", rank=3, alpha=6.0), Adapter("time_embed/.*", rank=2))
MLP_TABLE = (Adapter("blocks_0/.*", rank=2), Adapter("blocks_1/mlp_in", rank=3, alpha=1.5))


def image_network():
  head = VelocityHead(channels=2, patch_size=2)
  fields = dict(channels=2, patch_size=2, width=16, depth=2, num_heads=2, num_classes=5)
  return DiT(head=head, dtype=jnp.float64, remat="full", **fields)


def point_network():
  return MLP(channels=2, width=16, depth=2, num_classes=5, head=VelocityHead(channels=2), dtype=jnp.float64)


CASES = [(image_network, DIT_TABLE), (point_network, MLP_TABLE)]


@functools.cache
def setup(network, table):
  """Returns jitted plain(params) and new(params), plain parameters, adapters with B = 0 and others, all float64."""
  module = network()
  x = jax.random.normal(jax.random.key(0), (3, 4, 6, 2) if network is image_network else (3, 2))
  inputs = x, jnp.linspace(0.1, 0.9, 3), jnp.arange(3)
  params = perturbed_params(module, *inputs, dtype=jnp.float64)
  fresh = jax.tree.map(lambda a: a.astype(jnp.float64), init_adapters(params, table, jax.random.key(1)))
  rng = np.random.default_rng(2)
  used = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape)), fresh)

  def plain(params):
    return module.apply({"params": params}, *inputs)

  def new(params):
    with adapted(table):
      return plain(params)

  return jax.jit(plain), jax.jit(new), params, fresh, used


def shapes_made(f, *args):
  """Returns the shapes of everything that f computes."""
  return {out.aval.shape for equation in equations(jax.make_jaxpr(f)(*args).jaxpr) for out in equation.outvars}


@pytest.mark.parametrize(("network", "table"), CASES)
def test_merged_equals_adapted(network, table):
  plain, new, params, _, used = setup(network, table)
  merged = merge_adapters(combine(params, used), table)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  got = new(combine(params, used))
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, plain(merged), rtol=1e-10, atol=1e-12)
  assert np.abs(got - plain(params)).max() > 0.01


@pytest.mark.parametrize(("network", "table"), CASES)
def test_starts_exactly_as_without(network, table):
  plain, new, params, fresh, _ = setup(network, table)
  np.testing.assert_array_equal(new(combine(params, fresh)), plain(params))


def test_merge_in_numpy():
  _, _, params, _, used = setup(image_network, DIT_TABLE)
  merged = merge_adapters(combine(params, used), DIT_TABLE)
  for name in ("mlp_in", "mlp_out"):
    layer, new = params["blocks"][name], used["blocks"][name]
    want = [layer["kernel"][i] + 6.0 / 3 * new["lora_a"][i] @ new["lora_b"][i] for i in range(2)]
    np.testing.assert_allclose(merged["blocks"][name]["kernel"], want, rtol=1e-12)
  assert merged["blocks"]["qkv"]["kernel"] is params["blocks"]["qkv"]["kernel"]
  assert merged["blocks"]["mlp_in"]["bias"] is params["blocks"]["mlp_in"]["bias"]


def test_merge_keeps_the_kernels_dtype_and_sums_in_float32():
  table = (Adapter("", rank=2),)
  params = {
    "kernel": jnp.ones((4, 5), jnp.bfloat16),
    "lora_a": jnp.full((4, 2), 0.1, jnp.float32),
    "lora_b": jnp.full((2, 5), 0.1, jnp.float32),
  }
  assert merge_adapters(params, table)["kernel"].dtype == jnp.bfloat16
  jaxpr = jax.make_jaxpr(lambda p: merge_adapters(p, table))(params).jaxpr
  (product,) = (e for e in equations(jaxpr) if e.primitive.name == "dot_general")
  assert product.outvars[0].aval.dtype == jnp.float32
  assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize(("network", "table"), CASES)
def test_never_makes_a_merged_kernel(network, table):
  """Neither forward nor in the gradient: a frozen kernel has none."""
  plain, new, params, fresh, _ = setup(network, table)
  kernels = {params[a][b]["kernel"].shape for a, b, leaf in flatten_dict(fresh) if leaf == "lora_a"}
  kernels |= {shape[1:] for shape in kernels if len(shape) == 3}

  def forward(adapters):
    return jnp.sum(new(combine(params, adapters)) ** 2)

  assert not kernels & shapes_made(forward, fresh)
  assert not kernels & shapes_made(jax.grad(forward), fresh)
  assert kernels & shapes_made(lambda adapters: plain(merge_adapters(combine(params, adapters), table)), fresh)


@pytest.mark.parametrize(("network", "table"), CASES)
def test_gradient(network, table):
  _, new, params, fresh, used = setup(network, table)
  loss = jax.jit(jax.value_and_grad(lambda adapters: jnp.mean(new(combine(params, adapters)) ** 2)))
  for keys, gradient in flatten_dict(loss(fresh)[1]).items():
    depths = gradient.reshape(-1, *gradient.shape[-2:])
    np.testing.assert_array_equal(np.any(depths, axis=(1, 2)), keys[-1] == "lora_b", "/".join(keys))
  flat, unravel = ravel_pytree(used)
  direction = np.random.default_rng(3).normal(size=flat.shape)
  after, before = (loss(unravel(flat + h * direction))[0] for h in (1e-5, -1e-5))
  got = ravel_pytree(loss(used)[1])[0] @ direction
  np.testing.assert_allclose(got, (after - before) / 2e-5, rtol=1e-6)


def test_initialisation():
  """A's deviation is 1 / rank, not its root; every layer and depth has its own draw."""
  kernels = {"blocks": {n: {"kernel": np.zeros((3, 64, 80))} for n in ("up", "down")}}
  key = jax.random.key(0)
  new = init_adapters(kernels, [Adapter("blocks/.*", rank=16, alpha=1.0)], key)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == {
    "blocks": {n: {"lora_a": ((3, 64, 16), jnp.float32), "lora_b": ((3, 16, 80), jnp.float32)} for n in ("up", "down")}
  }
  a = np.stack([new["blocks"][n]["lora_a"] for n in ("up", "down")]).reshape(6, -1)
  np.testing.assert_allclose(a.std(axis=1), 1 / 16, rtol=0.1)
  assert np.abs(np.corrcoef(a) - np.eye(6)).max() < 0.15
  assert not np.any(new["blocks"]["up"]["lora_b"])
  kernels = {"blocks": {n: kernels["blocks"][n] for n in ("down", "up")}}  # as a restored checkpoint may be ordered
  alone = init_adapters(kernels, [Adapter("blocks/up", rank=16)], key)
  assert set(alone["blocks"]) == {"up"}
  np.testing.assert_array_equal(alone["blocks"]["up"]["lora_a"], new["blocks"]["up"]["lora_a"])


def test_first_row_wins():
  kernels = {name: {"kernel": np.zeros((4, 4))} for name in ("a", "b")} | {"norm": {"kernel": np.ones(4)}}
  new = init_adapters(kernels, [Adapter("a", rank=1), Adapter(".*", rank=2)], jax.random.key(0))
  assert {name: layer["lora_a"].shape for name, layer in new.items()} == {"a": (4, 1), "b": (4, 2)}


def identity(size, leading=()):
  """A Dense that returns 0, with an adapter that returns its input."""
  eye = jnp.broadcast_to(jnp.eye(size), (*leading, size, size))
  return {"kernel": 0 * eye, "lora_a": eye, "lora_b": eye}


def test_dropout_needs_its_rng():
  x = jax.random.normal(jax.random.key(0), (40, 50))
  module, variables = nn.Dense(50, use_bias=False), {"params": identity(50)}
  rngs = {"dropout": jax.random.key(1)}
  with adapted([Adapter("", rank=50, dropout=0.2)]):
    np.testing.assert_array_equal(module.apply(variables, x), x)
    np.testing.assert_array_equal(module.apply(variables, x, rngs={"other": jax.random.key(1)}), x)
    out = np.asarray(module.apply(variables, inputs=x, rngs=rngs))
    assert "random_bits" in str(jax.make_jaxpr(lambda x: module.apply(variables, x, rngs=rngs))(x))
  dropped = out == 0
  assert dropped.mean() == pytest.approx(0.2, abs=0.03)
  np.testing.assert_allclose(out, np.where(dropped, 0, x / 0.8), rtol=1e-12)
  with adapted([Adapter("", rank=50)]):
    assert "random_bits" not in str(jax.make_jaxpr(lambda x: module.apply(variables, x, rngs=rngs))(x))


def test_dropout_differs_by_depth_in_a_scan():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x, nn.Dense(30, use_bias=False, name="dense")(x)

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      rngs = {"params": True, "dropout": True}
      layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs=rngs, length=4)
      return layers(name="layers")(x)[1]

  def loss(params):
    with adapted([Adapter("layers/dense", rank=30, dropout=0.5)]):
      out = Stack().apply({"params": params}, jnp.ones((2, 30)), rngs={"dropout": jax.random.key(0)})
    return jnp.sum(out), out

  gradient, out = jax.grad(loss, has_aux=True)({"layers": {"dense": identity(30, (4,))}})
  masks = np.asarray(out).reshape(4, -1)
  np.testing.assert_array_equal(np.unique(masks), [0, 2])
  assert len(np.unique(masks, axis=0)) == 4
  # d sum / dB = sum over rows of the dropped input: the backward pass has the masks of the forward pass.
  want = np.broadcast_to(np.asarray(out).sum(1)[..., None], (4, 30, 30))
  np.testing.assert_array_equal(gradient["layers"]["dense"]["lora_b"], want)


def test_modules_outside_apply_are_left_alone():
  head = VelocityHead(channels=2)
  with adapted([Adapter("", rank=2)]):
    assert head.params_from_teacher({"bias": 1}, jax.random.key(0), jnp.zeros((1, 2))) == {"proj_out": {"bias": 1}}


def test_computes_in_the_layers_dtype():
  def apply(params, x, dtype):
    with adapted([Adapter("", rank=2)]):
      return nn.Dense(5, dtype=dtype).apply({"params": params}, x)

  kernel = {"kernel": jnp.ones((4, 5), jnp.float32), "bias": jnp.ones(5, jnp.float32)}
  params = combine(kernel, init_adapters(kernel, [Adapter("", rank=2)], jax.random.key(0)))
  for dtype in (jnp.bfloat16, None):
    jaxpr = jax.make_jaxpr(apply, static_argnums=2)(params, jnp.ones((3, 4), jnp.float32), dtype)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.dtype for e in products] == [jnp.dtype(dtype or jnp.float32)] * 3
    assert jaxpr.out_avals[0].dtype == jnp.dtype(dtype or jnp.float32)


def test_trains_under_5_percent_of_dit_xl():
  """The released rank 256 at width 3072, scaled to 1152, and the released choice of layers."""
  head = ArcHead(channels=4, patch_size=2, num_components=16)
  module = DiT(channels=4, patch_size=2, num_classes=1000, head=head, **DIT_SIZES["XL"])
  table = [Adapter("blocks/(mlp_in|mlp_out)|time_embed/(in|out)", rank=256 * 1152 // 3072, dropout=0.05)]

  def init(key):
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = module.init(key, *inputs)["params"]
    return combine(params, init_adapters(params, table, key))

  params = jax.eval_shape(init, jax.random.key(0))
  rows = [("head/.*", True), ("final_norm/.*", True), (".*/lora_[ab]", True), (".*", False)]
  trained, frozen = split(params, match(rows, params))

  def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  assert count(trained["blocks"]) == 28 * 2 * 96 * (1152 + 4608)
  assert count(frozen) > 670e6
  assert count(trained) / count(params) < 0.05


def test_misfits_are_refused():
  kernels = {"blocks": {"mlp_in": {"kernel": np.zeros((2, 4, 6))}}, "head": {"out": {"kernel": np.zeros((4, 3))}}}
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r"adapter 'blocks/mlp': .* near: \['blocks/mlp_in'\]"):
    init_adapters(kernels, [Adapter("head/out", rank=1), Adapter("blocks/mlp", rank=1)], key)
  with pytest.raises(ValueError, match=r"adapter 'head/out': .*no earlier row takes"):
    init_adapters(kernels, [Adapter(".*", rank=1), Adapter("head/out", rank=1)], key)
  with pytest.raises(ValueError, match=r"adapter '.*': expected rank <= .* 'head/out' \(4, 3\), got 4"):
    init_adapters(kernels, [Adapter(".*", rank=4)], key)
  for settings, problem in [
    (dict(rank=0), "rank >= 1, got 0"),
    (dict(rank=1, alpha=0.0), "alpha > 0, or None for the rank, got 0.0"),
    (dict(rank=1, dropout=1.0), r"dropout in \[0, 1\), got 1.0"),
  ]:
    with pytest.raises(ValueError, match=f"adapter 'a': expected {problem}"):
      Adapter("a", **settings)


def test_another_table_is_refused():
  params = {"head": identity(3)}

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, use_bias=False, name="head")(x)

  class Other(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dropout(0.5, deterministic=True, name="head")(x)

  for table, got in [([Adapter("blocks", rank=3)], "no row"), ([Adapter("head", rank=2)], "rank 2 in row 'head'")]:
    with pytest.raises(ValueError, match=f"layer 'head' has an adapter of rank 3: .* got {got}"):
      merge_adapters(params, table)
    with adapted(table), pytest.raises(ValueError, match=f"layer 'head' has an adapter of rank 3: .* got {got}"):
      Network().apply({"params": params}, jnp.ones((1, 3)))
  with adapted([Adapter("head", rank=3)]), pytest.raises(ValueError, match="expected an nn.Dense, got Dropout"):
    Other().apply({"params": params}, jnp.ones((1, 3)))
