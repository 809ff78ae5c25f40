"""An encoder on eight devices: what it stores is what the autoencoder gives, whatever the batch and the device."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pflow_jax.conversion.encoding import Encoder
from pflow_jax.families.autoencoder import Codec
from pflow_jax.families.qwen_image.vae import QwenVAE
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.networks.vae import Autoencoder, AutoencoderKL

pytestmark = pytest.mark.usefixtures("float32")

PIXELS = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), np.uint8)
X = PIXELS.astype(np.float32) / 127.5 - 1
NUMBERS = np.random.default_rng(1).integers(0, 2**64, 19, np.uint64)
KL = AutoencoderKL(widths=(4, 8), depth=1, groups=2, latent_channels=3, scale=0.5, shift=0.25, mid_attention=False)


class Small(Autoencoder):
  """A convolution, which compiles in a moment, in the place of an encoder of forty."""

  channels: int = 3
  latent_channels: int = 3
  dtype: str = "float32"
  down_factor: ClassVar[int] = 2

  def setup(self):
    self.encoder = nn.Conv(2 * self.latent_channels, (2, 2), strides=2)
    self.decoder = nn.ConvTranspose(self.channels, (2, 2), strides=(2, 2))
    self.quant_conv = self.post_quant_conv = None

  def normalisation(self):
    return 0.25, 0.5


def codec_of(module, logvar=None):
  """A codec of random weights; `logvar` makes it the variance of all latents."""
  params = jax.jit(module.init)(jax.random.key(0), X[:1])["params"]
  if logvar is not None:
    layer = params["encoder"]
    layer["kernel"] = layer["kernel"].at[..., module.latent_channels :].set(0)
    layer["bias"] = layer["bias"].at[module.latent_channels :].set(logvar)
  return Codec(module, params)


@pytest.fixture(scope="module")
def codec():
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return codec_of(Small())


def stored(encoder, pixels=PIXELS, numbers=NUMBERS):
  """Stored values of all pictures, in batches of the encoder."""
  size = encoder.batch_size
  parts = [encoder(pixels[i : i + size], numbers[i : i + size]) for i in range(0, len(pixels), size)]
  assert all(part.shape == (size, *encoder.stored) and part.dtype == jnp.float16 for part in parts)
  return np.concatenate(parts)[: len(pixels)]


def moments_of(codec, x=X):
  mean, logvar = jax.jit(lambda x: codec.module.apply({"params": codec.params}, x, method="moments"))(x)
  return np.asarray(mean, np.float64), np.exp(np.asarray(logvar, np.float64) / 2)


def near(a, b, rtol=2e-3):
  """Equal to the rounding of float16."""
  np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_moments_and_mean_of_picture_and_mirror_image_are_the_autoencoder_s(codec):
  real = codec_of(KL)
  near(stored(Encoder(real, (8, 8, 3), store="moments", batch_size=24))[:, 0, 1], moments_of(real)[1])
  got = stored(Encoder(codec, (8, 8, 3), store="moments", mirror=True))
  for view, x in enumerate((X, X[:, :, ::-1])):
    mean, std = moments_of(codec, x)
    near(got[:, view, 0], mean)
    near(got[:, view, 1], std)
  near(stored(Encoder(codec, (8, 8, 3), store="mean"))[:, 0, 0], (moments_of(codec)[0] - 0.25) * 0.5)


def test_a_draw_is_the_scaled_mean_with_noise_of_its_standard_deviation():
  codec = codec_of(Small(), logvar=2 * np.log(0.7))
  rng = np.random.default_rng(2)
  numbers = rng.integers(0, 2**64, 400, np.uint64)
  pixels = np.repeat(PIXELS[:1], 400, axis=0)
  got = stored(Encoder(codec, (8, 8, 3), batch_size=200), pixels, numbers)[:, 0, 0]
  mean, std = moments_of(codec, X[:1])
  np.testing.assert_allclose(std, 0.7, rtol=1e-5)
  noise = (got / 0.5 + 0.25 - mean) / 0.7
  count = noise.size
  assert abs(noise.mean()) < 5 / np.sqrt(count)
  np.testing.assert_allclose(noise.var(), 1, atol=5 * np.sqrt(2 / count))
  np.testing.assert_allclose((noise**4).mean(), 3, atol=5 * np.sqrt(96 / count))
  flat = noise.reshape(400, -1)
  assert np.abs(np.corrcoef(flat.T) - np.eye(flat.shape[1])).max() < 6 / np.sqrt(400), "numbers of one picture"
  assert np.abs(np.corrcoef(flat) - np.eye(400)).max() < 6 / np.sqrt(flat.shape[1]), "pictures with other numbers"


def test_what_is_drawn_depends_on_seed_and_number_and_neither_on_batch_nor_device(codec):
  one = Encoder(codec, (8, 8, 3), mirror=True, batch_size=8)
  whole = stored(one)
  for size in (16, 24):
    near(stored(Encoder(codec, (8, 8, 3), mirror=True, batch_size=size)), whole.astype(np.float64), rtol=1e-3)
  order = np.random.default_rng(3).permutation(19)
  near(stored(one, PIXELS[order], NUMBERS[order]), whole[order].astype(np.float64), rtol=1e-3)
  mean, std = moments_of(codec)
  noise = lambda values: (values / 0.5 + 0.25 - mean) / std
  other = stored(Encoder(codec, (8, 8, 3), mirror=True, batch_size=8, seed=1))
  assert abs(np.corrcoef(noise(whole[:, 0, 0]).ravel(), noise(other[:, 0, 0]).ravel())[0, 1]) < 0.2
  flipped = (whole[:, 1, 0] / 0.5 + 0.25 - moments_of(codec, X[:, :, ::-1])[0]) / moments_of(codec, X[:, :, ::-1])[1]
  assert abs(np.corrcoef(noise(whole[:, 0, 0]).ravel(), flipped.ravel())[0, 1]) < 0.2, "noise of their own"


def test_all_devices_work_on_a_batch_and_one_shape_is_compiled(codec):
  encoder = Encoder(codec, (8, 8, 3), batch_size=9)
  assert encoder.batch_size == 16
  part = encoder(PIXELS[:16], NUMBERS[:16])
  assert len(part.sharding.device_set) == jax.local_device_count() == 8
  assert not part.sharding.is_fully_replicated
  encoder(PIXELS[:3], NUMBERS[:3])
  assert encoder._run._cache_size() == 1
  assert Encoder(codec, (8, 8, 3)).batch_size == 8 * 16
  assert {name.split("/")[0] for name in encoder._params} == {"encoder"}, "the decoder stays where it is"


def test_floating_pictures_are_those_of_pixels(codec):
  encoder = Encoder(codec, (8, 8, 3), store="moments", batch_size=8)
  np.testing.assert_allclose(stored(encoder, X), stored(encoder), rtol=2e-3, atol=2e-3)


def test_bfloat16_is_computed_in_where_it_is_asked_for():
  real = codec_of(KL)
  half = Codec(KL.clone(dtype=jnp.bfloat16), real.params)
  encoder = Encoder(half, (8, 8, 3), store="moments", batch_size=24)
  got = stored(encoder)[:, 0, 0].astype(float)
  exact = moments_of(real)[0]
  error = np.abs(got - exact).max() / np.abs(exact).max()
  assert 1e-3 < error < 0.05
  with pytest.MonkeyPatch.context() as patch:
    asked = []
    patch.setattr(jax, "default_matmul_precision", lambda name: asked.append(name) or jax.numpy_rank_promotion("allow"))
    encoder(PIXELS[:8], NUMBERS[:8])
    assert asked == []
    Encoder(codec_of(Small()), (8, 8, 3))(PIXELS[:8], NUMBERS[:8])
  assert asked == ["high"], "products of float32 are those of TF32 at least"


@pytest.mark.parametrize(
  "module",
  [
    TinyAutoencoder(
      latent_channels=4, encoder_widths=(4, 4), encoder_depths=(1, 1), decoder_widths=(4, 4), decoder_depths=(1, 1)
    ),
    QwenVAE(
      width=4,
      width_mult=(1, 2),
      depth=1,
      temporal=(False,),
      latent_channels=2,
      latent_mean=(0.5, 1.0),
      latent_std=(1.0, 2.0),
    ),
  ],
  ids=["tiny", "qwen"],
)
def test_other_autoencoders(module):
  codec = codec_of(module)
  mean = stored(Encoder(codec, (8, 8, 3), store="mean", batch_size=24))
  near(mean[:, 0, 0], codec.encode(X, batch_size=19), rtol=1e-2)
  if codec.has_variance:
    assert (codec.normalisation.shift, codec.normalisation.scale) == ((0.5, 1.0), (1.0, 0.5))
    assert Encoder(codec, (8, 8, 3), store="moments").stored == (1, 2, 4, 4, 2)
  else:
    assert codec.normalisation.scale == ()
    np.testing.assert_array_equal(stored(Encoder(codec, (8, 8, 3), batch_size=24)), mean)
    with pytest.raises(ValueError, match="moments: TinyAutoencoder has no variance; leave out --moments"):
      Encoder(codec, (8, 8, 3), store="moments")


def test_a_codec_takes_batches_of_a_chosen_size(codec):
  x = X[:7]
  whole = codec.encode(x)
  for size in (2, 7, 100):
    np.testing.assert_allclose(codec.encode(x, batch_size=size), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(codec.decode(whole, batch_size=size), codec.decode(whole), rtol=1e-4, atol=1e-4)
