"""Arrays too many for memory, such as the latents of an autoencoder, in array_record shards.

A folder holds info.json ({"shape": [*space, C], "num_classes": n}) and shards named *.array_record, read in the order
of their names. A record is its label, int32, and its x0, float16, both little-endian, in row-major order.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np

from pflow_jax.data.dataset import Dataset
from pflow_jax.data.records import Record, SourceRecords

INFO = "info.json"
LABEL, VALUES = np.dtype("<i4"), np.dtype("<f2")


class LatentSource:
  """Random access to the records of a folder; opened at the first use, so that shapes are known without the data."""

  def __init__(self, folder: str, shape: tuple[int, ...], num_classes: int):
    self.folder, self.shape, self.num_classes = folder, shape, num_classes

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, row: SupportsIndex) -> Record:
    record = self._records[int(row)]
    x0 = np.frombuffer(record, VALUES, offset=LABEL.itemsize).astype(np.float32)
    return {"x0": x0.reshape(self.shape), "label": np.frombuffer(record, LABEL, 1)[0].astype(np.int32)}

  def __getstate__(self) -> dict[str, Any]:
    # Worker processes open the files themselves.
    return {name: value for name, value in self.__dict__.items() if name != "_records"}

  @functools.cached_property
  def _records(self) -> Any:
    import grain

    shards = sorted(map(str, pathlib.Path(self.folder).glob("*.array_record")))
    info = _read_info(self.folder)
    if info is None or not shards:
      raise ValueError(f"latents:{self.folder}: there are no latents; expected {INFO} and shards *.array_record there.")
    if info != (self.shape, self.num_classes):
      raise ValueError(
        f"latents:{self.folder}: expected shape and num_classes of its {INFO}, {info[0]} and {info[1]}, got "
        f"{self.shape} and {self.num_classes}."
      )
    return grain.sources.ArrayRecordDataSource(shards)


def latents(
  path: str, *, split: str = "train", shape: tuple[int, ...] | None = None, num_classes: int | None = None
) -> Dataset:
  """Arrays of a folder of array_record shards, see `write_latents`.

  Args:
    path: of the folder; split "test" reads the one beside it that is named <path>_test.
    shape, num_classes: of its records, by default what the folder says; with both given, a run can be planned on a
      machine that does not have the data.
  Raises: ValueError for a folder that says otherwise, or is needed and not there.
  """
  if split not in ("train", "test"):
    raise ValueError(f"latents:{path}: split must be 'train' or 'test', got {split!r}.")
  if "://" in path:
    raise ValueError(f"latents:{path}: shards are read from a file system; mount the bucket, and give where it is.")
  folder = f"{path}_test" if split == "test" else path
  info = _read_info(folder)
  given = (None if shape is None else tuple(shape), num_classes)
  if info is None:
    if None in given:
      raise ValueError(f"latents:{folder}: there is no {INFO}; write the latents, or give shape= and num_classes=.")
    info = given  # type: ignore[assignment]
  expected = tuple(b if a is None else a for a, b in zip(given, info, strict=True))  # type: ignore[arg-type]
  if expected != info:
    raise ValueError(f"latents:{folder}: its {INFO} has shape and num_classes {info}, got {given}.")
  assert info is not None
  names = tuple(f"class {index}" for index in range(info[1]))
  return Dataset(
    f"latents:{path}", info[0], info[1], names, SourceRecords(LatentSource(folder, *info), read_threads=16)
  )


def write_latents(
  path: str, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, num_classes: int, shard_size: int = 50_000
) -> int:
  """Writes a folder that "latents:<path>" reads, and returns the number of records.

  Args:
    path: of the folder, new or empty.
    batches: pairs of x0 (n, *space, C) and label (n,), integers in [0, num_classes).
    num_classes: 0 for none, with labels of 0.   shard_size: records a file.
  Raises: ValueError for a folder with shards, labels out of range, or shapes that differ.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.glob("*.array_record")):
    raise ValueError(f"{path} holds shards already; give another folder, or remove them.")
  count, shape, writer = 0, None, None
  try:
    for x0, label in batches:
      shape = shape or x0.shape[1:]
      if x0.shape[1:] != shape or label.shape != x0.shape[:1]:
        raise ValueError(f"expected x0 (n, {shape}) and label (n,), got {x0.shape} and {label.shape}.")
      if np.any((label < 0) | (label >= max(num_classes, 1))):
        raise ValueError(f"labels must lie in [0, {max(num_classes, 1)}), got {label.min()} to {label.max()}.")
      for values, number in zip(np.asarray(x0, VALUES), np.asarray(label, LABEL), strict=True):
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
  if shape is None:
    raise ValueError(f"{path}: no records to write.")
  # Last, so that a folder that was cut short is none.
  (folder / INFO).write_text(json.dumps({"shape": shape, "num_classes": num_classes}) + "\n")
  return count


def _read_info(folder: str) -> tuple[tuple[int, ...], int] | None:
  """Shape and number of classes that a folder says it has; None where there is none."""
  path = pathlib.Path(folder) / INFO
  if not path.exists():
    return None
  try:
    info = json.loads(path.read_text())
    return tuple(info["shape"]), int(info["num_classes"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"latents:{folder}: {INFO} cannot be read ({error}); write the latents again.") from error
