"""Checksums of the files of a checkpoint, written beside them."""

from __future__ import annotations

import functools
import pathlib
import zlib

from pflow_jax.files.foreign import may_pass, read_json

CHECKSUMS = "checksums.json"


def checksums(path: pathlib.Path) -> dict[str, list[int]]:
  """[size, CRC-32] of each file of each item, by relative path.

  Files beside the items are left out: Orbax still changes them, and restoring does not need them.
  """
  return {
    str(file.relative_to(path)): checksum(file)
    for item in sorted(path.iterdir())
    if item.is_dir()
    for file in sorted(item.rglob("*"))
    if file.is_file()
  }


def checksum(file: pathlib.Path) -> list[int]:
  """[size, CRC-32] of a file, which is read once in a process unless it changes."""
  told = file.stat()
  return list(_checksum(file, told.st_size, told.st_mtime_ns, told.st_ino))


@functools.lru_cache(maxsize=4096)
def _checksum(file: pathlib.Path, *_: int) -> tuple[int, int]:
  size = crc = 0
  with file.open("rb") as f:
    while block := f.read(1 << 24):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return size, crc


def damage(path: pathlib.Path) -> str | None:
  """Describes the damage of the files of the checkpoint in `path`; None if they are intact."""
  try:
    if not (path / CHECKSUMS).is_file():
      return f"{CHECKSUMS} cannot be read: there is none"
    expected = read_json(path / CHECKSUMS, dict[str, tuple[int, int]])
    for name, (size, crc) in expected.items():
      file = path / name
      # Opening a pipe waits, and a device has no end.
      if ".." in file.parts or not file.is_relative_to(path) or not file.is_file():
        return f"{name} is missing"
      if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes instead of {size}"
      if checksum(file) != [size, crc]:
        return f"{name} does not match its checksum"
  except (OSError, ValueError) as error:
    if may_pass(error):
      raise
    return f"cannot be read: {error}"
  return None
