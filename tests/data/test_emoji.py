"""Emoji from a miniature of the npm package, and its fetching with a stand-in for npm."""

import gzip
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TABLE = [
  {
    "name": "WAVING HAND",
    "category": "People & Body",
    "short_names": ["wave", "waving_hand"],
    "sheet_x": 0,
    "sheet_y": 0,
    "has_img_google": True,
    "skin_variations": {
      "1F3FB-1F3FF": {"sheet_x": 1, "sheet_y": 0, "has_img_google": True},
      "1F3FD": {"sheet_x": 1, "sheet_y": 1, "has_img_google": False},
    },
  },
  {
    "name": "Blue Book",
    "category": "Objects",
    "sheet_x": 0,
    "sheet_y": 1,
    "has_img_google": True,
  },
]


def write_package(package):
  """A 2 x 2 sheet: red and green above, blue (half transparent) below."""
  sheets = package / "img" / "google" / "sheets-clean"
  sheets.mkdir(parents=True)
  for size in (32, 64):
    sheet = Image.new("RGBA", (2 * (size + 2), 2 * (size + 2)))
    for name, column, row, alpha in [
      ("red", 0, 0, 255),
      ("green", 1, 0, 255),
      ("blue", 0, 1, 128),
    ]:
      cell = Image.new("RGBA", (size, size), (*COLOURS[name], alpha))
      sheet.paste(cell, (column * (size + 2) + 1, row * (size + 2) + 1))
    sheet.save(sheets / f"{size}.png")
  (package / "emoji.json").write_text(json.dumps(TABLE))
  for name in ("LICENSE", "package.json"):
    (package / name).write_text("{}")


@pytest.fixture
def cache(tmp_path):
  write_package(tmp_path / "cache" / "emoji-datasource-google-16.0.0")
  return str(tmp_path / "cache")


@pytest.mark.parametrize("size", [32, 64])
def test_images_categories_and_names(cache, size):
  dataset = data.load("emoji", size=size, cache_dir=cache)
  assert dataset.shape == (size, size, 3)
  assert dataset.class_names == ("Objects", "People & Body")
  assert dataset.texts == (
    "waving hand",
    "waving hand: light skin tone, dark skin tone",
    "blue book",
  )
  np.testing.assert_array_equal(dataset.records.label, [1, 1, 0])
  colours = [(255, 0, 0), (0, 255, 0), (127, 127, 255)]
  for image, colour in zip(dataset.records.x0, colours, strict=True):
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(colour), image.shape))


def test_tones_names_and_classes_are_chosen(cache):
  plain = data.load("emoji", skin_tones=False, cache_dir=cache)
  assert plain.texts == ("waving hand", "blue book")
  named = data.load("emoji", names="all", classes="picture", cache_dir=cache)
  tones = ": light skin tone, dark skin tone"
  assert named.texts == ("waving hand", "wave", f"waving hand{tones}", f"wave{tones}", "blue book")
  assert named.class_names == ("blue book", "waving hand", f"waving hand{tones}")
  np.testing.assert_array_equal(named.records.label, [1, 1, 2, 2, 0])
  np.testing.assert_array_equal(named.records.x0[2], named.records.x0[3])
  with pytest.raises(ValueError, match="names"):
    data.load("emoji", names="some", cache_dir=cache)


def test_texts_follow_the_records_of_a_split(cache):
  everything = data.load("emoji", cache_dir=cache)
  parts = [data.load("emoji", split=s, held_out=1, cache_dir=cache) for s in ("train", "test")]
  assert [part.num_records for part in parts] == [2, 1]
  images = {text: everything.records.x0[i] for i, text in enumerate(everything.texts)}
  for part in parts:
    for text, image in zip(part.texts, part.records.x0, strict=True):
      np.testing.assert_array_equal(image, images.pop(text))
  assert not images


def test_names_can_be_the_condition(cache, tmp_path, monkeypatch):
  from pflow_jax.conversion import cache as program
  from tests.encoders import StubEncoder

  monkeypatch.setattr(program, "load_encoder", lambda *args, **options: StubEncoder("minilm"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  (tmp_path / "xdg").mkdir()
  (tmp_path / "xdg" / "pflow_jax").symlink_to(cache)
  program.cache("data:emoji", "minilm", tmp_path / "names")
  for split, count in (("train", 2), ("test", 1)):
    dataset = data.load("emoji", split=split, held_out=1, embeddings=str(tmp_path / "names"))
    assert (dataset.num_records, dataset.num_classes, dataset.has_x0) == (count, 0, True)
    want = np.stack([StubEncoder("minilm").one(text)[1] for text in dataset.texts])
    np.testing.assert_array_equal(dataset.records.embeddings["pooled"], want)
  with pytest.raises(ValueError, match="no prompts; write them with `pflow cache`"):
    data.load("emoji", embeddings=str(tmp_path / "none"))


def test_absent_images_name_the_command(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="`pflow data emoji`"):
    data.load("emoji", cache_dir=str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  with pytest.raises(ValueError, match="xdg/pflow_jax/emoji-datasource-google-16.0.0"):
    data.load("emoji")


def test_other_sizes_are_refused(cache):
  with pytest.raises(ValueError, match=r"one of \(32, 64\), got 48"):
    data.load("emoji", size=48, cache_dir=cache)


@pytest.mark.parametrize(
  ("table", "message"),
  [
    ({}, "input should be a valid .*, got {}"),
    ([], "is not of the images beside it"),
    ([1], "0: .*got 1"),
    ([TABLE[1] | {"name": 3, "category": None}], "0.name: .*got 3; 0.category: .*got None"),
    ([TABLE[1] | {"sheet_x": 2}], "is not of the images beside it; remove them and fetch them again"),
    ([TABLE[1] | {"sheet_y": -1}], "0.sheet_y: .*got -1"),
    ([TABLE[1] | {"sheet_y": 10**9}], "is not of the images beside it"),
    ([TABLE[1] | {"skin_variations": [1]}], "0.skin_variations: .*got \\[1\\]"),
  ],
)
def test_a_table_that_is_damaged_is_refused(cache, table, message):
  (pathlib.Path(cache) / "emoji-datasource-google-16.0.0" / "emoji.json").write_text(json.dumps(table))
  with pytest.raises(ValueError, match=message):
    data.load("emoji", cache_dir=cache)


def test_a_sheet_that_is_no_image_is_refused(cache):
  sheet = pathlib.Path(cache) / "emoji-datasource-google-16.0.0" / "img" / "google" / "sheets-clean" / "32.png"
  sheet.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 68 68\n")
  with pytest.raises(ValueError, match=r"cannot read the image .*32\.png"):
    data.load("emoji", cache_dir=cache)


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
  """Puts an `npm` on the PATH that notes its arguments and copies `archive` to its folder."""
  binaries = tmp_path / "bin"
  binaries.mkdir()
  archive, log = tmp_path / "package.tar.gz", tmp_path / "log"
  script = binaries / "npm"
  script.write_text(
    f'#!/bin/sh\necho "$@" >> {log}\n'
    f'[ -f {archive} ] || {{ echo "no network" >&2; exit 7; }}\n/bin/cp {archive} ./emoji.tgz\n'
  )
  script.chmod(0o755)
  monkeypatch.setenv("PATH", str(binaries))
  return archive, log


def write_archive(archive, tmp_path, without=None):
  write_package(tmp_path / "package")
  (tmp_path / "package" / "surplus.txt").write_text("not kept")
  if without is not None:
    (tmp_path / "package" / without).unlink()
  with tarfile.open(archive, "w:gz") as tar:
    tar.add(tmp_path / "package", "package")


def test_fetch_keeps_what_is_needed_and_only_once(fake_npm, tmp_path):
  archive, log = fake_npm
  write_archive(archive, tmp_path)
  cache = str(tmp_path / "new" / "cache")
  package = data.fetch_emoji(cache)
  assert log.read_text() == "pack emoji-datasource-google@16.0.0 --silent\n"
  assert not (package / "surplus.txt").exists()
  assert data.load("emoji", cache_dir=cache).num_records == 3
  assert data.fetch_emoji(cache) == package
  assert len(log.read_text().splitlines()) == 1
  assert [p.name for p in package.parent.iterdir()] == [package.name]


def test_a_failed_fetch_says_why_and_leaves_nothing(fake_npm, tmp_path):
  archive, _ = fake_npm
  cache = tmp_path / "cache"
  with pytest.raises(RuntimeError, match="exit status 7: no network"):
    data.fetch_emoji(str(cache))
  write_archive(archive, tmp_path, without="emoji.json")
  with pytest.raises(RuntimeError, match=r"has no emoji\.json"):
    data.fetch_emoji(str(cache))
  assert list(cache.iterdir()) == []


def _link(tar, name, kind):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, name
  tar.addfile(member)


@pytest.mark.parametrize(
  "damage",
  [
    lambda archive: archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2]),
    lambda archive: archive.write_bytes(b"\x1f\x8b" + b"\0" * 99),
    lambda archive: archive.write_bytes(b"no archive"),
    lambda archive: archive.write_bytes(gzip.compress(b"\xff" * 5000)),
    lambda archive: archive.write_bytes(gzip.compress(b"")),
  ],
)
def test_a_download_that_is_damaged_can_be_tried_again(fake_npm, tmp_path, damage):
  archive, _ = fake_npm
  write_archive(archive, tmp_path)
  damage(archive)
  with pytest.raises(RuntimeError, match="cannot be unpacked|has no LICENSE"):
    data.fetch_emoji(str(tmp_path / "cache"))
  assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_files_are_taken_from_an_archive_and_none_from_elsewhere(fake_npm, tmp_path, kind, monkeypatch):
  archive, _ = fake_npm
  write_package(tmp_path / "package")
  (tmp_path / "package" / "LICENSE").unlink()
  with tarfile.open(archive, "w:gz") as tar:
    tar.add(tmp_path / "package", "package")
    _link(tar, "package/LICENSE", kind)
    tar.add(tmp_path / "package" / "emoji.json", "../../escaped")
  with pytest.raises(RuntimeError, match="has no LICENSE"):
    data.fetch_emoji(str(tmp_path / "cache"))
  assert not list(tmp_path.rglob("escaped"))
  monkeypatch.setattr("pflow_jax.data.emoji._MAX_UNPACKED", 9999)
  with pytest.raises(RuntimeError, match="has more than 9.765 KiB"):
    data.fetch_emoji(str(tmp_path / "cache"))


def test_fetch_without_npm_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(ValueError, match=r"`npm` was not found; install Node\.js"):
    data.fetch_emoji(str(tmp_path / "cache"))
