"""Checked reading of files that others wrote: their kind, their size and their content.

Every reader of a user's file uses this module. A file is a regular one, JSON is bounded and has the types that its
reader names, an image is of a format that is decoded in this process. The size of a file bounds the memory that it
makes the program allocate; the memory of the machine bounds a user's requests. Errors are ValueErrors of one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import math
import os
import pathlib
import reprlib
import stat
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import pydantic
from etils import epath
from PIL import Image, UnidentifiedImageError

from pflow_jax.files.folders import is_remote

MAX_JSON = 32 * 2**20  # bytes; the index of the largest models has 10 MB
MAX_IMAGE_FILE = 2**30  # bytes
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_PROBLEMS_SHOWN = 8
# Numbers of the system's errors for a wrong path. All others are of a disk, a network or a busy machine.
_OF_A_PATH = (
  *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
  *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.EILSEQ, errno.EXDEV),
)
_QUOTING = '; on the shell quote a tuple, and within it its strings: \'(("a", 1), ("b", 2))\''
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def may_pass(error: BaseException) -> bool:
  """Returns whether another try may succeed: after a lack of memory or threads, an error of a disk or a network.

  A decoder's own OSErrors have no number; another try would not help.
  """
  if isinstance(error, OSError):
    return isinstance(error, (ConnectionError, TimeoutError)) or error.errno not in (None, *_OF_A_PATH)
  return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error))


def regular_file(path: str | os.PathLike) -> pathlib.Path:
  """Returns `path`, a regular file or a link to one; opening anything else can wait for ever or change a device.

  Raises:
    ValueError: the file is missing, cannot be looked at, or is a folder, pipe, socket or device.
  """
  _expect(path, stat.S_IFREG)
  return pathlib.Path(path)


def real_folder(path: str | os.PathLike) -> pathlib.Path:
  """Returns `path`, a folder or a link to one.

  Raises:
    ValueError: it is missing, cannot be looked at, or is a file.
  """
  _expect(path, stat.S_IFDIR)
  return pathlib.Path(path)


def is_there(path: str | os.PathLike) -> bool:
  """Returns whether there is anything at `path`.

  Raises:
    ValueError: that cannot be looked at.
  """
  return _kind(path) is not None


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
  """Reads a file, or an object of a store, of at most `limit` bytes.

  Raises:
    ValueError: it is no regular file, cannot be read, or is larger. Errors of a disk or a network pass as they are, in
      all functions of this module.
  """
  file = epath.Path(path) if is_remote(path) else regular_file(path)
  try:
    size = file.stat().length if is_remote(path) else file.stat().st_size  # type: ignore[union-attr]
    if size <= limit:
      return file.read_bytes()
  except FileNotFoundError as error:
    raise ValueError(f"{path}: there is no such file") from error
  except OSError as error:
    if may_pass(error):
      raise
    raise ValueError(f"{path}: cannot be read ({_reason(error)})") from error
  raise ValueError(f"{path}: expected at most {in_bytes(limit)}, got {in_bytes(size)}")


def read_text(path: str | os.PathLike, limit: int) -> str:
  """Reads a file of UTF-8 text; errors are those of `read_bytes`.

  Raises:
    ValueError: there are other bytes.
  """
  try:
    return read_bytes(path, limit).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: expected text in UTF-8, byte {error.start} is none") from error


def read_json(path: str | os.PathLike, schema: Any = dict[str, Any], *, limit: int = MAX_JSON) -> Any:
  """Reads a JSON file whose content must be of type `schema`.

  Args:
    path: of the file; gs:// works too.
    schema: a type that pydantic knows, such as a frozen dataclass or list[str]; JSON's own types are not converted.
    limit: largest size in bytes.

  Raises:
    ValueError: the content does not fit; the message lists every misfit.
  """
  return parse_json(read_bytes(path, limit), schema, where=str(path))


def parse_json(data: bytes | str, schema: Any = dict[str, Any], *, where: str) -> Any:
  """Parses JSON whose content must be of type `schema`; `where` names it in errors, see `read_json`."""
  try:
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    json.loads(text, parse_float=_finite, parse_constant=_finite, parse_int=_finite)  # a float may look like an int
    return _adapter(schema).validate_json(text, strict=True)
  except pydantic.ValidationError as error:
    raise ValueError(f"{where}: {_problems(error)}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: cannot be read as JSON ({_reason(error)})") from error


def check_type(value: Any, schema: Any, *, where: str) -> Any:
  """Returns a value as type `schema`.

  Raises:
    ValueError: it does not fit; the message lists every misfit.
  """
  try:
    return _adapter(schema).validate_python(value, strict=True)
  except pydantic.ValidationError as error:
    raise ValueError(f"{where}: {_problems(error)}") from error
  except RecursionError as error:
    raise ValueError(f"{where}: is nested too deeply") from error


def check_arguments(function: Callable, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
  """Returns keyword arguments for `function`, a class or a function, each of the type that it is annotated with.

  Lists become tuples. Numbers are finite; whole ones are below 2^31, the range in which arrays count, seeds below 2^32.
  Arguments without an annotation take any type.

  Raises:
    ValueError: for the first that does not fit, named `where`.argument.
  """
  hints = _hints(function)
  checked = {}
  for name, value in values.items():
    hint, place = hints.get(name, Any), f"{where}.{name}"
    try:
      checked[name] = check_type(_as_tuples(value), hint, where=place)
    except ValueError as error:
      quoting = isinstance(value, str) or (isinstance(value, tuple) and value and isinstance(value[0], str))
      is_tuple = "tuple" in str(hint)
      raise ValueError(f"{error}{_QUOTING if quoting and is_tuple else ''}") from error
    _check_numbers(checked[name], place, bits=32 if name == "seed" else 31)
  return checked


@contextlib.contextmanager
def decoding(what: str | os.PathLike) -> Iterator[None]:
  """Turns any error of a decoder on broken bytes into a ValueError of one sentence that begins with `what`.

  Errors for which `may_pass` holds pass as they are.
  """
  try:
    yield
  except Exception as error:  # decoders raise many types; all of them mean unreadable
    if may_pass(error):
      raise
    raise ValueError(f"{what}: {_reason(error)}") from error


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes, name: str = "") -> Iterator[Image.Image]:
  """Opens an image of one of IMAGE_FORMATS, whatever its name ends in: other formats start other programs.

  Args:
    source: a file, or its bytes.
    name: of bytes, for errors; by default that of the file.

  Raises:
    ValueError: it is none of them, has more pixels than Pillow's limit, or fails to decode in the body.
  """
  file = io.BytesIO(source) if isinstance(source, bytes) else regular_file(source)
  with decoding(f"cannot read the image {name or os.fsdecode(source)}"):
    if isinstance(file, pathlib.Path) and file.stat().st_size > MAX_IMAGE_FILE:
      raise ValueError(f"expected at most {in_bytes(MAX_IMAGE_FILE)}, got {in_bytes(file.stat().st_size)}")
    try:
      image = Image.open(file, formats=available_formats())
    except UnidentifiedImageError as error:
      raise ValueError(f"expected one of {', '.join(available_formats())}, its bytes are of none") from error
    with image:
      if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, got {image.width} x {image.height}")
      yield image


@functools.cache
def available_formats() -> tuple[str, ...]:
  """The formats of IMAGE_FORMATS that this Pillow decodes."""
  Image.init()
  return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def check_memory(what: str, nbytes: int, advice: str = "", *, have: int | None = None) -> None:
  """Raises ValueError for more bytes than the machine has memory.

  Args:
    what: the purpose of the bytes; the message begins with it.
    nbytes: how many are needed.
    advice: a remedy; the message ends with it.
    have: bytes of a device's memory, in place of the machine's.
  """
  owner = "this machine" if have is None else "a device"
  have = machine_memory() if have is None else have
  if nbytes > have:
    takes = f"{what}: takes {in_bytes(nbytes)} of memory, {owner} has {in_bytes(have)}"
    raise ValueError(f"{takes}; {advice}" if advice else takes)


@functools.cache
def machine_memory() -> int:
  """Bytes of memory that this process may have: the machine's, or the limit of its container."""
  limits = [psutil.virtual_memory().total]
  for name in _CGROUP_LIMITS:
    with contextlib.suppress(OSError, ValueError):
      limits.append(int(pathlib.Path(name).read_text()))
  return min(limits)


def in_bytes(count: int) -> str:
  """A number of bytes in words: "1.5 GiB"."""
  if count < 1024:
    return f"{count} bytes"
  power = min((int(count).bit_length() - 1) // 10, 6)
  return f"{count / 1024**power:.4g} {('KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power - 1]}"


def shown(value: Any, width: int = 60) -> str:
  """Writes a foreign value for a message: escaped, on one line, cut to `width`."""
  if isinstance(value, int) and abs(value) > 10**width:
    return f"a number of more than {width} digits"
  short = reprlib.Repr()
  short.maxstring = short.maxother = short.maxlong = width
  text = " ".join(short.repr(value).split()).encode("ascii", "backslashreplace").decode()
  return text if len(text) <= width else f"{text[: width - 3]}..."


def _kind(path: str | os.PathLike) -> int | None:
  """The type of the file at `path`, one of the constants of `stat`; None if there is none."""
  try:
    return stat.S_IFMT(os.stat(path).st_mode)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:  # a loop of links, too long a name, a NUL in it
    if may_pass(error):
      raise
    raise ValueError(f"{shown(str(path))}: cannot be looked at ({_reason(error)})") from error


def _expect(path: str | os.PathLike, expected: int) -> None:
  names = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
  kind = _kind(path)
  if kind is None:
    raise ValueError(f"{path}: there is no such {names[expected]}")
  if kind != expected:
    raise ValueError(f"{path}: expected a {names[expected]}, this is a {names.get(kind, 'device')}")


@functools.cache
def _adapter(schema: Any) -> pydantic.TypeAdapter:
  return pydantic.TypeAdapter(schema)


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
  return typing.get_type_hints(function)


def _as_tuples(value: Any) -> Any:
  return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check_numbers(value: Any, where: str, bits: int) -> None:
  if isinstance(value, (list, tuple)):
    for inner in value:
      _check_numbers(inner, where, bits)
  elif isinstance(value, int) and abs(value) >= 2**bits:
    raise ValueError(f"{where}: expected a whole number below 2^{bits}, got {shown(value)}")
  elif isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{where}: expected a finite number, got {value}")


def _finite(number: str) -> float:
  if not math.isfinite(value := float(number)):
    raise ValueError(f"expected a finite number, got {shown(number)}")
  return value


def _problems(error: pydantic.ValidationError) -> str:
  """All problems that pydantic found, each as "place: message, got value"."""
  found = []
  for problem in error.errors(include_url=False, include_context=False):
    place = ".".join(shown(part).strip("'") for part in problem["loc"])
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    found.append(f"{place}{': ' if place else ''}{message}, got {shown(problem['input'])}")
  more = f" and {len(found) - _PROBLEMS_SHOWN} more" if len(found) > _PROBLEMS_SHOWN else ""
  return "; ".join(found[:_PROBLEMS_SHOWN]) + more


def _reason(error: BaseException) -> str:
  text = getattr(error, "strerror", None) or str(error) or type(error).__name__
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split())[:300])
