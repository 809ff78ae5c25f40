"""Autoencoders as folders: what is saved is read again, by this package and by diffusers."""

import gc
import re
import weakref

import diffusers
import jax
import numpy as np
import pytest
import torch

from pflow_jax.families import autoencoder
from pflow_jax.families.autoencoder import Codec, load_autoencoder
from pflow_jax.families.qwen_image.vae import QwenVAE
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.networks.mlp import MLP
from pflow_jax.networks.vae import AutoencoderKL

pytestmark = pytest.mark.usefixtures("float32")

MODULES = {
  "AutoencoderKL": AutoencoderKL(widths=(4, 8), depth=1, groups=2, latent_channels=3, scale=0.5, mid_attention=False),
  "AutoencoderKLQwenImage": QwenVAE(
    width=4,
    width_mult=(1, 2),
    depth=1,
    temporal=(False,),
    latent_channels=2,
    latent_mean=(0.5, 1.0),
    latent_std=(1.0, 2.0),
  ),
  "AutoencoderTiny": TinyAutoencoder(
    latent_channels=3,
    encoder_widths=(4, 4),
    encoder_depths=(1, 2),
    decoder_widths=(6, 6),
    decoder_depths=(2, 1),
    scale=0.5,
  ),
}


@pytest.mark.parametrize("name", MODULES)
def test_what_is_saved_is_read_again(tmp_path, name):
  module = MODULES[name]
  x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
  codec = Codec(module, jax.jit(module.init)(jax.random.key(1), x)["params"])
  assert codec.save(tmp_path) == codec.save(tmp_path) == tmp_path / "vae"
  again = load_autoencoder(tmp_path)
  assert again.module == module
  jax.tree.map(np.testing.assert_array_equal, again.params, dict(codec.params))
  network = getattr(diffusers, name).from_pretrained(tmp_path / "vae")
  image = torch.from_numpy(x).movedim(-1, 1)
  with torch.inference_mode():
    if name == "AutoencoderKLQwenImage":
      theirs = network.encode(image[:, :, None]).latent_dist.mode()[:, :, 0].movedim(1, -1).numpy()
      theirs = (theirs - np.array(module.latent_mean)) / np.array(module.latent_std)
    elif name == "AutoencoderTiny":
      theirs = module.scale * network.encode(image).latents.movedim(1, -1).numpy()
      z = torch.from_numpy(theirs).movedim(-1, 1) / module.scale
      np.testing.assert_allclose(codec.decode(theirs), network.decode(z).sample.movedim(1, -1).numpy(), atol=1e-5)
    else:
      theirs = module.scale * network.encode(image).latent_dist.mode().movedim(1, -1).numpy()
  np.testing.assert_allclose(codec.encode(x), theirs, atol=1e-4 * np.abs(theirs).max())


def test_it_is_a_line_and_reports_what_takes_long(monkeypatch, capsys):
  module = MODULES["AutoencoderTiny"]
  x = np.zeros((3, 8, 8, 3), np.float32)
  codec = Codec(module, jax.jit(module.init)(jax.random.key(1), x)["params"])
  assert re.fullmatch(r"Codec\(TinyAutoencoder, 2 x 2 pixels to 3 numbers, [\d,]+ parameters\)", repr(codec))
  codec.encode(x)
  assert capsys.readouterr().out == "", "it is over in a moment"
  monkeypatch.setattr(autoencoder, "SHOWN", 0.0)
  codec.decode(codec.encode(x))
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in lines] == [
    f"{word} {n}/3" for word in ("encoding", "decoding") for n in (2, 3)
  ]


def test_its_memory_is_free_with_its_last_name():
  module = MODULES["AutoencoderKL"]
  codec = Codec(module, jax.jit(module.init)(jax.random.key(1), np.zeros((1, 4, 4, 3), np.float32))["params"])
  assert codec.decode(codec.encode(np.zeros((2, 4, 4, 3), np.float32))).shape == (2, 4, 4, 3)
  alive = weakref.ref(codec)
  del codec
  gc.collect()
  assert alive() is None


def test_an_autoencoder_that_no_family_has_is_refused(tmp_path):
  with pytest.raises(ValueError, match="expected an autoencoder of .*'AutoencoderKL', 'QwenVAE'.*, got MLP"):
    Codec(MLP(width=4, depth=1), {}).save(tmp_path)
