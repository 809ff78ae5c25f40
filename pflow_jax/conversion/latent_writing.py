"""Pictures, or latents of others, to a folder of latents: read in threads, encoded in batches, written in shards.

Pictures are decoded in threads while the devices encode those before. Processes each write their own shards, and need
nothing of each other until the end. A run that was stopped is gone on with by the same call: shards that are complete
are kept, the others made anew, and the folder becomes what it would have been.
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
from typing import Any, NamedTuple

import jax
import numpy as np

from pflow_jax.data.image_source import Pictures
from pflow_jax.data.latent_shards import SHARD_RECORDS, LatentFolder
from pflow_jax.data.latents import LABEL, UNREADABLE, Info, read_info
from pflow_jax.files.folders import checked_folder, is_remote
from pflow_jax.files.foreign import shown
from pflow_jax.files.lock import Lock
from pflow_jax.files.progress import progress
from pflow_jax.mesh.distributed import agreed, from_first, is_first, together

MAX_BAD = 100  # pictures that cannot be read, after which a run stops
_SEEN = 60  # seconds after which a machine sees what another one wrote to a shared folder
_AHEAD = 2  # batches that are decoded while one is encoded

Values = Callable[[np.ndarray, np.ndarray], Any]
"""Function of pictures (n, ...) and their numbers (n,) to values of which the first n, (views, parts, *space, C), are
stored; they may still be computed when it returns."""


class Chosen(Sequence[str]):
  """The pictures of a set, each once, by their keys; of several with one key it is the first.

  Attributes:
    rows: of the set, (n,).
    numbers: hashes of the keys, (n,) uint64.
    repeated: pictures that are left out, because another one has their key.

  Args:
    name: of the set, for errors.
    pictures: the set.

  Raises:
    ValueError: most keys are repeated, so they are none.
  """

  def __init__(self, name: str, pictures: Pictures):
    self._pictures = pictures
    keys = (pictures.key(row).encode(errors="surrogatepass") for row in range(len(pictures)))
    numbers = np.frombuffer(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys), "<u8")
    self.rows = np.sort(np.unique(numbers, return_index=True)[1])
    self.numbers, self.repeated = numbers[self.rows], len(numbers) - len(self.rows)
    if self.repeated > len(self.rows):
      again = pictures.key(int(np.setdiff1d(np.arange(len(numbers)), self.rows)[0]))
      raise ValueError(
        f"{name}: expected names that tell pictures apart, {self.repeated:,} of {len(numbers):,} are repeated, such as "
        f"{shown(again)}; rename them, or give fewer files"
      )

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, place: Any) -> str:
    return self._pictures.key(int(self.rows[place]))

  def read(self, place: int) -> tuple[np.ndarray, int]:
    """Returns a picture and its class; errors are those of the set."""
    return self._pictures.read(int(self.rows[place]))

  @functools.cached_property
  def digest(self) -> str:
    """Hash of the keys in their order."""
    return hashlib.blake2b(self.numbers.tobytes(), digest_size=16).hexdigest()


class Batch(NamedTuple):
  """Pictures that were read.

  Attributes:
    shard: their shard.
    places: of all of them, ascending.
    kept: of those that could be read.
    arrays: these.
    label: their classes.
    unreadable: the others, and why.
  """

  shard: int
  places: np.ndarray
  kept: np.ndarray
  arrays: np.ndarray
  label: np.ndarray
  unreadable: dict[int, str]


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
  own = np.frombuffer(bytes.fromhex(chosen.digest), np.uint8)
  if not np.array_equal(from_first(own), own):
    raise ValueError(f"process {jax.process_index()} has other pictures than process 0; give all the same files")
  folder = LatentFolder(path, info, len(chosen), shard_records)
  if agreed(folder.claim):
    with Lock(path, "pflow latents", active=is_first()):
      todo = agreed(folder.todo)
      left = sum(len(folder.rows(number)) for number in todo)
      say(f"{len(chosen):,} pictures" + (f" ({chosen.repeated:,} repeated left out)" if chosen.repeated else ""))
      agreed(functools.partial(folder.check_room, todo))
      if left < len(chosen):
        say(f"going on after {len(chosen) - left:,} pictures")
      part = np.array_split(np.array(todo, int), jax.process_count())[jax.process_index()]
      bad = folder.unreadable(sorted({*range(folder.num_shards)} - {*todo}))
      _write_shards(folder, part.tolist(), chosen, values, batch_size, bad, max_bad)
      together("latents")
      agreed(functools.partial(_finish, folder, chosen, texts))
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


def _finish(folder: LatentFolder, chosen: Chosen, texts: Sequence[str]) -> None:
  end = time.monotonic() + (_SEEN if jax.process_count() > 1 else 0)
  while (missing := folder.todo()) and time.monotonic() < end:
    time.sleep(1)
  if missing:
    raise ValueError(
      f"{folder.path}: {len(missing)} shards of other processes are not there, such as number {missing[0]}; give a "
      "folder that all processes see"
    )
  folder.finish(chosen, texts)


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
    for number, group in itertools.groupby(encoded(places, chosen, values), lambda pair: pair[0].shard):
      with folder.writing(number) as shard:
        for batch, stored in group:
          if len(batch.kept):
            with naming(batch, stored, chosen):
              shard.add(stored, batch.label)
          for place, why in batch.unreadable.items():
            shard.leave_out(place, why)
          bad = bad | batch.unreadable
          if len(bad) > max_bad:
            folder.tell(bad, chosen)
            raise ValueError(f"{too_many(bad, chosen, max_bad)}; {UNREADABLE} in {folder.path} names them")
          done += len(batch.places)
          report.update(done)


def too_many(bad: dict[int, str], chosen: Chosen, max_bad: int) -> str:
  """Words for more pictures that cannot be read than are let pass."""
  place, why = next(iter(bad.items()))
  return (
    f"max_bad: more than {max_bad} pictures cannot be read, such as {shown(chosen[place])} ({why}); repair or remove "
    "them, or go on with a larger number"
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
  places: Iterable[tuple[int, np.ndarray]], chosen: Chosen, values: Values
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Yields batches of pictures with their values, each while the next one is encoded.

  Args:
    places: shard and places (n,) of the pictures of each batch.
    chosen: the pictures.
    values: of pictures.
  """
  fetched = lambda batch, stored: (batch, np.asarray(stored)[: len(batch.kept)])
  before: tuple[Batch, Any] | None = None
  for batch in _read(places, chosen):
    # Of a batch without a picture that could be read there is nothing to encode.
    stored = values(batch.arrays, chosen.numbers[batch.kept]) if len(batch.kept) else np.zeros(0)
    if before is not None:
      yield fetched(*before)
    before = batch, stored
  if before is not None:
    yield fetched(*before)


def _read(places: Iterable[tuple[int, np.ndarray]], chosen: Chosen) -> Iterator[Batch]:
  """Reads pictures in threads, some batches ahead of what is asked for."""
  waiting: collections.deque[tuple[int, np.ndarray, list[Future]]] = collections.deque()
  # Pillow decodes outside Python's lock, so threads help.
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    try:
      for shard, batch in places:
        waiting.append((shard, batch, [pool.submit(chosen.read, int(place)) for place in batch]))
        if len(waiting) > _AHEAD:
          yield _gathered(*waiting.popleft())
      while waiting:
        yield _gathered(*waiting.popleft())
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _gathered(shard: int, places: np.ndarray, futures: list[Future]) -> Batch:
  arrays, labels, kept, unreadable = [], [], [], dict[int, str]()
  for place, future in zip(places.tolist(), futures, strict=True):
    try:
      array, label = future.result()
    except ValueError as error:
      unreadable[place] = str(error)
      continue
    arrays.append(array)
    labels.append(label)
    kept.append(place)
  return Batch(
    shard,
    places,
    np.array(kept, int),
    np.stack(arrays) if arrays else np.zeros(0),
    np.array(labels, LABEL),
    unreadable,
  )
