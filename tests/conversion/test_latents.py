"""Pictures as latents: what is written is read back, and a run on them shows pictures."""

import dataclasses
import io
import json
import logging
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib

import jax
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

import pflow_jax as pf
from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.conversion import cache, latent_writing
from pflow_jax.conversion.latents import encode, make, picture_set
from pflow_jax.data import Description, registry
from pflow_jax.data.dataset import Scaling
from pflow_jax.data.latents import read_info
from pflow_jax.data.pixels import read_pixels
from pflow_jax.data.prompts.dataset import with_embeddings
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.families.autoencoder import Codec, codec_of, load_autoencoder
from pflow_jax.families.taesd.network import TinyAutoencoder
from pflow_jax.networks.vae import AutoencoderKL
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from pflow_jax.training.workdir import pinned
from tests.data.adm_pictures import encoded, pixels
from tests.data.test_tfds_source import prepare
from tests.encoders import StubEncoder
from tests.programs import ROOT, environment, quick, write_pretrained

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
    np.testing.assert_allclose(encoded.scaling.std, expected.std(), rtol=1e-3)
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
  with pytest.raises(ValueError, match=r"store: expected one of \('draw', 'mean', 'moments'\), got 'moment'"):
    pf.encode(data.from_arrays(PIXELS), autoencoder, store="moment")
  with pytest.raises(ValueError, match="moments and mirror images are drawn of while they are read; give out="):
    pf.encode(data.from_arrays(PIXELS), autoencoder, mirror=True)


def test_an_encoding_that_failed_says_so_at_once_and_is_gone_on_with(tmp_path, autoencoder, pictures, capsys):
  x0 = PIXELS.astype(np.float32) / 127.5 - 1
  x0[60] *= 1e9
  out = tmp_path / "latents"
  broken = data.from_arrays(x0, np.arange(70) % 3, class_names=("a", "b", "c"), texts=TEXTS)
  with pytest.raises(ValueError, match=r"latents of '60': .*not in float16") as error:  # which keeps its frames
    pf.encode(broken, autoencoder, out=out, batch_size=8)
  assert "stopped" in capsys.readouterr().out, error
  with pytest.raises(ValueError, match=r"there is no info\.json"):
    data.load(f"latents:{out}")
  assert pf.encode(pictures, autoencoder, out=out, batch_size=8).num_records == 70, "nothing of the others is kept"
  with pytest.raises(ValueError, match="mount the bucket"):
    pf.encode(pictures, autoencoder, out="gs://bucket/latents")
  assert pf.encode(pictures, autoencoder, out=tmp_path / "whole").num_records == 70
  capsys.readouterr()
  assert pf.encode(pictures, autoencoder, out=tmp_path / "whole").num_records == 70
  assert "is complete" in capsys.readouterr().out
  others = data.from_arrays(255 - PIXELS, np.arange(70) % 3, class_names=("a", "b", "c"), texts=TEXTS)
  with pytest.raises(ValueError, match="holds other latents: '0' was another picture when it was encoded"):
    pf.encode(others, autoencoder, out=tmp_path / "whole")


def test_embeddings_of_texts_stay_the_condition(tmp_path, autoencoder, pictures, monkeypatch):
  monkeypatch.setattr(cache, "load_encoder", lambda *args, **options: StubEncoder("minilm"))
  pf.encode(pictures, autoencoder, out=tmp_path / "plain")
  names = str(tmp_path / "names")
  cache.cache(f"data:latents:{tmp_path}/plain", "minilm", names)
  described = dataclasses.replace(with_embeddings(pictures, names), options={"name": "mine", "embeddings": names})
  for out in (None, tmp_path / "z"):
    encoded = pf.encode(described, autoencoder, out=out)
    assert (encoded.num_classes, encoded.class_names, encoded.texts) == (0, (), TEXTS)
    assert encoded.embedding.pooled_width == described.embedding.pooled_width
    pooled = encoded.records.take(np.array([7, 2]))["cond"]["pooled"]
    np.testing.assert_array_equal(pooled, described.records.take(np.array([7, 2]))["cond"]["pooled"])
  with pytest.raises(ValueError, match="embeddings are for what is in memory; leave out embeddings="):
    pf.encode(described, autoencoder, out=tmp_path / "more", mirror=True)


def test_other_records_of_tfds_are_not_taken_for_the_rest_of_those_that_were_begun(tmp_path, autoencoder):
  prepare(tmp_path, "array_record")
  load = lambda split: picture_set("tfds:tiny_colours", 8, split=split, options={"data_dir": str(tmp_path)})
  assert encode(load("train[:5]"), autoencoder, out=tmp_path / "z").num_records == 5
  encode(load("train[:5]"), autoencoder, out=tmp_path / "z")
  with pytest.raises(ValueError, match=r"holds other latents(.*\n)*  options: it has .*'train\[:5\]'"):
    encode(load("train[5:10]"), autoencoder, out=tmp_path / "z")
  prepared_anew = dataclasses.replace(load("train[5:10]"), options=load("train[:5]").options)
  with pytest.raises(ValueError, match="holds other latents: '0' was another picture when it was encoded"):
    encode(prepared_anew, autoencoder, out=tmp_path / "z")


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
  said = capsys.readouterr().out
  assert "wrote 2 latents of (4, 4, 4)" in said
  assert "latents of 2 pictures, 4 x 4 x 4, in 1 shards, " in said
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


# ---- Image files

KL = AutoencoderKL(widths=(4,), depth=1, groups=2, latent_channels=3, scale=0.5, shift=0.25, mid_attention=False)


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
  """Folder of a small autoencoder whose latents have a variance."""
  folder = tmp_path_factory.mktemp("kl")
  Codec(KL, jax.jit(KL.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]).save(folder)
  return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Pictures of different sizes in two class folders, four of them broken."""
  root = tmp_path_factory.mktemp("photos")
  for number in range(20):
    path = root / ("cat" if number % 2 else "dog") / f"{number:02d}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(pixels(20 + number, 31 - number))))
  whole = (root / "cat" / "01.png").read_bytes()
  (root / "cat" / "03.png").write_bytes(whole[: len(whole) // 2])
  bomb = bytearray((root / "cat" / "07.png").read_bytes())
  bomb[16:24] = struct.pack(">II", 40_000, 40_000)  # says that it has 1.6 billion pixels
  bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
  (root / "cat" / "07.png").write_bytes(bytes(bomb))
  (root / "dog" / "04.png").write_bytes(b"no picture")
  (root / "dog" / "06.png").write_bytes(b"")
  return root


BROKEN = ("cat/03.png", "cat/07.png", "dog/04.png", "dog/06.png")


def contents(folder):
  """Every file of a folder by name, its bytes."""
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_image_files_are_cropped_as_adm_does_and_what_cannot_be_read_is_told_at_the_end(tmp_path, photos, kl, capsys):
  out = tmp_path / "z"
  words = ["latents", "--images", str(photos), "--size", "8", "--autoencoder", str(kl), "--out", str(out)]
  words += ["--moments", "--mirror", "--batch_size", "8", "--shard_records", "6"]
  with pytest.raises(SystemExit) as end:
    main(words)
  said = capsys.readouterr()
  assert end.value.code == 2
  assert f"4 pictures could not be read and are left out; {out}/unreadable.txt names them" in said.err
  assert "wrote 16 latents of (8, 8, 3)" in said.out
  assert "moments of 20 pictures and of their mirror images, 8 x 8 x 3, in 4 shards, " in said.out
  listed = (out / "unreadable.txt").read_text().splitlines()
  assert tuple(line.split(": ")[0] for line in listed) == BROKEN
  assert "1600000000 pixels" in listed[1]
  names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
  kept = [name for name in names if name not in BROKEN]
  dataset = data.load(f"latents:{out}")
  assert (dataset.class_names, dataset.num_records) == (("cat", "dog"), 16)
  np.testing.assert_array_equal(dataset.records.take(np.arange(16))["cond"], [name.startswith("dog") for name in kept])
  x = np.stack([read_pixels(photos / name, 8, 3, "adm") for name in kept]).astype(np.float32) / 127.5 - 1
  expected = load_autoencoder(kl).encode(x, batch_size=16)
  np.testing.assert_allclose(dataset.records.take(np.arange(16))["x0"], expected, rtol=5e-3, atol=5e-3)
  info = read_info(str(out))
  assert (info.shift, info.scale, info.made["crop"], info.made["pictures"]) == (
    (0.25,) * 3,
    (0.5,) * 3,
    "adm",
    [8, 8, 3],
  )
  assert (info.made["store"], info.made["dtype"], info.unreadable) == ("moments", "float32", 4)


def test_too_many_that_cannot_be_read_stop_it_and_it_goes_on_with_a_larger_number(tmp_path, photos, kl, capsys):
  dataset, out = picture_set(str(photos), 8), tmp_path / "z"
  options = dict(out=out, batch_size=8, shard_records=6)
  for _ in range(2):  # those of shards that are complete count too
    with pytest.raises(
      ValueError, match=r"max_bad: more than 2 pictures cannot be read, such as 'cat/03\.png' \(cannot"
    ):
      encode(dataset, kl, max_bad=2, **options)
    assert len((out / "unreadable.txt").read_text().splitlines()) == 4
  capsys.readouterr()
  encode(dataset, kl, max_bad=4, **options)
  assert "going on after 12 pictures" in capsys.readouterr().out
  assert len((out / "unreadable.txt").read_text().splitlines()) == 4
  encode(dataset, kl, out=tmp_path / "whole", batch_size=8, shard_records=6)
  assert contents(out) == contents(tmp_path / "whole")
  kept = encode(dataset, kl)
  stored = data.load(f"latents:{out}").records.take(np.arange(16))["x0"]
  np.testing.assert_allclose(kept.records.take(np.arange(16))["x0"], stored, rtol=2e-3, atol=1e-4)
  with pytest.raises(ValueError, match="more than 0 pictures cannot be read"):
    encode(dataset, kl, max_bad=0)


def test_a_picture_that_was_there_before_is_left_out(tmp_path, kl, capsys):
  for name in ("a", "b"):
    with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
      for i in range(3):
        content = encoded(Image.fromarray(pixels(9, 8 + i)))
        member = tarfile.TarInfo(f"{i}.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  info = make(f"webdataset:{tmp_path}", f"{tmp_path}/z", autoencoder=str(kl), size=8, store="mean")
  said = capsys.readouterr().out
  assert "3 pictures (3 repeated left out)" in said
  assert "wrote 3 latents of (8, 8, 3), 3 repeated pictures left out, in " in said
  assert info.num_records == 3
  for name in "cdefg":
    (tmp_path / f"{name}.tar").write_bytes((tmp_path / "a.tar").read_bytes())
  info = make(f"webdataset:{tmp_path}", f"{tmp_path}/other", autoencoder=str(kl), size=8, store="mean")
  assert (info.num_records, info.made["repeated"]) == (3, 18)


def write_parquet(path, names, contents, labels):
  path.parent.mkdir(parents=True, exist_ok=True)
  images = [{"bytes": content, "path": name} for name, content in zip(names, contents, strict=True)]
  pq.write_table(pa.table({"image": images, "label": labels}), path)


def test_other_pictures_of_one_name_are_all_kept(tmp_path):
  """Of the same size too, as in files that count their images anew for each class, or in each folder."""
  of = lambda number: encoded(Image.new("RGB", (9, 9), (number, 0, 0)), "BMP")
  for name, labels in (("a", (0, 1)), ("b", (0, 1))):
    first = 2 * (name == "b")
    write_parquet(tmp_path / name / "0.parquet", ["000.png"] * 2, [of(first), of(first + 1)], labels)
    with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
      for label in labels:
        member = tarfile.TarInfo(f"{label}/000.bmp")
        member.size = len(of(0))
        tar.addfile(member, io.BytesIO(of(first + label)))
  for kind, ending in (("parquet", "parquet"), ("webdataset", "tar")):
    pictures = picture_set(f"{kind}:{tmp_path}/*/0.{ending}", 8).records.source
    chosen = latent_writing.Chosen(pictures)
    assert (len(chosen), chosen.repeated, len(set(chosen.numbers.tolist()))) == (4, 0, 4), kind
  # One of the same bytes in another class is no copy either; one of the same class is.
  write_parquet(tmp_path / "c" / "0.parquet", ["000.png"] * 2, [of(0), of(1)], (1, 1))
  chosen = latent_writing.Chosen(picture_set(f"parquet:{tmp_path}/*/0.parquet", 8).records.source)
  assert (list(chosen), chosen.repeated) == (
    [f"{name}/0.parquet:{row}" for name in "ab" for row in (0, 1)] + ["c/0.parquet:0"],
    1,
  )


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_another_input_into_a_folder_that_is_complete_is_refused(tmp_path, kl, kind):
  def write(shade, labels):
    contents = [encoded(Image.new("RGB", (9, 9), (shade, 9 * i, 0))) for i in range(3)]
    if kind == "folder":
      shutil.rmtree(tmp_path / "x", ignore_errors=True)
      for i in range(3):
        (tmp_path / "x" / "abc"[labels[i]]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / "abc"[labels[i]] / f"{i}.png").write_bytes(contents[i])
      return str(tmp_path / "x")
    if kind == "parquet":
      write_parquet(tmp_path / "x.parquet", [f"{i}.png" for i in range(3)], contents, labels)
      return f"parquet:{tmp_path}/x.parquet"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
      for i in range(3):
        for name, content in ((f"{i}.png", contents[i]), (f"{i}.cls", str(labels[i]).encode())):
          member = tarfile.TarInfo(name)
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
    return f"webdataset:{tmp_path}/x.tar"

  run = lambda shade, labels, **options: make(
    write(shade, labels), f"{tmp_path}/z", autoencoder=str(kl), size=8, store="mean", options=options
  )
  run(1, [0, 1, 2])
  run(1, [0, 1, 2])
  with pytest.raises(ValueError, match="holds other latents: '.*0.*' was another picture when it was encoded"):
    run(2, [0, 1, 2])
  with pytest.raises(ValueError, match="holds other latents(.*\n)*  (keys|labels): it has"):
    run(1, [0, 2, 1])
  if kind != "folder":
    with pytest.raises(ValueError, match="holds other latents(.*\n)*  num_classes: it has 3, this run 5"):
      run(1, [0, 1, 2], num_classes=5)


def test_what_an_earlier_version_wrote_is_read_and_not_gone_on_with(tmp_path, kl, photos):
  out = tmp_path / "z"
  encode(picture_set(str(photos), 8), kl, out=out)
  info = json.loads((out / "info.json").read_text())
  del info["made"]["version"]
  for name in ("info.json", "info.json.partial"):
    (out / "info.json").unlink(missing_ok=True)
    (out / name).write_text(json.dumps(info))
    with pytest.raises(
      ValueError, match="was written by another version, which did not note .*, or give another folder"
    ):
      encode(picture_set(str(photos), 8), kl, out=out)
    if name == "info.json":
      assert data.load(f"latents:{out}").num_records == 16


def test_pictures_that_were_repaired_are_added(tmp_path, photos, kl, capsys):
  """To a folder that stopped at too many, and to one that is complete; others stay as they are."""
  root, out = tmp_path / "photos", tmp_path / "z"
  shutil.copytree(photos, root)
  repair = lambda name: (root / name).write_bytes((photos / "cat" / "05.png").read_bytes())
  run = lambda out, **options: encode(picture_set(str(root), 8), kl, out=out, batch_size=2, shard_records=3, **options)
  with pytest.raises(ValueError, match="repair them, or go on with a larger number"):
    run(out, max_bad=1)
  repair("cat/03.png")
  with pytest.raises(ValueError, match="max_bad: more than 1 pictures cannot be read"):
    run(out, max_bad=1)
  repair("cat/07.png")
  repair("dog/04.png")
  assert run(out, max_bad=1).num_records == 19, "those that were repaired do not count any more"
  assert (out / "unreadable.txt").read_text().startswith("dog/06.png: ")
  kept = (out / "00000.array_record").stat().st_mtime_ns
  capsys.readouterr()
  assert run(out).num_records == 19
  assert "is complete" in capsys.readouterr().out
  repair("dog/06.png")
  assert run(out).num_records == 20
  assert "going on after 17 pictures" in capsys.readouterr().out
  assert (out / "00000.array_record").stat().st_mtime_ns == kept
  run(tmp_path / "whole")
  assert contents(out) == contents(tmp_path / "whole")
  assert not (out / "unreadable.txt").exists()


def test_pictures_that_cannot_be_read_are_counted_over_all_processes(tmp_path, photos, kl, monkeypatch):
  out, real = tmp_path / "z", latent_writing._write_shards
  # Each of two processes has two of them.
  count_alone = lambda folder, todo, chosen, values, batch_size, bad, max_bad: real(
    folder, todo, chosen, values, batch_size, {}, 2 * max_bad
  )
  monkeypatch.setattr(latent_writing, "_write_shards", count_alone)
  for _ in range(2):
    with pytest.raises(ValueError, match="max_bad: more than 3 pictures cannot be read"):
      encode(picture_set(str(photos), 8), kl, out=out, max_bad=3)
    assert not (out / "info.json").exists()
  assert encode(picture_set(str(photos), 8), kl, out=out, max_bad=4).num_records == 16


def test_draws_of_the_same_pictures_are_the_same_whatever_lies_beside_them(tmp_path, photos, kl):
  """The noise is seeded by a picture's name in its folder."""
  few = tmp_path / "few"
  for name in ("cat/05.png", "dog/08.png"):
    (few / name).parent.mkdir(parents=True)
    (few / name).write_bytes((photos / name).read_bytes())
  x0 = encode(picture_set(str(few), 8), kl).records.x0
  whole = encode(picture_set(str(photos), 8), kl, batch_size=16).records.x0
  names = [
    name for name in sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png")) if name not in BROKEN
  ]
  rows = [names.index("cat/05.png"), names.index("dog/08.png")]
  np.testing.assert_allclose(x0, whole[rows], rtol=2e-3, atol=2e-3)
  other = encode(picture_set(str(few), 8), kl, seed=1).records.x0
  mean = encode(picture_set(str(few), 8), kl, store="mean").records.x0
  assert np.abs(other - x0).mean() > 0.01
  assert np.abs(mean - x0).mean() > 0.01


KILLED = """
import os, sys, threading
from pflow_jax.commands.cli import main
from pflow_jax.data.folder import FolderSource
calls, lock, read = [0], threading.Lock(), FolderSource.read
def counted(self, row):
  with lock:
    calls[0] += 1
    if calls[0] == int(sys.argv[1]):
      os._exit(9)
  return read(self, row)
FolderSource.read = counted
main(sys.argv[2:])
"""


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, photos, kl):
  """Two kills in real processes: as the first shard is written, and after it."""
  words = ["latents", f"--images={photos}", "--size=8", f"--autoencoder={kl}", "--batch_size=2", "--shard_records=6"]
  run = lambda at, out: subprocess.run(
    [sys.executable, "-c", KILLED, str(at), *words, f"--out={out}"],
    cwd=ROOT,
    env=environment(1),
    capture_output=True,
    text=True,
  )
  out, whole = tmp_path / "z", tmp_path / "whole"
  assert run(3, out).returncode == 9
  assert run(18, out).returncode == 9
  assert (out / "00000.array_record").exists()
  assert not (out / "info.json").exists()
  kept = (out / "00000.array_record").stat().st_mtime_ns
  done = run(0, out)
  assert (done.returncode, "going on after " in done.stdout) == (2, True), done.stderr
  assert (out / "00000.array_record").stat().st_mtime_ns == kept
  assert run(0, whole).returncode == 2
  assert contents(out) == contents(whole)
  assert sorted(contents(out)) == [
    *(f"{number:05d}.{ending}" for number in range(4) for ending in ("array_record", "part.json")),
    "info.json",
    "unreadable.txt",
  ]


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, photos, kl):
  """A shell's limit on the size of files stands for it."""
  words = [f"--images={photos}", "--size=8", f"--autoencoder={kl}", "--batch_size=2", "--shard_records=6"]
  words = [
    sys.executable,
    "-c",
    "from pflow_jax.commands.cli import main; main()",
    "latents",
    *words,
    f"--out={tmp_path}/z",
  ]
  limited = ["bash", "-c", 'ulimit -f 32; exec "$@"', "bash", *words]
  full = subprocess.run(limited, cwd=ROOT, env=environment(1), capture_output=True, text=True)
  assert full.returncode == 1, full.stderr
  assert "Traceback" not in full.stderr
  assert not list((tmp_path / "z").glob("*.array_record*"))
  assert not (tmp_path / "z" / "lock.json").exists()
  done = subprocess.run(words, cwd=ROOT, env=environment(1), capture_output=True, text=True)
  assert (done.returncode, "wrote 16 latents" in done.stdout) == (2, True), done.stderr


def test_another_writer_is_refused(tmp_path, photos, kl, monkeypatch):
  dataset = picture_set(str(photos), 8)
  real = latent_writing._write_shards

  def other(*args):
    with pytest.raises(ValueError, match="is being written by 'pflow latents'"):
      encode(dataset, kl, out=tmp_path / "z")
    real(*args)

  monkeypatch.setattr(latent_writing, "_write_shards", other)
  encode(dataset, kl, out=tmp_path / "z")


def test_names_of_pictures(photos, monkeypatch):
  assert picture_set(str(photos), 8).records.source.form.crop == "adm"
  assert picture_set(f"folder:{photos}").shape == (256, 256, 3)
  own = picture_set(f"folder:{photos}", options={"image_size": 12})
  assert (own.shape, own.records.source.form.crop) == ((12, 12, 3), "fit"), "as the data set does it"
  with pytest.raises(ValueError, match="size: is for image files, digits has a size of its own"):
    picture_set("digits", 8)
  with pytest.raises(ValueError, match="there is no data set 'nothing'"):
    picture_set("nothing")
  with pytest.raises(ValueError, match="autoencoder: pictures need one; give its folder"):
    make(str(photos), "z")


def test_latents_of_another_scale_than_the_autoencoder_are_told(tmp_path, kl, photos, caplog):
  dataset = encode(picture_set(str(photos), 8), kl, out=tmp_path / "z")
  assert codec_of(dataset).normalisation == Scaling((0.25,) * 3, (0.5,) * 3)
  other = data.Dataset(**{**vars(dataset), "scaling": Scaling((0.25,) * 3, (0.13,) * 3)})
  with pytest.raises(
    ValueError, match=r"makes latents of another scale than latents:.* has: scale \(0\.5, .*, the data's"
  ):
    codec_of(other)
  with caplog.at_level(logging.WARNING):
    assert as_pictures(other, np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 8, 8, 3)
  assert "latents are shown by their first channels" in caplog.text


def test_latents_of_another_scale_than_a_converted_teacher_takes_are_told(tmp_path, caplog):
  config = quick("imagenet", "gmrepa_1nfe", tmp_path / "teacher")
  config.data = dict(name=f"latents:{tmp_path}/z")
  rng = np.random.default_rng(0)

  def latents(std):
    shutil.rmtree(tmp_path / "z", ignore_errors=True)
    x0 = std * rng.normal(size=(32, 8, 8, 4)).astype(np.float32)
    data.write_latents(f"{tmp_path}/z", [(x0, np.arange(32) % 10)], num_classes=10)

  latents(1.0)
  write_pretrained(config, tmp_path / "teacher")
  with caplog.at_level(logging.WARNING):
    build(config)
    assert "takes latents of about" not in caplog.text
    latents(0.5)
    build(config)
  assert re.search(r"has a standard deviation of 0\.[45].*, the teacher in ", caplog.text)
  assert "takes latents of about 1: are they of its autoencoder?" in caplog.text
  own = json.loads((tmp_path / "teacher" / "config.json").read_text())
  own["source"] |= {"latent_shift": 0.0, "latent_scale": 0.18215}
  (tmp_path / "teacher" / "config.json").write_text(json.dumps(own))
  info = json.loads((tmp_path / "z" / "info.json").read_text())
  for shift, scale in ((0.0, 0.18215), (0.0, 0.13025), (0.5, 0.18215)):  # of one standard deviation all
    (tmp_path / "z" / "info.json").write_text(json.dumps(info | {"shift": [shift] * 4, "scale": [scale] * 4}))
    if (shift, scale) == (0.0, 0.18215):
      build(config)
    else:
      with pytest.raises(
        ValueError, match=r"another shift or scale than the teacher in .*: (scale|shift) \(0\.\d+, .*, the data"
      ):
        build(config)
  latents(5.49)  # as those of Stable Diffusion before they are scaled
  with pytest.raises(
    ValueError, match=r"config.data.name: latents:.* has a standard deviation of 5\.[45].*, the teacher in"
  ):
    build(config)


def test_the_size_of_a_set_that_has_one_is_its_option(monkeypatch):
  def squares(*, split="train", size=32):
    return pf.data.from_arrays(np.zeros((4, size, size, 3), np.float32), np.zeros(4, int))

  monkeypatch.setitem(registry._SOURCES, "squares", squares)
  assert picture_set("squares").shape == (32, 32, 3)
  assert picture_set("squares", 16).shape == (16, 16, 3)
  assert picture_set("squares", options={"size": 8}).shape == (8, 8, 3)
