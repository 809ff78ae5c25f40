"""Fingerprints of data sets: counts, names, and a hash of records spread over all of the set.

A fingerprint is the same on every machine, whatever the path and the dates of the files. It is quick for sets of any
size: of arrays in memory it reads up to `MOST_BYTES`, of files a few records.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import Any

import numpy as np

from pflow_jax.data.dataset import Dataset
from pflow_jax.data.folder import FolderSource
from pflow_jax.data.prompts.buckets import BucketRecords
from pflow_jax.data.records import ArrayRecords, AugmentedRecords, GeneratedRecords, SourceRecords
from pflow_jax.data.tfds_source import TfdsSource
from pflow_jax.files.foreign import regular_file

MOST_BYTES = 2**28  # read of arrays in memory
RECORDS = 64  # read of a set in files
_BLOCK = 2**16  # bytes read at either end of a file

Fingerprint = dict[str, Any]


def fingerprint(dataset: Dataset) -> Fingerprint:
  """Fingerprint of a data set, in plain JSON: equal for equal records in an equal order.

  Records between those that are read may differ unnoticed. Files of images are compared as they are, not as they are
  decoded, which differs between versions of the decoders.

  Returns:
    "shape", "records" (None without end), digests of "class_names" and of the empty condition "null", and digests of
      the records, by name.
  """
  null = dataset.embedding.null if dataset.embedding else None
  return {
    "shape": list(dataset.shape),
    "records": dataset.num_records,
    "class_names": _Hash().text(*dataset.class_names).digest(),
    "null": _Hash().arrays(null or {}).digest(),
    **_content(dataset.records),
  }


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
  """Differences between two fingerprints, a line each; empty if they are the same."""
  return [
    f"{key}: was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]


class _Hash:
  """A digest that grows; different additions never give the same bytes to hash."""

  def __init__(self) -> None:
    self._hash = hashlib.blake2b(digest_size=8)

  def text(self, *texts: str) -> _Hash:
    self._hash.update(json.dumps(texts).encode())
    return self

  def array(self, array: np.ndarray) -> _Hash:
    array = np.asarray(array)
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    self.text(array.dtype.name, *map(str, array.shape))
    self._hash.update(little.reshape(-1).view(np.uint8).data)
    return self

  def arrays(self, arrays: dict[str, np.ndarray]) -> _Hash:
    for name, array in sorted(arrays.items()):
      self.text(name).array(array)
    return self

  def digest(self) -> str:
    return self._hash.hexdigest()


def _spread(count: int, most: int = RECORDS) -> np.ndarray:
  """At most `most` rows of `count`, evenly spaced, with the first and the last."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.arange(0)


@functools.singledispatch
def _content(records: Any) -> Fingerprint:
  """Digests of records of an unknown kind, by the methods that every kind has."""
  batch = records.sample(min(records.num_records or RECORDS, RECORDS), 0)
  cond = batch["cond"] if isinstance(batch["cond"], dict) else {"label": batch["cond"]}
  x0 = {"x0": batch["x0"]} if "x0" in batch else {}
  return {"content": _Hash().arrays({**cond, **x0}).digest()}


@_content.register
def _(records: GeneratedRecords) -> Fingerprint:
  return {}  # code makes these records


@_content.register
def _(records: AugmentedRecords) -> Fingerprint:
  return _content(records.records)  # code changes them


@_content.register
def _(records: ArrayRecords) -> Fingerprint:
  count = len(records.x0)
  arrays = {"x0": records.x0, **records.embeddings}
  row = sum(array.nbytes for array in arrays.values()) // max(count, 1)
  rows = _spread(count, max(MOST_BYTES // max(row, 1), RECORDS))
  read = {name: array if len(rows) == count else array[rows] for name, array in arrays.items()}
  return {"labels": _Hash().array(records.label).digest(), "content": _Hash().arrays(read).digest()}


@_content.register
def _(records: SourceRecords) -> Fingerprint:
  return _of_source(records.source)


@_content.register
def _(records: BucketRecords) -> Fingerprint:
  source = records.source
  return {"lengths": _Hash().array(np.asarray(source.text_lengths)).digest(), **_of_source(source)}


@functools.singledispatch
def _of_source(source: Any) -> Fingerprint:
  """Digests of records that are read one by one."""
  content = _Hash()
  for row in _spread(len(source)):
    content.arrays(source[int(row)])
  return {"content": content.digest()}


@_of_source.register
def _(source: TfdsSource) -> Fingerprint:
  raw = getattr(source.source, "data_source", None)  # array_record has the stored bytes of records
  records = [raw[int(row)] for row in _spread(len(raw))] if raw is not None else []
  if not records or not all(isinstance(record, bytes) for record in records):
    return _of_source.dispatch(object)(source)
  content = _Hash()
  for record in records:
    # Counts of bytes do not depend on the order of a record's features, which changes when it is prepared anew.
    content.array(np.bincount(np.frombuffer(record, np.uint8), minlength=256))
  return {"content": content.digest()}


@_of_source.register
def _(source: FolderSource) -> Fingerprint:
  names, content = _Hash(), _Hash()
  names.text(*(f"{label}/{os.path.basename(path)}" for path, label in source.files))
  for row in _spread(len(source.files)):
    _add_file(content, source.files[int(row)][0])
  return {"names": names.digest(), "content": content.digest()}


def _add_file(content: _Hash, path: str) -> None:
  """Adds the size of a file and the bytes at its two ends."""
  with regular_file(path).open("rb") as file:
    size = file.seek(0, os.SEEK_END)
    content.text(str(size))
    for start in (0, max(size - _BLOCK, 0)):
      file.seek(start)
      content.array(np.frombuffer(file.read(_BLOCK), np.uint8))
