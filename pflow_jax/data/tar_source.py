"""Images in tar archives, as WebDataset has them: files with one name and several endings are one record.

Archives are read where they lie: nothing is unpacked, so no name in one is a path on this machine. Their headers are
read once; an image is then a place in a file.

References:
  https://github.com/webdataset/webdataset, its description of the format.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pflow_jax.data.dataset import Dataset, check_classes
from pflow_jax.data.image_source import Form, ImageSource, find_files, relative_names
from pflow_jax.data.pixels import Crop, image_endings
from pflow_jax.data.records import SourceRecords
from pflow_jax.files.foreign import MAX_IMAGE_FILE, decoding, in_bytes, shown

_CLASS = ".cls"
_MAX_CLASS = 32  # bytes of a .cls file
_MAX_READ = 2**20  # bytes that a header may make tarfile read at once
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclasses.dataclass(frozen=True)
class _Image:
  """An image in an archive.

  Attributes:
    record: its name in its archive, without the ending.
    start: of its bytes in the archive.
    size: of it in bytes.
    label: that its .cls file has, or None.
  """

  record: str
  start: int
  size: int
  label: int | None


class TarSource(ImageSource):
  """Random access to the images of archives, see `ImageSource`."""

  def __init__(
    self,
    paths: Sequence[str],
    names: Sequence[str],
    archives: np.ndarray,
    places: np.ndarray,
    records: Sequence[str],
    labels: np.ndarray,
    form: Form,
  ):
    """Takes the archives' paths and names, and of each image its archive's number (n,), its start and size (n, 2), its
    record's name and its class (n,)."""
    self.paths, self.names, self.archives, self.places = paths, names, archives, places
    self.records, self._labels, self.form = records, labels, form

  def __len__(self) -> int:
    return len(self.records)

  def open(self, row: int) -> tuple[str | bytes, str]:
    path, (start, size) = self.paths[self.archives[row]], self.places[row]
    name = f"{self.records[row]} of {path}"
    if size > MAX_IMAGE_FILE:
      raise ValueError(f"{name}: expected at most {in_bytes(MAX_IMAGE_FILE)}, got {in_bytes(int(size))}")
    with open(path, "rb") as file:
      file.seek(start)
      return file.read(size), name

  def label(self, row: int) -> int:
    return int(self._labels[row])

  @property
  def labels(self) -> np.ndarray:
    return self._labels

  def key(self, row: int) -> str:
    return f"{self.names[self.archives[row]]}/{self.records[row]}"

  def common_name(self, row: int) -> str:
    return f"{self.records[row]}, {self.places[row, 1]} bytes"


def webdataset(
  path: str,
  *,
  split: str = "train",
  image_size: int | None = None,
  channels: int = 3,
  crop: Crop = "fit",
  num_classes: int | None = None,
) -> Dataset:
  """Images in tar archives; the class of one is the number in the .cls file beside it, else the folder that it is in.

  An image whose name has several dots is a record of its own, unless the part before the first dot names one that has
  an image or a class: 7.mask.png beside 7.jpg is left out, with one warning that counts such files.

  Args:
    path: an archive, a folder of *.tar, or a pattern: data-{000..146}.tar, data-*.tar.
    split: "train"; for others give their own archives.
    image_size: side in pixels, required.
    channels: 3 (RGB) or 1 (grey).
    crop: "adm" cuts and scales as the published work on ImageNet does, see `data.pixels.center_crop`.
    num_classes: by default one more than the largest number, or the number of folders.

  Raises:
    ValueError: for archives that are compressed, cut short or without images, and for classes that do not fit.
  """
  name = f"webdataset:{path}"
  check_split(name, split)
  form, paths = Form.checked(name, image_size, channels, crop), find_files(name, path, ".tar")
  with ThreadPoolExecutor(min(len(paths), 16)) as pool:
    found, beside = zip(*pool.map(_images, paths), strict=True)
  images = [image for one in found for image in one]
  left_out = [f"{record} of {path}" for path, records in zip(paths, beside, strict=True) for record in records]
  if left_out:
    left = f"{len(left_out):,} images, such as {shown(left_out[0])}, belong to the record before their first dot"
    warnings.warn(f"{name}: {left}, and are left out; rename them if they are records of their own.", stacklevel=3)
  if not images:
    endings = ", ".join(sorted(image_endings()))
    raise ValueError(f"{name}: there are no images; their names end with {endings}.")
  labels, names = _classes(name, images, num_classes)
  archives = np.repeat(np.arange(len(paths), dtype=np.int32), [len(one) for one in found])
  places = np.array([(image.start, image.size) for image in images], np.int64)
  records = [image.record for image in images]
  source = TarSource(paths, relative_names(path, paths), archives, places, records, labels, form)
  return Dataset(name, form.shape, len(names), names, SourceRecords(source))


def check_split(name: str, split: str) -> None:
  """Raises ValueError for another split than "train", of a data set whose files are its splits."""
  if split != "train":
    raise ValueError(
      f"{name}: expected split='train', got {split!r}; name the files of other splits by their own path."
    )


def _images(path: str) -> tuple[list[_Image], list[str]]:
  """Finds the images of an archive, in their order, with their classes, and the names of those beside a record's own.

  WebDataset's name of a record ends at the first dot, which names like photo.v2.png are not made for.
  """
  endings, several = image_endings(), set[str]()
  places, labels = dict[str, tuple[int, int]](), dict[str, int]()
  with open(path, "rb") as file, decoding(f"{path} cannot be read as a tar archive"):
    for member in _members(file):
      record, ending = os.path.splitext(member.name.removeprefix("./"))
      ending = ending.lower()
      if os.path.basename(record).startswith("."):
        continue
      if ending in endings:
        if record in places:
          several.add(record)
        places[record] = member.offset_data, member.size
      elif ending == _CLASS:
        here = file.tell()
        file.seek(member.offset_data)
        labels[record] = _number(record, file.read(min(member.size, _MAX_CLASS)))
        file.seek(here)
    others = {*places, *labels}
    beside = [record for record in places if (first := _first(record)) != record and first in others]
    for record in beside:
      del places[record]
    several &= places.keys()
    if several:
      raise ValueError(f"{shown(min(several))} has several images; give archives with one image a record")
  return [_Image(record, *place, labels.get(record)) for record, place in places.items()], beside


def _first(record: str) -> str:
  """The name of a record up to the first dot of its file's name."""
  folder, slash, base = record.rpartition("/")
  return folder + slash + base.partition(".")[0]


def _members(file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
  """Yields the regular files of an archive.

  Raises:
    ValueError: it ends without the mark of its end, as one that was cut short does.
  """
  with tarfile.open(fileobj=_Sparing(file), mode="r:") as archive:  # type: ignore[arg-type]
    while (member := archive.next()) is not None:
      archive.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte of each
      if member.type in _FILES and not member.issparse() and member.size >= 0:
        yield member
    # A broken header ends an archive for tarfile as the mark of its end does, which is a block of zeros.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise ValueError(f"it is damaged or cut short after {in_bytes(archive.offset)}; bring it anew")


class _Sparing(io.RawIOBase):
  """A file that is not read in large pieces: the length of a long name is what its header says."""

  def __init__(self, file: io.BufferedReader):
    self._file = file

  def read(self, size: int = -1) -> bytes:
    if not 0 <= size <= _MAX_READ:
      raise ValueError(f"expected a header of at most {in_bytes(_MAX_READ)}, it says {in_bytes(max(size, 0))}")
    return self._file.read(size)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()


def _number(key: str, content: bytes) -> int:
  text = content.decode("ascii", "replace").strip()
  if not text.isdecimal() or len(text) > 9:
    raise ValueError(f"expected a number in {shown(key)}{_CLASS}, got {shown(text)}")
  return int(text)


def _classes(name: str, images: Sequence[_Image], num_classes: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
  """Classes of all images, (n,) int32, and their names."""
  numbers = [image.label for image in images if image.label is not None]
  if numbers:
    if len(numbers) < len(images):
      raise ValueError(f"{name}: expected a {_CLASS} file beside each of {len(images)} images, got {len(numbers)}.")
    return numbered_classes(name, np.array(numbers), num_classes)
  folders = [image.record.rpartition("/")[0] for image in images]
  known = sorted(set(folders))
  count = 0 if known == [""] or (len(known) == 1 and not num_classes) else len(known)
  check_classes(name, count)
  if num_classes not in (None, count):
    raise ValueError(
      f"{name}: num_classes: expected {num_classes}, got {count} folders of images and no {_CLASS} files; leave it "
      f"out, or give archives with {_CLASS} files."
    )
  if not count:
    return np.zeros(len(images), np.int32), ()
  of = {folder: number for number, folder in enumerate(known)}
  return np.array([of[folder] for folder in folders], np.int32), tuple(known)


def numbered_classes(name: str, labels: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns classes that are given as numbers, (n,) int32, and their names.

  Args:
    name: of the data set, for errors.
    labels: (n,) integers.
    num_classes: by default one more than the largest.

  Raises:
    ValueError: there are others than [0, num_classes).
  """
  count = int(labels.max()) + 1 if num_classes is None else num_classes
  check_classes(name, count)
  if labels.min() < 0 or labels.max() >= count:
    raise ValueError(f"{name}: expected classes in [0, {count}), got {labels.min()} to {labels.max()}.")
  return labels.astype(np.int32), tuple(map(str, range(count)))
