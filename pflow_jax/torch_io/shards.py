"""Writing a model folder as diffusers reads it, a tensor at a time, so that a stopped conversion can go on.

Shards are written to <name>.partial, with a journal of those that are complete; when all are, they get their names,
then the index is written and config.json last: a folder that has it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.checksums import checksum
from pflow_jax.files.foreign import read_json, regular_file
from pflow_jax.torch_io.places import DTYPES
from pflow_jax.torch_io.tensors import CONFIG, INDEX, WEIGHTS, open_tensors

JOURNAL = "conversion.partial.json"
SOURCE = "source"  # of what a file was made, in its metadata
_PARTIAL = ".partial"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class _Journal:
  """Journal of an interrupted conversion: its source, and sizes and checksums of its complete files."""

  source: str
  files: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Planned:
  """A tensor to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Size of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
  """Deals tensors out to files.

  Wide dtypes come first, so that every tensor is aligned in its file; else the order stays.

  Args:
    tensors: to be written.
    max_bytes: of a file, unless one tensor alone has more.
  """
  shards: list[list[Planned]] = [[]]
  size = 0
  for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
    if shards[-1] and size + tensor.nbytes > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  return shards


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A folder to be written.

  Attributes:
    folder: where it is written.
    config: content of config.json.
    tensors: all of them.
    source: tells what the model is made of from anything else; kept in the files' metadata.
    metadata: more of that.
    max_bytes: of a file.
  """

  folder: pathlib.Path
  config: Mapping[str, Any]
  tensors: Sequence[Planned]
  source: str
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  max_bytes: int = 5 * 10**9

  @property
  def shards(self) -> list[tuple[str, list[Planned]]]:
    """Names of the files, and their tensors."""
    shards = plan_shards(self.tensors, self.max_bytes)
    stem, count = WEIGHTS.removesuffix(".safetensors"), len(shards)
    name = lambda i: WEIGHTS if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
    return [(name(i), shard) for i, shard in enumerate(shards)]

  def is_complete(self) -> bool:
    """Returns whether the folder holds the model already.

    Raises:
      ValueError: it holds another, or part of one.
    """
    if not self.folder.exists():
      return False
    if not self.folder.is_dir():
      raise ValueError(f"{self.folder} is a file, expected a folder that may be new; give another --out")
    other = f"{self.folder} holds a model that was not made from this source with these options; give another --out"
    if (self.folder / CONFIG).exists():
      try:
        same = open_tensors(self.folder).metadata.get(SOURCE) == self.source
      except ValueError as error:
        raise ValueError(f"{other} ({error})") from error
      if not same:
        raise ValueError(other)
      return True
    if (self.folder / JOURNAL).exists():
      if self._journal().get(SOURCE) != self.source:
        raise ValueError(f"{other}, or remove what is there: that conversion was not finished")
    elif any(self.folder.glob(f"{WEIGHTS.removesuffix('.safetensors')}*")):
      raise ValueError(other)
    return False

  def write(self, produce: Callable[[str], np.ndarray], report: Callable[[int], None] = lambda nbytes: None) -> None:
    """Writes what is missing.

    Args:
      produce: the tensor of a name, in C order.
      report: called with the number of bytes that are done since.

    Raises:
      OSError: the folder cannot be written. Complete files stay, and the next call goes on after them, as it does after
        an error of `produce`.
    """
    try:
      self._write(produce, report)
    except OSError as error:
      raise OSError(f"{self.folder}: {error}; what is complete is kept, and the same command goes on there") from error

  def _write(self, produce: Callable[[str], np.ndarray], report: Callable[[int], None]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    journal = self._journal()
    done = journal["files"] if journal.get(SOURCE) == self.source else {}
    self._write_json(JOURNAL, {SOURCE: self.source, "files": done})
    for name, tensors in self.shards:
      if self._intact(name, done):
        report(sum(tensor.nbytes for tensor in tensors))
        continue
      done[name] = self._write_shard(name, tensors, produce, report)
      self._write_json(JOURNAL, {SOURCE: self.source, "files": done})
    for name, _ in self.shards:
      if (self.folder / f"{name}{_PARTIAL}").exists():
        (self.folder / f"{name}{_PARTIAL}").replace(self.folder / name)
    if len(self.shards) > 1:
      total = sum(tensor.nbytes for tensor in self.tensors)
      weight_map = {tensor.name: name for name, tensors in self.shards for tensor in tensors}
      self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    self._write_json(CONFIG, self.config)
    (self.folder / JOURNAL).unlink()

  def _journal(self) -> dict[str, Any]:
    """Returns the journal; empty if there is none that can be read."""
    try:
      return dataclasses.asdict(read_json(self.folder / JOURNAL, _Journal))
    except ValueError:
      return {}

  def _intact(self, name: str, done: Mapping[str, list[int]]) -> bool:
    """Returns whether a file is complete and as it was when it was written, by whichever name."""
    found = [file for file in (self.folder / name, self.folder / f"{name}{_PARTIAL}") if file.exists()]
    return name in done and len(found) == 1 and checksum(regular_file(found[0])) == done[name]

  def _write_shard(
    self, name: str, tensors: Sequence[Planned], produce: Callable[[str], np.ndarray], report: Callable[[int], None]
  ) -> list[int]:
    """Writes one file; returns its size and checksum."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", SOURCE: self.source, **self.metadata}}
    end = 0
    for tensor in tensors:
      offsets = [end, end + tensor.nbytes]
      header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
      end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (self.folder / f"{name}{_PARTIAL}").open("wb") as f:
      head = struct.pack("<Q", len(text)) + text
      f.write(head)
      size, crc = len(head), zlib.crc32(head)
      for tensor in tensors:
        data = _bytes_of(produce(tensor.name), tensor)
        f.write(data)
        size, crc = size + len(data), zlib.crc32(data, crc)
        del data
        report(tensor.nbytes)
      f.flush()
      os.fsync(f.fileno())
    return [size, crc]

  def _write_json(self, name: str, value: Any) -> None:
    write_atomically(self.folder / name, json.dumps(value, indent=2) + "\n")


def _bytes_of(array: np.ndarray, tensor: Planned) -> memoryview:
  if array.shape != tensor.shape or array.dtype != tensor.dtype or not array.flags.c_contiguous:
    raise RuntimeError(f"{tensor.name}: planned {tensor.dtype} {tensor.shape}, made {array.dtype} {array.shape}")
  return array.reshape(-1).view(np.uint8).data
