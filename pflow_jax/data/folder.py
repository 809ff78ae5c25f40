"""A folder of images with one subfolder a class."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import SupportsIndex

import numpy as np
from PIL import Image, ImageOps

from pflow_jax.data.dataset import Dataset, split_rows
from pflow_jax.data.pixels import check_image_options, to_pixels, to_unit
from pflow_jax.data.records import Record, SourceRecords

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_NAMES_SHOWN = 10


class FolderSource:
  """Random access to image files: {"x0": (size, size, channels) float32, "label": () int32}."""

  def __init__(self, files: Sequence[tuple[pathlib.Path, int]], size: int, channels: int):
    self.files = files
    self.size = size
    self.channels = channels

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, row: SupportsIndex) -> Record:
    path, label = self.files[int(row)]
    try:
      x0 = to_unit(_read(path, self.size, self.channels))
    except Exception as error:
      raise ValueError(f"cannot read the image {path}: {error}") from error
    return {"x0": x0, "label": np.asarray(label, np.int32)}


def folder(
  path: str,
  *,
  split: str = "train",
  held_out: int = 0,
  image_size: int | None = None,
  channels: int = 3,
  allow_unreadable: bool = False,
  check: bool = True,
) -> Dataset:
  """Images in <path>/<class>/**: (image_size, image_size, channels), classes in sorted order.

  Images are cropped to the centred square and resized; transparency is composited over white.

  Args:
    path: the folder of class folders.
    split: "train" or "test".   held_out: records kept out of "train" for "test".
    image_size: side in pixels, required.   channels: 3 (RGB) or 1 (grey).
    allow_unreadable: skip files that cannot be decoded, with a warning, instead of refusing.
    check: decode every file once now, so that a broken one does not stop a run in the night; with
      False that cost is saved, and the error comes when the file is read.
  Raises: ValueError for a folder without classes or images, and for unreadable files: all of them
    in one message, with their count and the first names.
  """
  name = f"folder:{path}"
  check_image_options(name, image_size, channels)
  size = int(image_size or 0)
  root = pathlib.Path(path).expanduser()
  files, class_names = _scan(name, root)
  if check:
    files = _readable(name, root, files, size, channels, allow_unreadable)
  files = [files[row] for row in split_rows(name, len(files), split, held_out)]
  source = FolderSource(files, size, channels)
  return Dataset(name, (size, size, channels), len(class_names), class_names, SourceRecords(source))


def _scan(name: str, root: pathlib.Path) -> tuple[list[tuple[pathlib.Path, int]], tuple[str, ...]]:
  if not root.is_dir():
    raise ValueError(f"{name}: expected a folder with one subfolder a class; {root} is no folder.")
  folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  if not folders:
    raise ValueError(f"{name}: no class folders; put the images in {root}/<class>/, one or more.")
  files = []
  empty = []
  for label, class_folder in enumerate(folders):
    found = sorted(p for p in class_folder.rglob("[!.]*") if p.suffix.lower() in _SUFFIXES)
    files += [(path, label) for path in found]
    if not found:
      empty.append(class_folder.name)
  if empty:
    raise ValueError(
      f"{name}: {len(empty)} class folder(s) without images: {_shorten(empty)}; remove them or add"
      f" images ({', '.join(sorted(_SUFFIXES))})."
    )
  return files, tuple(p.name for p in folders)


def _readable(
  name: str,
  root: pathlib.Path,
  files: list[tuple[pathlib.Path, int]],
  size: int,
  channels: int,
  allow_unreadable: bool,
) -> list[tuple[pathlib.Path, int]]:
  def problem(file: tuple[pathlib.Path, int]) -> str | None:
    # Decoders raise many types on broken files; all of them mean unreadable.
    try:
      _read(file[0], size, channels)
    except Exception as error:
      return f"{file[0].relative_to(root)} ({error})"
    return None

  # Pillow decodes outside Python's lock, so threads help.
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    problems = list(pool.map(problem, files))
  broken = [text for text in problems if text is not None]
  if not broken:
    return files
  message = f"{name}: {len(broken)} of {len(files)} images are unreadable: {_shorten(broken)}."
  if len(broken) == len(files):
    raise ValueError(f"{message} None is left.")
  if not allow_unreadable:
    raise ValueError(f"{message} Repair or remove them, or skip them with allow_unreadable=True.")
  warnings.warn(f"{message} They are skipped.", stacklevel=4)
  return [file for file, text in zip(files, problems, strict=True) if text is None]


def _read(path: pathlib.Path, size: int, channels: int) -> np.ndarray:
  with Image.open(path) as image:
    return to_pixels(ImageOps.exif_transpose(image), size, channels)


def _shorten(names: list[str]) -> str:
  more = len(names) - _NAMES_SHOWN
  return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
