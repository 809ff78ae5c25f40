"""Writing of latents: shards that are whole or not there, so that a run that was stopped goes on.

Beside each shard lies a small file, see `data.latent_parts.Part`, with what is known of it; a shard without one is made
anew. When all are there, info.json is made of these files. They stay: by them another run knows whether it has the same
pictures, and whether some that could not be read can be now. `data.latents` describes the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pflow_jax.data.latent_parts import Part, Shard, Totals, check_values
from pflow_jax.data.latents import INFO, LABEL, TEXTS, UNREADABLE, VALUES, Info, read_info
from pflow_jax.data.shards import (
  ENDING,
  PARTIAL,
  check_room,
  disk_bytes,
  in_decimals,
  is_complete,
  shard_name,
  writing,
)
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import is_remote
from pflow_jax.files.foreign import MAX_JSON, is_there, read_json, real_folder, shown

SHARD_RECORDS = 4096
_PARTS = ".part.json"
_MOST_SHARDS = 100_000  # whose names sort as their numbers
_COMPARED = 1024  # pictures that are compared when a run is gone on with, about; at least one a shard
_VERSION = 2  # of what is told of pictures: those of another version cannot be compared


class LatentFolder:
  """A folder of latents that is being written, perhaps by several processes, which all see it.

  Args:
    path: of the folder.
    info: of the result, without what only the records tell. Its `made` tells whether a run makes the same.
    count: pictures in all.
    shard_records: pictures of a shard.

  Raises:
    ValueError: there would be too many shards.
  """

  def __init__(self, path: str | os.PathLike, info: Info, count: int, shard_records: int = SHARD_RECORDS):
    self.path, self.count, self.shard_records = pathlib.Path(path), count, shard_records
    made = {**info.made, "shard_records": shard_records, "version": _VERSION}
    self.info = dataclasses.replace(info, made=json.loads(json.dumps(made, default=str)))
    if self.num_shards > _MOST_SHARDS:
      raise ValueError(
        f"{path}: expected at most {_MOST_SHARDS:,} shards, got {self.num_shards:,}; raise shard_records"
      )

  @property
  def num_shards(self) -> int:
    """Number of shards."""
    return -(-self.count // self.shard_records)

  def rows(self, number: int) -> range:
    """Pictures of a shard."""
    start = number * self.shard_records
    return range(start, min(start + self.shard_records, self.count))

  def claim(self) -> bool:
    """Marks the folder as one that these latents are being written to; returns False if they are complete already.

    Raises:
      ValueError: it holds anything else.
    """
    claimed = INFO + PARTIAL
    for name in (INFO, claimed):
      other = read_info(str(self.path), name)
      if other is None:
        continue
      if other.made and other.made.get("version") != _VERSION:
        raise ValueError(
          f"{self.path} was written by another version, which did not note what its pictures can be known by: go on "
          f"with that version, or give another folder; once it has {INFO}, training reads it as it is"
        )
      if differing := self._differing(other):
        raise ValueError(f"{self.path} holds other latents; give another folder, or remove it:{differing}")
      if name == INFO:
        return False
    if not is_there(self.path / claimed):
      # A process that was killed while it claimed the folder leaves a part of this one file.
      if is_there(self.path) and any(not path.name.startswith(claimed) for path in real_folder(self.path).iterdir()):
        raise ValueError(f"{self.path} is not empty; give a new folder.")
      self.path.mkdir(parents=True, exist_ok=True)
      write_atomically(self.path / claimed, _as_json(self.info))
    return True

  def _differing(self, other: Info) -> str:
    """Differences of another run's description from this one, a line each."""
    keys = ("shape", "num_classes", "class_names", "moments", "mirrored", "shift", "scale")
    own, its = ({**{key: getattr(info, key) for key in keys}, **info.made} for info in (self.info, other))
    return "".join(
      f"\n  {key}: it has {shown(its.get(key))}, this run {shown(own.get(key))}"
      for key in sorted(own.keys() | its.keys())
      if own.get(key) != its.get(key)
    )

  def todo(self) -> list[int]:
    """Numbers of the shards that are not complete."""
    return [number for number in range(self.num_shards) if not self._is_complete(number)]

  def is_noted(self, row: int) -> bool:
    """Returns whether the digest of a picture is kept, by which another run knows it."""
    return row % max(1, min(self.count // _COMPARED, self.shard_records)) == 0

  def reopen(self, numbers: Iterable[int]) -> None:
    """Takes shards, and with them the folder, for not complete."""
    if is_there(self.path / INFO):
      write_atomically(self.path / (INFO + PARTIAL), _as_json(self.info))
      (self.path / INFO).unlink()
    for number in numbers:
      self._part(number).unlink(missing_ok=True)

  def check_room(self, todo: Sequence[int]) -> None:
    """Tells the size of the folder, and whether its disk has room for these shards.

    Raises:
      ValueError: it has not.
    """
    nbytes = lambda rows, shards: disk_bytes(rows * self.info.record_bytes, rows, shards)
    needed = sum(nbytes(len(self.rows(number)), 1) for number in todo)
    what = "moments" if self.info.moments else "latents"
    mirrored = " and of their mirror images" if self.info.mirrored else ""
    shape, size = " x ".join(map(str, self.info.shape)), in_decimals(nbytes(self.count, self.num_shards))
    content = f"{what} of {self.count:,} pictures{mirrored}, {shape}, in {self.num_shards:,} shards, {size}"
    check_room(self.path, needed, content, "or leave out --moments or --mirror")

  @contextlib.contextmanager
  def writing(self, number: int) -> Iterator[Shard]:
    """Context that writes a shard, which counts as complete once it is left without an error."""
    path = self.path / shard_name(number)
    with writing(path) as write:
      shard = Shard(self.info, write)
      yield shard
    write_atomically(self._part(number), json.dumps(dataclasses.asdict(shard.part), ensure_ascii=False) + "\n")

  def part(self, number: int) -> Part:
    """Returns the description of a shard that is complete.

    Raises:
      ValueError: it is not.
    """
    return read_json(self._part(number), Part, limit=MAX_JSON)

  def unreadable(self, numbers: Iterable[int]) -> dict[int, str]:
    """Returns the pictures of these complete shards that could not be read, and why."""
    return {row: why for number in numbers for row, why in self.part(number).unreadable}

  def finish(self, names: Sequence[str] | None = None, texts: Sequence[str] = ()) -> Info:
    """Describes the folder, whose shards are complete, and removes what killed processes left.

    Args:
      names: of the pictures, for the list of those that could not be read; by default their numbers.
      texts: one a picture, or none.

    Returns:
      The description.

    Raises:
      ValueError: no picture could be read.
    """
    totals, count, left_out = Totals(), 0, self.unreadable(range(self.num_shards))
    for number in range(self.num_shards):
      part = self.part(number)
      totals, count = totals + part.totals, count + part.records
    self.tell(left_out, names)
    if not count:
      raise ValueError(f"{self.path}: none of {self.count:,} pictures could be read; {UNREADABLE} there says why.")
    if texts:
      kept = [text for row, text in enumerate(texts) if row not in left_out]
      write_atomically(self.path / TEXTS, json.dumps(kept, ensure_ascii=False) + "\n")
    mean, std = totals.measured(self.info)
    info = dataclasses.replace(self.info, num_records=count, mean=mean, std=std, unreadable=len(left_out))
    # It comes last: a folder without it is not finished.
    write_atomically(self.path / INFO, _as_json(info))
    self.clean()
    return info

  def tell(self, left_out: dict[int, str], names: Sequence[str] | None = None) -> None:
    """Writes the list of pictures that could not be read, or removes it if there are none."""
    if not left_out:
      (self.path / UNREADABLE).unlink(missing_ok=True)
    else:
      lines = [f"{names[row] if names else row}: {why}\n" for row, why in sorted(left_out.items())]
      write_atomically(self.path / UNREADABLE, "".join(lines).encode(errors="backslashreplace"))

  def clean(self) -> None:
    """Removes the mark of an unfinished folder, and what killed processes left half written."""
    for path in self.path.iterdir():
      if path.name.endswith(PARTIAL):
        path.unlink(missing_ok=True)

  def _part(self, number: int) -> pathlib.Path:
    return self.path / shard_name(number).replace(ENDING, _PARTS)

  def _is_complete(self, number: int) -> bool:
    path = self._part(number)
    if not is_there(path):
      return False
    try:
      part = read_json(path, Part)
    except ValueError:
      return False
    return not part.records or is_complete(self.path / shard_name(number), part.records)


def _as_json(info: Info) -> str:
  """Content of info.json: what says nothing is left out, so that it is as in older versions."""
  own, plain = dataclasses.asdict(info), Info((1,), 0)
  kept = {key: value for key, value in own.items() if key in ("shape", "num_classes") or value != getattr(plain, key)}
  return json.dumps(kept, ensure_ascii=False) + "\n"


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
  if is_remote(path):
    raise ValueError(f"{path}: shards are written to a file system; mount the bucket, and give where it is.")
  if class_names and len(class_names) != num_classes:
    raise ValueError(f"{path}: expected {num_classes} class_names, one a class, got {len(class_names)}.")
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.glob(f"*{ENDING}")):
    ended = "" if is_there(folder / INFO) else f" of a run that did not end, without {INFO}"
    raise ValueError(f"{path} holds shards already{ended}; give another folder, or remove them.")
  info: Info | None = None
  totals, count = Totals(), 0
  with contextlib.ExitStack() as stack:
    for x0, label in batches:
      info = info or Info(x0.shape[1:], num_classes)
      if x0.shape[1:] != info.shape or label.shape != x0.shape[:1]:
        raise ValueError(f"expected x0 (n, {info.shape}) and label (n,), got {x0.shape} and {label.shape}.")
      with np.errstate(over="ignore"):
        values = np.asarray(x0, VALUES)[:, None, None]
      try:
        check_values(values, label, num_classes)
      except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
      totals += Totals.of(info, values)
      for one, number in zip(values, np.asarray(label, LABEL), strict=True):
        if count % shard_size == 0:
          stack.close()
          write = stack.enter_context(writing(folder / shard_name(count // shard_size)))
        write(number.tobytes() + one.tobytes())
        count += 1
  if info is None or not count:
    raise ValueError(f"{path}: no records to write.")
  if texts and len(texts) != count:
    raise ValueError(f"{path}: expected {count} texts, one a record, got {len(texts)}.")
  if texts:
    write_atomically(folder / TEXTS, json.dumps(list(texts), ensure_ascii=False) + "\n")
  mean, std = totals.measured(info)
  about: dict[str, Any] = {"num_records": count, "class_names": tuple(class_names), "autoencoder": autoencoder}
  # It comes last: a folder without it is not finished.
  write_atomically(folder / INFO, _as_json(dataclasses.replace(info, mean=mean, std=std, **about)))
  return count
