"""Latents that other projects have written, one file a picture, as a folder of latents.

* `lakonlab:LIST.txt`: the cache of π-Flow's release. The list has a path and a class a line; a file has "x" (C, h, w),
  a draw that is scaled, some of them of mirror images, and "y", the class.
* `edm2:FOLDER` or `edm2:FILE.zip`: files *.npy with mean and standard deviation (2 C, h, w), and dataset.json with the
  classes. The pictures were in [0, 1], and the latents get a shift and a scale a channel.
* `meanflow:FOLDER`: files *.pt with "image" (2 C, h, w), mean and standard deviation, and "label".

References:
  github Lakonik/LakonLab (84566d5), tools/cache_imagenet_data_sdvae.py; NVlabs/edm2 (4bf8162), dataset_tool.py and
  training/encoders.py; Gsunshine/meanflow (d70cb55), utils/data_util.py and utils/vae_util.py.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pflow_jax.conversion.latent_writing import MAX_BAD, Chosen, write
from pflow_jax.data.dataset import Scaling, check_classes
from pflow_jax.data.image_source import digest_of
from pflow_jax.data.latent_shards import SHARD_RECORDS
from pflow_jax.data.latents import VALUES, Info, check_scale
from pflow_jax.families.autoencoder import SD_SCALE, load_autoencoder, other_scale
from pflow_jax.families.edm2 import latents as edm2_latents
from pflow_jax.files.array_files import read_npy
from pflow_jax.files.foreign import (
  check_arguments,
  decoding,
  in_bytes,
  parse_json,
  read_bytes,
  read_text,
  real_folder,
  regular_file,
  shown,
)
from pflow_jax.files.nearest import did_you_mean
from pflow_jax.torch_io.pickled import PickledAlike

_BATCH = 256  # records that are read together
_MAX_LIST = 2**30  # bytes of a list, which has 60 MB for ImageNet
_MAX_RECORD = 2**26  # bytes of a file


class ForeignLatents(abc.ABC):
  """Latents in files of others, one a picture; `data.image_source.Pictures` of values as they are stored.

  Attributes:
    info: of the folder that they make.
  """

  info: Info
  _classes: np.ndarray | None = None

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @property
  def labels(self) -> np.ndarray | None:
    """Classes of all records, None where only their files tell."""
    return self._classes

  @abc.abstractmethod
  def key(self, row: int) -> str:
    """Returns the path of a record."""

  def common_name(self, row: int) -> str:
    """Returns the path of a record."""
    return self.key(row)

  @abc.abstractmethod
  def content(self, row: int) -> str:
    """Returns a digest of a record's file."""

  @abc.abstractmethod
  def load(self, row: int) -> tuple[np.ndarray, int]:
    """Returns the values of a record, (parts * C, h, w), and its class."""

  def read(self, row: int) -> tuple[np.ndarray, int]:
    """Returns the values of a record, as they are stored, and its class.

    Raises:
      ValueError: they have another shape, or the class is out of range.
    """
    (values, label), info = self.load(row), self.info
    expected = (info.stored[1] * info.shape[-1], *info.shape[:-1])
    if values.shape != expected or values.dtype.kind not in "fV":  # bfloat16 is a kind of V
      raise ValueError(f"expected floating numbers {expected}, got {values.dtype} {values.shape}")
    if not 0 <= label < max(info.num_classes, 1):
      raise ValueError(f"expected a class in [0, {max(info.num_classes, 1)}), got {label}")
    parts = values.astype(np.float32).reshape(info.stored[1], info.shape[-1], *info.shape[:-1])
    return np.moveaxis(parts, 1, -1)[None], label

  def _describe(self, moments: bool, num_classes: int, scaling: Scaling) -> None:
    """Sets `info`, with the shape of the first record."""
    check_classes("num_classes", num_classes)
    first = self.load(0)[0]
    parts = 1 + moments
    if first.ndim != 3 or first.shape[0] % parts or not first.size:
      raise ValueError(f"{self.key(0)}: expected ({'2 ' * moments}C, h, w), got {first.shape}")
    channels = first.shape[0] // parts
    if len(scaling.scale) not in (1, channels):
      raise ValueError(f"{self.key(0)}: expected {len(scaling.scale)} channels, got {channels}")
    wide = lambda values: tuple(np.broadcast_to(values, channels).tolist())
    about: dict[str, Any] = {"moments": moments, "shift": wide(scaling.shift), "scale": wide(scaling.scale)}
    self.info = Info((*first.shape[1:], channels), num_classes, **about)


class _Pickled(ForeignLatents):
  """Files of torch.save."""

  def __init__(self, root: str, paths: Sequence[str], names: tuple[str, str]):
    self._root, self._paths, self._names, self._files = root, paths, names, PickledAlike()

  def __len__(self) -> int:
    return len(self._paths)

  def key(self, row: int) -> str:
    return self._paths[row]

  def content(self, row: int) -> str:
    return digest_of(read_bytes(os.path.join(self._root, self._paths[row]), _MAX_RECORD))

  def load(self, row: int) -> tuple[np.ndarray, int]:
    path = regular_file(os.path.join(self._root, self._paths[row]))
    if path.stat().st_size > _MAX_RECORD:
      raise ValueError(f"{path}: expected at most {in_bytes(_MAX_RECORD)}, got {in_bytes(path.stat().st_size)}")
    tensors = self._files.open(path)
    values, label = self._names
    if not {values, label} <= set(tensors.shapes) or tensors.shapes[label] not in ((), (1,)):
      raise ValueError(f"{path}: expected {values} and a number {label}, got {shown(tensors.shapes)}")
    with decoding(path):
      return tensors.read(values), int(tensors.read(label).reshape(()))


class LakonLab(_Pickled):
  """The cache of π-Flow's release."""

  _classes: np.ndarray

  def __init__(self, path: str, *, root: str | None = None, num_classes: int | None = None):
    """Opens a list.

    Args:
      path: of the list.
      root: folder that its paths begin in; by default the one named as the list, without .txt.
      num_classes: by default one more than the largest of the list.
    """
    lines = [line.split() for line in read_text(os.path.expanduser(path), _MAX_LIST).splitlines() if line.strip()]
    wrong = [line for line in lines if len(line) != 2 or not line[1].isdecimal() or len(line[1]) > 9]
    if wrong or not lines:
      got = shown(" ".join(wrong[0])) if wrong else "none"
      raise ValueError(f"{path}: expected lines of a path and a class, got {got}")
    outside = [name for name, _ in lines if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts]
    if outside:
      raise ValueError(f"{path}: expected paths below its folder, got {shown(outside[0])}")
    root = os.path.expanduser(path.removesuffix(".txt") if root is None else root)
    super().__init__(str(real_folder(root)), [name for name, _ in lines], ("x", "y"))
    self._classes = np.array([int(label) for _, label in lines])
    count = int(self._classes.max()) + 1 if num_classes is None else num_classes
    self._describe(False, count, Scaling((0.0,), (SD_SCALE,)))

  def load(self, row: int) -> tuple[np.ndarray, int]:
    values, label = super().load(row)
    if label != self._classes[row]:
      raise ValueError(f"{self.key(row)}: has the class {label}, its list says {self._classes[row]}")
    return values, label


class MeanFlow(_Pickled):
  """The latents of MeanFlow's and Improved MeanFlow's code."""

  def __init__(self, path: str, *, num_classes: int = 1000):
    """Opens a folder.

    Args:
      path: of the folder of *.pt.
      num_classes: which no file says.
    """
    root = real_folder(os.path.expanduser(path))
    with os.scandir(root) as entries:
      names = sorted(entry.name for entry in entries if entry.name.endswith(".pt"))
    if not names:
      raise ValueError(f"{path}: there are no files *.pt")
    super().__init__(str(root), names, ("image", "label"))
    self._describe(True, num_classes, Scaling((0.0,), (SD_SCALE,)))


@dataclasses.dataclass(frozen=True)
class _DatasetJson:
  labels: tuple[tuple[str, int], ...] | None


class EDM2(ForeignLatents):
  """The data sets that EDM2's dataset_tool.py encodes."""

  _classes: np.ndarray

  def __init__(self, path: str, *, num_classes: int | None = None):
    """Opens a folder or an archive.

    Args:
      path: of a folder or a .zip.
      num_classes: by default one more than the largest of dataset.json.
    """
    path = os.path.expanduser(path)
    self._root, self._archive = path, None
    if path.endswith(".zip"):
      with decoding(f"{path} cannot be read as a zip archive"):
        self._archive = zipfile.ZipFile(regular_file(path))
      names = self._archive.namelist()
    else:
      root = str(real_folder(path))
      names = [
        os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
        for folder, _, files in os.walk(root)
        for name in files
      ]
    self._paths = sorted(name for name in names if name.endswith(".npy"))
    if not self._paths or "dataset.json" not in names:
      raise ValueError(f"{path}: expected files *.npy and dataset.json, as EDM2's dataset_tool.py encodes")
    described: _DatasetJson = parse_json(self._bytes("dataset.json", _MAX_LIST), _DatasetJson, where="dataset.json")
    labels = dict(described.labels or ())
    if labels and (missing := [name for name in self._paths if name not in labels]):
      raise ValueError(f"{path}: dataset.json has no class of {len(missing)} files, such as {shown(missing[0])}")
    self._classes = np.array([labels.get(name, 0) for name in self._paths])
    count = int(self._classes.max()) + 1 if labels else 0
    self._describe(True, count if num_classes is None else num_classes, edm2_latents.SCALING)

  def __len__(self) -> int:
    return len(self._paths)

  def key(self, row: int) -> str:
    return self._paths[row]

  def content(self, row: int) -> str:
    return digest_of(self._bytes(self._paths[row], _MAX_RECORD))

  def load(self, row: int) -> tuple[np.ndarray, int]:
    name = self._paths[row]
    return read_npy(self._bytes(name, _MAX_RECORD), name=name), int(self._classes[row])

  def _bytes(self, name: str, limit: int) -> bytes:
    if self._archive is None:
      return read_bytes(os.path.join(self._root, name), limit)
    size = self._archive.getinfo(name).file_size
    if size > limit:
      raise ValueError(f"{name}: expected at most {in_bytes(limit)}, got {in_bytes(size)}")
    with decoding(f"{name} of {self._root}"):
      return self._archive.read(name)


KINDS: dict[str, Callable[..., ForeignLatents]] = {"lakonlab": LakonLab, "edm2": EDM2, "meanflow": MeanFlow}


def is_foreign(name: str) -> bool:
  """Returns whether a name is one of latents of others, kind:path."""
  kind, colon, path = name.partition(":")
  return bool(colon and path) and kind in KINDS


def adopt(
  name: str,
  out: str | os.PathLike,
  *,
  autoencoder: str | os.PathLike | None = None,
  shard_records: int = SHARD_RECORDS,
  max_bad: int = MAX_BAD,
  **options: Any,
) -> Info:
  """Writes latents of others as a folder that `latents:<out>` reads, or goes on with it.

  Args:
    name: kind:path, lakonlab:LIST.txt, edm2:FOLDER, edm2:FILE.zip or meanflow:FOLDER.
    out: the folder.
    autoencoder: folder of the autoencoder that made them, with which pictures are shown.
    shard_records: latents of a file.
    max_bad: files that cannot be read, after which it stops.
    **options: keyword arguments of the kind.

  Returns:
    The folder's description.

  Raises:
    ValueError: the files are none of that kind, or the autoencoder makes other latents.
  """
  kind, _, path = name.partition(":")
  source = KINDS[kind]
  known = [key for key in source.__init__.__annotations__ if key not in ("path", "return")]  # type: ignore[misc]
  for option in options:
    if option not in known:
      raise ValueError(f"{name} has no option {option!r}{did_you_mean(option, known, '.')} The options are: {known}")
  found = source(path, **check_arguments(source.__init__, options, where=name))  # type: ignore[misc]
  info = found.info
  if autoencoder is not None:
    codec = load_autoencoder(autoencoder)
    if codec.module.latent_channels != info.shape[-1]:
      channels = f"{codec.module.latent_channels} channels, {name} has {info.shape[-1]}"
      raise ValueError(f"autoencoder: makes latents of {channels}; give the one that made these")
    if problem := other_scale(codec.normalisation, info.scaling):
      raise ValueError(f"autoencoder: makes latents of another scale than {name} has: {problem}; leave it out")
    info = dataclasses.replace(info, autoencoder=codec.folder)
  chosen = Chosen(found)
  kept = {key: value for key, value in options.items() if key != "root"}
  info = dataclasses.replace(info, made={"images": kind, **chosen.described, "options": kept})
  info = write(out, info, chosen, _stored, _BATCH, shard_records=shard_records, max_bad=max_bad)
  check_scale(name, info.scaling)
  return info


def _stored(arrays: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Values of a batch, in float16."""
  del numbers
  with np.errstate(over="ignore"):
    return arrays.astype(VALUES)
