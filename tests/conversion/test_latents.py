"""Pictures as latents: what is written is read back, and a run on them shows pictures."""

import json
import logging

import jax
import numpy as np
import pytest
from PIL import Image

import pflow_jax as pf
from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.data import Description
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.families.autoencoder import Codec, codec_of, load_autoencoder
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from pflow_jax.training.workdir import pinned
from tests.programs import quick

pytestmark = pytest.mark.usefixtures("float32")

MODULE = TinyAutoencoder(
  latent_channels=4, encoder_widths=(4, 4), encoder_depths=(1, 1), decoder_widths=(4, 4), decoder_depths=(1, 1)
)
PIXELS = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8)
TEXTS = tuple(f"picture {i}" for i in range(70))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
  """Folder of a small autoencoder with random weights."""
  folder = tmp_path_factory.mktemp("tiny")
  x = np.zeros((1, 2, 2, 3), np.float32)
  Codec(MODULE, jax.jit(MODULE.init)(jax.random.key(0), x)["params"]).save(folder)
  return folder


@pytest.fixture(scope="module")
def pictures():
  """A set of pictures with classes and texts."""
  return data.from_arrays(PIXELS, np.arange(70) % 3, class_names=("a", "b", "c"), texts=TEXTS)


def test_latents_in_memory_and_in_a_folder_are_those_of_the_pictures(tmp_path, autoencoder, pictures):
  codec = load_autoencoder(autoencoder)
  expected = codec.encode(PIXELS.astype(np.float32) / 127.5 - 1)
  for out in (None, tmp_path / "latents"):
    encoded = pf.encode(pictures, codec if out is None else autoencoder, out=out)
    assert (encoded.shape, encoded.num_classes, encoded.class_names) == ((8, 8, 4), 3, ("a", "b", "c"))
    assert (encoded.texts, encoded.autoencoder) == (TEXTS, str(autoencoder))
    batch = encoded.records.take(np.arange(70))
    np.testing.assert_allclose(batch["x0"], expected, atol=2e-3)  # float16 in the folder
    np.testing.assert_array_equal(batch["cond"], np.arange(70) % 3)
    np.testing.assert_allclose(as_pictures(encoded, expected), codec.decode(expected), atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(x0=np.zeros((2, 16, 16, 1), np.uint8)), r"expected a set of pictures \(H, W, 3\), got \(16, 16, 1\)"),
    (dict(x0=np.zeros((2, 2), np.float32)), r"expected a set of pictures \(H, W, 3\), got \(2,\)"),
    (dict(x0=np.zeros((2, 15, 16, 3), np.uint8)), "expected sides that are multiples of 2, got 15 x 16"),
  ],
)
def test_what_is_no_picture_is_refused(autoencoder, change, message):
  with pytest.raises(ValueError, match=message):
    pf.encode(data.from_arrays(**change), autoencoder)


def test_an_encoding_that_failed_says_so_at_once_and_its_folder_is_told_to_be_unfinished(
  tmp_path, autoencoder, pictures, capsys
):
  broken = Codec(MODULE, load_autoencoder(autoencoder).params)
  whole = broken.encode(PIXELS[:1].astype(np.float32))
  answers = iter([np.repeat(whole, 64, axis=0), np.repeat(whole, 6, axis=0) * np.float32(1e9)])
  object.__setattr__(broken, "encode", lambda x: next(answers))
  out = tmp_path / "latents"
  with pytest.raises(ValueError, match="float16") as error:  # which keeps the frames that it came through
    pf.encode(pictures, broken, out=out)
  assert "stopped" in capsys.readouterr().out, error
  with pytest.raises(ValueError, match=r"holds shards already of a run that did not end, without info\.json"):
    pf.encode(pictures, autoencoder, out=out)
  with pytest.raises(ValueError, match="mount the bucket"):
    pf.encode(pictures, autoencoder, out="gs://bucket/latents")


def test_the_data_of_a_loaded_run_are_told_to_be_loaded_anew(pictures, autoencoder):
  described = Description.of(pictures, {"name": "mine"}).dataset()
  with pytest.raises(ValueError, match=r"its pictures have no order; load it anew"):
    pf.encode(described, autoencoder)


def test_a_folder_with_another_number_of_texts_or_names_is_refused(tmp_path, autoencoder, pictures):
  out = tmp_path / "latents"
  pf.encode(pictures, autoencoder, out=out)
  (out / "texts.json").unlink()
  with pytest.raises(ValueError, match=r"has no texts\.json"):
    data.load(f"latents:{out}", embeddings="names")
  (out / "texts.json").write_text(json.dumps(TEXTS[:-1]))
  with pytest.raises(ValueError, match=r"expected 70 texts in texts\.json, got 69"):
    data.load(f"latents:{out}")
  (out / "info.json").write_text(json.dumps({"shape": [8, 8, 4], "num_classes": 3, "class_names": ["a"]}))
  with pytest.raises(ValueError, match="has 1 class_names for 3 classes"):
    data.load(f"latents:{out}")


def test_the_command_encodes_a_folder_of_pictures(tmp_path, autoencoder, capsys):
  for name in ("cat", "dog"):
    (tmp_path / "photos" / name).mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(tmp_path / "photos" / name / "0.png")
  images = f"folder:{tmp_path / 'photos'}"
  main(
    [
      "latents",
      "--images",
      images,
      "--option",
      "image_size=8",
      "--autoencoder",
      str(autoencoder),
      "--out",
      f"{tmp_path}/z",
    ]
  )
  assert "wrote 2 latents of (4, 4, 4)" in capsys.readouterr().out
  assert data.load(f"latents:{tmp_path}/z").class_names == ("cat", "dog")


@pytest.mark.parametrize(
  ("option", "message"),
  [
    *((bad, "--option: expected key=value") for bad in ("size", "=8", "si ze=8")),
    ("split=test", "--option: name and split have flags of their own"),
  ],
)
def test_an_option_without_a_key_and_a_value_or_with_a_flag_is_refused(tmp_path, option, message, capsys):
  with pytest.raises(SystemExit) as end:
    main(["latents", "--images", "digits", "--option", option, "--autoencoder", "none", "--out", str(tmp_path / "z")])
  assert end.value.code == 2
  assert message in capsys.readouterr().err


def test_a_run_on_latents_shows_pictures_while_it_trains_and_afterwards(tmp_path, autoencoder, pictures):
  pf.encode(pictures, autoencoder, out=tmp_path / "latents")
  config = quick("emoji", "classes_teacher", sample_every=3)
  config.data = dict(name=f"latents:{tmp_path}/latents")
  config.sample.nfe = (1,)
  train(config, tmp_path / "run", picture=(save_picture, preview_size))
  run = pf.load(tmp_path / "run")
  x = run.sample(3, nfe=1)
  shown = run.decode(x)
  assert (x.shape, shown.shape) == ((3, 8, 8, 4), (3, 16, 16, 3))
  np.testing.assert_allclose(shown, load_autoencoder(autoencoder).decode(x), atol=1e-5)
  (preview,) = (tmp_path / "run" / "samples").glob("*.png")
  # Decoded pictures of 16 pixels are shown six times as large; raw latents would be grey squares of 8 pixels.
  assert len(np.unique(np.asarray(Image.open(preview).convert("RGB")).reshape(-1, 3), axis=0)) > 256


def test_another_autoencoder_shows_a_run_and_a_lost_one_is_told(tmp_path, autoencoder, pictures, caplog):
  config = quick("emoji", "classes_teacher")
  config.sample.autoencoder = str(autoencoder)
  dataset = build(config).dataset
  assert codec_of(dataset).module.latent_channels == 4
  config.sample.autoencoder = str(tmp_path / "gone")
  dataset = build(config).dataset
  with caplog.at_level(logging.WARNING):
    assert as_pictures(dataset, np.zeros((2, 8, 8, 4), np.float32)).shape == (2, 8, 8, 3)
  assert "latents are shown by their first channels" in caplog.text
  other = data.from_arrays(np.zeros((2, 8, 8, 6), np.float32))
  with pytest.raises(ValueError, match="makes latents of 4 channels, arrays has 6"):
    codec_of(pf.data.Dataset(**{**vars(other), "autoencoder": str(autoencoder)}))


def test_an_autoencoder_of_previews_is_refused_before_a_training_or_kept_by_its_absolute_folder(
  tmp_path, autoencoder, monkeypatch, capsys
):
  words = ["train", "--config=configs/digits.py:teacher", f"--workdir={tmp_path}/run", "--config.train.steps=2"]
  with pytest.raises(SystemExit) as end:
    main([*words, "--config.optimizer.warmup_steps=1", f"--preview_autoencoder={tmp_path}/gone"])
  assert end.value.code == 2
  assert "expected an autoencoder of diffusers" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
  monkeypatch.chdir(autoencoder.parent)
  settings = Settings.of(quick("digits", "teacher")).changed("sample", autoencoder=autoencoder.name)
  assert pinned(None, settings).sample.autoencoder == str(autoencoder)
