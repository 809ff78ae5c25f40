"""Writing of latents: shards that are whole or not there, so that a run that was stopped goes on.

Beside each shard lies a small file, see `Part`, with what is known of it; a shard without one is made anew. When all
are there, info.json is made of these files, and they go. `data.latents` describes the result.
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
import pydantic

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

Floats = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over latents, a number a channel, of which mean and standard deviation follow.

  Attributes:
    count: numbers that were added, of one channel.
    sums: of x0, or of the means of moments.
    squares: of these squared.
    variances: of moments: sums of the variances.
  """

  count: int = 0
  sums: Floats = ()
  squares: Floats = ()
  variances: Floats = ()

  def __add__(self, other: Totals) -> Totals:
    if not self.count:
      return other
    if not other.count:
      return self
    plus = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
    return Totals(
      self.count + other.count,
      plus(self.sums, other.sums),
      plus(self.squares, other.squares),
      plus(self.variances, other.variances),
    )

  @classmethod
  def of(cls, info: Info, values: np.ndarray) -> Totals:
    """Sums over stored values (n, views, parts, *space, C)."""
    wide, axes = values.astype(np.float64), tuple(range(values.ndim - 2))  # without the axis of parts
    first = wide[:, :, 0]
    sums, squares = first.sum(axes), np.square(first).sum(axes)
    variances = np.square(wide[:, :, 1]).sum(axes) if info.moments else np.zeros_like(sums)
    count = first.size // first.shape[-1]
    return cls(count, tuple(sums.tolist()), tuple(squares.tolist()), tuple(variances.tolist()))

  def measured(self, info: Info) -> tuple[Floats, Floats]:
    """Mean and standard deviation of x0, one a channel."""
    mean = np.array(self.sums) / self.count
    var = np.maximum(np.array(self.squares) / self.count - mean**2, 0) + np.array(self.variances) / self.count
    std = np.sqrt(var)
    if info.moments:
      mean, std = (mean - info.shift) * info.scale, std * np.abs(info.scale)
    return tuple(mean.tolist()), tuple(std.tolist())


@dataclasses.dataclass(frozen=True)
class Part:
  """A shard's file: what is known of it without reading it.

  Attributes:
    records: of the shard, which is no file if there are none.
    unreadable: rows of its pictures that could not be read, and why.
    totals: over its records.
  """

  records: pydantic.NonNegativeInt
  unreadable: tuple[tuple[int, str], ...] = ()
  totals: Totals = Totals()


class Shard:
  """A shard that is being written."""

  def __init__(self, info: Info, write: Any):
    self._info, self._write = info, write
    self._records, self._totals = 0, Totals()
    self._unreadable: list[tuple[int, str]] = []

  def add(self, values: np.ndarray, label: np.ndarray) -> None:
    """Writes records.

    Args:
      values: (n, views, parts, *space, C), float16.
      label: (n,) integers.

    Raises:
      ValueError: shapes or labels do not fit, or values are not finite.
    """
    info = self._info
    if values.shape[1:] != info.stored or label.shape != values.shape[:1]:
      raise ValueError(f"expected values (n, {info.stored}) and label (n,), got {values.shape} and {label.shape}.")
    check_values(values, label, info.num_classes)
    if len(values):
      self._totals += Totals.of(info, values)
    for one, number in zip(values, np.asarray(label, LABEL), strict=True):
      self._write(number.tobytes() + one.tobytes())
    self._records += len(values)

  def leave_out(self, row: int, reason: str) -> None:
    """Notes a picture that could not be read."""
    self._unreadable.append((row, reason))

  @property
  def part(self) -> Part:
    """Its description."""
    return Part(self._records, tuple(self._unreadable), self._totals)


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
    self.info = dataclasses.replace(info, made=json.loads(json.dumps({**info.made, "shard_records": shard_records})))
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
    """Describes the folder, whose shards are complete, and removes what was of use until then.

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
    """Writes the list of pictures that could not be read, if there are any."""
    if left_out:
      lines = [f"{names[row] if names else row}: {why}\n" for row, why in sorted(left_out.items())]
      write_atomically(self.path / UNREADABLE, "".join(lines).encode(errors="backslashreplace"))

  def clean(self) -> None:
    """Removes what was of use until info.json was there, and what killed processes left half written."""
    for path in self.path.iterdir():
      if path.name.endswith((_PARTS, PARTIAL)):
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


def check_values(values: np.ndarray, label: np.ndarray, num_classes: int) -> None:
  """Raises ValueError for values that are not finite, and labels that are not in [0, num_classes)."""
  if label.dtype.kind not in "iu" or np.any((label < 0) | (label >= max(num_classes, 1))):
    got = f"{label.dtype}, {label.min()} to {label.max()}"
    raise ValueError(f"labels must lie in [0, {max(num_classes, 1)}), integers, got {got}.")
  if not np.isfinite(values).all():
    raise ValueError("x0 holds values that are not finite, or not in float16; scale or remove them.")


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
