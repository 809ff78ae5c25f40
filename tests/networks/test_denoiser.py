"""EDM preconditioning and the velocity of a denoiser, where the answer is known: Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.networks.denoiser import denoiser_velocity, edm_denoiser
from pflow_jax.networks.edm2 import EDM2UNet
from tests.networks.test_dit import apply, perturbed_params

MEAN, DEVIATION = 0.7, 0.3  # of the data


def gaussian_denoiser(y, sigma, cond):
  sigma = sigma.reshape(-1, *[1] * (y.ndim - 1))
  return MEAN + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (y - MEAN)


def gaussian_velocity(x, t):
  """E[eps - x0 | x] of N(MEAN, DEVIATION^2) on x = (1 - t) x0 + t eps, from the joint Gaussian."""
  t = np.asarray(t).reshape(-1, *[1] * (x.ndim - 1))
  centred = (np.asarray(x) - (1 - t) * MEAN) / ((1 - t) ** 2 * DEVIATION**2 + t**2)
  return t * centred - (MEAN + (1 - t) * DEVIATION**2 * centred)


def states(space=(2, 3)):
  x = jax.random.normal(jax.random.key(0), (5, *space, 2), jnp.float64)
  return x, jnp.array([0.002, 0.1, 0.5, 0.9, 0.987]), jnp.zeros(5, jnp.int32)


@pytest.mark.parametrize("space", [(), (4,), (2, 3)])
def test_velocity_of_gaussian_data_is_exact(space):
  x, t, cond = states(space)
  v = jax.jit(denoiser_velocity(gaussian_denoiser))(x, t, cond)
  assert v.dtype == jnp.float64
  np.testing.assert_allclose(v, gaussian_velocity(x, t), rtol=1e-10, atol=1e-10)


def test_below_the_lowest_noise_level_its_velocity_counts():
  x, _, cond = states()
  velocity = jax.jit(denoiser_velocity(gaussian_denoiser))
  nearest = gaussian_velocity(x, np.full(5, 0.002 / 1.002))
  np.testing.assert_allclose(velocity(x, jnp.zeros(5), cond), nearest, rtol=1e-10)
  # The exact limit at the data is -x.
  np.testing.assert_allclose(velocity(x, jnp.zeros(5), cond), -x, atol=0.1)
  v = denoiser_velocity(gaussian_denoiser, max_sigma=3.0, min_sigma=0.5)(x, jnp.array([0.0, 0.3, 0.5, 0.7, 0.75]), cond)
  np.testing.assert_allclose(v, gaussian_velocity(x, [1 / 3, 1 / 3, 0.5, 0.7, 0.75]), rtol=1e-10)


@pytest.mark.parametrize("t", [1.0, 0.9, 0.8])
def test_a_jump_from_above_the_highest_noise_level_lands_on_its_denoised_state(t):
  """Of the same noise, sigma x / t: none of it is left."""
  x, _, cond = states()
  v = denoiser_velocity(gaussian_denoiser, max_sigma=3.0)(x, jnp.full(5, t), cond)
  np.testing.assert_allclose(x - t * v, gaussian_denoiser(3.0 * x / t, jnp.full(5, 3.0), cond), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_ends_are_finite_in_float32(t):
  x = states()[0].astype(jnp.float32)
  f = lambda x, t: denoiser_velocity(gaussian_denoiser)(x, t, None)
  at = jnp.full(5, t, jnp.float32)
  v, tangent = jax.jvp(f, (x, at), (x, jnp.ones_like(at)))
  assert v.dtype == jnp.float32
  assert np.all(np.isfinite(v))
  assert np.all(np.isfinite(tangent))


def test_jvp_matches_finite_differences():
  x, t, cond = states()
  t = jnp.clip(t, 0.05, 0.95)
  velocity, dx, h = denoiser_velocity(gaussian_denoiser), jnp.cos(3 * x), 1e-5
  _, tangent = jax.jvp(lambda x, t: velocity(x, t, cond), (x, t), (dx, jnp.ones_like(t)))
  want = (gaussian_velocity(x + h * dx, t + h) - gaussian_velocity(x - h * dx, t - h)) / (2 * h)
  np.testing.assert_allclose(tangent, want, rtol=1e-6, atol=1e-6)


def test_preconditioning_has_the_papers_coefficients():
  """At sigma = sigma_data = 0.5: c_skip 1/2, c_out 1/sqrt 8, c_in sqrt 2, c_noise ln(1/2)/4; at 1.2: from 1.3^2."""
  y = jnp.array([[1.0, -2.0], [3.0, 0.5]])
  network = lambda x, c_noise, cond: x**2 + c_noise[:, None] + cond[:, None]
  out = edm_denoiser(network)(y, jnp.array([0.5, 1.2]), jnp.array([10.0, 20.0]))
  first = 0.5 * y[0] + (2 * y[0] ** 2 + np.log(0.5) / 4 + 10) / np.sqrt(8)
  second = 25 / 169 * y[1] + 0.6 / 1.3 * ((y[1] / 1.3) ** 2 + np.log(1.2) / 4 + 20)
  np.testing.assert_allclose(out, [first, second], rtol=1e-12)
  out = edm_denoiser(network, sigma_data=1.6)(y, jnp.array([1.2, 1.2]), jnp.zeros(2))
  np.testing.assert_allclose(out, 0.64 * y + 0.96 * (y**2 / 4 + np.log(1.2) / 4), rtol=1e-12)


def test_edm2_network_becomes_a_velocity():
  """EDM2's network takes flow time; its Fourier features turn it back into c_noise."""
  unet = EDM2UNet(2, 3, 4, (1,), 0, (0,), 4, time_embedding="fourier", dtype="float64")
  x, t, cond = states((4, 4))
  params = perturbed_params(unet, x, t, cond, dtype=jnp.float64)
  network = lambda x, c_noise, cond: apply(unet, params, x, jax.nn.sigmoid(4 * c_noise), cond)
  v = denoiser_velocity(edm_denoiser(network))(x, t, cond)
  time = t[:, None, None, None]
  y, sigma = x / (1 - time), time / (1 - time)
  total = np.sqrt(0.25 + sigma**2)
  denoised = 0.25 / total**2 * y + 0.5 * sigma / total * apply(unet, params, y / total, t, cond)
  np.testing.assert_allclose(v, (x - denoised) / time, rtol=1e-9)
  assert v.shape == x.shape


def test_misfits_are_refused():
  with pytest.raises(ValueError, match="sigma_data: .* got 0"):
    edm_denoiser(lambda x, c, cond: x, sigma_data=0)
  for low, high in ((0.0, 80.0), (80.0, 80.0)):
    with pytest.raises(ValueError, match=f"0 < min_sigma < max_sigma, got {low}, {high}"):
      denoiser_velocity(gaussian_denoiser, high, low)
