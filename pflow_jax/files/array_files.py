"""NumPy's files, with their headers checked against their sizes.

Nothing is unpickled. Nothing is allocated before the file is known to have the bytes for it.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Collection
from typing import IO

import numpy as np

from pflow_jax.files.foreign import check_memory, decoding, in_bytes, regular_file, shown

_KINDS = "biufcSU"  # kinds of dtypes, without objects, records and dates
_MAX_RATIO = 1032  # bytes that deflate makes of one, at most
_CHUNK = 2**20


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
  file = io.BytesIO(source) if isinstance(source, bytes) else regular_file(source)
  limit = len(source) if isinstance(source, bytes) else os.stat(source).st_size
  with decoding(f"{name or os.fsdecode(source)} cannot be read"), zipfile.ZipFile(file) as archive:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()) or not set(required) <= members.keys() <= {*required, *optional}:
      expected = " and ".join(required) + (f", perhaps {' and '.join(optional)}" if optional else "")
      raise ValueError(f"expected the arrays {expected}, got {shown(sorted(members), 200)}")
    _check_memory(sum(info.file_size for info in members.values()))
    arrays = {}
    for key, info in members.items():
      if info.file_size > _MAX_RATIO * info.compress_size or info.compress_size > limit:
        raise ValueError(f"{key} says it has {in_bytes(info.file_size)}, which {info.compress_size} bytes cannot hold")
      with archive.open(info) as stream:
        arrays[key] = _read(stream, info.file_size, key)
    return arrays


def read_npy(path: str | os.PathLike) -> np.ndarray:
  """Reads an .npy file of a plain array; errors as of `read_npz`."""
  file = regular_file(path)
  with decoding(f"{path} cannot be read"), file.open("rb") as stream:
    _check_memory(file.stat().st_size)
    return _read(stream, file.stat().st_size, "it")


def _check_memory(nbytes: int) -> None:
  check_memory("what it says it holds", 2 * nbytes)  # twice, because arrays are converted


def _read(stream: IO[bytes], size: int, name: str) -> np.ndarray:
  """The array of a stream of `size` bytes, called `name`."""
  if (version := np.lib.format.read_magic(stream)) != (1, 0):  # other versions are for records, or a long header
    raise ValueError(f"{name} is of NumPy's format {version}, expected (1, 0), which np.save writes")
  shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
  if dtype.kind not in _KINDS or dtype.fields or dtype.subdtype or not dtype.itemsize:
    raise ValueError(f"{name} is an array of {shown(str(dtype))}, expected numbers or strings")
  nbytes = math.prod(shape) * dtype.itemsize
  if min(shape, default=0) < 0 or stream.tell() + nbytes != size:
    what = f"{dtype} of shape {shown(shape)}"
    raise ValueError(f"{name} says it is {what}, for which there are {in_bytes(size - stream.tell())}")
  data = bytearray(nbytes)
  view = memoryview(data)
  while count := stream.readinto(view[:_CHUNK]):  # type: ignore[attr-defined]
    view = view[count:]
  # Reading one byte beyond the end makes zipfile compare the checksum.
  if view or stream.read(1):
    raise ValueError(f"{name} is cut short")
  return np.ndarray(shape, dtype, data, order="F" if fortran_order else "C")
