"""Pictures, or latents of others, to a folder of latents: read in threads, encoded in batches, written in shards.

Pictures are decoded in threads while the devices encode those before. Processes each write their own shards, and need
nothing of each other until the end. A run that was stopped is gone on with by the same call: shards that are complete
are kept, the others made anew, and the folder becomes what it would have been. So are shards of which a picture that
could not be read can be read by now.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from pflow_jax.conversion.progress import digest
from pflow_jax.data.image_source import Pictures, digest_of
from pflow_jax.data.latent_shards import SHARD_RECORDS, LatentFolder
from pflow_jax.data.latents import INFO, LABEL, UNREADABLE, Info, read_info
from pflow_jax.files.folders import checked_folder, is_remote
from pflow_jax.files.foreign import is_there, shown
from pflow_jax.files.lock import Lock
from pflow_jax.files.progress import progress
from pflow_jax.mesh.distributed import agreed, from_first, is_first, together

MAX_BAD = 100  # pictures that cannot be read, after which a run stops
_SEEN = 60  # seconds after which a machine sees what another one wrote to a shared folder
_COMPARED = 1024  # pictures whose bytes are compared together
_AHEAD = 2  # batches that are decoded while one is encoded

Values = Callable[[np.ndarray, np.ndarray], Any]
"""Function of pictures (n, ...) and their numbers (n,) to values of which the first n, (views, parts, *space, C), are
stored; they may still be computed when it returns."""


class Chosen(Sequence[str]):
  """The pictures of a set, each once, by their keys; of several with one name, class and content it is the first.

  Attributes:
    rows: of the set, (n,).
    numbers: hashes of the keys, (n,) uint64.
    repeated: pictures that are left out, because one before is the same.

  Args:
    pictures: the set.
  """

  def __init__(self, pictures: Pictures):
    self._pictures, self._labels = pictures, pictures.labels
    self.rows = self._distinct()
    self.numbers = _hashes(pictures.key(int(row)) for row in self.rows)
    self.repeated = len(pictures) - len(self.rows)

  def _distinct(self) -> np.ndarray:
    """Rows of pictures of which none before is a copy; only those that have name and class of others are read."""
    pictures, labels, count = self._pictures, self._labels, len(self._pictures)
    names = _hashes(f"{'' if labels is None else labels[row]} {pictures.common_name(row)}" for row in range(count))
    _, group, sizes = np.unique(names, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(sizes[group] > 1)
    kept, seen = np.ones(count, bool), set[tuple[int, str]]()
    if not len(alike):
      return np.flatnonzero(kept)
    about: dict[str, Any] = {"unit": "pictures", "delay": 2.0}
    with (
      ThreadPoolExecutor(os.cpu_count()) as pool,
      progress(len(alike), 0, "names that repeat", not is_first(), **about) as report,
    ):
      for start in range(0, len(alike), _COMPARED):
        rows = alike[start : start + _COMPARED].tolist()
        for row, content in zip(rows, pool.map(self._content, rows), strict=True):
          if content:
            kept[row] = (group[row], content) not in seen
            seen.add((group[row], content))
        report.update(start + len(rows))
    return np.flatnonzero(kept)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, place: Any) -> str:
    return self._pictures.key(int(self.rows[place]))

  def read(self, place: int) -> tuple[np.ndarray, int]:
    """Returns a picture and its class; errors are those of the set."""
    return self._pictures.read(int(self.rows[place]))

  def content(self, place: int) -> str:
    """Returns a digest of a picture's bytes; "" where they cannot be read."""
    return self._content(int(self.rows[place]))

  def _content(self, row: int) -> str:
    try:
      return self._pictures.content(int(row))
    except ValueError:
      return ""

  @functools.cached_property
  def described(self) -> dict[str, Any]:
    """Digests of keys and classes in their order, by which other pictures are told before one is read."""
    about = {"keys": digest_of(self.numbers), "repeated": self.repeated}
    return about if self._labels is None else about | {"labels": digest_of(self._labels[self.rows].astype(LABEL))}


def _hashes(texts: Iterable[str]) -> np.ndarray:
  """Hashes of texts, (n,) uint64."""
  hashed = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts)
  return np.frombuffer(b"".join(hashed), "<u8")


class Batch(NamedTuple):
  """Pictures that were read.

  Attributes:
    shard: their shard.
    places: of all of them, ascending.
    kept: of those that could be read.
    arrays: these.
    label: their classes.
    unreadable: the others, and why.
    contents: digests of those that are noted.
  """

  shard: int
  places: np.ndarray
  kept: np.ndarray
  arrays: np.ndarray
  label: np.ndarray
  unreadable: dict[int, str]
  contents: dict[int, str]


def write(
  out: str | os.PathLike,
  info: Info,
  chosen: Chosen,
  values: Values,
  batch_size: int,
  *,
  shard_records: int = SHARD_RECORDS,
  max_bad: int = MAX_BAD,
  texts: Sequence[str] = (),
) -> Info:
  """Writes the folder `latents:<out>`, or goes on with it; all processes call it.

  Args:
    out: the folder.
    info: of the result, see `data.latent_shards.LatentFolder`.
    chosen: the pictures.
    values: of pictures.
    batch_size: pictures that `values` takes at a time.
    shard_records: pictures of a file.
    max_bad: pictures that cannot be read, after which it stops.
    texts: one a picture, or none.

  Returns:
    The folder's description.

  Raises:
    ValueError: the folder holds other things, its disk has no room, or too many pictures cannot be read.
  """
  if max_bad < 0 or shard_records < 1:
    raise ValueError(f"expected max_bad >= 0 and shard_records >= 1, got {max_bad} and {shard_records}")
  path = checked_folder(out, "out")
  if is_remote(path):
    raise ValueError(f"out: {path}: shards are written to a file system; mount the bucket, and give where it is.")
  folder = LatentFolder(path, info, len(chosen), shard_records)
  own = np.frombuffer(bytes.fromhex(digest(folder.info.made)), np.uint8)
  if not np.array_equal(from_first(own), own):
    raise ValueError(f"process {jax.process_index()} has other pictures than process 0; give all the same files")
  unfinished, left_to_do = agreed(folder.claim), functools.partial(_todo, folder, chosen)
  if unfinished or agreed(left_to_do):
    with Lock(path, "pflow latents", active=is_first()):
      todo = agreed(left_to_do)
      agreed(functools.partial(folder.reopen, todo))
      left = sum(len(folder.rows(number)) for number in todo)
      say(f"{len(chosen):,} pictures" + (f" ({chosen.repeated:,} repeated left out)" if chosen.repeated else ""))
      agreed(functools.partial(folder.check_room, todo))
      if left < len(chosen):
        say(f"going on after {len(chosen) - left:,} pictures")
      part = np.array_split(np.array(todo, int), jax.process_count())[jax.process_index()]
      bad = folder.unreadable(sorted({*range(folder.num_shards)} - {*todo}))
      _write_shards(folder, part.tolist(), chosen, values, batch_size, bad, max_bad)
      together("latents")
      agreed(functools.partial(_finish, folder, chosen, texts, max_bad))
  else:
    say(f"{path} is complete")
    if is_first():
      folder.clean()  # a process that was killed at its end may have left some
  result = read_info(path)
  assert result is not None
  return result


def say(text: str) -> None:
  """Prints a line, in the first process."""
  if is_first():
    print(text, flush=True)


def _todo(folder: LatentFolder, chosen: Chosen) -> list[int]:
  """Shards to be written: those that are not complete, and those of which more pictures can be read by now.

  Raises:
    ValueError: a shard that is complete is of other pictures.
  """
  missing = folder.todo()
  if missing and is_there(folder.path / INFO):
    return []  # parts that are gone are no reason to make anew what is complete
  kept = sorted({*range(folder.num_shards)} - {*missing})
  parts = {number: folder.part(number) for number in kept}
  noted = [pair for part in parts.values() for pair in part.contents]
  bad = [(row, number) for number, part in parts.items() for row, _ in part.unreadable]
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    for (row, before), now in zip(noted, pool.map(chosen.content, (row for row, _ in noted)), strict=True):
      if now != before:
        raise ValueError(
          f"{folder.path} holds other latents: {shown(chosen[row])} was another picture when it was encoded; give "
          "another folder, or remove it"
        )
    repaired = pool.map(functools.partial(_can_read, chosen), (row for row, _ in bad))
    again = {number for (_, number), can in zip(bad, repaired, strict=True) if can}
  return sorted({*missing, *again})


def _can_read(chosen: Chosen, place: int) -> bool:
  try:
    chosen.read(place)
  except ValueError:
    return False
  return True


def _finish(folder: LatentFolder, chosen: Chosen, texts: Sequence[str], max_bad: int) -> None:
  end = time.monotonic() + (_SEEN if jax.process_count() > 1 else 0)
  while (missing := folder.todo()) and time.monotonic() < end:
    time.sleep(1)
  if missing:
    raise ValueError(
      f"{folder.path}: {len(missing)} shards of other processes are not there, such as number {missing[0]}; give a "
      "folder that all processes see"
    )
  bad = folder.unreadable(range(folder.num_shards))
  if max_bad < len(bad) < len(chosen):  # each process counted its own
    _refuse(folder, bad, chosen, max_bad)
  folder.finish(chosen, texts)


def _refuse(folder: LatentFolder, bad: dict[int, str], chosen: Chosen, max_bad: int) -> NoReturn:
  folder.tell(bad, chosen)
  raise ValueError(f"{too_many(bad, chosen, max_bad)}; {UNREADABLE} in {folder.path} names them")


def _write_shards(
  folder: LatentFolder,
  todo: list[int],
  chosen: Chosen,
  values: Values,
  batch_size: int,
  bad: dict[int, str],
  max_bad: int,
) -> None:
  """Writes these shards; `bad` are the pictures of others that cannot be read."""
  # Batches begin with the shard, so that one made anew is the same.
  places = (
    (number, np.arange(start, min(start + batch_size, folder.rows(number).stop)))
    for number in todo
    for start in range(folder.rows(number).start, folder.rows(number).stop, batch_size)
  )
  named = "latents" if jax.process_count() == 1 else f"latents of process {jax.process_index()}"
  count, done = sum(len(folder.rows(number)) for number in todo), 0
  with progress(count, 0, named, not is_first(), unit="pictures") as report:
    batches = encoded(places, chosen, values, folder.is_noted)
    for number, group in itertools.groupby(batches, lambda pair: pair[0].shard):
      with folder.writing(number) as shard:
        for batch, stored in group:
          if len(batch.kept):
            with naming(batch, stored, chosen):
              shard.add(stored, batch.label)
          for place, why in batch.unreadable.items():
            shard.leave_out(place, why)
          for place, content in batch.contents.items():
            shard.note(place, content)
          bad = bad | batch.unreadable
          if len(bad) > max_bad:
            _refuse(folder, bad, chosen, max_bad)
          done += len(batch.places)
          report.update(done)


def too_many(bad: dict[int, str], chosen: Chosen, max_bad: int) -> str:
  """Words for more pictures that cannot be read than are let pass."""
  place, why = next(iter(bad.items()))
  return (
    f"max_bad: more than {max_bad} pictures cannot be read, such as {shown(chosen[place])} ({why}); repair them, "
    "or go on with a larger number: the same command reads them anew"
  )


@contextlib.contextmanager
def naming(batch: Batch, stored: np.ndarray, chosen: Chosen) -> Iterator[None]:
  """Context for storing values; an error gets the name of the first picture whose values are not finite, if any are."""
  try:
    yield
  except ValueError as error:
    finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    place = batch.kept[int(np.argmin(finite))]
    raise ValueError(f"latents of {shown(chosen[place])}: {error}") from error


def encoded(
  places: Iterable[tuple[int, np.ndarray]],
  chosen: Chosen,
  values: Values,
  is_noted: Callable[[int], bool] = lambda place: False,
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Yields batches of pictures with their values, each while the next one is encoded.

  Args:
    places: shard and places (n,) of the pictures of each batch.
    chosen: the pictures.
    values: of pictures.
    is_noted: whether the digest of a picture is wanted.
  """
  fetched = lambda batch, stored: (batch, np.asarray(stored)[: len(batch.kept)])
  before: tuple[Batch, Any] | None = None
  for batch in _read(places, chosen, is_noted):
    # Of a batch without a picture that could be read there is nothing to encode.
    stored = values(batch.arrays, chosen.numbers[batch.kept]) if len(batch.kept) else np.zeros(0)
    if before is not None:
      yield fetched(*before)
    before = batch, stored
  if before is not None:
    yield fetched(*before)


def _read(places: Iterable[tuple[int, np.ndarray]], chosen: Chosen, is_noted: Callable[[int], bool]) -> Iterator[Batch]:
  """Reads pictures in threads, some batches ahead of what is asked for."""

  def read(place: int) -> tuple[np.ndarray, int, str]:
    return *chosen.read(place), chosen.content(place) if is_noted(place) else ""

  waiting: collections.deque[tuple[int, np.ndarray, list[Future]]] = collections.deque()
  # Pillow decodes outside Python's lock, so threads help.
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    try:
      for shard, batch in places:
        waiting.append((shard, batch, [pool.submit(read, place) for place in batch.tolist()]))
        if len(waiting) > _AHEAD:
          yield _gathered(*waiting.popleft())
      while waiting:
        yield _gathered(*waiting.popleft())
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _gathered(shard: int, places: np.ndarray, futures: list[Future]) -> Batch:
  arrays, labels, kept, unreadable, contents = [], [], [], dict[int, str](), dict[int, str]()
  for place, future in zip(places.tolist(), futures, strict=True):
    try:
      array, label, content = future.result()
    except ValueError as error:
      unreadable[place] = str(error)
      continue
    arrays.append(array)
    labels.append(label)
    kept.append(place)
    if content:
      contents[place] = content
  return Batch(
    shard,
    places,
    np.array(kept, int),
    np.stack(arrays) if arrays else np.zeros(0),
    np.array(labels, LABEL),
    unreadable,
    contents,
  )
