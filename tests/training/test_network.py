"""Networks: which parameters train, that they fit back onto a frozen base, and what a call computes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.mesh.partition import path_of
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.heads import ArcHead, VelocityHead
from pflow_jax.networks.mlp import MLP
from pflow_jax.settings.adapters import AdapterSettings
from pflow_jax.training.network import Network
from tests.networks.test_dit import perturbed_params

pytestmark = pytest.mark.usefixtures("float32")

TABLE = (("blocks/(mlp_in|mlp_out)", 2), ("time_embed/out", 3, 1.5))
ADAPTERS = AdapterSettings(TABLE)


def image_network(head=VelocityHead, adapters=ADAPTERS):
  fields = dict(channels=1, patch_size=2, width=8, depth=2, num_heads=2, num_classes=3)
  made = head(channels=1, patch_size=2)
  return Network(DiT(head=made, **fields), made, adapters)


def point_network(dropout=0.0, dtype=jnp.float32, table=None):
  module = MLP(channels=2, width=8, depth=1, num_classes=3, head=VelocityHead(channels=2), dtype=dtype)
  row = ("blocks_0/(mlp_in|mlp_out)", 2, 3.0, dropout)
  return Network(module, module.head, AdapterSettings((row,) if table is None else table))


def points():
  return jax.random.normal(jax.random.key(0), (3, 2)), jnp.linspace(0.1, 0.9, 3), jnp.arange(3)


def all_params(network):
  """Random values in every parameter and every adapter: nothing starts hidden behind a zero."""
  params = perturbed_params(network.module, *points())
  if not network.adapters.table:
    return params
  rng = np.random.default_rng(1)
  trained = network.trained(params, params, jax.random.key(1))
  return network.complete(jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), a.dtype), trained), params)


def base_of(network):
  inputs = jnp.zeros((1, 4, 4, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)
  return perturbed_params(network.module, *inputs)


def leaves_of(tree):
  return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_trained_are_the_adapters_and_the_named_layers_and_nothing_else():
  network = image_network()
  base = base_of(network)
  trained = leaves_of(network.trained(base, base, jax.random.key(0)))
  adapters = {f"{layer}/lora_{ab}" for layer in ("blocks/mlp_in", "blocks/mlp_out", "time_embed/out") for ab in "ab"}
  layers = {f"{layer}/{name}" for layer in ("head/proj_out", "final_norm/adaln") for name in ("kernel", "bias")}
  assert set(trained) == adapters | layers
  assert all(trained[path] is leaves_of(base)[path] for path in layers)
  assert trained["blocks/mlp_in/lora_a"].shape == (2, 8, 2), "of every depth its own"
  assert trained["time_embed/out/lora_b"].shape == (3, 8)

  few = image_network(adapters=AdapterSettings(TABLE[:1], train=(".*/bias",)))
  names = set(leaves_of(few.trained(base, base, jax.random.key(0))))
  in_full = {path for path in leaves_of(base) if path.endswith("bias") or path.startswith("head/")}
  assert names == {path for path in adapters if "blocks" in path} | in_full


def test_complete_shares_every_frozen_leaf_with_the_base():
  """A student with another head than its teacher: the base is the teacher's, the head the student's."""
  base = base_of(image_network())
  network = image_network(ArcHead)
  own = base_of(network)
  trained = network.trained(own, base, jax.random.key(0))
  whole = leaves_of(network.complete(trained, base))
  assert set(whole) == set(leaves_of(own)) | set(leaves_of(trained)), "the module's whole tree, no teacher's head"
  kept, theirs = leaves_of(trained), leaves_of(base)
  assert all(leaf is (kept[path] if path in kept else theirs[path]) for path, leaf in whole.items())
  assert sum(path not in kept for path in whole) > 10


def test_without_a_table_all_is_trained_and_nothing_is_done():
  network = image_network(adapters=AdapterSettings())
  params, other = {"layer": {"kernel": np.ones(2)}}, {"layer": {"kernel": np.zeros(2)}}
  jax.tree.map(np.testing.assert_array_equal, network.trained(params, other, jax.random.key(0)), params)
  assert network.complete(params, other) is params
  assert network.merged(params) is params


@pytest.mark.parametrize("table", [(), TABLE])
def test_what_trains_is_float32_whatever_its_teacher_is(table):
  network = image_network(adapters=AdapterSettings(table))
  params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), base_of(network))
  trained = network.trained(params, params, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype("float32")}
  whole = leaves_of(network.complete(trained, params))
  assert whole["blocks/qkv/kernel"].dtype == ("bfloat16" if table else "float32")


def test_patterns_that_take_nothing_are_refused():
  for adapters, name in (
    (AdapterSettings(TABLE, train=("fnal_norm/.*",)), "fnal_norm"),
    (AdapterSettings((*TABLE, ("blocks/mlp_inn", 2))), "mlp_inn.*near.*mlp_in"),
  ):
    network = image_network(adapters=adapters)
    with pytest.raises(ValueError, match=name):
      network.trained(base_of(network), base_of(network), jax.random.key(0))


def test_merged_parameters_are_the_plain_networks():
  network = point_network()
  params = all_params(network)
  adapted = network(params, *points())
  merged = network.merged(params)
  assert not any("lora" in path for path in leaves_of(merged))
  plain = Network(network.module, network.head)
  np.testing.assert_allclose(plain(merged, *points()), adapted, rtol=1e-5, atol=1e-6)
  assert not np.allclose(plain(params, *points()), adapted, atol=0.01), "the adapters do something"


def test_dropout_engages_with_a_key_alone():
  network = point_network(dropout=0.5)
  params = all_params(network)
  plain = network(params, *points())
  np.testing.assert_array_equal(plain, network(params, *points()))
  np.testing.assert_allclose(plain, point_network(dropout=0.0)(params, *points(), key=jax.random.key(0)), rtol=1e-6)
  one, again, two = (network(params, *points(), key=jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(plain, one, atol=0.01)
  assert not np.allclose(one, two, atol=0.01)


def test_float32_is_the_same_network_in_more_digits():
  assert point_network().float32 is None
  assert point_network(dtype="float64").float32 is None
  rough = point_network(dtype="bfloat16")
  precise = rough.float32
  assert precise.module.dtype == jnp.float32
  assert precise.adapters == rough.adapters
  params = all_params(rough)
  np.testing.assert_array_equal(precise(params, *points()), point_network()(params, *points()))
  assert np.abs(rough(params, *points()) - precise(params, *points())).max() > 1e-3
