"""Tiny autoencoders in their authors' files, against what the authors' code makes of the same weights."""

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pflow_jax.families.autoencoder import load_autoencoder

pytestmark = pytest.mark.usefixtures("float32")

# Factor and channels of the latents. taesdxl is built as taesd, taef1 as taesd3.
KINDS = {"taesd": (8, 4), "taesd3": (8, 16), "taef2": (8, 32), "taesana": (32, 32)}


def weights(name, shape):
  """Weights as the golden file was made with: of a layer's name and shape alone."""
  draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
  if len(shape) > 1:
    return draw * np.sqrt(2 / np.prod(shape[1:])).astype(np.float32)
  return 1 + 0.1 * draw if name.endswith("pool.1.weight") else 0.1 * draw


def parts(golden, kind):
  """State dicts of the encoder and of the decoder, as the authors name them."""
  found = {"encoder": {}, "decoder": {}}
  for name, shape in json.loads(str(golden[f"{kind}_shapes"])).items():
    part, _, layer = name.partition("/")
    found[part][layer] = weights(f"{part}.{layer}", shape)
  return found


def save(folder, name, found):
  for part, tensors in found.items():
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / f"{name}_{part}.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_authors_files_give_the_authors_latents_and_pictures(tmp_path, golden, kind):
  numbers = golden("tiny_autoencoder")
  save(tmp_path, kind, parts(numbers, kind))
  codec = load_autoencoder(tmp_path)
  factor, channels = KINDS[kind]
  assert (codec.factor, codec.module.latent_channels, codec.module.pool) == (factor, channels, kind == "taef2")
  side = 32 if kind == "taesana" else 16
  x = np.random.default_rng(1).uniform(-1, 1, (2, side, 2 * side, 3)).astype(np.float32)
  z = np.random.default_rng(2).standard_normal((1, 1, 2, channels) if kind == "taesana" else (2, 2, 3, channels))
  for ours, theirs in (
    (codec.encode(x), numbers[f"{kind}_z"]),
    (codec.decode(z.astype(np.float32)), numbers[f"{kind}_x"]),
  ):
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max(), rtol=1e-5)


def test_one_of_several_is_named_without_the_ending(tmp_path, golden):
  found = parts(golden("tiny_autoencoder"), "taesd")
  save(tmp_path, "taesd", found)
  save(tmp_path, "taesdxl", found)
  with pytest.raises(ValueError, match=r"expected one autoencoder, got .*taesdxl.*; give .*/taesd$"):
    load_autoencoder(tmp_path)
  assert load_autoencoder(tmp_path / "taesdxl").module.latent_channels == 4


def test_one_file_of_both_parts_is_read_by_either_numbering(tmp_path, golden):
  found = parts(golden("tiny_autoencoder"), "taesd")
  theirs = {f"{part}.{key}": value for part, tensors in found.items() for key, value in tensors.items()}

  def as_diffusers(name):
    part, number, rest = name.split(".", 2)
    return f"{part}.layers.{int(number) - (part == 'decoder')}.{rest}"

  x = np.zeros((1, 8, 8, 3), np.float32)
  save_file(theirs, tmp_path / "a.safetensors")
  save_file({as_diffusers(name): value for name, value in theirs.items()}, tmp_path / "b.safetensors")
  first, second = (load_autoencoder(tmp_path / f"{name}.safetensors") for name in "ab")
  np.testing.assert_array_equal(first.decode(first.encode(x)), second.decode(second.encode(x)))


def test_what_diffusers_cannot_hold_is_not_written(tmp_path, golden):
  save(tmp_path, "taef2", parts(golden("tiny_autoencoder"), "taef2"))
  with pytest.raises(ValueError, match="AutoencoderTiny cannot hold this one"):
    load_autoencoder(tmp_path / "taef2").save(tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a stranger's layer", "a missing layer", "another file"])
def test_other_files_are_refused_by_name(tmp_path, golden, damage):
  found = parts(golden("tiny_autoencoder"), "taesd")
  if damage == "a stranger's layer":
    found["encoder"]["attention.weight"] = np.zeros((2, 2), np.float32)
  elif damage == "a missing layer":
    del found["decoder"]["4.conv.2.bias"]
  else:
    found["encoder"] = {"0.weight": np.zeros((4, 4), np.float32)}
  save(tmp_path, "taesd", found)
  with pytest.raises(ValueError, match=r"attention\.weight|decoder\.layers\.3\.conv\.2\.bias|expected the layers"):
    load_autoencoder(tmp_path)
