"""EDM denoisers as teachers: preconditioning of a raw network, and the flow velocity of a denoiser.

The EDM state y = x0 + sigma eps is the flow state over its weight of the data: y = x_t / (1 - t), sigma = t / (1 - t).

References:
  EDM, arXiv:2206.00364; flow maps, arXiv:2506.14603.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import checked

Array = jax.Array
Denoiser = Callable[[Array, Array, Any], Array]  # y (B, *space, C), sigma (B,), cond -> E[x0 | y]


def _like(a: Array, x: Array) -> Array:
  """Returns a (B,) with the axes of x (B, *space, C)."""
  return jnp.expand_dims(a, tuple(range(1, x.ndim)))


def edm_denoiser(network: Callable[[Array, Array, Any], Array], sigma_data: float = 0.5) -> Denoiser:
  """Denoiser of a raw network: D = c_skip y + c_out F(c_in y, c_noise, cond).

  Args:
    network: F (x, c_noise, cond) -> (B, *space, C), x of unit variance, c_noise = log(sigma) / 4 (B,). One that takes
      flow time, like `EDM2UNet`, gets t = sigmoid(4 c_noise).
    sigma_data: standard deviation of the data, > 0.

  Returns:
    (y, sigma, cond) -> D, y (B, *space, C), sigma (B,) > 0.

  References:
    EDM, arXiv:2206.00364, Table 1.
  """
  if not 0 < sigma_data < math.inf:
    raise ValueError(f"sigma_data: expected the data's standard deviation, > 0, got {sigma_data}")

  network = checked("edm_denoiser: network(x, c_noise, cond)", network)

  def denoiser(y: Array, sigma: Array, cond: Any) -> Array:
    noise = _like(sigma, y)
    total = jnp.sqrt(noise**2 + sigma_data**2)
    out = network(y / total, jnp.log(sigma) / 4, cond)
    return (sigma_data / total) ** 2 * y + noise * sigma_data / total * out

  return denoiser


def denoiser_velocity(denoiser: Denoiser, max_sigma: float = 80.0, min_sigma: float = 0.002) -> Denoiser:
  """Flow velocity of a denoiser: v = (x - D(x / (1 - t), t / (1 - t))) / t on x_t = (1 - t) x0 + t eps.

  At t = 1 the EDM state is infinite. Above max_sigma the denoised state is that of max_sigma with the same noise, so
  that a jump from t = 1 leads to it and keeps none of the noise. Below min_sigma the velocity is that of min_sigma at
  the same x: towards t = 0 a network's error, like rounding, grows as 1 / t while the exact velocity only tends to -x.
  The defaults are EDM's range.

  Args:
    denoiser: (y, sigma, cond) -> E[x0 | y].
    max_sigma: largest noise level of the denoiser.
    min_sigma: smallest noise level of the denoiser.

  Returns:
    (x, t, cond) -> v, x (B, *space, C), t (B,) in [0, 1].

  Raises:
    ValueError: not 0 < min_sigma < max_sigma.
  """
  if not 0 < min_sigma < max_sigma < math.inf:
    raise ValueError(f"noise levels: expected 0 < min_sigma < max_sigma, got {min_sigma}, {max_sigma}")

  denoiser = checked("denoiser_velocity: denoiser(y, sigma, cond)", denoiser)

  def velocity(x: Array, t: Array, cond: Any) -> Array:
    t = jnp.maximum(t, min_sigma / (1 + min_sigma))
    known = jnp.minimum(t, max_sigma / (1 + max_sigma))
    # Above, x / t has the noise of a state at the highest level, less and less of the data.
    state = x * _like(known / t / (1 - known), x)
    return (x - denoiser(state, known / (1 - known), cond)) / _like(t, x)

  return velocity
