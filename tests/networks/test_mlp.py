"""The MLP for points: conditioning, any space, start at zero, compute dtype, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.networks.heads import DXHead, GMFlowHead, VelocityHead
from pflow_jax.networks.mlp import MLP
from tests.networks.test_dit import apply, perturbed_params


def network(**fields):
  defaults = dict(channels=2, width=16, depth=2, num_classes=3, head=VelocityHead(channels=2))
  return MLP(**(defaults | fields))


def batch(space=(), key=0):
  x = jax.random.normal(jax.random.key(key), (4, *space, 2), jnp.float32)
  return x, jnp.linspace(0.1, 0.9, 4, dtype=jnp.float32), jnp.arange(4)


def test_starts_at_zero():
  inputs = batch()
  params = jax.jit(network().init)(jax.random.key(0), *inputs)["params"]
  out = apply(network(), params, *inputs)
  assert out.shape == (4, 2)
  assert not np.any(out)
  for block in (params["blocks_0"], params["blocks_1"]):
    assert not np.any(block["mlp_out"]["kernel"])
    assert not np.any(block["adaln"]["kernel"])


def test_acts_on_each_point_alone():
  x, t, label = batch((3, 5))
  params = perturbed_params(network(), x, t, label)
  out = apply(network(), params, x, t, label)
  assert out.shape == (4, 3, 5, 2)
  alone = apply(network(), params, x[:, 1, 4], t, label)
  np.testing.assert_allclose(out[:, 1, 4], alone, rtol=1e-4, atol=1e-5)


def test_depends_on_every_input():
  x, t, label = batch()
  params = perturbed_params(network(), x, t, label)
  out = apply(network(), params, x, t, label)
  for other in [(x + 1, t, label), (x, t + 0.05, label), (x, t, (label + 1) % 4)]:
    assert np.all(np.abs(apply(network(), params, *other) - out).max(-1) > 1e-3)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_class_table_has_a_null_row(num_classes):
  x, t, _ = batch()
  module = network(num_classes=num_classes)
  params = perturbed_params(module, x, t, jnp.full(4, num_classes))
  assert params["class_embed"]["embedding"].shape == (num_classes + 1, 16)
  assert np.all(np.isfinite(apply(module, params, x, t, jnp.full(4, num_classes))))


def test_heads_of_policies():
  inputs = batch()
  module = network(head=GMFlowHead(channels=2, num_components=5))
  out = apply(module, perturbed_params(module, *inputs), *inputs)
  shapes = {name: value.shape for name, value in out.items()}
  assert shapes == {"means": (4, 5, 2), "logits": (4, 5), "log_std": (4,)}
  module = network(head=DXHead(channels=2, num_coefficients=7))
  out = apply(module, perturbed_params(module, *inputs), *inputs)
  assert out["coefficients"].shape == (4, 7, 2)


def test_bfloat16_keeps_float32_ends():
  inputs = batch()
  half = network(dtype="bfloat16")
  params = perturbed_params(half, *inputs)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  out, want = apply(half, params, *inputs), apply(network(), params, *inputs)
  assert out.dtype == jnp.float32
  assert 1e-5 < np.abs(out - want).max() / np.abs(want).max() < 0.05


def test_jvp_matches_finite_differences():
  module, (x, t, label) = network(dtype="float64"), batch()
  params = perturbed_params(module, x, t, label, dtype=jnp.float64)
  x, t = x.astype(jnp.float64), t.astype(jnp.float64)
  dx, dt = jnp.cos(3 * x), jnp.array([1.0, -0.5, 0.3, 0.7])
  f = jax.jit(lambda x, t: module.apply({"params": params}, x, t, label))
  _, tangent = jax.jvp(f, (x, t), (dx, dt))
  h = 1e-7
  want = (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h)
  np.testing.assert_allclose(tangent, want, rtol=1e-5, atol=1e-5)


def test_misfits_are_refused():
  x, t, label = batch()
  with pytest.raises(ValueError, match=r"expected shape \(B, \*space, 2\), got \(4, 1\)"):
    jax.eval_shape(network().init, jax.random.key(0), x[:, :1], t, label)
  patched = dataclasses.replace(network(), head=VelocityHead(channels=2, patch_size=2))
  with pytest.raises(ValueError, match=r"\(2, 1\), got \(2, 2\)"):
    jax.eval_shape(patched.init, jax.random.key(0), x, t, label)
