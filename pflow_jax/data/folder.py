"""A folder of images, with one subfolder a class, or without classes."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NoReturn

import numpy as np

from pflow_jax.data.dataset import Dataset, check_classes, split_rows
from pflow_jax.data.image_source import Form, ImageSource
from pflow_jax.data.pixels import Crop, image_endings
from pflow_jax.data.records import SourceRecords
from pflow_jax.files.foreign import decoding, is_there, real_folder, shown

_NAMES_SHOWN = 10
_File = tuple[str, int]  # path, of which a million take less memory as text, and label


class FolderSource(ImageSource):
  """Random access to image files, see `ImageSource`."""

  def __init__(self, root: str, files: Sequence[_File], form: Form):
    self.root, self.files, self.form = root, files, form

  def __len__(self) -> int:
    return len(self.files)

  def open(self, row: int) -> tuple[str | bytes, str]:
    return self.files[row][0], ""

  def label(self, row: int) -> int:
    return self.files[row][1]

  @property
  def labels(self) -> np.ndarray:
    return np.array([label for _, label in self.files], np.int32)

  def key(self, row: int) -> str:
    return self.files[row][0].removeprefix(self.root).lstrip(os.sep)


@dataclasses.dataclass(frozen=True)
class _Absent:
  """Records of a folder that is not there: shape and number of classes are known, and nothing can be read."""

  name: str
  is_found: ClassVar[bool] = False
  read_threads: ClassVar[int] = 0

  def _refuse(self, *_: Any) -> NoReturn:
    raise ValueError(f"{self.name}: there is no such folder; say where it is with --config.data.name=folder:<path>.")

  num_records = property(_refuse)
  batches = sample = _refuse


def folder(
  path: str,
  *,
  split: str = "train",
  held_out: int = 0,
  image_size: int | None = None,
  channels: int = 3,
  num_classes: int | None = None,
  crop: Crop = "fit",
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
    num_classes: class folders that have to be there, by default any number. With it a run can be planned on a machine
      that does not have the folder.
    crop: "adm" cuts and scales as the published work on ImageNet does, see `data.pixels.center_crop`.
    allow_unreadable: skip files that cannot be decoded, with a warning, instead of refusing.
    check: decode every file once now. False saves that time; a broken file is then an error when it is read.

  Raises:
    ValueError: for a folder without images, for images beside class folders, for class folders without images, for
      another number of them, and for unreadable files: one message has their count and the first names.
  """
  name = f"folder:{path}"
  form = Form.checked(name, image_size, channels, crop)
  if num_classes is not None and not is_there(os.path.expanduser(path)):
    check_classes(name, num_classes)
    return Dataset(name, form.shape, num_classes, tuple(f"class {i}" for i in range(num_classes)), _Absent(name))
  try:
    root = real_folder(os.path.expanduser(path))
  except ValueError as error:
    raise ValueError(f"folder:{error}; give a folder with one subfolder a class, or of images.") from error
  files, class_names = _scan(name, root)
  if num_classes not in (None, len(class_names)):
    raise ValueError(f"{name}: expected {num_classes} class folders, got {len(class_names)}.")
  if check:
    files = _readable(name, FolderSource(str(root), files, form), allow_unreadable)
  files = [files[row] for row in split_rows(name, len(files), split, held_out)]
  source = FolderSource(str(root), files, form)
  return Dataset(name, form.shape, len(class_names), class_names, SourceRecords(source))


def _scan(name: str, root: pathlib.Path) -> tuple[list[_File], tuple[str, ...]]:
  """Finds the image files, sorted, with their labels, and the names of the classes; warns of files left out."""
  endings = image_endings()
  with decoding(name):
    entries = _entries(root)
    folders = [entry for entry in entries if os.path.isdir(entry)]
    # An ancestor, or itself: its images would be of two classes.
    loops = [entry.name for entry in folders if root.resolve().is_relative_to(pathlib.Path(entry).resolve())]
    found = [[entry.path for entry in entries if entry not in folders], *map(_walk, folders)]
  if loops:
    raise ValueError(f"{name}: {shown(loops[0])} is a link to the folder that it is in; remove it.")
  check_classes(name, len(folders))
  images = [[path for path in paths if _ending(path) in endings] for paths in found]
  left_out = _counted(path for paths in found for path in paths if _ending(path) not in endings)
  left_out = left_out and f"{left_out} are no images that are read; "
  advice = f"images end with {', '.join(sorted(endings))}; convert others."
  top, *of_classes = images
  if top and folders:
    one, beside = os.path.basename(top[0]), _shorten([entry.name for entry in folders])
    raise ValueError(
      f"{name}: expected images in class folders or without any, got {len(top)}, such as {shown(one)}, beside the "
      f"folders {beside}; move them."
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


def _entries(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
  """The entries of a folder that are not hidden, sorted."""
  with os.scandir(os.fspath(path)) as entries:
    return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _ending(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _walk(folder: os.DirEntry) -> list[str]:
  """All files below a folder, sorted, with the links to folders, which are not followed: they may lead in circles."""
  found: list[str] = []
  waiting: list[os.DirEntry] = [folder]
  while waiting:
    for entry in _entries(waiting.pop()):
      if entry.is_dir(follow_symlinks=False):
        waiting.append(entry)
      else:
        found.append(entry.path)
  return sorted(found, key=lambda path: path.split(os.sep))


def _counted(paths: Iterable[str]) -> str:
  """'2 .heic, 1 .txt and 1 without an ending'."""
  counts = collections.Counter(map(_ending, paths))
  words = [f"{count} {shown(ending)[1:-1] or 'without an ending'}" for ending, count in counts.most_common()]
  return _shorten(words)


def _readable(name: str, source: FolderSource, allow_unreadable: bool) -> list[_File]:
  def problem(row: int) -> str | None:
    try:
      source.read(row)
    except ValueError as error:
      return str(error).replace(f"{source.root}{os.sep}", "")
    return None

  files = list(source.files)
  # Pillow decodes outside Python's lock, so threads help.
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    problems = list(pool.map(problem, range(len(files))))
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
