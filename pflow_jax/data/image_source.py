"""Random access to image files, whatever holds them: a folder, tar archives, parquet files."""

from __future__ import annotations

import abc
import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np

from pflow_jax.data.pixels import Crop, check_image_options, read_pixels, to_unit
from pflow_jax.data.records import Record
from pflow_jax.files.foreign import MAX_IMAGE_FILE, read_bytes, regular_file

_MAX_FILES = 1_000_000  # that a pattern with {0..9} may name


@runtime_checkable
class Pictures(Protocol):
  """Random access to pictures as they are encoded."""

  @property
  def labels(self) -> np.ndarray | None:
    """Classes of all pictures, (n,) integers; None where only reading a picture tells its class."""

  def __len__(self) -> int: ...

  def read(self, row: int) -> tuple[np.ndarray, int]:
    """Returns a picture (H, W, C), uint8 or in [-1, 1], and its class.

    Raises:
      ValueError: it cannot be read.
    """

  def key(self, row: int) -> str:
    """Returns the name that a picture alone has in its set: its file's, below the folder of the set, and its place."""

  def common_name(self, row: int) -> str:
    """Returns what a copy of a picture has too, wherever it lies in the set, as far as it is known without reading."""

  def content(self, row: int) -> str:
    """Returns a digest of a picture's bytes.

    Raises:
      ValueError: they cannot be read.
    """


@dataclasses.dataclass(frozen=True)
class Form:
  """The form that all images of a set get.

  Attributes:
    size: side in pixels.
    channels: 1 (grey) or 3 (RGB).
    crop: see `data.pixels.read_pixels`.
  """

  size: int
  channels: int = 3
  crop: Crop = "fit"

  @classmethod
  def checked(cls, name: str, image_size: int | None, channels: int, crop: Crop) -> Form:
    """Returns the form that a data set's options ask for; errors are those of `check_image_options`."""
    check_image_options(name, image_size, channels)
    return cls(int(image_size or 0), channels, crop)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Shape of an image."""
    return self.size, self.size, self.channels


class ImageSource(abc.ABC):
  """Images of one form: {"x0": (size, size, channels) float32, "label": () int32}."""

  form: Form

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def open(self, row: int) -> tuple[str | bytes, str]:
    """Returns the path of an image's file, or its bytes, and its name for errors."""

  @abc.abstractmethod
  def label(self, row: int) -> int:
    """Returns the class of an image."""

  @property
  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """Classes of all images, (n,) integers."""

  @abc.abstractmethod
  def key(self, row: int) -> str:
    """Returns the name that an image alone has, see `Pictures`."""

  def common_name(self, row: int) -> str:
    """Returns what copies of an image have too, see `Pictures`; by default none are looked for."""
    return self.key(row)

  def content(self, row: int) -> str:
    """Returns a digest of an image's file, see `Pictures`."""
    file, _ = self.open(row)
    return digest_of(read_bytes(file, MAX_IMAGE_FILE) if isinstance(file, str) else file)

  def read(self, row: int) -> tuple[np.ndarray, int]:
    """Returns the pixels of an image, (size, size, channels) uint8, and its class.

    Raises:
      ValueError: it is no image, or broken.
    """
    file, name = self.open(row)
    return read_pixels(file, self.form.size, self.form.channels, self.form.crop, name=name), self.label(row)

  def __getitem__(self, row: SupportsIndex) -> Record:
    pixels, label = self.read(int(row))
    return {"x0": to_unit(pixels), "label": np.asarray(label, np.int32)}


def digest_of(content: bytes | np.ndarray) -> str:
  """Returns a hash of bytes, or of an array's values."""
  data = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def relative_names(path: str, files: Sequence[str]) -> list[str]:
  """Returns names of the files that `find_files` found, below the folder that `path` begins with."""
  path = os.path.expanduser(path)
  root = path if os.path.isdir(path) else os.path.dirname(re.split(r"[*?\[{]", path, maxsplit=1)[0])
  return [os.path.relpath(file, root or os.curdir) for file in files]


def find_files(name: str, path: str, ending: str) -> list[str]:
  """Finds the files of a data set that consists of several, in the order of their names.

  Args:
    name: of the data set, for errors.
    path: a file; a folder, of which those with the ending are taken; or a pattern, data-*.tar or data-{000..146}.tar.
    ending: of the files' names.

  Raises:
    ValueError: there are none, or one that is named is not there.
  """
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    found = sorted(glob.glob(f"*{ending}", root_dir=path))
    found = [os.path.join(path, file) for file in found]
  elif numbered := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path):
    start, first, last, end = numbered.groups()
    if not 0 <= int(last) - int(first) < _MAX_FILES:
      raise ValueError(f"{name}: expected {{first..last}}, at most {_MAX_FILES:,} files, got {{{first}..{last}}}.")
    found = [f"{start}{number:0{len(first)}d}{end}" for number in range(int(first), int(last) + 1)]
  else:
    found = [path] if os.path.lexists(path) else sorted(glob.glob(path))
  if not found:
    raise ValueError(f"{name}: there are no files; expected one, a folder with *{ending}, or a pattern.")
  for file in found:
    regular_file(file)
  return found
