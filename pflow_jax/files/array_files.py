"""NumPy's files, with their headers checked against their sizes.

Nothing is unpickled. Nothing is allocated before the file is known to have the bytes for it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Collection, Iterator
from typing import IO, Literal

import numpy as np

from pflow_jax.files.foreign import check_memory, decoding, in_bytes, regular_file, shown

_KINDS = "biufcSU"  # kinds of dtypes, without objects, records and dates
_MAX_RATIO = 1032  # bytes that deflate makes of one, at most
_CHUNK = 2**20


class Npz:
  """An .npz file of plain arrays, each of which is read when it is asked for; a context manager that closes the file.

  Args:
    source: a file, or its bytes.
    name: of bytes, for errors; by default that of the file.

  Attributes:
    members: the arrays by name, as entries of the archive.

  Raises:
    ValueError: it cannot be read, as in all methods.
  """

  def __init__(self, source: str | os.PathLike | bytes, *, name: str = ""):
    file = io.BytesIO(source) if isinstance(source, bytes) else regular_file(source)
    self._limit = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    self._name = name or os.fsdecode(source)
    with self._decoding():
      self._archive = zipfile.ZipFile(file)
      entries = self._archive.infolist()
      self.members = {info.filename.removesuffix(".npy"): info for info in entries}
      if len(self.members) < len(entries):
        self._archive.close()
        raise ValueError(f"expected names of arrays that differ, got {shown([info.filename for info in entries], 200)}")

  def __enter__(self) -> Npz:
    return self

  def __exit__(self, *_: object) -> None:
    self._archive.close()

  def shape(self, key: str) -> tuple[int, ...]:
    """Returns the shape of an array."""
    with self._decoding(), self._open(key) as (stream, size):
      return _header(stream, size, key)[0]

  def read(self, keys: Collection[str]) -> dict[str, np.ndarray]:
    """Returns some of the arrays, by name.

    Raises:
      ValueError: the headers promise more bytes than the file has, or more than the machine has memory for.
    """
    with self._decoding():
      check_memory("what it says it holds", 2 * sum(self.members[key].file_size for key in keys))  # they are converted
      arrays = {}
      for key in keys:
        with self._open(key) as (stream, size):
          arrays[key] = _read(stream, size, key)
      return arrays

  def rows(self, key: str, count: int) -> Iterator[np.ndarray]:
    """Yields an array (N, *axes) in parts (n, *axes) with n = `count`, and fewer at the end.

    Raises:
      ValueError: as `read`, or the array has no rows one after another.
    """
    with contextlib.ExitStack() as stack:
      with self._decoding():
        stream, size = stack.enter_context(self._open(key))
        shape, fortran_order, dtype = _header(stream, size, key)
        if not shape or (fortran_order and len(shape) > 1):
          raise ValueError(f"expected {key} as rows one after another, got shape {shape}, the first axis fastest")
        check_memory(f"{count} rows of {key}", 2 * count * math.prod(shape[1:]) * dtype.itemsize)
      for start in range(0, shape[0], count):
        part = (min(count, shape[0] - start), *shape[1:])
        with self._decoding():
          values = _array(stream, part, dtype, key, is_last=start + part[0] == shape[0])
        yield values  # an error of the caller's is not one of the file

  @contextlib.contextmanager
  def _open(self, key: str) -> Iterator[tuple[IO[bytes], int]]:
    """Context with the bytes of an array's file, and their number."""
    info = self.members[key]
    if info.file_size > _MAX_RATIO * info.compress_size or info.compress_size > self._limit:
      raise ValueError(f"{key} says it has {in_bytes(info.file_size)}, which {info.compress_size} bytes cannot hold")
    with self._archive.open(info) as stream:
      yield stream, info.file_size

  def _decoding(self) -> contextlib.AbstractContextManager[None]:
    return decoding(f"{self._name} cannot be read")


def read_npz(
  source: str | os.PathLike | bytes, required: Collection[str], optional: Collection[str] = (), *, name: str = ""
) -> dict[str, np.ndarray]:
  """Reads an .npz file of plain arrays.

  Args:
    source: a file, or its bytes.
    required: names of arrays that it must have.
    optional: names of arrays that it may have.
    name: of bytes, for errors; by default that of the file.

  Raises:
    ValueError: for a file that cannot be read, has other arrays, or has a header that promises more bytes than it has.
  """
  with Npz(source, name=name) as file:
    if not set(required) <= file.members.keys() <= {*required, *optional}:
      expected = " and ".join(required) + (f", perhaps {' and '.join(optional)}" if optional else "")
      where = name or os.fsdecode(source)
      raise ValueError(
        f"{where} cannot be read: expected the arrays {expected}, got {shown(sorted(file.members), 200)}"
      )
    return file.read(file.members)


def read_npy(source: str | os.PathLike | bytes, *, name: str = "") -> np.ndarray:
  """Reads an .npy file of a plain array; arguments and errors as of `read_npz`."""
  stream: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else regular_file(source).open("rb")
  size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
  with decoding(f"{name or os.fsdecode(source)} cannot be read"), stream:
    check_memory("what it says it holds", 2 * size)  # twice, because arrays are converted
    return _read(stream, size, "it")


def _read(stream: IO[bytes], size: int, name: str) -> np.ndarray:
  """The array of a stream of `size` bytes, called `name`."""
  shape, fortran_order, dtype = _header(stream, size, name)
  return _array(stream, shape, dtype, name, order="F" if fortran_order else "C")


def _header(stream: IO[bytes], size: int, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Reads shape, order (whether the first axis is the fastest) and dtype, which account for all `size` bytes."""
  if (version := np.lib.format.read_magic(stream)) != (1, 0):  # other versions are for records, or a long header
    raise ValueError(f"{name} is of NumPy's format {version}, expected (1, 0), which np.save writes")
  shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
  if dtype.kind not in _KINDS or dtype.fields or dtype.subdtype or not dtype.itemsize:
    raise ValueError(f"{name} is an array of {shown(str(dtype))}, expected numbers or strings")
  if min(shape, default=0) < 0 or stream.tell() + math.prod(shape) * dtype.itemsize != size:
    what = f"{dtype} of shape {shown(shape)}"
    raise ValueError(f"{name} says it is {what}, for which there are {in_bytes(size - stream.tell())}")
  return shape, fortran_order, dtype


def _array(
  stream: IO[bytes],
  shape: tuple[int, ...],
  dtype: np.dtype,
  name: str,
  order: Literal["C", "F"] = "C",
  is_last: bool = True,
) -> np.ndarray:
  """Reads the next values of a stream, after which it ends if they are the last."""
  data = bytearray(math.prod(shape) * dtype.itemsize)
  view = memoryview(data)
  while count := stream.readinto(view[:_CHUNK]):  # type: ignore[attr-defined]
    view = view[count:]
  # Reading one byte beyond the end makes zipfile compare the checksum.
  if view or (is_last and stream.read(1)):
    raise ValueError(f"{name} is cut short")
  return np.ndarray(shape, dtype, data, order=order)
