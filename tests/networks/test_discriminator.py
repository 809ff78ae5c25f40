"""Discriminators: StyleGAN2's formulas in NumPy, every size, scale at the start, groups, classes, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import convolve2d, correlate2d

from pflow_jax.mesh.sharding import Layout, make_mesh
from pflow_jax.networks.discriminator import Discriminator, PointDiscriminator, blur, make_discriminator, minibatch_std
from tests.networks.test_dit import apply, perturbed_params

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def batch(shape, size=4, key=0, num_classes=3):
  x = jax.random.normal(jax.random.key(key), (size, *shape), jnp.float32)
  return x, jnp.arange(size) % (num_classes + 1)


def numpy_act(x):
  return np.sqrt(2) * np.where(x > 0, x, 0.2 * x)


def numpy_blur(x, padding):
  x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
  return np.stack([convolve2d(x[..., c], FILTER, "valid") for c in range(x.shape[-1])], -1)


def numpy_conv(params, x, mode="same"):
  kernel = params["kernel"] / np.sqrt(np.prod(params["kernel"].shape[:3]))
  maps = [
    sum(correlate2d(x[..., c], kernel[..., c, f], mode) for c in range(x.shape[-1])) for f in range(kernel.shape[-1])
  ]
  return np.stack(maps, -1) + params.get("bias", 0)


def numpy_dense(params, x):
  return x @ params["kernel"] / np.sqrt(len(params["kernel"])) + params["bias"]


def numpy_features(params, x):
  """StyleGAN2's layers down to 4 x 4, for one example; a stride is a full result, thinned."""
  h = numpy_act(numpy_conv(params["from_input"], x))
  i = 0
  while f"block_{i}" in params:
    p = params[f"block_{i}"]
    skip = numpy_conv(p["skip"], numpy_blur(h, 1)[::2, ::2])
    h = numpy_act(numpy_conv(p["conv_0"], h))
    h = numpy_act(numpy_conv(p["conv_1"], numpy_blur(h, 2), "valid")[::2, ::2])
    h, i = (h + skip) / np.sqrt(2), i + 1
  return h


def numpy_logit(params, h, label):
  projection = h @ params["class_embed"]["embedding"][label] / np.sqrt(len(h))
  return (numpy_dense(params["out"], h)[0] + projection) / np.sqrt(2)


def test_images_match_numpy():
  """Two groups of two examples: features, the groups' deviation, and the rest of the network."""
  module = Discriminator((16, 16, 2), 3, width=2, max_width=3, group_size=2, dtype="float64")
  x, label = batch((16, 16, 2))
  params = perturbed_params(module, x, label, dtype=jnp.float64)
  p = jax.tree.map(np.asarray, params)
  features = np.stack([numpy_features(p, np.asarray(one, np.float64)) for one in x])
  assert features.shape == (4, 4, 4, 3)
  want = []
  for i, h in enumerate(features):
    group = features[2 * (i // 2) : 2 * (i // 2) + 2]
    std = np.full((4, 4, 1), np.sqrt(group.var(0) + 1e-8).mean())
    h = numpy_act(numpy_conv(p["conv"], np.concatenate([h, std], -1)))
    want.append(numpy_logit(p["logit"], numpy_act(numpy_dense(p["dense"], h.reshape(-1))), label[i]))
  np.testing.assert_allclose(apply(module, params, x, label), want, rtol=1e-9, atol=1e-12)


def test_points_match_numpy():
  module = PointDiscriminator((2,), 3, width=5, depth=2, dtype="float64")
  x, label = batch((2,))
  params = perturbed_params(module, x, label, dtype=jnp.float64)
  p, h = jax.tree.map(np.asarray, params), np.asarray(x, np.float64)
  for i in range(2):
    h = numpy_act(numpy_dense(p[f"dense_{i}"], h))
  want = [numpy_logit(p["logit"], *inputs) for inputs in zip(h, label, strict=True)]
  np.testing.assert_allclose(apply(module, params, x, label), want, rtol=1e-9)


@pytest.mark.parametrize(
  ("shape", "width", "channels"),
  [
    ((4, 4, 3), 8, [8]),
    ((8, 8, 1), 64, [64, 128]),
    ((32, 32, 3), 600, [512, 512, 512, 512]),
    ((64, 64, 4), 128, [128, 256, 512, 512, 512]),
    ((512, 512, 3), 64, [64, 128, 256, 512, 512, 512, 512, 512]),
  ],
)
def test_size_follows_the_resolution(shape, width, channels):
  """StyleGAN2's count of parameters, layer by layer; nothing is computed."""
  module = make_discriminator(shape, 10, width=width, dtype="bfloat16")
  x, label = jax.ShapeDtypeStruct((6, *shape), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.int32)
  logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x, label)
  assert (logits.shape, logits.dtype) == ((6,), jnp.float32)
  last = channels[-1]
  count = (shape[-1] + 1) * channels[0]
  for a, b in itertools.pairwise(channels):
    count += (9 * a + 1) * a + (9 * a + 1) * b + a * b
  count += (9 * (last + 1) + 1) * last + (16 * last + 1) * last + (last + 1) + 11 * last
  leaves = jax.tree.leaves(variables["params"])
  assert sum(leaf.size for leaf in leaves) == count
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_activations_start_near_unit_variance(size):
  """Smooth images, which the blur leaves alone: the scaling at run time holds every layer near their unit power."""
  axis, phase = np.linspace(0, 2, size), np.arange(12).reshape(4, 1, 1, 3)
  x = np.sqrt(2) * np.sin(phase + axis[:, None, None] + 3 * axis[:, None])
  module = make_discriminator((size, size, 3), 3, width=16)
  inputs = jnp.asarray(x, jnp.float32), jnp.arange(4)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * (len(a.shape) > 1), jnp.float32), shapes)
  run = lambda p: module.apply({"params": p}, *inputs, capture_intermediates=True, mutable="intermediates")
  _, captured = jax.jit(run)(params)
  layers = captured["intermediates"]
  power = {name: np.mean(layers[name]["__call__"][0] ** 2) for name in layers if name not in ("__call__", "logit")}
  assert len(power) == 3 + np.log2(size / 4)
  assert all(0.2 < value < 1.5 for value in power.values()), power


def test_kernels_start_as_unit_normals():
  module = make_discriminator((8, 8, 1), 3, width=32)
  params = jax.jit(module.init)(jax.random.key(0), *batch((8, 8, 1)))["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert abs(np.std(leaf) - (leaf.ndim > 1)) < 3 / np.sqrt(leaf.size), path


def test_blur_keeps_constants_and_removes_the_finest_pattern():
  """The pattern that a stride of 2 would alias vanishes inside, a constant passes; sizes are as documented."""
  filtered = jax.jit(blur, static_argnums=(1, 2))
  checker = jnp.asarray(np.indices((9, 9)).sum(0) % 2 * 2.0 - 1)[None, :, :, None]
  np.testing.assert_allclose(filtered(checker, 1, 0), 0.0, atol=1e-12)
  np.testing.assert_allclose(filtered(jnp.full((1, 8, 8, 2), 3.0), 2, 0), 3.0, rtol=1e-12)
  for size, stride, padding, want in [(8, 1, 2, 9), (8, 2, 1, 4), (9, 2, 0, 3)]:
    assert filtered.eval_shape(jnp.zeros((1, size, size, 1)), stride, padding).shape == (1, want, want, 1)


@pytest.mark.parametrize(("size", "group_size", "groups"), [(8, 4, 2), (6, 4, 2), (7, 4, 7), (6, 1, 6)])
def test_examples_of_a_group_see_each_other(size, group_size, groups):
  """Consecutive examples, as many as the largest divisor of the batch up to the group size, and no others."""
  module = Discriminator((4, 4, 1), 3, width=4, group_size=group_size)
  x, label = batch((4, 4, 1), size)
  params = perturbed_params(module, x, label)
  moved = apply(module, params, x.at[0].multiply(3.0), label) != apply(module, params, x, label)
  np.testing.assert_array_equal(moved, np.arange(size) < size // groups)


@pytest.mark.parametrize("size", [16, 32])
def test_groups_do_not_depend_on_devices(size):
  """Groups across devices have the right deviations; with whole groups on every device nothing is communicated."""
  x = np.random.default_rng(0).normal(size=(size, 2, 2, 3))
  sharded = Layout(make_mesh()).spread(x)
  assert len(sharded.sharding.device_set) == 8
  program = jax.jit(minibatch_std, static_argnums=1).lower(sharded, 4).compile()
  want = x.reshape(-1, 4, 2, 2, 3).std(axis=1).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(program(sharded)[:, 0, 0, 3], np.repeat(want, 4), rtol=1e-6)
  assert any(word in program.as_text() for word in ("all-", "collective-")) == (size == 16)


@pytest.mark.parametrize("shape", [(4, 4, 1), (2,)])
def test_class_moves_the_logit(shape):
  """Only the rows of the labels present get a gradient, the null class's among them."""
  x, _ = batch(shape)
  label = jnp.array([0, 3, 3, 0])
  module = make_discriminator(shape, 3, width=4)
  params = perturbed_params(module, x, label)
  out, other = (apply(module, params, x, cond) for cond in (label, jnp.array([1, 2, 3, 0])))
  np.testing.assert_array_equal(out != other, [True, True, False, False])
  gradient = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x, label))))(params)
  rows = jnp.any(gradient["logit"]["class_embed"]["embedding"] != 0, axis=1)
  np.testing.assert_array_equal(rows, [True, False, False, True])


@pytest.mark.parametrize("num_classes", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4, 1), (2,)])
def test_few_classes(shape, num_classes):
  x, _ = batch(shape)
  module = make_discriminator(shape, num_classes, width=4)
  label = jnp.full(4, num_classes)
  params = perturbed_params(module, x, label)
  assert params["logit"]["class_embed"]["embedding"].shape == (num_classes + 1, 4)
  assert np.all(np.isfinite(apply(module, params, x, label)))


@pytest.mark.parametrize("shape", [(8, 8, 1), (2,)])
def test_bfloat16_keeps_float32_ends(shape):
  half, full = (make_discriminator(shape, 3, width=8, dtype=dtype) for dtype in ("bfloat16", "float32"))
  x, label = batch(shape)
  params = perturbed_params(full, x, label)
  out, want = apply(half, params, x, label), apply(full, params, x, label)
  assert out.dtype == jnp.float32
  assert 1e-5 < np.abs(out - want).max() / np.abs(want).max() < 0.05


def test_misfits_are_refused():
  for shape in [(12, 12, 3), (2, 2, 3), (8, 16, 3), (0, 0, 3)]:
    with pytest.raises(ValueError, match=r"H = W = 4, 8, 16, 32, .*crop, pad or resize"):
      make_discriminator(shape, 3)
  with pytest.raises(ValueError, match=r"\(H, W, C\) of an image or \(C,\) of a point, got \(8, 3\)"):
    make_discriminator((8, 3), 3)
  for shape, other in [((8, 8, 1), (16, 16, 1)), ((2,), (3,))]:
    x, label = batch(other)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, .*got \(4, "):
      jax.eval_shape(make_discriminator(shape, 3).init, jax.random.key(0), x, label)
