"""Arrays too many for memory, such as the latents of an autoencoder, in array_record shards.

A folder holds info.json, see `Info`, and shards named *.array_record, read in the order of their names. A record is its
label, int32, and its values, float16, both little-endian, in row-major order: x0, or the mean and the standard
deviation of a latent, from which x0 is drawn each time it is read; and after them the same of the mirror image, where
the folder has that. Beside them texts.json may have a text a record, in their order; unreadable.txt names the
pictures that are left out, and *.part.json tell a later writer what the shards were made of.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, SupportsIndex

import numpy as np
import pydantic

from pflow_jax.data.dataset import Dataset, Scaling, check_classes
from pflow_jax.data.prompts.dataset import with_embeddings
from pflow_jax.data.records import ArrayRecords, Batch, Draws, Record, SourceRecords
from pflow_jax.data.shards import ENDING, Shards
from pflow_jax.files.folders import is_remote
from pflow_jax.files.foreign import check_memory, is_there, read_json, shown

INFO, TEXTS, UNREADABLE = "info.json", "texts.json", "unreadable.txt"
LABEL, VALUES = np.dtype("<i4"), np.dtype("<f2")
_CHUNK = 64  # records that are decoded together
SCALED = (1 / 4, 4.0)  # standard deviations that flow models and autoencoders here may take for about 1

logger = logging.getLogger(__name__)
Channels = tuple[pydantic.FiniteFloat, ...]


@dataclasses.dataclass(frozen=True)
class Info:
  """A folder's info.json; older folders have shape and number of classes alone.

  Attributes:
    shape: (*space, C) of x0.
    num_classes: 0 for none.
    num_records: in all shards.
    class_names: one name a class, or none.
    autoencoder: folder of the autoencoder that made the latents, absolute.
    moments: whether a record has mean and standard deviation of a latent, before shift and scale, in place of x0.
    mirrored: whether it has the values of the picture and then those of its mirror image.
    shift: in x0 = (latent - shift) * scale, one a channel; empty where it is not known. Records of x0 have it in them.
    scale: likewise.
    mean: of x0, one a channel, as it was measured; empty where it was not.
    std: likewise.
    unreadable: pictures that were left out.
    made: how they were made, in plain JSON, for people and to tell whether another run makes the same.
  """

  shape: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]
  num_classes: pydantic.NonNegativeInt
  num_records: pydantic.PositiveInt | None = None
  class_names: tuple[str, ...] = ()
  autoencoder: str = ""
  moments: bool = False
  mirrored: bool = False
  shift: Channels = ()
  scale: Channels = ()
  mean: Channels = ()
  std: Channels = ()
  unreadable: pydantic.NonNegativeInt = 0
  made: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def stored(self) -> tuple[int, ...]:
    """Shape of a record's values: (views, parts, *space, C), views the picture and its mirror image."""
    return 1 + self.mirrored, 1 + self.moments, *self.shape

  @property
  def record_bytes(self) -> int:
    """Bytes of a record."""
    return LABEL.itemsize + math.prod(self.stored) * VALUES.itemsize

  @property
  def scaling(self) -> Scaling | None:
    """Shift, scale and standard deviation of x0; None where none of them is known."""
    std = None
    if self.std and self.mean:
      mean, var = np.array(self.mean), np.square(self.std)
      std = float(np.sqrt(np.mean(var + mean**2) - np.mean(mean) ** 2))
    return Scaling(self.shift, self.scale, std) if self.scale or std is not None else None

  def rescaled(self, shift: tuple[float, ...] | None, scale: tuple[float, ...] | None) -> Info:
    """Returns the folder with another shift and scale of its moments, one number or one a channel.

    Raises:
      ValueError: their number is another, or the records have theirs in them.
    """
    if shift is None and scale is None:
      return self
    if not self.moments:
      raise ValueError(f"shift, scale: are for moments; these records are of x0, scaled already by {self.scale or '?'}")
    wide = lambda name, values: _one_a_channel(name, getattr(self, name) if values is None else values, self.shape[-1])
    changed = dataclasses.replace(self, shift=wide("shift", shift), scale=wide("scale", scale))
    if not (self.std and self.mean):
      return changed
    raw = np.divide(self.mean, self.scale) + self.shift
    mean = (raw - changed.shift) * changed.scale
    std = np.multiply(self.std, np.abs(np.divide(changed.scale, self.scale)))
    return dataclasses.replace(changed, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

  def __post_init__(self):
    for name in ("shift", "scale", "mean", "std"):
      if len(getattr(self, name)) not in (0, self.shape[-1] if self.shape else 0):
        raise ValueError(f"{name}: expected {self.shape[-1]} numbers, one a channel, got {len(getattr(self, name))}")
    if self.moments and not (self.shift and self.scale and all(self.scale)):
      raise ValueError("expected shift and scale of moments, numbers of which no scale is 0")


def _one_a_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
  if len(values) not in (1, channels):
    raise ValueError(f"{name}: expected 1 or {channels} numbers, one a channel, got {shown(values)}")
  return tuple(np.broadcast_to(np.array(values, float), channels).tolist())


class _Opened(NamedTuple):
  info: Info
  records: Shards


class LatentSource:
  """Random access to the records of a folder; opened at the first use, so that shapes are known without the data.

  What is drawn of a record depends on the run's seed and on its place in the run, see `data.records.Draws`: which of
  picture and mirror image, by the highest bit of 64, and then the noise of a latent, by 16 bits a number.
  """

  def __init__(
    self,
    folder: str,
    shape: tuple[int, ...],
    num_classes: int,
    shift: tuple[float, ...] | None = None,
    scale: tuple[float, ...] | None = None,
  ):
    """Names a folder, and what is expected there; for moments perhaps another shift and scale."""
    self.folder, self.shape, self.num_classes = folder, shape, num_classes
    self.shift, self.scale = shift, scale

  def __len__(self) -> int:
    return len(self._opened.records)

  def __getitem__(self, row: SupportsIndex) -> Record:
    batch = self.batch(np.array([int(row)]))
    return {"x0": batch["x0"][0], "label": batch["cond"][0]}

  def batch(self, rows: np.ndarray, draws: Draws | None = None) -> Batch:
    """Returns x0 and labels of these rows; without `draws` the mean of latents, and no mirror image.

    Raises:
      ValueError: a record is damaged, or not what info.json says.
    """
    info, records = self._opened
    x0, label = np.empty((len(rows), *info.shape), np.float32), np.empty(len(rows), np.int32)
    streams = draws.streams() if draws is not None and (info.moments or info.mirrored) else None
    decode = _Decoder(info)
    for start in range(0, len(rows), _CHUNK):
      part = slice(start, start + _CHUNK)
      data = records.take(rows[part])
      for row, record in zip(rows[part], data, strict=True):
        if len(record) != info.record_bytes:
          expected = f"shape {shown(info.shape)} has {info.record_bytes}"
          raise ValueError(f"{self._place(row)} has {len(record)} bytes, {expected}; write them again.")
      label[part] = decode(data, streams, x0[part])
    most = max(self.num_classes, 1)
    if wrong := np.flatnonzero((label < 0) | (label >= most)).tolist():
      got = f"the label {label[wrong[0]]}, which is not in [0, {most})"
      raise ValueError(f"{self._place(rows[wrong[0]])} has {got}.")
    if not np.isfinite(x0).all():
      wrong = np.flatnonzero(~np.isfinite(x0).reshape(len(x0), -1).all(axis=1)).tolist()
      raise ValueError(f"{self._place(rows[wrong[0]])} has values that are not finite; write it again without.")
    return {"x0": x0, "cond": label}

  def _place(self, row: SupportsIndex) -> str:
    return f"latents:{self.folder}: record {int(row)}"

  def __getstate__(self) -> dict[str, Any]:
    # A worker process opens the files itself.
    return {name: value for name, value in self.__dict__.items() if name != "_opened"}

  @functools.cached_property
  def _opened(self) -> _Opened:
    name = f"latents:{self.folder}"
    info = read_info(self.folder)
    shards = sorted(pathlib.Path(self.folder).glob(f"*{ENDING}")) if info else []
    if info is None or not shards:
      raise ValueError(f"{name}: there are no latents; expected {INFO} and shards *{ENDING} there.")
    if (info.shape, info.num_classes) != (self.shape, self.num_classes):
      raise ValueError(
        f"{name}: expected shape and num_classes of its {INFO}, {info.shape} and {info.num_classes}, got {self.shape} "
        f"and {self.num_classes}."
      )
    records = Shards(name, shards)
    if not len(records) or info.num_records not in (None, len(records)):
      raise ValueError(f"{name}: expected {info.num_records or 'some'} records, got {len(records)}; copy them again.")
    return _Opened(info.rescaled(self.shift, self.scale), records)


class _Decoder:
  """Makes x0 of up to _CHUNK records at a time, in memory that is kept: it stays in a core's cache."""

  def __init__(self, info: Info):
    self._info = info
    if info.moments:
      whole = lambda values: np.broadcast_to(np.array(values, np.float32), info.shape).copy()
      self._shift, self._scale = whole(info.shift), whole(info.scale)
      self._noise, self._std = np.empty((2, _CHUNK, *info.shape), np.float32)
      self._size, self._table = math.prod(info.shape), _normal_quantiles()

  def __call__(self, records: list[bytes], streams: Iterator[np.random.Philox] | None, out: np.ndarray) -> np.ndarray:
    """Writes x0 of records to `out`, (n, *space, C), and returns their labels; nothing is drawn without streams."""
    info, count = self._info, len(records)
    table = np.frombuffer(b"".join(records), np.uint8).reshape(count, info.record_bytes)
    values = table[:, LABEL.itemsize :].view(VALUES).reshape(count, *info.stored)
    parts = values[:, 0]
    if streams is not None:
      sides = np.zeros(count, np.intp)
      for i, stream in enumerate(itertools.islice(streams, count)):
        sides[i] = stream.random_raw() >> 63
        if info.moments:
          numbers = stream.random_raw(-(-self._size // 4)).view(np.uint16)[: self._size]
          np.take(self._table, numbers, out=self._noise[i].reshape(-1), mode="clip")  # "raise" would copy
      parts = values[np.arange(count), sides] if info.mirrored else parts
    out[...] = parts[:, 0]
    if info.moments:
      if streams is not None:
        noise, std = self._noise[:count], self._std[:count]
        std[...] = parts[:, 1]
        noise *= std
        out += noise
      out -= self._shift
      out *= self._scale
    return np.ascontiguousarray(table[:, : LABEL.itemsize]).view(LABEL)[:, 0]


@functools.cache
def _normal_quantiles() -> np.ndarray:
  """65,536 numbers, (65536,) float32, that are equally likely in a normal distribution of variance 1; the last is 4.3.

  Noise that is taken from them costs a third of an exact draw. Half of them lie less than 6e-5 apart, and what it is
  added to was rounded to float16, by up to 5e-4 of itself.
  """
  from scipy.special import ndtri  # slow to import

  values = ndtri((np.arange(2**16) + 0.5) / 2**16)
  return (values / values.std()).astype(np.float32)


def latents(
  path: str,
  *,
  split: str = "train",
  shape: tuple[int, ...] | None = None,
  num_classes: int | None = None,
  shift: tuple[float, ...] | None = None,
  scale: tuple[float, ...] | None = None,
  embeddings: str | None = None,
) -> Dataset:
  """Arrays of a folder of array_record shards, which `pflow latents` and `write_latents` write.

  Of moments every example is drawn each time it is read, and so is which of picture and mirror image it is of. What is
  drawn depends on the run's seed and the example's place in the run alone.

  Args:
    path: of the folder; split "test" reads the one beside it that is named <path>_test.
    split: "train" or "test".
    shape: (*space, C) of its records, by default the folder's. With `num_classes` given too, a run can be planned on a
      machine that does not have the data.
    num_classes: of its records, by default the folder's.
    shift: of moments, x0 = (latent - shift) * scale, a number or one a channel; by default the folder's.
    scale: likewise.
    embeddings: folder of the embeddings of its texts, which are then the condition in place of the class. The records
      are kept in memory: `pflow cache --prompts=data:latents:<path> --model=minilm --out=<folder>`.

  Raises:
    ValueError: for a folder with another shape or number of classes, or one that is needed and not there.
  """
  if split not in ("train", "test"):
    raise ValueError(f"latents:{path}: split must be 'train' or 'test', got {split!r}.")
  if is_remote(path):
    raise ValueError(f"latents:{path}: shards are read from a file system; mount the bucket, and give where it is.")
  folder = f"{path}_test" if split == "test" else path
  name, given, info = f"latents:{folder}", (None if shape is None else tuple(shape), num_classes), read_info(folder)
  if info is None:
    if given[0] is None or given[1] is None:
      raise ValueError(f"{name}: there is no {INFO}; write the latents, or give shape= and num_classes=.")
    info = Info(given[0], given[1])
  else:
    info = _rescaled(name, info, shift, scale)
  its = info.shape, info.num_classes
  if any(wanted not in (None, has) for wanted, has in zip(given, its, strict=True)):
    raise ValueError(f"{name}: its {INFO} has shape and num_classes {its}, got {given}.")
  check_classes(name, info.num_classes)
  names = info.class_names or tuple(f"class {index}" for index in range(info.num_classes))
  if len(names) != info.num_classes:
    raise ValueError(f"{name}: its {INFO} has {len(names)} class_names for {info.num_classes} classes.")
  texts = _read_texts(folder, info)
  # More threads than processors wait for Python's lock more than for a disk.
  threads = min(16, max(2, os.cpu_count() or 2))
  records = SourceRecords(LatentSource(folder, *its, shift, scale), read_threads=threads)
  about: dict[str, Any] = {"texts": texts, "autoencoder": info.autoencoder, "scaling": info.scaling}
  dataset = Dataset(f"latents:{path}", *its, names, records, **about)
  check_scale(name, info.scaling)
  if not embeddings:
    return dataset
  if not texts or info.moments or info.mirrored:
    why = "is drawn of while it is read" if texts else f"has no {TEXTS}, whose embeddings could be the condition"
    raise ValueError(f"{name}: {why}; leave out embeddings=.")
  size = (info.num_records or 0) * 4 * math.prod(info.shape)
  check_memory(f"{name}: {info.num_records} records in memory", size, "leave out embeddings=")
  whole = records.take(np.arange(len(texts)))
  return with_embeddings(dataclasses.replace(dataset, records=ArrayRecords(whole["x0"], whole["cond"])), embeddings)


def check_scale(name: str, scaling: Scaling | None) -> None:
  """Warns of latents whose standard deviation is far from the 1 that flow models and autoencoders here take.

  Args:
    name: of the latents, which begins the warning.
    scaling: theirs.
  """
  if scaling is not None and scaling.std is not None and not SCALED[0] <= scaling.std <= SCALED[1]:
    by = f"; they are scaled by {shown(scaling.scale)}" if scaling.scale else ""
    logger.warning(
      "%s: a standard deviation of %.3g, where flow models take about 1: write them anew with the scale of their "
      "autoencoder%s",
      name,
      scaling.std,
      by,
    )


def _rescaled(name: str, info: Info, shift: tuple[float, ...] | None, scale: tuple[float, ...] | None) -> Info:
  try:
    return info.rescaled(shift, scale)
  except ValueError as error:
    raise ValueError(f"{name}: {error}.") from error


def _read_texts(folder: str, info: Info) -> tuple[str, ...]:
  path = pathlib.Path(folder) / TEXTS
  if not is_there(path):
    return ()
  texts = tuple(read_json(path, list[str]))
  if len(texts) != info.num_records:
    raise ValueError(f"latents:{folder}: expected {info.num_records} texts in {TEXTS}, got {len(texts)}.")
  return texts


def read_info(folder: str, name: str = INFO) -> Info | None:
  """Reads a folder's info.json; None where there is none.

  Raises:
    ValueError: it describes no latents.
  """
  path = pathlib.Path(folder) / name
  try:
    return read_json(path, Info) if is_there(path) else None
  except ValueError as error:
    raise ValueError(f"latents:{folder}: {name} cannot be read ({error}); write the latents again.") from error
