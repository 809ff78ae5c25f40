"""Qwen-Image's autoencoder against diffusers: outputs, gradients, sizes, names."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pflow_jax.families.qwen_image import vae as qwen_vae
from pflow_jax.families.qwen_image.vae import QwenVAE
from pflow_jax.families.qwen_image.vae_names import NAMES as names
from pflow_jax.torch_io.table import to_flax, to_torch
from tests.networks.test_vae import (
  call,
  check_dtypes,
  check_gradients,
  check_names,
  check_whole_on_a_mesh,
  error,
  from_torch_image,
  normal,
  randomised,
  settings,
  tensors_of,
  to_torch_image,
)

TINY = dict(
  base_dim=8,
  z_dim=4,
  dim_mult=[1, 2, 2],
  num_res_blocks=1,
  temperal_downsample=[False, True],
  latents_mean=[0.5, -1.0, 0.25, 0.0],
  latents_std=[2.0, 0.5, 1.5, 3.0],
)
# Another order of the two kinds of resampling, a first level of another width, and an alpha channel.
CONFIGS = {
  "image": TINY,
  "layered": TINY | dict(input_channels=4, dim_mult=[2, 2, 1], temperal_downsample=[True, False], num_res_blocks=2),
}


@functools.cache
def models(name):
  """diffusers' network, ours, its parameters and the table between them."""
  network = randomised(diffusers.AutoencoderKLQwenImage(**CONFIGS[name]))
  model = names.model_from_config(CONFIGS[name])
  table = names.rows(model)
  return network, QwenVAE(**model), to_flax(table, tensors_of(network)), table


def statistics(network):
  """Mean and standard deviation of the latents, as the pipeline takes them."""
  values = network.config.latents_mean, network.config.latents_std
  return (torch.tensor(value).reshape(1, -1, 1, 1, 1) for value in values)


def torch_encode(network, x):
  """Moments and the normalised mode, (B, C, h, w), of images (B, C, H, W)."""
  distribution = network.encode(x[:, :, None]).latent_dist
  mean, std = statistics(network)
  normalised = (distribution.mode() - mean) / std
  return distribution.mean[:, :, 0], distribution.logvar[:, :, 0], normalised[:, :, 0]


def torch_decode(network, z):
  mean, std = statistics(network)
  return network.decode(z[:, :, None] * std + mean).sample[:, :, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_encodes_as_diffusers(name):
  network, module, params, _ = models(name)
  x = normal((2, 12, 20, module.channels), seed=1)
  with torch.no_grad():
    expected = [from_torch_image(y) for y in torch_encode(network, to_torch_image(x))]
  got = call(module, params, lambda vae, x: (*vae.moments(x), vae.encode(x)), x)
  for a, b in zip(got, expected, strict=True):
    assert a.shape == (2, 3, 5, 4)
    assert error(a, b) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_decodes_as_diffusers(name):
  network, module, params, _ = models(name)
  z = normal((2, 3, 5, 4), seed=2)
  with torch.no_grad():
    expected = from_torch_image(torch_decode(network, to_torch_image(z)))
  got = call(module, params, "decode", z)
  assert got.shape == (2, 12, 20, module.channels)
  assert error(got, expected) < 1e-4
  clipped = np.mean(np.abs(expected) == 1)
  assert 0 < clipped < 0.3


def test_gradients_are_those_of_diffusers():
  """Nothing reaches slices of kernels before the frame, and the convolutions in time."""
  network, module, params, table = models("image")
  x, z = normal((2, 8, 12, 3), seed=1), normal((2, 2, 3, 4), seed=2)

  def encoded(x):
    return (torch_encode(network, x)[2] * to_torch_image(z)).sum()

  def decoded(z):
    return (torch_decode(network, z) * to_torch_image(x)).sum()

  by_encoder = check_gradients(module, params, "encode", x, z, encoded, network, table)
  by_decoder = check_gradients(module, params, "decode", z, x, decoded, network, table)
  assert np.any(by_encoder["encoder/conv_in/kernel"][-1])
  assert not np.any(by_encoder["encoder/conv_in/kernel"][:-1])
  assert not np.any(by_encoder["encoder/level_1/time_conv/kernel"])
  assert not np.any(by_decoder["decoder/level_0/time_conv/kernel"])


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_within_its_precision(method):
  """Within 2 % of float32; outputs are float32 even so."""
  _, module, params, _ = models("image")
  x = normal((2, 12, 20, 3), 1) if method == "encode" else normal((2, 3, 5, 4), 2)
  check_dtypes(module.clone(dtype=jnp.bfloat16), params, method, x)
  got = call(module.clone(dtype=jnp.bfloat16), params, method, x)
  assert got.dtype == jnp.float32
  assert 1e-4 < error(got, call(module, params, method, x)) < 0.02


def test_published_size():
  with torch.device("meta"):
    network = diffusers.AutoencoderKLQwenImage()
  assert QwenVAE(**names.model_from_config(settings(network))) == QwenVAE()
  assert check_names(QwenVAE(), names.rows({}), network) == 126_892_531


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_exact(name):
  """Parameters that no image meets too."""
  network, module, params, table = models(name)
  check_names(module, table, network)
  back, tensors = to_torch(table, params), tensors_of(network)
  assert back.keys() == tensors.keys()
  assert any("time_conv" in key for key in back)
  assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def test_refuses_other_networks():
  with pytest.raises(ValueError, match=r"attn_scales: .* at most 0 items.*got \[0.5\]"):
    names.model_from_config({"attn_scales": [0.5]})
  image = jnp.zeros((1, 8, 8, 3))
  with pytest.raises(ValueError, match="temporal: expected one entry for each change of resolution, 3 of them"):
    QwenVAE(temporal=(True,)).init(jax.random.key(0), image)
  with pytest.raises(ValueError, match="latent_std: expected one number for each of latent_channels 16"):
    QwenVAE(latent_std=(1.0,)).init(jax.random.key(0), image)


def test_refuses_shapes_that_do_not_fit():
  _, module, params, _ = models("image")
  with pytest.raises(ValueError, match=r"expected shape \(B, H, W, 3\) with H and W multiples of 4"):
    module.apply({"params": params}, jnp.zeros((1, 12, 18, 3)), method="encode")
  with pytest.raises(ValueError, match=r"expected latents of shape \(B, h, w, 4\)"):
    module.apply({"params": params}, jnp.zeros((1, 3, 3, 16)), method="decode")


def test_a_norm_of_nothing_has_a_gradient():
  """Of zero pixels: black borders after a bias of zero."""
  norm = qwen_vae.PixelNorm()
  x = jnp.zeros((1, 2, 2, 3), jnp.float32)
  gradient = jax.grad(lambda x: jnp.sum(norm.apply({"params": {"scale": jnp.ones(3, jnp.float32)}}, x)))(x)
  assert np.all(np.isfinite(gradient))


def test_parameters_are_whole_on_a_mesh():
  check_whole_on_a_mesh(models("image")[1], qwen_vae.SHARDING)
