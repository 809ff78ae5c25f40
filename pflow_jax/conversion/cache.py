"""`pflow cache`: embeds prompts once, so that training needs neither PyTorch nor the text encoders.

A run that was stopped is gone on with by the same command: shards that are complete are kept, the others made anew,
and the folder becomes what it would have been. Its index, written last, makes it a folder of prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pflow_jax import data
from pflow_jax.data.prompts.files import Prompts
from pflow_jax.data.prompts.records import INDEX, NULL, TABLE, Index, prompt_hashes, read_index, without_x0
from pflow_jax.data.shards import PARTIAL, check_room, disk_bytes, in_decimals, is_complete, shard_name, writing
from pflow_jax.families.autoencoder import load_autoencoder
from pflow_jax.families.text import Encoder, load_encoder
from pflow_jax.files.array_files import read_npy
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.foreign import decoding, is_there, real_folder, regular_file, shown
from pflow_jax.files.lock import Lock
from pflow_jax.files.progress import progress

ReadX0 = Callable[[Sequence[pathlib.Path]], np.ndarray]  # files -> x0 (n, *space, C), floating

SHARD_BYTES = 4 * 2**30  # at most, unless told otherwise
_COUNTED = 10_000  # prompts whose tokens are counted at a time


def cache(
  prompts: str | os.PathLike | Sequence[str],
  model: str,
  out: str | os.PathLike,
  *,
  encoders: str | os.PathLike | None = None,
  batch_size: int = 16,
  max_length: int | None = None,
  shard_records: int | None = None,
  dtype: str | None = None,
  field: str | None = None,
  latents: str | None = None,
  images: str | None = None,
  height: int = 1024,
  width: int = 1024,
) -> Index:
  """Writes a folder that `prompts:<out>` reads, see `data.prompts.records`.

  Args:
    prompts: texts, or a .txt, .jsonl or .csv file, see `data.read_prompts`, or `data:<name>` for those of a data set.
    model: name of the family that they are for.
    out: the new folder.
    encoders: folder of the model's pipeline.
    batch_size: prompts at a time.
    max_length: tokens of a text, see `families.text.load_encoder`.
    dtype: that the encoders compute in; text is always stored in bfloat16.
    shard_records: in a file; default what gives files of 4 GiB at most.
    field: of the file of prompts: the prompt.
    latents: of the file of prompts: a file beside it, NumPy's .npy, with x0 (*space, C), such as an image's latents.
    images: of the file of prompts: a picture beside it, whose latents the pipeline's autoencoder makes.
    height: of pictures, which are cut and scaled to it.
    width: of pictures.

  Returns:
    The index.

  Raises:
    ValueError: the input or the folder does not fit, or the disk has no room.
    RuntimeError: a shard that was written cannot be read back.
  """
  folder = pathlib.Path(checked_folder(out, "out"))
  if "://" in str(out):
    raise ValueError(f"{out}: shards are written to a file system; give a folder, and copy or mount it.")
  if batch_size < 1 or (shard_records is not None and shard_records < 1):
    raise ValueError(f"expected batch_size and shard_records >= 1, got {batch_size} and {shard_records}.")
  read_x0 = _reader(encoders, latents, images, (height, width))
  prompts = os.fspath(prompts) if isinstance(prompts, os.PathLike) else prompts
  found = _read(prompts, field, images or latents)
  named = prompts if isinstance(prompts, str) else "prompts"
  left = f"{found.blank:,} blank and {found.repeated:,} repeated"
  print(f"{named}: {len(found.texts):,} prompts ({left} left out)")
  encoder = load_encoder(model, encoders, max_length=max_length, dtype=dtype)
  shape = _x0(found, read_x0, slice(0, 1)).shape[1:] if found.paths else ()
  fields = dataclasses.replace(encoder.fields, shape=shape)
  texts = [*found.texts, ""]
  lengths = _text_lengths(encoder, texts)
  record_bytes = fields.sizes(lengths[:-1]) + np.array([len(text.encode()) for text in found.texts])
  shard_records = shard_records or _shard_records(int(record_bytes.max()), batch_size)
  index = Index(
    model=model,
    fields=fields,
    max_length=encoder.max_length,
    longest=int(lengths.max()),
    num_records=len(found.texts),
    shard_records=shard_records,
    made={
      "encoders": encoder.folder.resolve().name,
      "encoders_digest": encoder.digest(),
      "template": encoder.template,
      "dtype": encoder.dtype,
      "prompts_digest": _digest(found),
    },
  )
  if not _claim(folder, index):
    print(f"{folder} is complete: {_described(folder, index, record_bytes)}")
    return index
  with Lock(folder, "pflow cache"):
    _check_room(folder, index, record_bytes)
    np.savez(folder / TABLE, length=lengths[:-1], hash=prompt_hashes(found.texts))
    if not (folder / NULL).exists():
      record = _rows(encoder.encode([""]), lengths[-1:])[0]
      write_atomically(folder / NULL, without_x0(fields).pack("", record))
    _write_shards(folder, index, encoder, found, lengths, read_x0, batch_size)
    os.replace(folder / (INDEX + PARTIAL), folder / INDEX)
  print(f"wrote {folder}")
  return index


def read_arrays(paths: Sequence[pathlib.Path]) -> np.ndarray:
  """Returns the arrays of .npy files, (n, ...).

  Raises:
    ValueError: files are none, or differ in shape.
  """
  arrays = [read_npy(path) for path in paths]
  if len({array.shape for array in arrays}) > 1:
    raise ValueError(f"expected arrays of one shape, got {shown([array.shape for array in arrays])}")
  return np.stack(arrays)


def _reader(
  encoders: str | os.PathLike | None, latents: str | None, images: str | None, size: tuple[int, int]
) -> ReadX0:
  if not images:
    return read_arrays
  if latents or not encoders:
    raise ValueError("images: expected encoders, the pipeline with the autoencoder, and no latents")
  return functools.partial(load_autoencoder(encoders).read, size=size)


def _read(prompts: str | Sequence[str], field: str | None, file_field: str | None) -> Prompts:
  if not isinstance(prompts, str):
    if field or file_field:
      raise ValueError(f"prompts: a list has no field {field or file_field!r}; give a file")
    given = [text for text in prompts if text.strip()]
    own = list(dict.fromkeys(given))
    if not own:
      raise ValueError("prompts: expected at least one text, got none")
    return Prompts(own, [], [f"prompt {text!r}" for text in own], len(prompts) - len(given), len(given) - len(own))
  kind, _, name = prompts.partition("data:")
  if kind or not name:
    return data.read_prompts(prompts, field, file_field)
  texts = data.load(name).texts
  if not texts:
    raise ValueError(f"{prompts}: the data set has no texts.")
  if field or file_field:
    raise ValueError(f"{prompts}: the texts of a data set have no field {field or file_field!r}.")
  unique = list(dict.fromkeys(texts))
  where = [f"{prompts}, text {text!r}" for text in unique]
  return Prompts(unique, [], where, repeated=len(texts) - len(unique))


def _text_lengths(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
  """Tokens of every text, (n,) int32."""
  parts = []
  with progress(len(texts), 0, "counting tokens", disable=len(texts) <= _COUNTED, unit="prompts") as report:
    for start in range(0, len(texts), _COUNTED):
      parts.append(encoder.text_lengths(texts[start : start + _COUNTED]))
      report.update(min(start + _COUNTED, len(texts)))
  return np.concatenate(parts)


def _shard_records(record_bytes: int, batch_size: int) -> int:
  """Records in a shard, whole batches of them if it holds one."""
  count = max(1, min(2**16, SHARD_BYTES // record_bytes))
  return count // batch_size * batch_size or count


def _digest(found: Prompts) -> str:
  state = hashlib.blake2b(prompt_hashes(found.texts).tobytes(), digest_size=16)
  state.update("\n".join(map(str, found.paths)).encode(errors="surrogatepass"))
  return state.hexdigest()


def _claim(folder: pathlib.Path, index: Index) -> bool:
  """Marks the folder as one that `index` is being written to; False if it is complete already.

  Raises:
    ValueError: it holds anything else.
  """
  for name in (INDEX, INDEX + PARTIAL):
    other = read_index(str(folder), name)
    if other is None:
      continue
    own, its = _flat(index), _flat(other)
    differing = [
      f"\n  {key}: it has {its.get(key)!r}, this run {own.get(key)!r}"
      for key in sorted(own.keys() | its.keys())
      if own.get(key) != its.get(key) and key != "encoders"
    ]
    if differing:
      raise ValueError(f"{folder} holds other prompts; give another folder, or remove it:{''.join(differing)}")
    if name == INDEX:
      return False
  if not is_there(folder / (INDEX + PARTIAL)):
    # A process that was killed while it claimed the folder leaves a part of this one file.
    claim = f"{INDEX}{PARTIAL}."
    if is_there(folder) and any(not path.name.startswith(claim) for path in real_folder(folder).iterdir()):
      raise ValueError(f"{folder} is not empty; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / (INDEX + PARTIAL), index.as_json().encode())
  return True


def _flat(index: Index) -> dict[str, Any]:
  values = dataclasses.asdict(index)
  fields, made = values.pop("fields"), values.pop("made")
  return {**values, **fields, **made}


def _described(folder: pathlib.Path, index: Index, record_bytes: np.ndarray) -> str:
  fields = index.fields
  arrays = [f"text of {index.longest} x {fields.text_width}"] if fields.text_width else []
  arrays += [f"pooled {fields.pooled_width}"] if fields.pooled_width else []
  arrays += [f"x0 {fields.shape}"] if fields.shape else []
  size = in_decimals(_disk_bytes(record_bytes, index.num_shards))
  return f"{index.num_records:,} records ({', '.join(arrays)}) in {index.num_shards:,} shards, {size}"


def _disk_bytes(record_bytes: np.ndarray, num_shards: int) -> int:
  return disk_bytes(int(record_bytes.sum()), len(record_bytes), num_shards)


def _check_room(folder: pathlib.Path, index: Index, record_bytes: np.ndarray) -> None:
  starts = range(0, index.num_records, index.shard_records)
  todo = [start for number, start in enumerate(starts) if not (folder / shard_name(number)).exists()]
  needed = sum(_disk_bytes(record_bytes[start : start + index.shard_records], 1) for start in todo)
  check_room(folder, needed, _described(folder, index, record_bytes), "fewer prompts or a smaller max_length")


def _write_shards(
  folder: pathlib.Path,
  index: Index,
  encoder: Encoder,
  found: Prompts,
  lengths: np.ndarray,
  read_x0: ReadX0,
  batch_size: int,
) -> None:
  starts = list(enumerate(range(0, index.num_records, index.shard_records)))
  sizes = {number: min(index.shard_records, index.num_records - start) for number, start in starts}
  todo = [(number, start) for number, start in starts if not is_complete(folder / shard_name(number), sizes[number])]
  done = index.num_records - sum(sizes[number] for number, _ in todo)
  if done and todo:
    print(f"going on after {done:,} prompts")
  with progress(index.num_records, done, "cache", unit="prompts") as report:
    for number, start in todo:
      with writing(folder / shard_name(number)) as write:
        # Batches begin with the shard, so that one made anew is the same.
        for first in range(start, start + sizes[number], batch_size):
          rows = slice(first, min(first + batch_size, start + sizes[number]))
          records = _rows(encoder.encode(found.texts[rows]), lengths[rows])
          if found.paths:
            for record, x0 in zip(records, _x0(found, read_x0, rows, index.fields.shape), strict=True):
              record["x0"] = x0
          for text, record in zip(found.texts[rows], records, strict=True):
            write(index.fields.pack(text, record))
          done += len(records)
          report.update(done)


def _rows(arrays: dict[str, np.ndarray], lengths: np.ndarray) -> list[dict[str, np.ndarray]]:
  """The arrays of single prompts, their text cut to its length."""
  count = len(next(iter(arrays.values())))
  records = [{name: values[row] for name, values in arrays.items() if name != "mask"} for row in range(count)]
  for record, length in zip(records, lengths, strict=True):
    if "text" in record:
      record["text"] = record["text"][:length]
  return records


def _x0(found: Prompts, read_x0: ReadX0, rows: slice, shape: tuple[int, ...] | None = None) -> np.ndarray:
  """x0 (n, *space, C) of prompts, checked: of `shape`, which float16 can hold."""
  paths, where = found.paths[rows], found.where[rows]
  for path, place in zip(paths, where, strict=True):
    with decoding(place):
      regular_file(path)
  try:
    x0 = read_x0(paths)
  except ValueError as error:
    raise ValueError(f"{where[0]} to {where[-1].rpartition(' ')[2]}: {error}") from error
  if len(x0) != len(paths) or x0.ndim < 3 or not x0.size or x0.dtype.kind != "f":
    raise ValueError(f"{where[0]}: expected floating x0 of (*space, C), got {x0.dtype} {x0.shape[1:]} in {paths[0]}.")
  if shape is not None and x0.shape[1:] != shape:
    raise ValueError(f"{where[0]}: expected x0 of shape {shape} as in the first, got {x0.shape[1:]} in {paths[0]}.")
  with np.errstate(over="ignore"):
    finite = np.isfinite(x0.astype(np.float16)).reshape(len(x0), -1).all(axis=1)
  if not finite.all():
    row = int(np.flatnonzero(~finite)[0])
    raise ValueError(f"{where[row]}: {paths[row]} has values that are not finite, or not in float16.")
  return x0
