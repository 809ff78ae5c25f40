"""Atomic writing: a file is there whole or not at all, whenever a process is killed or its machine dies."""

from __future__ import annotations

import contextlib
import os
import pathlib

from etils import epath

from pflow_jax.files.folders import is_remote


def replace_safely(partial: epath.Path | pathlib.Path, path: epath.Path | pathlib.Path) -> None:
  """Renames a file once its content is on the disk, where the new name follows.

  Without that a machine that dies may leave the name of a file whose blocks were never written. An object store has
  what it took.

  Raises:
    OSError: the disk does not take them.
  """
  if is_remote(path):
    partial.replace(path)
    return
  sync(partial)
  partial.replace(path)
  sync(path.parent)


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
  """Writes a file beside its place and renames it: a reader finds the old content or all of the new one.

  The partial file has a name of this process alone. It is removed when writing fails; a killed process leaves it.

  Args:
    path: of this machine or of an object store (gs://...). Its folder must exist; a file that is there is replaced.
    content: a text is written as UTF-8.

  Raises:
    OSError: nothing can be written there.
  """
  file = epath.Path(path)
  partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
  try:
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    replace_safely(partial, file)
  except BaseException:
    with contextlib.suppress(OSError):  # the first error is the one to raise
      partial.unlink(missing_ok=True)
    raise


def sync(path: str | os.PathLike) -> None:
  """Waits until a file of this machine, or the names in a folder, are on the disk.

  Raises:
    OSError: a file cannot be written. A storage that does not sync folders is left to its own ways.
  """
  number = os.open(path, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError) if os.path.isdir(path) else contextlib.nullcontext():
      os.fsync(number)
  finally:
    os.close(number)
