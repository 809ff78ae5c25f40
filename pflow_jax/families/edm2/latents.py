"""The latents of EDM2: Stable Diffusion's, of pictures in [0, 1], each channel scaled to a standard deviation of 0.5.

References:
  StabilityVAEEncoder in training/encoders.py of github.com/NVlabs/edm2, commit 4bf8162.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.data.dataset import Scaling
from pflow_jax.networks.heads import attributes_of
from pflow_jax.networks.layers import accumulation_dtype
from pflow_jax.networks.vae import AutoencoderKL

ENCODER = "StabilityVAEEncoder"  # NVIDIA's class
# Its arguments by default.
_ARGUMENTS: dict[str, Any] = {
  "raw_mean": (5.81, 3.25, 0.12, -2.15),
  "raw_std": (4.17, 4.62, 3.71, 3.28),
  "final_mean": 0.0,
  "final_std": 0.5,
}


def scaling_of(arguments: Mapping[str, Any]) -> Scaling | None:
  """Returns shift and scale of the latents that an encoder makes; None where its arguments are no numbers.

  Args:
    arguments: that it was made with, those left out having NVIDIA's defaults.
  """
  try:
    raw_mean, raw_std, mean, std = (np.asarray(arguments.get(key, of), float) for key, of in _ARGUMENTS.items())
    scale = np.broadcast_to(std / raw_std, raw_mean.shape)
    shift = raw_mean - mean / scale
  except (TypeError, ValueError):
    return None
  if shift.ndim != 1 or not (np.isfinite(shift).all() and np.isfinite(scale).all() and scale.all()):
    return None
  return Scaling(tuple(shift.tolist()), tuple(scale.tolist()))


SCALING = Scaling(_ARGUMENTS["raw_mean"], tuple(_ARGUMENTS["final_std"] / std for std in _ARGUMENTS["raw_std"]))


class EDM2Autoencoder(AutoencoderKL):
  """Stable Diffusion's autoencoder as EDM2 takes it."""

  def normalisation(self) -> tuple[Any, Any]:
    wide = accumulation_dtype(self.dtype)
    shift, scale = (jnp.asarray(values, wide).reshape(1, 1, 1, -1) for values in (SCALING.shift, SCALING.scale))
    return shift, scale

  def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return super().moments((x + 1) / 2)

  def decode(self, z: jax.Array) -> jax.Array:
    return 2 * super().decode(z) - 1


def are_edm2s(scaling: Scaling | None) -> bool:
  """Returns whether latents have EDM2's shift and scale."""
  if scaling is None or len(scaling.scale) != len(SCALING.scale) or len(scaling.shift) != len(SCALING.shift):
    return False
  return np.allclose(scaling.scale, SCALING.scale, rtol=1e-3) and np.allclose(scaling.shift, SCALING.shift, rtol=1e-3)


def autoencoder_of(module: Any) -> EDM2Autoencoder:
  """Returns an autoencoder of Stable Diffusion as EDM2 takes it, with the same parameters.

  Raises:
    ValueError: it is another one.
  """
  if type(module) is not AutoencoderKL or (module.shift, module.scale) != (AutoencoderKL.shift, AutoencoderKL.scale):
    raise ValueError(
      f"expected sd-vae-ft-mse, with which EDM2's latents are made, got {type(module).__name__}; give that in "
      "config.sample.autoencoder"
    )
  return EDM2Autoencoder(**attributes_of(module, ()))
