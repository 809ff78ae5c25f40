"""Heads against the PyTorch releases (golden), and a student that starts as its teacher."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.networks.dit import DiT
from pflow_jax.networks.heads import (
  ArcHead,
  DXHead,
  GMFlowHead,
  VelocityHead,
  head_params_from_teacher,
  student_params_from_teacher,
)
from pflow_jax.networks.layers import patchify, unpatchify
from pflow_jax.networks.mlp import MLP
from tests.networks.test_dit import apply, perturbed_params

K, C, D = 3, 2, 6  # of the golden files
HEADS = {
  "head_gmdit_v2": GMFlowHead(channels=C, patch_size=2, num_components=K),
  "head_gmflux": GMFlowHead(channels=C, patch_size=2, num_components=K, layout="flux"),
  "head_gmqwen": GMFlowHead(channels=C, patch_size=2, num_components=K, layout="flux"),
  # The release starts FLUX.2's log-std at 0 and its means have no bias.
  "head_gmflux2": GMFlowHead(
    channels=C, patch_size=2, num_components=K, layout="flux", use_bias=False, init_log_std=0.0
  ),
  "head_dxdit": DXHead(channels=C, patch_size=2, num_coefficients=K),
  "head_dxflux": DXHead(channels=C, patch_size=2, num_coefficients=K, layout="flux"),
  "head_dxqwen_grid": DXHead(channels=C, patch_size=2, num_coefficients=K, layout="flux"),
  "head_dxqwen_poly": DXHead(channels=C, patch_size=2, num_coefficients=K, layout="flux", basis="polynomial"),
  "head_arcflux": ArcHead(channels=C, patch_size=2, num_components=K, layout="flux"),
  "head_arcqwen": ArcHead(channels=C, patch_size=2, num_components=K, layout="flux"),
}


def golden_teacher(data, use_bias=True):
  layer = {"kernel": data["in_proj_out_weight"].T}
  return {"proj_out": layer | ({"bias": data["in_proj_out_bias"]} if use_bias else {})}


@pytest.mark.parametrize("name", HEADS)
def test_initialisation_is_the_releases(golden, name):
  data, head = golden(name), HEADS[name]
  noise = data["rng_noise"].reshape(K, C) if "rng_noise" in data else None
  params = head_params_from_teacher(head, golden_teacher(data, head.use_bias), jax.random.key(0), noise=noise)
  layer = "proj_out" if isinstance(head, DXHead) else "proj_out_means"
  wanted = {key: value for key, value in data.items() if key.startswith("out_proj_out")}
  (weight,) = (value for key, value in wanted.items() if key.endswith("_weight"))
  np.testing.assert_array_equal(params[layer]["kernel"], weight.T)
  biases = [value for key, value in wanted.items() if key.endswith("_bias")]
  assert set(params[layer]) == ({"kernel", "bias"} if biases else {"kernel"})
  for bias in biases:
    np.testing.assert_allclose(params[layer]["bias"], bias, rtol=1e-6, atol=1e-7)
  if isinstance(head, GMFlowHead):
    np.testing.assert_allclose(params["proj_out_logstds_3"]["bias"], data["out_logstd_bias"])
    assert not np.any(params["proj_out_logstds_3"]["kernel"])
    assert np.any(params["proj_out_logstds_1"]["kernel"])
  if not isinstance(head, DXHead):
    assert not any(np.any(leaf) for leaf in params["proj_out_logweights"].values())


def tokens_to_rows(a):
  """Golden tokens (B, K, R, Hp, Wp) -> rows (B, T, K R), component-major as in "flux"."""
  batch, maps, rows, height, width = a.shape
  return jnp.asarray(a).transpose(0, 3, 4, 1, 2).reshape(batch, height * width, maps * rows)


@pytest.mark.parametrize("name", [n for n, head in HEADS.items() if head.layout == "flux"])
def test_row_order_is_the_releases(golden, name):
  data = golden(name)
  names = [key.removeprefix("in_tok") for key in data if key.startswith("in_tok")]
  assert names
  for suffix in names:
    tokens, want = data[f"in_tok{suffix}"], data[f"out_unpatch{suffix}"]
    got = unpatchify(tokens_to_rows(tokens), tokens.shape[-2:], 2, tokens.shape[1], "flux")
    np.testing.assert_array_equal(got, want.transpose(0, 1, 3, 4, 2))
  if "in_latent" in data:
    packed = patchify(jnp.asarray(data["in_latent"]).transpose(0, 2, 3, 1), 2, "flux")
    want = data["out_patchified"].reshape(2, 8, -1).transpose(0, 2, 1)
    np.testing.assert_array_equal(packed, want)


@pytest.mark.parametrize("layout", ["dit", "flux"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_rows_as_the_table_says(layout, p):
  """One-hot tokens read a kernel whose entries are their own row numbers."""
  head = ArcHead(channels=C, patch_size=p, num_components=K, layout=layout)
  tokens, embedding = jnp.ones((1, 2, 1)), jnp.ones((1, 1))
  init = functools.partial(head.init, grid=(1, 2))
  params = jax.eval_shape(init, jax.random.key(0), tokens, embedding)["params"]
  params = {
    name: {"kernel": jnp.arange(a["bias"].size, dtype=jnp.float32)[None], "bias": jnp.zeros(a["bias"].size)}
    for name, a in params.items()
  }
  out = jax.tree.map(np.asarray, head.apply({"params": params}, tokens, embedding, (1, 2)))

  def row(i, j, m, c, maps, channels):
    if layout == "dit":
      return ((i * p + j % p) * maps + m) * channels + c
    return ((m * channels + c) * p + i) * p + j % p

  for i, j in np.ndindex(p, 2 * p):
    for m, c in np.ndindex(K, C):
      assert out["velocities"][0, m, i, j, c] == row(i, j, m, c, K, C)
    for m in range(K):
      assert out["logits"][0, m, i, j] == row(i, j, m, 0, K, 1)
    for m in range(K - 1):
      assert out["log_gammas"][0, m, i, j] == row(i, j, m, 0, K - 1, 1)


def image_network(head, **fields):
  return DiT(channels=2, patch_size=2, width=16, depth=2, num_heads=2, num_classes=5, head=head, **fields)


def point_network(head, **fields):
  return MLP(channels=2, width=16, depth=2, num_classes=5, head=head, **fields)


def inputs_of(network):
  space = (4, 6) if network is image_network else ()
  x = jax.random.normal(jax.random.key(0), (3, *space, 2), jnp.float32)
  return x, jnp.linspace(0.1, 0.9, 3, dtype=jnp.float32), jnp.arange(3)


def fixed_fields(network, layout):
  return dict(channels=2, patch_size=2 if network is image_network else 1, layout=layout)


@functools.cache
def teacher_of(network, layout):
  """Returns (parameters, velocity) of a teacher without any zero parameter."""
  teacher, inputs = network(VelocityHead(**fixed_fields(network, layout))), inputs_of(network)
  params = perturbed_params(teacher, *inputs)
  return params, apply(teacher, params, *inputs)


def start(network, make_head, layout, bias_noise, **fields):
  """Returns (teacher's velocity, student's output, student's parameters) at initialisation."""
  teacher_params, velocity = teacher_of(network, layout)
  student, inputs = (
    network(make_head(**fixed_fields(network, layout), **fields)),
    inputs_of(network),
  )
  params = student_params_from_teacher(teacher_params, student, jax.random.key(3), bias_noise=bias_noise)
  fresh = jax.eval_shape(student.init, jax.random.key(0), *inputs)["params"]
  got, want = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (params, fresh))
  assert got == want
  return velocity, apply(student, params, *inputs), params


@pytest.mark.parametrize(
  ("network", "layout"), [(image_network, "dit"), (image_network, "flux"), (point_network, "dit")]
)
@pytest.mark.parametrize(
  ("make_head", "field", "output"),
  [
    (GMFlowHead, "num_components", "means"),
    (DXHead, "num_coefficients", "coefficients"),
    (ArcHead, "num_components", "velocities"),
  ],
)
def test_student_starts_as_its_teacher(network, layout, make_head, field, output):
  velocity, out, _ = start(network, make_head, layout, 0.0, **{field: 4})
  assert np.abs(velocity).max() > 0.1
  assert out[output].shape == (3, 4, *velocity.shape[1:])
  want = np.broadcast_to(velocity[:, None], out[output].shape)
  np.testing.assert_allclose(out[output], want, rtol=1e-6, atol=1e-6)
  assert all(value.dtype == jnp.float32 for value in out.values())
  if "logits" in out:
    assert not np.any(out["logits"])


def test_bias_noise_parts_the_components():
  velocity, out, _ = start(image_network, GMFlowHead, "dit", 0.05, num_components=64)
  offset = np.asarray(out["means"] - velocity[:, None])
  # One value per (component, channel): the same at every pixel and example.
  np.testing.assert_allclose(offset, np.broadcast_to(offset[:1, :, :1, :1], offset.shape), atol=1e-5)
  assert offset[0, :, 0, 0].std() == pytest.approx(0.05, rel=0.25)


def test_polynomial_keeps_one_coefficient():
  velocity, out, _ = start(image_network, DXHead, "dit", 0.05, num_coefficients=3, basis="polynomial")
  np.testing.assert_allclose(out["coefficients"][:, 0], velocity, rtol=1e-6, atol=1e-6)
  assert not np.any(out["coefficients"][:, 1:])


@pytest.mark.parametrize("layout", ["dit", "flux"])
def test_gammas_start_log_spaced(layout):
  _, out, _ = start(image_network, ArcHead, layout, 0.05, num_components=4)
  want = np.log([0.2, math.sqrt(0.2 * 4), 4.0])[None, :, None, None]
  np.testing.assert_allclose(out["log_gammas"], np.broadcast_to(want, out["log_gammas"].shape), rtol=1e-5, atol=1e-6)
  fresh = ArcHead(channels=2, patch_size=2, num_components=4, layout=layout)
  out, _ = fresh.init_with_output(jax.random.key(0), jnp.ones((1, 1, 3)), jnp.ones((1, 3)), (1, 1))
  np.testing.assert_allclose(out["log_gammas"][0, :, 0, 1], want.ravel(), rtol=1e-5, atol=1e-6)


def test_arc_with_one_component_has_no_gamma():
  velocity, out, params = start(image_network, ArcHead, "dit", 0.0, num_components=1)
  assert out["log_gammas"].shape == (3, 0, 4, 6)
  assert "proj_out_loggamma" not in params["head"]
  np.testing.assert_allclose(out["velocities"][:, 0], velocity, rtol=1e-6, atol=1e-6)


def test_log_std_starts_at_its_constant_and_does_not_steer_the_backbone():
  _, out, params = start(image_network, GMFlowHead, "dit", 0.05, num_components=2)
  np.testing.assert_allclose(out["log_std"], math.log(0.05), rtol=1e-6)
  assert params["head"]["proj_out_logstds_1"]["kernel"].shape == (16, 1024)
  head = GMFlowHead(channels=2, patch_size=2, num_components=2)

  def log_std(head_params, embedding):
    tokens = jnp.zeros((3, 1, 16), jnp.float32)
    return jnp.sum(head.apply({"params": head_params}, tokens, embedding, (1, 1))["log_std"])

  embedding = jnp.ones((3, 16), jnp.float32)
  own_params = {
    **params["head"],
    "proj_out_logstds_3": {"kernel": jnp.ones((1024, 1)), "bias": jnp.ones(1)},
  }
  own, back = jax.grad(log_std, argnums=(0, 1))(own_params, embedding)
  assert np.any(own["proj_out_logstds_1"]["kernel"])
  assert not np.any(back)


def test_constant_log_std_has_no_parameters():
  _, out, params = start(image_network, GMFlowHead, "dit", 0.05, num_components=2, log_std=-2.5)
  np.testing.assert_array_equal(out["log_std"], np.full(3, -2.5, np.float32))
  assert sorted(params["head"]) == ["proj_out_logweights", "proj_out_means"]


def test_heads_compute_in_float32_under_a_bfloat16_backbone():
  module = image_network(GMFlowHead(channels=2, patch_size=2, num_components=2), dtype="bfloat16")
  inputs = inputs_of(image_network)
  out = apply(module, perturbed_params(module, *inputs), *inputs)
  assert {value.dtype for value in out.values()} == {jnp.dtype("float32")}


def test_student_params_are_new_arrays():
  head = VelocityHead(channels=2, patch_size=2)
  inputs = inputs_of(image_network)
  teacher_params = perturbed_params(image_network(head), *inputs)
  params = student_params_from_teacher(teacher_params, head, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, teacher_params)
  jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)(params)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher_params))
  assert np.all(np.isfinite(apply(image_network(head), teacher_params, *inputs)))


def test_misfits_are_refused(golden):
  data = golden("head_gmflux")
  head, teacher, key = HEADS["head_gmflux"], golden_teacher(data), jax.random.key(0)
  with pytest.raises(ValueError, match=r'one layer "proj_out", got \[\'proj_out_means\'\]'):
    head_params_from_teacher(head, {"proj_out_means": {}}, key)
  with pytest.raises(ValueError, match="channels 3 and patch_size 2, got 8"):
    head_params_from_teacher(dataclasses.replace(head, channels=3), teacher, key)
  with pytest.raises(ValueError, match="channels 2 and patch_size 3, got 8"):
    head_params_from_teacher(dataclasses.replace(head, patch_size=3), teacher, key)
  with pytest.raises(ValueError, match=r"\(3, 2\), got \(6,\)"):
    head_params_from_teacher(head, teacher, key, noise=data["rng_noise"])
  with pytest.raises(ValueError, match="expected no bias"):
    head_params_from_teacher(HEADS["head_gmflux2"], teacher, key)
  with pytest.raises(ValueError, match='"grid" or "polynomial", got \'cubic\''):
    head_params_from_teacher(DXHead(channels=2, patch_size=2, basis="cubic"), teacher, key)
  with pytest.raises(ValueError, match='expected "dit" or "flux", got \'sd3\''):
    head_params_from_teacher(dataclasses.replace(head, layout="sd3"), teacher, key)
  with pytest.raises(ValueError, match="expected \"learned\" or a number, got 'fixed'"):
    head_params_from_teacher(dataclasses.replace(head, log_std="fixed"), teacher, key)
  with pytest.raises(ValueError, match='the key "head"'):
    student_params_from_teacher({"blocks": {}}, head, key)
