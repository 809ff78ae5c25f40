"""Arrays too many for memory, such as the latents of an autoencoder, in array_record shards.

A folder holds info.json, see `Info`, and shards named *.array_record, read in the order of their names. A record is its
label, int32, and its x0, float16, both little-endian, in row-major order. Beside them texts.json may have a text a
record, in their order.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, SupportsIndex

import numpy as np
import pydantic

from pflow_jax.data.dataset import Dataset, check_classes
from pflow_jax.data.prompts.dataset import with_embeddings
from pflow_jax.data.records import ArrayRecords, Record, SourceRecords
from pflow_jax.data.shards import Shards
from pflow_jax.files.folders import is_remote
from pflow_jax.files.foreign import check_memory, is_there, read_json, shown

INFO, TEXTS = "info.json", "texts.json"
LABEL, VALUES = np.dtype("<i4"), np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class Info:
  """A folder's info.json; older folders have shape and number of classes alone.

  Attributes:
    shape: (*space, C) of a record.
    num_classes: 0 for none.
    num_records: in all shards.
    class_names: one name a class, or none.
    autoencoder: folder of the autoencoder that made the latents, absolute.
  """

  shape: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]
  num_classes: pydantic.NonNegativeInt
  num_records: pydantic.PositiveInt | None = None
  class_names: tuple[str, ...] = ()
  autoencoder: str = ""


class LatentSource:
  """Random access to the records of a folder; opened at the first use, so that shapes are known without the data."""

  def __init__(self, folder: str, shape: tuple[int, ...], num_classes: int):
    self.folder, self.shape, self.num_classes = folder, shape, num_classes

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, row: SupportsIndex) -> Record:
    record, place = self._records[row], f"latents:{self.folder}: record {int(row)}"
    expected = LABEL.itemsize + math.prod(self.shape) * VALUES.itemsize
    if len(record) != expected:
      raise ValueError(f"{place} has {len(record)} bytes, shape {shown(self.shape)} has {expected}; write them again.")
    label = np.frombuffer(record, LABEL, 1)[0].astype(np.int32)
    x0 = np.frombuffer(record, VALUES, offset=LABEL.itemsize).astype(np.float32).reshape(self.shape)
    if not 0 <= label < max(self.num_classes, 1):
      raise ValueError(f"{place} has the label {label}, which is not in [0, {max(self.num_classes, 1)}).")
    if not np.isfinite(x0).all():
      raise ValueError(f"{place} has values that are not finite; write it again without.")
    return {"x0": x0, "label": label}

  def __getstate__(self) -> dict[str, Any]:
    # A worker process opens the files itself.
    return {name: value for name, value in self.__dict__.items() if name != "_records"}

  @functools.cached_property
  def _records(self) -> Shards:
    name = f"latents:{self.folder}"
    info = _read_info(self.folder)
    shards = sorted(pathlib.Path(self.folder).glob("*.array_record")) if info else []
    if info is None or not shards:
      raise ValueError(f"{name}: there are no latents; expected {INFO} and shards *.array_record there.")
    if (info.shape, info.num_classes) != (self.shape, self.num_classes):
      raise ValueError(
        f"{name}: expected shape and num_classes of its {INFO}, {info.shape} and {info.num_classes}, got {self.shape} "
        f"and {self.num_classes}."
      )
    records = Shards(name, shards)
    if not len(records) or info.num_records not in (None, len(records)):
      raise ValueError(f"{name}: expected {info.num_records or 'some'} records, got {len(records)}; copy them again.")
    return records


def latents(
  path: str,
  *,
  split: str = "train",
  shape: tuple[int, ...] | None = None,
  num_classes: int | None = None,
  embeddings: str | None = None,
) -> Dataset:
  """Arrays of a folder of array_record shards, see `write_latents`.

  Args:
    path: of the folder; split "test" reads the one beside it that is named <path>_test.
    split: "train" or "test".
    shape: (*space, C) of its records, by default the folder's. With `num_classes` given too, a run can be planned on a
      machine that does not have the data.
    num_classes: of its records, by default the folder's.
    embeddings: folder of the embeddings of its texts, which are then the condition in place of the class. The records
      are kept in memory: `pflow cache --prompts=data:latents:<path> --model=minilm --out=<folder>`.

  Raises:
    ValueError: for a folder with another shape or number of classes, or one that is needed and not there.
  """
  if split not in ("train", "test"):
    raise ValueError(f"latents:{path}: split must be 'train' or 'test', got {split!r}.")
  if "://" in path:
    raise ValueError(f"latents:{path}: shards are read from a file system; mount the bucket, and give where it is.")
  folder = f"{path}_test" if split == "test" else path
  given, info = (None if shape is None else tuple(shape), num_classes), _read_info(folder)
  if info is None:
    if given[0] is None or given[1] is None:
      raise ValueError(f"latents:{folder}: there is no {INFO}; write the latents, or give shape= and num_classes=.")
    info = Info(given[0], given[1])
  its = info.shape, info.num_classes
  if any(wanted not in (None, has) for wanted, has in zip(given, its, strict=True)):
    raise ValueError(f"latents:{folder}: its {INFO} has shape and num_classes {its}, got {given}.")
  check_classes(f"latents:{folder}", info.num_classes)
  names = info.class_names or tuple(f"class {index}" for index in range(info.num_classes))
  if len(names) != info.num_classes:
    raise ValueError(f"latents:{folder}: its {INFO} has {len(names)} class_names for {info.num_classes} classes.")
  texts = _read_texts(folder, info)
  records = SourceRecords(LatentSource(folder, *its), read_threads=16)
  dataset = Dataset(f"latents:{path}", *its, names, records, texts=texts, autoencoder=info.autoencoder)
  if not embeddings:
    return dataset
  if not texts:
    raise ValueError(
      f"latents:{folder}: has no {TEXTS}, whose embeddings could be the condition; leave out embeddings=."
    )
  size = (info.num_records or 0) * 4 * math.prod(info.shape)
  check_memory(f"latents:{folder}: {info.num_records} records in memory", size, "leave out embeddings=")
  whole = records.take(np.arange(len(texts)))
  return with_embeddings(dataclasses.replace(dataset, records=ArrayRecords(whole["x0"], whole["cond"])), embeddings)


def _read_texts(folder: str, info: Info) -> tuple[str, ...]:
  path = pathlib.Path(folder) / TEXTS
  if not is_there(path):
    return ()
  texts = tuple(read_json(path, list[str]))
  if len(texts) != info.num_records:
    raise ValueError(f"latents:{folder}: expected {info.num_records} texts in {TEXTS}, got {len(texts)}.")
  return texts


def write_latents(
  path: str,
  batches: Iterable[tuple[np.ndarray, np.ndarray]],
  *,
  num_classes: int,
  shard_size: int = 50_000,
  class_names: Sequence[str] = (),
  texts: Sequence[str] = (),
  autoencoder: str = "",
) -> int:
  """Writes a folder that `latents:<path>` reads, and returns the number of records.

  Args:
    path: of the folder, new or empty.
    batches: pairs of x0 (n, *space, C) and label (n,), integers in [0, num_classes).
    num_classes: 0 for none, with labels of 0.
    shard_size: records a file.
    class_names: one name a class, or none.
    texts: one text a record, or none.
    autoencoder: folder of the autoencoder that made the latents.

  Raises:
    ValueError: for a folder with shards or in a bucket, another number of names or texts, labels out of range, values
      that float16 cannot hold, or shapes that differ.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  if is_remote(path):
    raise ValueError(f"{path}: shards are written to a file system; mount the bucket, and give where it is.")
  if class_names and len(class_names) != num_classes:
    raise ValueError(f"{path}: expected {num_classes} class_names, one a class, got {len(class_names)}.")
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.glob("*.array_record")):
    ended = "" if is_there(folder / INFO) else f" of a run that did not end, without {INFO}"
    raise ValueError(f"{path} holds shards already{ended}; give another folder, or remove them.")
  count, shape, writer = 0, None, None
  try:
    for x0, label in batches:
      shape = shape or x0.shape[1:]
      if x0.shape[1:] != shape or label.shape != x0.shape[:1]:
        raise ValueError(f"expected x0 (n, {shape}) and label (n,), got {x0.shape} and {label.shape}.")
      if label.dtype.kind not in "iu" or np.any((label < 0) | (label >= max(num_classes, 1))):
        got = f"{label.dtype}, {label.min()} to {label.max()}"
        raise ValueError(f"labels must lie in [0, {max(num_classes, 1)}), integers, got {got}.")
      with np.errstate(over="ignore"):
        x0 = np.asarray(x0, VALUES)
      if not np.isfinite(x0).all():
        raise ValueError(f"{path}: x0 holds values that are not finite, or not in float16; scale or remove them.")
      for values, number in zip(x0, np.asarray(label, LABEL), strict=True):
        if count % shard_size == 0:
          if writer is not None:
            writer.close()
          writer = ArrayRecordWriter(str(folder / f"{count // shard_size:05d}.array_record"), "group_size:1")
        assert writer is not None
        writer.write(number.tobytes() + values.tobytes())
        count += 1
  finally:
    if writer is not None:
      writer.close()
  if not count:
    raise ValueError(f"{path}: no records to write.")
  if texts and len(texts) != count:
    raise ValueError(f"{path}: expected {count} texts, one a record, got {len(texts)}.")
  if texts:
    (folder / TEXTS).write_text(json.dumps(list(texts), ensure_ascii=False) + "\n", encoding="utf-8")
  # It comes last: a folder without it is not finished.
  info: dict[str, Any] = {"shape": shape, "num_classes": num_classes, "num_records": count}
  info |= {"class_names": list(class_names)} if class_names else {}
  info |= {"autoencoder": autoencoder} if autoencoder else {}
  (folder / INFO).write_text(json.dumps(info, ensure_ascii=False) + "\n", encoding="utf-8")
  return count


def _read_info(folder: str) -> Info | None:
  """Reads a folder's info.json; None where there is none."""
  path = pathlib.Path(folder) / INFO
  try:
    return read_json(path, Info) if is_there(path) else None
  except ValueError as error:
    raise ValueError(f"latents:{folder}: {INFO} cannot be read ({error}); write the latents again.") from error
