"""A folder of images, with one subfolder a class, or without classes."""

from __future__ import annotations

import collections
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import SupportsIndex

import numpy as np
from PIL import Image

from pflow_jax.data.dataset import Dataset, check_classes, split_rows
from pflow_jax.data.pixels import check_image_options, read_pixels, to_unit
from pflow_jax.data.records import Record, SourceRecords
from pflow_jax.files.foreign import available_formats, decoding, real_folder, shown

_NAMES_SHOWN = 10
_File = tuple[pathlib.Path, int]  # and its label


class FolderSource:
  """Random access to image files: {"x0": (size, size, channels) float32, "label": () int32}."""

  def __init__(self, files: Sequence[_File], size: int, channels: int):
    self.files = files
    self.size = size
    self.channels = channels

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, row: SupportsIndex) -> Record:
    path, label = self.files[int(row)]
    pixels = read_pixels(path, self.size, self.channels)
    return {"x0": to_unit(pixels), "label": np.asarray(label, np.int32)}


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
  """Images in <path>/<class>/**, classes in sorted order, or in <path> itself, without classes.

  They become (image_size, image_size, channels): cropped to the centred square and resized, with transparency over
  white; of several frames the first is read. Files without an image's ending are left out, with one warning that counts
  them; files whose names begin with a dot are left out without one. Links to folders are followed to a class, and not
  within it.

  Args:
    path: the folder of class folders, or of images.
    split: "train" or "test".
    held_out: records kept out of "train" for "test".
    image_size: side in pixels, required.
    channels: 3 (RGB) or 1 (grey).
    allow_unreadable: skip files that cannot be decoded, with a warning, instead of refusing.
    check: decode every file once now. False saves that time; a broken file is then an error when it is read.

  Raises:
    ValueError: for a folder without images, for images beside class folders, for class folders without images, and for
      unreadable files: one message has their count and the first names.
  """
  name = f"folder:{path}"
  check_image_options(name, image_size, channels)
  size = int(image_size or 0)
  try:
    root = real_folder(os.path.expanduser(path))
  except ValueError as error:
    raise ValueError(f"folder:{error}; give a folder with one subfolder a class, or of images.") from error
  files, class_names = _scan(name, root)
  if check:
    files = _readable(name, root, files, size, channels, allow_unreadable)
  files = [files[row] for row in split_rows(name, len(files), split, held_out)]
  source = FolderSource(files, size, channels)
  return Dataset(name, (size, size, channels), len(class_names), class_names, SourceRecords(source))


def _scan(name: str, root: pathlib.Path) -> tuple[list[_File], tuple[str, ...]]:
  """Finds the image files, sorted, with their labels, and the names of the classes; warns of files left out."""
  endings = _endings()
  with decoding(name):
    entries = _entries(root)
    folders = [entry for entry in entries if os.path.isdir(entry)]
    # An ancestor, or itself: its images would be of two classes.
    loops = [entry.name for entry in folders if root.resolve().is_relative_to(pathlib.Path(entry).resolve())]
    found = [[pathlib.Path(entry) for entry in entries if entry not in folders], *map(_walk, folders)]
  if loops:
    raise ValueError(f"{name}: {shown(loops[0])} is a link to the folder that it is in; remove it.")
  check_classes(name, len(folders))
  images = [[path for path in paths if path.suffix.lower() in endings] for paths in found]
  left_out = _counted(path for paths in found for path in paths if path.suffix.lower() not in endings)
  left_out = left_out and f"{left_out} are no images that are read; "
  advice = f"images end with {', '.join(sorted(endings))}; convert others."
  top, *of_classes = images
  if top and folders:
    beside = _shorten([entry.name for entry in folders])
    raise ValueError(
      f"{name}: expected images in class folders or without any, got {len(top)}, such as {shown(top[0].name)}, beside "
      f"the folders {beside}; move them."
    )
  if not any(images):
    raise ValueError(f"{name}: there are no images, in class folders or without; {left_out}{advice}")
  empty = [entry.name for entry, paths in zip(folders, of_classes, strict=True) if not paths]
  if empty:
    raise ValueError(
      f"{name}: {len(empty)} class folder(s) without images: {_shorten(empty)}; remove them or add some; {left_out}"
      f"{advice}"
    )
  if left_out:
    warnings.warn(f"{name}: {left_out}they are left out; {advice}", stacklevel=4)
  files = [(path, 0) for path in top]
  files += [(path, label) for label, paths in enumerate(of_classes) for path in paths]
  return files, tuple(entry.name for entry in folders)


def _endings() -> frozenset[str]:
  """Endings of the files that Pillow is asked to read."""
  formats = available_formats()
  return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def _entries(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
  """The entries of a folder that are not hidden, sorted."""
  with os.scandir(os.fspath(path)) as entries:
    return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _walk(folder: os.DirEntry) -> list[pathlib.Path]:
  """All files below a folder, sorted, with the links to folders, which are not followed: they may lead in circles."""
  found: list[pathlib.Path] = []
  waiting: list[os.DirEntry] = [folder]
  while waiting:
    for entry in _entries(waiting.pop()):
      if entry.is_dir(follow_symlinks=False):
        waiting.append(entry)
      else:
        found.append(pathlib.Path(entry))
  return sorted(found)


def _counted(paths: Iterable[pathlib.Path]) -> str:
  """'2 .heic, 1 .txt and 1 without an ending'."""
  counts = collections.Counter(path.suffix.lower() for path in paths)
  words = [f"{count} {shown(ending)[1:-1] or 'without an ending'}" for ending, count in counts.most_common()]
  return _shorten(words)


def _readable(
  name: str,
  root: pathlib.Path,
  files: list[_File],
  size: int,
  channels: int,
  allow_unreadable: bool,
) -> list[_File]:
  def problem(file: _File) -> str | None:
    try:
      read_pixels(file[0], size, channels)
    except ValueError as error:
      return str(error).replace(f"{root}{os.sep}", "")
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


def _shorten(names: list[str]) -> str:
  more = len(names) - _NAMES_SHOWN
  return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
