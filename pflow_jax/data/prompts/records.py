"""Embeddings of prompts in array_record shards, with or without an image's latents beside each.

A folder, written by `pflow cache`, holds:

* index.json: the description of the records, see `Index`; written last, so that a folder without it is not finished.
* index.npz: "length" of every record, the tokens of its text, int32, and "hash" of its prompt, uint64.
* *.array_record: shards, read in the order of their names.
* null.record: the record of the empty prompt.

A record is the number l of its text's tokens, int32; "text" (l, D) bfloat16; "pooled" (P,) float32, small beside the
text and so kept in full; "x0" (*space, C) float16; and the prompt in UTF-8. All is little-endian and row-major. A field
that a model does not have takes no bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from pflow_jax.data.dataset import TEXT_DTYPE
from pflow_jax.data.records import Record
from pflow_jax.data.shards import Shards
from pflow_jax.files.array_files import read_npz
from pflow_jax.files.foreign import MAX_JSON, decoding, is_there, parse_json, read_bytes, read_text, shown

INDEX, TABLE, NULL, SHARDS = "index.json", "index.npz", "null.record", "*.array_record"
LENGTH, HASH, POOLED, VALUES = (np.dtype(name) for name in ("<i4", "<u8", "<f4", "<f2"))
MAX_NULL = 2**28  # bytes; FLUX.1's has 4 MB


@dataclasses.dataclass(frozen=True)
class Fields:
  """The arrays of a record.

  Attributes:
    text_width: D, 0 without text.
    pooled_width: P, 0 without.
    shape: of x0, empty without.
    masked: whether the network needs a mask of the padding; otherwise all texts have one length.
  """

  text_width: NonNegativeInt = 0
  masked: bool = False
  pooled_width: NonNegativeInt = 0
  shape: tuple[PositiveInt, ...] = ()

  def sizes(self, length: Any) -> Any:
    """Bytes of a record with a text of `length`, a number or an array of them, without those of the prompt."""
    text = np.int64(length) * self.text_width * TEXT_DTYPE.itemsize
    rest = self.pooled_width * POOLED.itemsize + (math.prod(self.shape) * VALUES.itemsize if self.shape else 0)
    return LENGTH.itemsize + text + rest

  def pack(self, prompt: str, record: Record) -> bytes:
    """Writes the bytes of a record of "text" (l, D), "pooled" (P,) and "x0", without the fields that are absent."""
    text = record["text"] if self.text_width else np.zeros((0, 0))
    parts = [np.asarray(len(text), LENGTH), text.astype(TEXT_DTYPE)]
    parts += [record["pooled"].astype(POOLED)] if self.pooled_width else []
    parts += [record["x0"].astype(VALUES)] if self.shape else []
    return b"".join(part.tobytes() for part in parts) + prompt.encode()

  def unpack(self, data: bytes) -> tuple[str, Record]:
    """Returns the prompt and the arrays of a record.

    Raises:
      ValueError: the bytes are none of a record.
    """
    length = int(np.frombuffer(data, LENGTH, 1)[0]) if len(data) >= LENGTH.itemsize else -1
    if length < 0 or len(data) < self.sizes(length):
      raise ValueError(f"{len(data)} bytes cannot hold a record of {self} with {length} tokens; write it again")
    offset, record = LENGTH.itemsize, {}

    def take(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
      nonlocal offset
      count = math.prod(shape)
      values = np.frombuffer(data, dtype, count, offset).reshape(shape)
      offset += count * dtype.itemsize
      return values

    if self.text_width:
      record["text"] = take((length, self.text_width), TEXT_DTYPE)
    if self.pooled_width:
      record["pooled"] = take((self.pooled_width,), POOLED)
    if self.shape:
      record["x0"] = take(self.shape, VALUES).astype(np.float32)
    return data[offset:].decode(), record


# Fields of the published models, for a run that is planned without the data, and the default number of tokens of their
# pipelines.
MODELS = {
  "flux": Fields(text_width=4096, pooled_width=768),
  "qwen_image": Fields(text_width=3584, masked=True),
  "minilm": Fields(pooled_width=384),
}
MAX_LENGTHS = {"flux": 512, "qwen_image": 512, "minilm": 0}


MAX_TOKENS = 2**15  # tokens of a text, the positions of Qwen2.5-VL


@dataclasses.dataclass(frozen=True)
class Index:
  """Description of a folder's records.

  Attributes:
    model: the model that the prompts are encoded for, one of `MODELS`.
    fields: of the records.
    max_length: tokens at most; tokens of every text for a model that attends to padding.
    longest: tokens of the longest text.
    num_records: records in all.
    shard_records: records in a shard; the last may have fewer.
    made: how they were made, in plain JSON, for people: encoders, template, dtype and such.
  """

  model: str
  fields: Fields
  max_length: NonNegativeInt
  longest: NonNegativeInt
  num_records: PositiveInt
  shard_records: PositiveInt
  made: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.max_length > MAX_TOKENS or self.longest > max(self.max_length, 1):
      raise ValueError(
        f"expected max_length of up to {MAX_TOKENS} tokens and longest of no more, got {shown(self.max_length)} and "
        f"{shown(self.longest)}"
      )

  def as_json(self) -> str:
    """Writes the content of the file."""
    return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

  @classmethod
  def from_json(cls, text: str, where: str = INDEX) -> Index:
    """Reads the content that `as_json` wrote.

    Raises:
      ValueError: it is any other.
    """
    return parse_json(text, cls, where=where)

  @property
  def num_shards(self) -> int:
    """Number of shards."""
    return -(-self.num_records // self.shard_records)


class PromptSource:
  """Random access to the records of a folder; opened at the first use, so that shapes are known without the data."""

  def __init__(self, folder: str, index: Index | None):
    self.folder, self.index = folder, index

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, row: SupportsIndex) -> Record:
    return self.read(int(row))[1]

  def read(self, row: int) -> tuple[str, Record]:
    """Returns the prompt and the arrays of a record.

    Raises:
      ValueError: it is damaged.
    """
    data, fields = self._records[row], self._known().fields
    with decoding(f"prompts:{self.folder}: record {row}"):
      prompt, record = fields.unpack(data)
      if not all(np.isfinite(record[name]).all() for name in ("pooled", "x0") if name in record):
        raise ValueError("there are values that are not finite; write it again")
    return prompt, record

  @functools.cached_property
  def text_lengths(self) -> np.ndarray:
    """Tokens of every record's text, (n,) integers, see `data.prompts.buckets.TextSource`."""
    return self._table("length")

  def find(self, prompts: Sequence[str]) -> np.ndarray:
    """Finds the rows (n,) int64 of `prompts`; -1 for one that is not there."""
    hashes, wanted = self._table("hash"), prompt_hashes(prompts)
    order = np.argsort(hashes, kind="stable")
    place = np.minimum(np.searchsorted(hashes, wanted, sorter=order), len(hashes) - 1)
    return np.where(hashes[order[place]] == wanted, order[place], -1)

  def _known(self) -> Index:
    if self.index is None:
      raise ValueError(f"prompts:{self.folder}: there are no prompts; write them with `pflow cache`.")
    return self.index

  def _table(self, name: str) -> np.ndarray:
    index, path = self._known(), pathlib.Path(self.folder) / TABLE
    try:
      table = read_npz(path, ["length", "hash"])
    except ValueError as error:
      raise ValueError(f"{error}; write the prompts again.") from error
    expected = {"length": LENGTH, "hash": HASH}
    got = {name: (values.dtype, values.shape) for name, values in table.items()}
    if got != {name: (dtype, (index.num_records,)) for name, dtype in expected.items()}:
      raise ValueError(f"{path}: expected {index.num_records} records as in {INDEX}, got {shown(got, 200)}.")
    lengths = table["length"]
    if lengths.min() < 0 or lengths.max() > index.longest:
      raise ValueError(f"{path}: expected texts of 0 to {index.longest} tokens as in {INDEX}, got {shown(lengths)}.")
    return table[name]

  @functools.cached_property
  def _records(self) -> Shards:
    index, name = self._known(), f"prompts:{self.folder}"
    shards = sorted(pathlib.Path(self.folder).glob(SHARDS))
    if len(shards) != index.num_shards:
      raise ValueError(f"{name}: expected {index.num_shards} shards, got {len(shards)}.")
    records = Shards(name, shards)
    if len(records) != index.num_records:
      raise ValueError(f"{name}: expected {index.num_records} records, got {len(records)}.")
    return records


def prompt_hashes(prompts: Iterable[str]) -> np.ndarray:
  """Hashes of prompts, (n,) uint64."""
  digest = b"".join(hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts)
  return np.frombuffer(digest, HASH)


def read_index(folder: str, name: str = INDEX) -> Index | None:
  """Reads the description of a folder's records; None where there is none."""
  path = pathlib.Path(folder) / name
  if not is_there(path):
    return None
  try:
    index = Index.from_json(read_text(path, MAX_JSON), where=name)
    if index.model not in MODELS:
      raise ValueError(f"model: expected one of {sorted(MODELS)}, got {shown(index.model)}")
  except ValueError as error:
    raise ValueError(f"{path} cannot be read ({error}); write the prompts again.") from error
  return index


def read_null(folder: str, fields: Fields) -> Record | None:
  """Reads the empty prompt's arrays; None where they are not there."""
  path = pathlib.Path(folder) / NULL
  if not is_there(path):
    return None
  data = read_bytes(path, MAX_NULL)
  with decoding(path):
    return without_x0(fields).unpack(data)[1]


def without_x0(fields: Fields) -> Fields:
  """The fields of the empty prompt's record."""
  return dataclasses.replace(fields, shape=())
