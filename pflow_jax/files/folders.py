"""Checks of the folders and files that a user names for results, before any work is done."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence

from etils import epath

STORES = ("gs", "s3")  # object stores that checkpoints can lie in
MAX_BYTES = 3500  # of a path: systems take 4096, and files of a checkpoint add some 200
MAX_NAME = 255  # bytes

_PACKAGE = os.path.dirname(os.path.realpath(__file__))
# Nothing is written below the folders of _SYSTEM, and nothing directly into those of _CROWDED.
_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", _PACKAGE)
_CROWDED = (
  *("/dev/shm", "/home", "/media", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/usr/local", "/var", "/var/tmp"),
  *("/Applications", "/Library", "/System", "/Users", "/Volumes", "/private"),
)


def expanded(path: str | os.PathLike, name: str = "workdir") -> str:
  """Returns the path of a folder that is read, with the home folder for "~" and without slashes at its end.

  Raises:
    ValueError: it is empty or no path.
  """
  if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
    raise ValueError(f"{name}: expected a path, got {path!r}")
  text = os.fspath(path)
  if not text.strip():
    raise ValueError(f"{name}: expected a path such as runs/mine, got {text!r}")
  return os.path.expanduser(text).rstrip("/") or "/"


def told_apart(paths: Sequence[str]) -> list[str]:
  """Returns names of folders: as many last parts of the paths as tell them apart; equal paths get numbers."""
  parts = [path.rstrip("/").split("/") for path in paths]
  for length in range(1, max(map(len, parts), default=0) + 1):
    names = ["/".join(one[-length:]) for one in parts]
    if len(set(names)) == len(set(map(tuple, parts))):
      return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
  return []


class _Folder(type(epath.Path())):  # type: ignore[misc]
  """A folder whose name `glob` takes literally; Orbax would find no checkpoint in one with a "[" in its name."""

  def glob(self, pattern: str) -> Iterator[_Folder]:
    return map(type(self), epath.Path(glob.escape(str(self))).glob(pattern))


def absolute(path: str | epath.PathLike) -> epath.Path:
  """Returns the absolute path; libraries take its name literally."""
  folder = epath.Path(path)
  return _Folder(folder if is_remote(folder) else folder.expanduser().absolute())


def is_remote(path: str | epath.PathLike) -> bool:
  """Returns whether a path is of an object store."""
  return "://" in str(path)


def checked_folder(path: str | os.PathLike, name: str = "workdir") -> str:
  """Checks a folder that results are to be written to; it need not exist, and nothing is made.

  Args:
    path: of this machine, or gs://BUCKET/FOLDER.
    name: of the argument, in a refusal.

  Returns:
    the path as of `expanded`.

  Raises:
    ValueError: the path is empty, no folder, not writable, or one that a checkpoint cannot be read back from; or the
      folder is not the user's to fill: the root, a home, the system's, this package's.
  """
  text = _checked_text(path, name)
  if is_remote(text):
    return text
  real = os.path.realpath(text)
  home = os.path.realpath(os.path.expanduser("~"))
  temporary = (os.environ.get(name) or "/tmp" for name in ("TMPDIR", "TEMP", "TMP"))
  crowded = {home, os.path.dirname(_PACKAGE), *map(os.path.realpath, (*_CROWDED, *temporary))}
  if real in crowded or home.startswith(f"{real.rstrip('/')}/") or _is_of_system(real):
    raise ValueError(f"{name}: {text!r} holds other things than a run; give a folder of its own, such as runs/mine")
  _check_parent(os.path.abspath(text), text, name)
  return text


def checked_file(path: str | os.PathLike, name: str = "out", *, ending: str = "") -> str:
  """Checks a file that is to be written, as `checked_folder` does for folders.

  Args:
    path: of the file.
    name: of the argument, in a refusal.
    ending: of the file's name, which is added to `path`.

  Returns:
    the path, without the ending.
  """
  text = _checked_text(path, name)
  if os.fspath(path).rstrip(" ").rsplit("/", 1)[-1] in ("", ".", "..", "~"):
    raise ValueError(f"{name}: expected the path of a file, got {os.fspath(path)!r}; add its name")
  if is_remote(text):
    return text
  file = os.path.abspath(text + ending)
  real = os.path.realpath(os.path.dirname(file))
  if real == "/" or _is_of_system(real):
    raise ValueError(f"{name}: {text!r} lies among the files of the system; give a path of yours")
  if os.path.lexists(file) and not os.path.isfile(file):
    raise ValueError(f"{name}: expected the path of a file, {text + ending!r} is none; give another")
  _check_parent(os.path.dirname(file), text, name)
  return text


def _checked_text(path: str | os.PathLike, name: str) -> str:
  """Returns the path as `expanded`.

  Raises:
    ValueError: it has characters that a library would take for a pattern or an address.
  """
  text = expanded(path, name)
  given = os.fspath(path)
  bad = next((word for sign, word in {"\0": "NUL", "\\": "backslash"}.items() if sign in text), None)
  if bad or not _is_unicode(text):
    raise ValueError(f"{name}: {given!r} has a {bad or 'byte that is not UTF-8'}, and could not be read; rename it")
  scheme, separator, rest = text.partition("://")
  if separator and scheme in STORES and rest.strip("/.") and ".." not in rest.split("/"):
    return text
  if separator or any(part.endswith(":") for part in text.split("/")):
    known = ", ".join(f"{store}://BUCKET/FOLDER" for store in STORES)
    raise ValueError(f"{name}: {given!r} reads like an address; expected {known} or a path of this machine")
  if text.startswith("~"):
    raise ValueError(f"{name}: {given!r} is nobody's home here; for a folder of that name give ./{given}")
  if len(os.path.abspath(text).encode()) > MAX_BYTES or any(len(p.encode()) > MAX_NAME for p in text.split("/")):
    raise ValueError(
      f"{name}: expected a path of at most {MAX_BYTES} bytes in names of at most {MAX_NAME}, got {given[:40]!r}..."
    )
  return text


def _is_unicode(text: str) -> bool:
  return not re.search("[\ud800-\udfff]", text)


def _is_of_system(real: str) -> bool:
  within = lambda folder: f"{real}/".startswith(f"{os.path.realpath(folder)}/")
  return any(map(within, _SYSTEM)) and not f"{real}/".startswith("/dev/shm/")


def _check_parent(folder: str, text: str, name: str) -> None:
  """Refuses a path whose nearest existing parent is no folder, or cannot be written."""
  nearest = folder
  while not os.path.lexists(nearest):
    nearest = os.path.dirname(nearest)
  try:
    kind = os.stat(nearest).st_mode
  except OSError as error:
    raise ValueError(f"{name}: {text!r} leads nowhere ({nearest}: {error.strerror}); give another path") from error
  if not stat.S_ISDIR(kind):
    raise ValueError(f"{name}: expected a folder, {nearest!r} is none; give another path")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f"{name}: {nearest!r} cannot be written; give another path, or the right to write there")
