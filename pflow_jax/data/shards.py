"""Records in array_record files that others wrote.

The library checks the sums of all that it reads and raises an error for damaged records. A file that it cannot open has
no records for it; here that is an error too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import SupportsIndex

from pflow_jax.files.foreign import decoding, regular_file

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


def num_records(path: str | os.PathLike) -> int:
  """Counts the records of a file.

  Raises:
    ValueError: it is of another format, or cannot be opened.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  file = regular_file(path)
  with _reading(f"{path} cannot be read"):
    reader = ArrayRecordReader(str(file), **_OPTIONS)
    try:
      if not reader.ok():
        reader.read([0])  # raises the reason
      return reader.num_records()
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
