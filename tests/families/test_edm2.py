"""EDM2 against NVIDIA's own code, see golden/README.md: outputs, gradients, samples, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.samplers import sample_teacher
from pflow_jax.networks.edm2 import EDM2_SIZES, EDM2UNet, normalize_weights
from pflow_jax.torch_io.table import flat_shapes, to_torch
from tests import edm2

pytestmark = pytest.mark.usefixtures("float32")


def relative(got, want):
  got, want = (np.asarray(a, np.float64) for a in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def first(x):
  return np.moveaxis(x, -1, 1)


def denoiser_of(head, module):
  """(params, y, sigma, label) -> D, by way of the velocity at flow time sigma / (1 + sigma)."""

  def denoise(params, y, sigma, label):
    t = sigma / (1 + sigma)
    time = t[:, None, None, None]
    x = y * (1 - time)
    return x - time * head.field(lambda x, t, cond: module.apply({"params": params}, x, t, cond))(x, t, label)

  return denoise


@pytest.mark.parametrize("kind", ["img64", "img512"])
def test_outputs_and_gradients_are_nvidias(golden, kind):
  """Float32: outputs to 1e-5 of their norm, gradients of the state and of every weight to 1e-4.

  NVIDIA's class is in training, where it brings its weights back to the sphere before it uses them. The second example
  of "img64" has no class, a block of "img512" is clipped.
  """
  file = {name.partition("/")[2]: value for name, value in golden("edm2").items() if name.startswith(kind)}
  module, head, params, rows = edm2.network(kind)
  y, cotangent = edm2.batch(kind)
  label = np.array([3, 5]) if edm2.KINDS[kind]["label_dim"] else np.zeros(2, int)
  denoise = denoiser_of(head, module)

  @jax.jit
  def contracted(params, y):
    run = lambda params, y: denoise(params, y, jnp.float32(edm2.SIGMA), label)
    out, back = jax.vjp(run, normalize_weights(params), y)
    return out, *back(jnp.asarray(cotangent))

  out, of_params, of_y = contracted(params, y)
  assert np.linalg.norm(out) == pytest.approx(file["norm"], rel=1e-5)
  assert relative(first(out)[:, :, ::2, ::2], file["out"]) < 1e-5
  assert relative(first(of_y)[:, :, ::2, ::2], file["grad_x"]) < 1e-4
  got = to_torch(rows, of_params)
  wanted = {name.removeprefix("grad/"): value for name, value in file.items() if name.startswith("grad/")}
  constant = {name for name in got if ".emb_fourier." in name}
  assert wanted.keys() == got.keys() - constant
  assert not any(got[name].any() for name in constant)
  # A gain's gradient is what is left of a sum over a block: they are compared as one vector.
  gains = [name for name in wanted if name.endswith("gain")]
  assert relative([got[name] for name in gains], [wanted[name][1] for name in gains]) < 1e-4
  for name, want in wanted.items():
    if name in gains:
      continue
    size = np.linalg.norm(got[name])
    assert size == pytest.approx(want[0], rel=1e-4), name
    each = np.abs(got[name].ravel()[edm2.probes(got[name].size)] - want[1:])
    # A probe is one number of many: it is compared with the root mean square of them.
    assert each.max() < 1e-4 * max(size / np.sqrt(got[name].size), np.abs(want[1:]).max()) * 5, name


# Numbers in the parameters of training/networks_edm2.py's Precond by --preset's sizes, at 64 x 64 with 1000 classes:
# of pixels, and of latents.
NVIDIAS = {
  "XS": (124_710_949, 124_713_253),
  "S": (280_209_381, 280_212_837),
  "M": (497_803_173, 497_807_781),
  "L": (777_492_325, 777_498_085),
  "XL": (1_119_276_837, 1_119_283_749),
  "XXL": (1_523_156_709, 1_523_164_773),
}


@pytest.mark.parametrize("size", EDM2_SIZES)
def test_sizes_are_nvidias(size):
  for channels, want in list(zip((3, 4), NVIDIAS[size], strict=True))[0 if size == "XS" else 1 :]:  # tracing takes time
    module = EDM2UNet(channels, 1000, time_embedding="fourier", **EDM2_SIZES[size])
    inputs = jnp.zeros((1, 64, 64, channels)), jnp.ones(1), jnp.zeros(1, int)
    shapes = flat_shapes(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    count = sum(int(np.prod(shape)) for path, shape in shapes.items() if not path.startswith("fourier/"))
    assert count + 128 == want  # NVIDIA's has a layer of 128 that estimates the loss


@functools.cache
def velocity(kind):
  module, head, params, _ = edm2.network(kind)
  return head.field(lambda x, t, cond: module.apply({"params": params}, x, t, cond))


# Settings of the release's `edm_sampler` by the names of the golden file; tests/conversion has the guided samples.
SAMPLES = {"plain": dict(steps=32), "few": dict(steps=6, rho=5.0, sigmas=(0.01, 30.0))}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_nvidias(golden, name):
  """The release's deterministic sampler to 1e-4 of the norm."""
  noise = np.random.default_rng(2).standard_normal((3, 16, 16, 3)).astype(np.float32)
  walk = lambda x, c: sample_teacher(velocity("strong"), x, c, solver="edm", **SAMPLES[name])
  samples = jax.jit(walk)(noise, np.array([0, 2, 4]))
  assert relative(first(samples), golden("edm2_samples")[name]) < 1e-4


def test_the_denoiser_hears_the_noise_level_to_the_last_digit():
  """At sigma 80 float32 has 1 - t to five digits after a sigmoid, and exactly where t itself is passed on."""
  _, head, _, _ = edm2.network("weak")
  heard = []

  def apply(x, t, cond):
    heard.append(t)
    return x

  t = jnp.float32([0.0, 0.002, 0.5, 0.98, 80 / 81, 0.999, 1.0])
  jax.eval_shape(lambda x: head.field(apply)(x, t, None), jnp.zeros((7, 2)))
  head.field(apply)(jnp.zeros((7, 2)), t, None)
  np.testing.assert_array_equal(heard[-1], np.clip(t, np.float32(0.002 / 1.002), np.float32(80 / 81)))
