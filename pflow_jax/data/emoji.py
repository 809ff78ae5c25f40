"""Colour emoji as a data set: 3,786 images, 1,910 without skin tones, with a category and names each."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from typing import Literal, NamedTuple

import numpy as np
import pydantic

from pflow_jax.data.dataset import Dataset, from_arrays, split_rows
from pflow_jax.data.pixels import over_white
from pflow_jax.data.prompts.dataset import with_embeddings
from pflow_jax.files.foreign import in_bytes, open_image, read_json, regular_file

_PACKAGE = "emoji-datasource-google"
_VERSION = "16.0.0"
_SIZES = (32, 64)
_TABLE = "emoji.json"
_FILES = ("LICENSE", "package.json", _TABLE, *(f"img/google/sheets-clean/{s}.png" for s in _SIZES))
_MAX_UNPACKED = 2**29  # bytes
_SKIN_TONES = {
  "1F3FB": "light skin tone",
  "1F3FC": "medium-light skin tone",
  "1F3FD": "medium skin tone",
  "1F3FE": "medium-dark skin tone",
  "1F3FF": "dark skin tone",
}


@dataclasses.dataclass(frozen=True)
class _Cell:
  """Place of an image on the sheet."""

  sheet_x: pydantic.NonNegativeInt
  sheet_y: pydantic.NonNegativeInt
  has_img_google: bool


@dataclasses.dataclass(frozen=True)
class _Entry(_Cell):
  name: str
  category: str
  short_names: tuple[str, ...] = ()
  skin_variations: dict[str, _Cell] = dataclasses.field(default_factory=dict)


def emoji(
  *,
  split: str = "train",
  held_out: int = 0,
  size: int = 32,
  skin_tones: bool = True,
  names: Literal["one", "all"] = "one",
  classes: Literal["category", "picture"] = "category",
  cache_dir: str | None = None,
  embeddings: str | None = None,
) -> Dataset:
  """Noto colour emoji over white: (size, size, 3), text = name.

  Skin tones are records of their own: "father christmas: dark skin tone".

  Args:
    split: "train" or "test".
    held_out: records kept out of "train" for "test".
    size: 32 or 64 pixels.
    skin_tones: whether pictures that differ in the tone of the skin alone are there.
    names: "one" is Unicode's name of a picture; "all" are the short names beside it too, "heavy black heart" and
      "heart", each with a record of its own.
    classes: "category" is one of ten, "picture" a class for each picture.
    cache_dir: the folder that `fetch_emoji` was given.
    embeddings: folder of the names' embeddings, which are then the condition in place of the class:
      `pflow cache --prompts=data:emoji --model=minilm --out=<folder>`.

  Raises:
    ValueError: if the images were never fetched or are damaged, for another size, or embeddings that are not there.

  References:
    npm package emoji-datasource-google (code MIT, images Apache-2.0).
  """
  if size not in _SIZES:
    raise ValueError(f"emoji: size must be one of {_SIZES}, got {size}.")
  package = _package_dir(cache_dir)
  if not _is_complete(package):
    raise ValueError(
      f"emoji: no images in {package}; fetch them once with `pflow data emoji` (needs npm, 74 MB),"
      " or name the folder they were fetched to in cache_dir=."
    )
  entries = _entries(read_json(package / _TABLE, list[_Entry]), skin_tones, names == "all")
  with open_image(_sheet_path(package, size)) as image:
    sheet = np.asarray(over_white(image).convert("RGB"))
  # Cells have a transparent border of one pixel.
  down, across = (length // (size + 2) for length in sheet.shape[:2])
  if not entries or any(one.x >= across or one.y >= down for one in entries):
    raise ValueError(f"emoji: {_TABLE} in {package} is not of the images beside it; remove them and fetch them again.")
  corners = [(1 + one.y * (size + 2), 1 + one.x * (size + 2)) for one in entries]
  x0 = np.stack([sheet[top : top + size, left : left + size] for top, left in corners])
  classes_of = [one.category if classes == "category" else one.picture for one in entries]
  numbers = {name: number for number, name in enumerate(sorted(set(classes_of)))}
  label = np.array([numbers[name] for name in classes_of], np.int32)
  rows = split_rows("emoji", len(entries), split, held_out)
  texts = tuple(entries[row].text for row in rows)
  dataset = from_arrays(x0[rows], label[rows], name="emoji", class_names=tuple(numbers), texts=texts)
  return with_embeddings(dataset, embeddings) if embeddings else dataset


def fetch_emoji(cache_dir: str | None = None) -> pathlib.Path:
  """Fetches the emoji package with `npm pack` (74 MB) and keeps the 21 MB that are used.

  Args:
    cache_dir: default $XDG_CACHE_HOME/pflow_jax, or ~/.cache/pflow_jax.

  Returns:
    the package's folder in the cache. Nothing is fetched if it is there already.

  Raises:
    ValueError: if npm is not installed.
    RuntimeError: if npm fails, with its words.
  """
  package = _package_dir(cache_dir)
  if _is_complete(package):
    return package
  npm = shutil.which("npm")
  if npm is None:
    raise ValueError(f"emoji: `npm` was not found; install Node.js, or unpack {_PACKAGE}@{_VERSION} to {package}.")
  package.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=package.parent, prefix=".fetch-") as work:
    command = [npm, "pack", f"{_PACKAGE}@{_VERSION}", "--silent"]
    result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    archives = list(pathlib.Path(work).glob("*.tgz"))
    if result.returncode != 0 or not archives:
      raise RuntimeError(
        f"emoji: `npm pack {_PACKAGE}@{_VERSION}` failed with exit status {result.returncode}:"
        f" {result.stderr.strip() or result.stdout.strip() or 'no output'}"
      )
    unpacked = pathlib.Path(work) / "unpacked"
    _unpack(archives[0], unpacked)
    # Moved into place whole: a fetch that is cut short leaves nothing that looks complete.
    shutil.rmtree(package, ignore_errors=True)
    unpacked.rename(package)
  return package


def _unpack(archive: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the files that are used and ignores the rest of the archive.

  Raises:
    RuntimeError: for an archive that is cut short, damaged, or lacks these files.
  """
  what = f"emoji: the package {_PACKAGE}@{_VERSION}"
  try:
    content = bytearray()
    with gzip.open(regular_file(archive)) as stream:
      while part := stream.read(2**20):
        content += part
        if len(content) > _MAX_UNPACKED:
          raise RuntimeError(f"{what} has more than {in_bytes(_MAX_UNPACKED)}.")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
      members = {member.name: member for member in tar}
      for name in _FILES:
        member = members.get(f"package/{name}")
        if member is None or not member.isreg():
          raise RuntimeError(f"{what} has no {name}.")
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
  except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
    raise RuntimeError(f"{what} cannot be unpacked: {error}") from error


class _Record(NamedTuple):
  """A picture with one of its texts; the picture's name is its first text."""

  x: int
  y: int
  category: str
  picture: str
  text: str


def _entries(table: list[_Entry], skin_tones: bool, all_names: bool) -> list[_Record]:
  """Returns a record for every picture, or for each of its names."""
  entries = []
  for one in table:
    names = [one.name.lower()]
    if all_names:
      names += [re.sub("[-_]", " ", name) for name in one.short_names]
    for tones, cell in [("", one), *(one.skin_variations.items() if skin_tones else ())]:
      words = ", ".join(_SKIN_TONES.get(tone, tone) for tone in tones.split("-") if tone)
      texts = [f"{name}: {words}" if words else name for name in dict.fromkeys(names)]
      if cell.has_img_google:
        entries += [_Record(cell.sheet_x, cell.sheet_y, one.category, texts[0], text) for text in texts]
  return entries


def _package_dir(cache_dir: str | None) -> pathlib.Path:
  if cache_dir is None:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache_dir = f"{cache}/pflow_jax"
  return pathlib.Path(os.path.expanduser(cache_dir)) / f"{_PACKAGE}-{_VERSION}"


def _sheet_path(package: pathlib.Path, size: int) -> pathlib.Path:
  return package / "img" / "google" / "sheets-clean" / f"{size}.png"


def _is_complete(package: pathlib.Path) -> bool:
  return all((package / name).is_file() for name in _FILES)
