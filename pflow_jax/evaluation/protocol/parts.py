"""Arrays of many rows in a folder, made a part at a time: a program that was killed goes on with the part it was at."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from pflow_jax.evaluation.metrics import Joined
from pflow_jax.files.atomic import sync, write_atomically
from pflow_jax.files.foreign import read_json, shown

ABOUT = "about.json"
FORMAT = 2  # of what is kept of an evaluation; raised where samples, features, metrics or files change
_PARTIAL = ".partial"
Extra = Callable[[pathlib.Path], None]


def check_same(folder: pathlib.Path, there: Mapping[str, Any], about: Mapping[str, Any]) -> None:
  """Raises ValueError where a folder holds what was made of something else.

  Args:
    folder: named in the error.
    there: its description, perhaps with more than that.
    about: the description that it should have.
  """
  if there.get("format") != FORMAT:
    raise ValueError(
      f"{folder} holds an evaluation of another version of pflow_jax; name another folder, or remove this one"
    )
  before, now = (_flat(one, about) for one in (there, json.loads(json.dumps(about))))
  told = lambda key: f"{key} {shown(before.get(key), 80)}, not {shown(now.get(key), 80)}"
  if differing := [told(key) for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
    raise ValueError(f"{folder} holds what was made of {'; '.join(differing)}; name another folder, or remove this one")


def _flat(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
  """Returns the values of some keys, those of sections by "section.key"."""
  flat: dict[str, Any] = {}
  for key in values.keys() & keys:
    section = values[key]
    flat |= {f"{key}.{name}": value for name, value in section.items()} if isinstance(section, dict) else {key: section}
  return flat


class Parts:
  """Arrays of N rows, each in files of `size` rows, by which they are made and read.

  A part is a folder, which is there whole or not at all; one with files that are damaged counts as not there.

  Args:
    folder: of the parts.
    about: what the rows depend on, as plain JSON.
    count: N.
    size: rows of a part.

  Attributes:
    folder: of the parts.
    count: N.
    size: rows of a part.
  """

  def __init__(self, folder: str | os.PathLike, about: Mapping[str, Any], *, count: int, size: int):
    self.folder, self.count, self.size = pathlib.Path(folder), count, size
    self._about = {"format": FORMAT, **about, "rows": count, "rows of a part": size}

  def __len__(self) -> int:
    return -(-self.count // self.size)

  def check(self) -> None:
    """Raises ValueError where the folder has parts of something else."""
    if (path := self.folder / ABOUT).exists():
      check_same(self.folder, read_json(path), self._about)

  def rows_of(self, number: int) -> range:
    """Rows of a part."""
    return range(number * self.size, min((number + 1) * self.size, self.count))

  def missing(self) -> list[int]:
    """Numbers of the parts that are yet to be made."""
    return [number for number in range(len(self)) if self._open(number) is None]

  def num_missing(self) -> int:
    """Number of the rows that are yet to be made."""
    return sum(len(self.rows_of(number)) for number in self.missing())

  def write(
    self,
    number: int,
    arrays: Mapping[str, np.ndarray],
    extra: Extra | None = None,
  ) -> None:
    """Writes a part, whole or not at all.

    Args:
      number: of the part.
      arrays: by name, a row for each of its rows.
      extra: writes more files into the folder that it is given.

    Raises:
      OSError: the disk is full, or cannot be written to.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    if not (self.folder / ABOUT).exists():
      write_atomically(self.folder / ABOUT, json.dumps(self._about, indent=2) + "\n")
    path = self._path(number)
    partial = path.with_name(path.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a program that was killed
    try:
      partial.mkdir()
      for name, array in arrays.items():
        assert len(array) == len(self.rows_of(number)), (name, array.shape)
        with (partial / f"{name}.npy").open("wb") as file:
          np.save(file, array, allow_pickle=False)
          file.flush()
          os.fsync(file.fileno())
      if extra is not None:
        extra(partial)
      shutil.rmtree(path, ignore_errors=True)  # a damaged one
      sync(partial)
      partial.rename(path)
      sync(self.folder)
    except BaseException:
      with contextlib.suppress(OSError):  # the first error is the one to raise
        shutil.rmtree(partial)
      raise

  def rows(self, name: str) -> Joined:
    """Returns an array of all rows, which stays in the files.

    Raises:
      ValueError: parts are missing, or their array was removed.
    """
    parts = [self._open(number) for number in range(len(self))]
    if missing := [number for number, part in enumerate(parts) if part is None]:
      raise ValueError(f"{self.folder}: parts {shown(missing)} are missing; the same command makes them")
    found = [part[name] for part in parts if part is not None and name in part]
    if len(found) < len(parts):
      raise ValueError(f"{self.folder}: some parts have no {name} any more; name another folder")
    return Joined(found)

  def has(self, name: str) -> bool:
    """Returns whether all parts have an array of this name."""
    return all((path / f"{name}.npy").exists() for path in self.paths())

  def remove(self, name: str) -> None:
    """Removes an array from all parts."""
    for number in range(len(self)):
      (self._path(number) / f"{name}.npy").unlink(missing_ok=True)

  def paths(self) -> list[pathlib.Path]:
    """Folders of the parts, in their order."""
    return [self._path(number) for number in range(len(self))]

  def _path(self, number: int) -> pathlib.Path:
    return self.folder / f"part_{number:05}"

  def _open(self, number: int) -> dict[str, np.ndarray] | None:
    """Maps the arrays of a part; None where it is missing or damaged."""
    path = self._path(number)
    if not path.is_dir():
      return None
    try:
      arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(path.glob("*.npy"))}
    except (ValueError, EOFError):  # cut short
      return None
    return arrays if arrays and {len(array) for array in arrays.values()} == {len(self.rows_of(number))} else None
