"""Records in array_record files: those that others wrote, and whole ones of its own.

The library checks the sums of all that it reads and raises an error for damaged records. A file that it cannot open has
no records for it; here that is an error too. A shard that is written has its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, SupportsIndex

from pflow_jax.files.atomic import replace_safely
from pflow_jax.files.foreign import decoding, regular_file

ENDING = ".array_record"
PARTIAL = ".partial"  # ends the name of what is not complete

# What array_record adds to a file, to a record and to a byte, rounded up.
_PER_SHARD, _PER_RECORD, _PER_BYTE = 192 * 1024, 100, 1 / 2048
# Records are not compressed: embeddings and latents hardly shrink, and so the size is known beforehand.
_WRITTEN = "group_size:1,uncompressed"
_OPTIONS = dict(options="readahead_buffer_size:0", file_reader_buffer_size=32768)
_THREADS = 16


class Shards:
  """Random access to the records of files, one after the other."""

  def __init__(self, name: str, paths: Sequence[str | os.PathLike]):
    """Opens `paths`; messages begin with `name`.

    Raises:
      ValueError: for a file of another format.
    """
    from grain.sources import ArrayRecordDataSource

    self._name = name
    with ThreadPoolExecutor(_THREADS) as pool:
      counts = list(pool.map(num_records, paths))
    with decoding(name):
      # Without the counts it would open every file again to find them.
      self._records = ArrayRecordDataSource([f"{path}[0:{n}]" for path, n in zip(paths, counts, strict=True)])

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, row: SupportsIndex) -> bytes:
    with _reading(f"{self._name}: record {int(row)} cannot be read"):
      return self._records[int(row)]

  def take(self, rows: Iterable[SupportsIndex]) -> list[bytes]:
    """Returns the records of many rows; the errors are those of one."""
    try:
      return [self._records[int(row)] for row in rows]
    except Exception:  # of one among them, which says its number
      return [self[row] for row in rows]


def shard_name(number: int) -> str:
  """Name of the shard of this number; names sort as numbers do."""
  return f"{number:05d}{ENDING}"


def disk_bytes(nbytes: int, count: int, num_shards: int) -> int:
  """Bytes that `count` records of `nbytes` in all take on a disk, at most."""
  return int(nbytes * (1 + _PER_BYTE)) + _PER_RECORD * count + _PER_SHARD * num_shards


def in_decimals(count: float) -> str:
  """A number of bytes in words, as disks are sold: "1.5 GB"."""
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:,.3g} TB"


def check_room(folder: pathlib.Path, needed: int, content: str, advice: str) -> None:
  """Tells how many bytes a folder is going to take, and whether its disk has them.

  Args:
    folder: to write to.
    needed: bytes that are still to be written.
    content: of the folder, in words.
    advice: other remedies than another disk.

  Raises:
    ValueError: the disk has fewer.
  """
  free = shutil.disk_usage(folder).free
  print(f"{folder}: {content}; {in_decimals(needed)} to write, {in_decimals(free)} free", flush=True)
  if needed > free:
    raise ValueError(
      f"{folder} needs {in_decimals(needed)}, and its disk has {in_decimals(free)} left; give a folder on another, "
      f"{advice}."
    )


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
  """Context with a function that writes a record to a shard, which has its name once all are there to be read.

  A shard without records is no file. What is not complete goes when writing fails; a killed process leaves it.

  Raises:
    RuntimeError: the records are not there when they are counted.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  partial, count = path.with_name(path.name + PARTIAL), 0
  writer = ArrayRecordWriter(str(partial), _WRITTEN)

  def write(record: bytes) -> None:
    nonlocal count
    writer.write(record)
    count += 1

  try:
    try:
      yield write
    finally:
      writer.close()
    if count and not is_complete(partial, count):
      raise RuntimeError(f"{partial}: {count} records were written and are not there; is the disk full?")
    if count:
      replace_safely(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def is_complete(path: pathlib.Path, count: int) -> bool:
  """Returns whether a shard is there and has so many records, of which the first and the last are read.

  The library checks the sum of what it reads, so blocks that were never written are found where they end a file.
  """
  try:
    with _opened(path) as reader:
      return reader.num_records() == count and len(reader.read(sorted({0, count - 1}))) > 0
  except ValueError:
    return False


def num_records(path: str | os.PathLike) -> int:
  """Counts the records of a file.

  Raises:
    ValueError: it is of another format, or cannot be opened.
  """
  with _opened(path) as reader:
    return reader.num_records()


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
  from array_record.python.array_record_module import ArrayRecordReader

  file = regular_file(path)
  with _reading(f"{path} cannot be read"):
    reader = ArrayRecordReader(str(file), **_OPTIONS)
    try:
      if not reader.ok():
        reader.read([0])  # raises the reason
      yield reader
    finally:
      reader.close()


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
  with decoding(what):
    try:
      yield
    except RuntimeError as error:
      if "() failed: " in str(error):  # a system call failed; another try may succeed
        raise OSError(errno.EIO, f"{what}: {error}") from error
      raise
