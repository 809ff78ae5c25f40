"""EDM2's U-Net against its formulas in NumPy: magnitudes, weights on the sphere, neutral branches, derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pflow_jax.networks.edm2 import EDM2_SIZES, Block, EDM2UNet, MPConv, mp_cat, mp_silu, mp_sum, normalize_weights
from tests.networks.test_dit import perturbed_params

TINY = dict(model_channels=4, channel_mult=(1, 2), num_blocks=0, attn_levels=(1,), channels_per_head=4)
BRANCHES = "length_embed", "guidance_embed"


def network(**fields):
  return EDM2UNet(**(dict(channels=2, num_classes=3) | TINY | fields))


@functools.cache
def compiled(module):
  return jax.jit(module.apply)


def apply(module, params, *inputs):
  return compiled(module)({"params": params}, *inputs)


def batch(shape=(3, 4, 6, 2), dtype=jnp.float32):
  x = jax.random.normal(jax.random.key(0), shape, dtype)
  return x, jnp.linspace(0.2, 0.9, shape[0], dtype=dtype), jnp.arange(shape[0]) + 1  # the last label is null


def flow_map_inputs(dtype=jnp.float32):
  x, t, cond = batch(dtype=dtype)
  return x, t, cond, t * jnp.array([0.0, 0.5, 0.9], dtype), jnp.array([1.0, 2.0, 3.0], dtype)


def with_leaf(params, path, value):
  flat = flatten_dict(params, sep="/")
  assert path in flat
  return unflatten_dict(flat | {path: jnp.full_like(flat[path], value)}, sep="/")


def rms(a):
  return np.sqrt(np.mean(np.square(a)))


class NumpyUNet:
  """The release's forward pass, float64; params by path, x (B, H, W, C)."""

  def __init__(self, params, net):
    self.params = {name: np.asarray(leaf, np.float64) for name, leaf in flatten_dict(params, sep="/").items()}
    self.net = net

  @staticmethod
  def unit(x, axis):
    return x / (1e-4 + np.sqrt(np.mean(x**2, axis=axis, keepdims=True)))

  @staticmethod
  def silu(x):
    return x / (1 + np.exp(-x)) / 0.596

  @staticmethod
  def mix(a, b, t):
    return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)

  def linear(self, x, name):
    kernel = self.params[f"{name}/mp_kernel"]
    fan_in = np.prod(kernel.shape[:-1])
    kernel = self.unit(kernel, tuple(range(kernel.ndim - 1))) * self.params.get(f"{name}/gain", 1) / np.sqrt(fan_in)
    if kernel.ndim == 2:
      return x @ kernel
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))

  def block(self, x, condition, name):
    if name.endswith("down"):
      x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    if name.endswith("up"):
      x = x.repeat(2, axis=1).repeat(2, axis=2)
    skip = f"{name}/conv_skip"
    widen = (lambda x: self.linear(x, skip)) if f"{skip}/mp_kernel" in self.params else (lambda x: x)
    if name.startswith("enc"):
      x, widen = self.unit(widen(x), -1), lambda x: x
    y = (
      self.linear(self.silu(x), f"{name}/conv_res0") * (1 + self.linear(condition, f"{name}/emb_linear"))[:, None, None]
    )
    x = self.mix(widen(x), self.linear(self.silu(y), f"{name}/conv_res1"), 0.3)
    if name.startswith(("enc1_block", "dec1_in0", "dec1_block")):
      qkv = self.linear(x, f"{name}/attn_qkv").reshape(len(x), -1, 2, x.shape[-1] // 2, 3)
      q, k, v = np.moveaxis(self.unit(qkv, 3), -1, 0).transpose(0, 1, 3, 2, 4)
      weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
      y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
      x = self.mix(x, self.linear(y, f"{name}/attn_proj"), 0.3)
    return np.clip(x, -256, 256)

  def embedding(self, t, cond, s, guidance):
    def sines(u):
      half = self.net.model_channels // 2
      angles = u[:, None] * 10_000.0 ** (-np.arange(half) / half)
      return np.sqrt(2) * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    scale, classes = self.net.time_scale, self.net.num_classes
    if self.net.time_embedding == "fourier":
      angles = scale * np.log(t / (1 - t))[:, None] / 4 * self.params["fourier/freqs"] + self.params["fourier/phases"]
      features = np.sqrt(2) * np.cos(angles)
    else:
      features = sines(scale * t)
    labels = np.sqrt(classes) * np.eye(classes + 1)[cond, :classes]
    out = self.mix(self.linear(features, "time_embed"), self.linear(labels, "class_embed"), 0.5)
    out = out + self.linear(sines(scale * (t - s)), "length_embed")
    return out + self.linear(sines(guidance), "guidance_embed")

  def __call__(self, x, t, cond, s, guidance):
    """For two levels of one block, two heads at the second."""
    condition = self.silu(self.embedding(t, cond, s, guidance))
    x = self.linear(np.concatenate([x, np.ones_like(x[..., :1])], axis=-1), "enc0_conv")
    skips = [x]
    for name in ("enc0_block0", "enc1_down", "enc1_block0"):
      x = self.block(x, condition, name)
      skips.append(x)
    for name in ("dec1_in0", "dec1_in1", "dec1_block0", "dec1_block1", "dec0_up", "dec0_block0", "dec0_block1"):
      if "block" in name:
        skip = skips.pop()
        n, m = x.shape[-1], skip.shape[-1]
        x = np.sqrt((n + m) / 2) * np.concatenate([x / np.sqrt(n), skip / np.sqrt(m)], axis=-1)
      x = self.block(x, condition, name)
    return self.linear(x, "out_conv")


@pytest.mark.parametrize("fields", [{"time_scale": 3.0}, {"time_embedding": "fourier", "time_scale": 0.5}])
def test_matches_the_formulas_in_numpy(fields):
  module, inputs = network(num_blocks=1, dtype="float64", **fields), flow_map_inputs(jnp.float64)
  params = perturbed_params(module, *inputs, dtype=jnp.float64)
  out = apply(module, params, *inputs)
  assert out.dtype == jnp.float64
  want = NumpyUNet(params, module)(*(np.asarray(a) for a in inputs))
  np.testing.assert_allclose(out, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("size", "millions"), [("XS", 125), ("S", 280), ("XXL", 1523)])  # as published, rounded
def test_sizes_have_the_published_parameter_counts(size, millions):
  module = EDM2UNet(channels=4, num_classes=1000, **EDM2_SIZES[size])
  x, t, label = (jax.ShapeDtypeStruct(*a) for a in (((1, 64, 64, 4), "float32"), ((1,), "float32"), ((1,), "int32")))
  params = jax.eval_shape(module.init, jax.random.key(0), x, t, label)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(1e6 * millions, abs=0.5e6)
  attends = {name for name, leaves in params.items() if "attn_qkv" in leaves}
  assert {name[:4] for name in attends} == {"enc2", "enc3", "dec2", "dec3"}
  assert {name for name in attends if "block" not in name} == {"dec3_in0"}


def test_size_names_are_the_papers():
  assert {name: size["model_channels"] for name, size in EDM2_SIZES.items()} == dict(
    XS=128, S=192, M=256, L=320, XL=384, XXL=448
  )


def test_elementary_functions_preserve_magnitude():
  grid = np.linspace(-10, 10, 20_001)
  density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
  second_moment = np.trapezoid(np.asarray(mp_silu(jnp.asarray(grid))) ** 2 * density, grid)
  assert second_moment == pytest.approx(1, abs=2e-3)  # 0.596 has three digits

  a, b = np.random.default_rng(0).normal(size=(2, 10_000, 6))
  np.testing.assert_allclose(mp_sum(jnp.array(3.0), jnp.array(1.0), 0.25), 2.5 / np.sqrt(0.625), rtol=1e-12)
  assert rms(mp_sum(a, b, 0.3)) == pytest.approx(1, rel=0.01)
  joined = np.asarray(mp_cat(a, b[:, :2], 0.3))
  assert rms(joined) == pytest.approx(1, rel=0.01)
  # Each side's share of the total square is (1 - t)^2 to t^2, whatever the widths.
  ratio = np.sum(joined[:, :6] ** 2) / np.sum(joined[:, 6:] ** 2)
  assert ratio == pytest.approx(0.49 / 0.09, rel=0.03)


def test_activations_have_unit_magnitude():
  module = network(num_blocks=1, model_channels=32, channels_per_head=16)
  x, t, _ = batch((4, 8, 8, 2))
  inputs = x, t, jnp.arange(4) % 3
  params = perturbed_params(module, *inputs)

  def activations(params):
    called = lambda child, method: method == "__call__" and isinstance(child, Block | MPConv)
    return module.apply({"params": params}, *inputs, capture_intermediates=called, mutable=["intermediates"])[1]

  seen = flatten_dict(jax.jit(activations)(params)["intermediates"])
  with_gain = [path for path in seen if {"emb_linear", "out_conv"} & set(path)]
  magnitudes = {path: rms(value[0]) for path, value in seen.items() if path not in with_gain}
  assert len(with_gain) == 11
  assert len(magnitudes) > 40
  for path, magnitude in magnitudes.items():
    low, high = (0.8, 1.2) if len(path) == 2 else (0.6, 1.3)  # of a block; of a layer inside one
    assert low < magnitude < high, path


def test_block_clips_its_output():
  block = Block(4, True, "keep", 0, jnp.float32, "xla")
  x, condition = jnp.ones((2, 2, 2, 3)), jnp.ones((2, 5))
  out = apply(block, with_leaf(perturbed_params(block, x, condition), "emb_linear/gain", 1e5), x, condition)
  assert np.abs(out).max() == 256


def test_starts_at_zero_velocity_with_unit_kernels():
  module, inputs = network(), flow_map_inputs()
  key = jax.random.key(0, impl="rbg")  # compiles quicker than the default
  params = jax.jit(module.init)(key, *inputs)["params"]
  out = apply(module, params, *inputs)
  assert out.shape == inputs[0].shape
  assert not np.any(out)
  for path, leaf in flatten_dict(params).items():
    if path[-1] == "gain":
      assert leaf == 0, path
    else:
      assert path[-1] == "mp_kernel"
      assert rms(leaf) == pytest.approx(1, abs=0.4), path


def test_normalize_weights_projects_kernels_alone():
  module, inputs = network(time_embedding="fourier"), flow_map_inputs()
  params = perturbed_params(module, *inputs)
  project = jax.jit(normalize_weights)
  once = project(params)
  before, after, again = map(flatten_dict, (params, once, project(once)))
  assert before.keys() == after.keys()
  for path, leaf in after.items():
    if path[-1] == "mp_kernel":
      np.testing.assert_allclose(np.sqrt(np.mean(leaf**2, tuple(range(leaf.ndim - 1)))), 1, atol=5e-3)
      np.testing.assert_allclose(again[path], leaf, rtol=5e-3)
    else:
      np.testing.assert_array_equal(leaf, before[path])
  kept = {path[-1] for path in after if path[-1] != "mp_kernel"}
  assert kept == {"gain", "freqs", "phases"}


def test_scale_of_kernels_is_not_seen():
  module, inputs = network(), batch()
  params = perturbed_params(module, *inputs)
  scaled = jax.tree_util.tree_map_with_path(lambda path, a: 50 * a if path[-1].key == "mp_kernel" else a, params)
  want = apply(module, params, *inputs)
  for other in (scaled, jax.jit(normalize_weights)(scaled)):
    np.testing.assert_allclose(apply(module, other, *inputs), want, rtol=0, atol=1e-2 * np.abs(want).max())


def test_branches_exist_only_if_used():
  module, (x, t, cond, s, guidance) = network(), flow_map_inputs()

  def names(*inputs):
    return set(jax.eval_shape(module.init, jax.random.key(0), x, t, cond, *inputs)["params"])

  teacher = names()
  assert names(s) - teacher == {"length_embed"}
  assert names(None, guidance) - teacher == {"guidance_embed"}
  assert names(s, guidance) - teacher == {"length_embed", "guidance_embed"}


def test_branches_are_neutral_until_they_learn():
  module, (x, t, cond, s, guidance) = network(dtype="float64"), flow_map_inputs(jnp.float64)
  params = perturbed_params(module, x, t, cond, s, guidance, dtype=jnp.float64)
  teacher = apply(module, {name: p for name, p in params.items() if name not in BRANCHES}, x, t, cond)
  gains = [f"{name}/gain" for name in BRANCHES]
  start = with_leaf(with_leaf(params, gains[0], 0.0), gains[1], 0.0)
  np.testing.assert_allclose(apply(module, start, x, t, cond, s, guidance), teacher, atol=1e-12)
  for gain, moved in zip(gains, [(0.5 * s, guidance), (s, 1.5 * guidance)], strict=True):
    learnt = with_leaf(start, gain, 0.5)
    out = apply(module, learnt, x, t, cond, s, guidance)
    assert np.abs(out - teacher).max() > 1e-3
    # Example 0 has s = 0: half of it is the same.
    assert np.all(np.abs(apply(module, learnt, x, t, cond, *moved) - out).max((1, 2, 3))[1:] > 1e-5)


@functools.cache
def derivative_case(remat="none"):
  """A network with one level, compiling being slow; every gain at 0.7, no tangent being small."""
  x, t, cond, s, guidance = flow_map_inputs(jnp.float64)
  module = network(channel_mult=(1,), attn_levels=(), time_scale=3.0, dtype="float64", remat=remat)
  params = perturbed_params(module, x, t, cond, s, guidance, dtype=jnp.float64)
  params = jax.tree.map(lambda a: a if a.ndim else jnp.full_like(a, 0.7), params)
  return module, params, (x, t, s, jnp.cos(3 * x)), (cond, guidance)


@functools.cache
def derivatives(remat):
  """Jaxpr, both tangents of a flow map (2, *x.shape), and the gradient of one number made of them."""
  module, params, (x, t, s, v), (cond, guidance) = derivative_case(remat)

  def loss(params):
    f = lambda x, t, s: module.apply({"params": params}, x, t, cond, s, guidance)
    eulerian, lagrangian = (
      (v, jnp.ones_like(t), jnp.zeros_like(t)),
      (jnp.zeros_like(x), jnp.zeros_like(t), jnp.ones_like(t)),
    )
    directions = jax.tree.map(lambda *a: jnp.stack(a), eulerian, lagrangian)
    tangents = jax.vmap(lambda direction: jax.jvp(f, (x, t, s), direction)[1])(directions)
    return jnp.sum(tangents * jnp.sin(5 * x)[None]), tangents

  traced = jax.jit(jax.grad(loss, has_aux=True)).trace(params)
  gradient, tangents = traced.lower().compile()(params)
  return str(traced.jaxpr), tangents, gradient


def differences(params, h=1e-5):
  """Central differences for the tangents of `derivatives`."""
  module, _, (x, t, s, v), (cond, guidance) = derivative_case()
  f = lambda x, t, s: apply(module, params, x, t, cond, s, guidance)
  eulerian = f(x + h * v, t + h, s) - f(x - h * v, t - h, s)
  return np.stack([eulerian, f(x, t, s + h) - f(x, t, s - h)]) / (2 * h)


def test_jvp_matches_finite_differences():
  _, tangents, _ = derivatives("none")
  np.testing.assert_allclose(tangents, differences(derivative_case()[1]), rtol=1e-6, atol=1e-7)
  assert np.all(np.abs(tangents).max((1, 2, 3, 4)) > 0.1)


def test_gradient_of_a_jvp_matches_finite_differences():
  _, params, (x, *_), _ = derivative_case()
  rng, h = np.random.default_rng(1), 1e-4
  direction = jax.tree.map(lambda a: rng.normal(size=a.shape), params)

  def loss(step):
    return np.sum(differences(jax.tree.map(lambda a, d: a + step * d, params, direction)) * np.sin(5 * x))

  products = jax.tree.map(lambda g, d: np.sum(np.asarray(g) * d), derivatives("none")[2], direction)
  np.testing.assert_allclose(sum(jax.tree.leaves(products)), (loss(h) - loss(-h)) / (2 * h), rtol=1e-4)


def test_remat_engages_and_keeps_derivatives():
  (plain, *want), (jaxpr, *got) = derivatives("none"), derivatives("full")
  assert "remat" not in plain
  assert jaxpr.count("remat") >= 3  # blocks
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_bfloat16_computes_in_bfloat16_between_float32_ends():
  inputs = flow_map_inputs()
  exact, half = network(), network(dtype="bfloat16")
  params = perturbed_params(half, *inputs)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  out, want = apply(half, params, *inputs), apply(exact, params, *inputs)
  assert out.dtype == jnp.float32
  assert 1e-5 < np.abs(out - want).max() / np.abs(want).max() < 0.05
  lines = str(jax.make_jaxpr(half.apply)({"params": params}, *inputs)).splitlines()
  convolutions = [line for line in lines if "= conv_general_dilated" in line]
  assert sum(":bf16" in line for line in convolutions) == len(convolutions) - 1 > 10  # but the output layer


@pytest.mark.parametrize("num_classes", [0, 3])
def test_null_class_adds_nothing(num_classes):
  module, (x, t, _) = network(num_classes=num_classes), batch()
  null = jnp.full(3, num_classes)
  params = perturbed_params(module, x, t, null)
  out = apply(module, params, x, t, null)
  if num_classes:
    changed = params | {"class_embed": jax.tree.map(lambda a: a[::-1], params["class_embed"])}
    np.testing.assert_array_equal(apply(module, changed, x, t, null), out)
    assert np.abs(apply(module, params, x, t, null - 1) - out).max() > 1e-3
  else:
    assert "class_embed" not in params
    np.testing.assert_array_equal(apply(module, params, x, t, null + 2), out)


def test_fourier_features_are_finite_at_both_ends_and_constant():
  module, (x, _, cond) = network(time_embedding="fourier", channel_mult=(1,), attn_levels=()), batch()
  t = jnp.array([0.0, 0.5, 1.0], jnp.float32)
  params = perturbed_params(module, x, t, cond)
  loss = lambda params, t: jnp.sum(module.apply({"params": params}, x, t, cond) ** 2)
  gradient, in_time = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, t)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradient, in_time)))
  assert not any(np.any(leaf) for leaf in gradient["fourier"].values())
  assert np.any(gradient["time_embed"]["mp_kernel"])


@pytest.mark.parametrize(
  ("fields", "changed", "match"),
  [
    ({}, {"x": (3, 4, 5, 2)}, r"\(4, 5\): expected multiples of 2 for 2 levels"),
    ({}, {"x": (3, 4, 4, 3)}, r"expected shape \(B, H, W, 2\), got \(3, 4, 4, 3\)"),
    ({}, {"x": (3, 4, 2)}, r"expected shape \(B, H, W, 2\), got \(3, 4, 2\)"),
    ({}, {"t": (3, 1)}, r"t: expected shape \(B,\) = \(3,\), got \(3, 1\)"),
    ({}, {"cond": ()}, r"cond: expected shape \(B,\) = \(3,\), got \(\)"),
    ({}, {"s": (2,)}, r"s: expected shape \(B,\) = \(3,\), got \(2,\)"),
    ({}, {"guidance": ()}, r"guidance: expected shape \(B,\) = \(3,\), got \(\)"),
    ({"channels_per_head": 3}, {}, "level 1: expected a multiple of channels_per_head 3, got 8"),
    ({"model_channels": 5}, {}, "even number, got 5"),
    ({"attn_levels": (2,)}, {}, r"levels in 0 .. 1, one a channel_mult, got \(2,\)"),
    ({"remat": "dots"}, {}, '"none" or "full", got \'dots\''),
    ({"time_embedding": "random"}, {}, '"positional" or "fourier", got \'random\''),
    ({"attention": "flash"}, {}, "got 'flash'"),
  ],
)
def test_misfits_are_refused(fields, changed, match):
  inputs = dict(zip(("x", "t", "cond", "s", "guidance"), flow_map_inputs(), strict=True))
  inputs |= {name: jnp.zeros(shape, inputs[name].dtype) for name, shape in changed.items()}
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(network(**fields).init, jax.random.key(0), **inputs)
