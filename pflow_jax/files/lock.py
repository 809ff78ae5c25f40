"""One writer to a folder: a lock that names its holder, and that shows when it is gone.

The lock is a file in the folder, on any storage (a disk, NFS, gs://). Locks of the operating system do not work across
machines on most of these. A holder on this machine is alive if its process runs. A holder on another machine is alive
if the lock's beat changes within a while; clocks of machines are not compared. The same test holds for a lock that is
not the file that its holder made: in a copy of the folder it does not beat, through another mount of the folder it
does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from etils import epath

from pflow_jax.files.folders import absolute, is_remote

LOCK = "lock.json"
BEAT = 15.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a holder counts as dead, and without an answer, storage as lost
SETTLE = 0.5  # seconds in which two that take a lock at once see each other

_MOST = 2**16  # bytes of a lock that are read


class Unwritable(OSError):
  """The folder can no longer be written to, or is gone."""


class TakenOver(RuntimeError):
  """Another process has taken the folder over."""


class Busy(RuntimeError):
  """Another machine's process holds the folder; it may have ended by the next try."""


class Lock:
  """Holds a folder, which is made if need be, while the context lasts.

  Args:
    folder: to hold.
    program: name of the program that writes to it.
    force: take it over from its holder.
    hint: advice on taking over, for the refusal.
    active: False does nothing, for all processes of a program but the first.

  Raises:
    ValueError: on entering, if a process of this machine holds the folder.
    Busy: on entering, if another machine's process gives signs of life.
  """

  def __init__(
    self, folder: str | os.PathLike, program: str, *, force: bool = False, hint: str = "", active: bool = True
  ):
    self._folder, self._program, self._force, self._hint, self._active = str(folder), program, force, hint, active
    self._path = absolute(folder) / LOCK
    self._remote = is_remote(folder)
    self._token, self._beats = uuid.uuid4().hex, 0
    self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    self._names = [str(self._path)]  # names of its file, see `_Found`
    self._lost: Exception | None = None  # the finding of the last look that got an answer
    self._heard = 0.0  # time of that look
    self._ended = threading.Event()
    self._heart: threading.Thread | None = None

  def __enter__(self) -> Lock:
    if self._active:
      self._acquire()
      self._heard = time.monotonic()
      self._heart = threading.Thread(target=self._live, name="pflow lock", daemon=True)
      self._heart.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._heart is None:
      return
    self._ended.set()
    self._heart.join(BEAT)
    with contextlib.suppress(Exception):  # the work is done; a lock that is left goes stale with its process
      if self._look():
        self._path.unlink()

  def refuse_early(self) -> None:
    """Raises the error of entering if it is known at once; called before work that would be in vain."""
    found = _read(self._path) if self._active and not self._force else None
    if found is not None and _runs(found):
      raise self._refusal(found)

  def check(self) -> None:
    """Raises TakenOver if another has the folder by now, Unwritable if it is gone, or could not be read for long."""
    if not self._active:
      return
    # A look into a bucket takes longer than a step. `_live` looks there, unless it has been silent.
    if not self._remote or self._is_silent():
      self._look()
    if self._lost is not None:
      raise self._lost

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """Context for writing to the folder; raises Unwritable for an OSError, and as `check` before."""
    self.check()
    try:
      yield
    except Unwritable:
      raise
    except OSError as error:
      if self._active:
        self._look()
      if self._lost is not None:  # the folder went while it was written to, which libraries say in other words
        raise self._lost from error
      text = str(error)
      raise Unwritable(text if self._folder in text else f"{self._folder} cannot be written: {text}") from error

  def _acquire(self) -> None:
    found = _read(self._path)
    if found is None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if self._make() and not self._remote:
        return
    else:
      if not self._force and (alive := self._alive(found)):
        raise self._refusal(alive)
      print(f"{self._folder}: taking over the lock of {_named(found.holder)}", flush=True)
      self._path.unlink(missing_ok=True)
      self._make()
      self._let_stop(found)
    # If several take the lock at once, the last one has it, and all see that.
    time.sleep(SETTLE)
    found = _read(self._path)
    if found is None or found.holder.get("token") != self._token:
      raise self._refusal(found)

  def _let_stop(self, found: _Found) -> None:
    """Waits for a holder whose lock was taken by force: it writes nothing new, but ends a save that is under way."""
    end = time.monotonic() + (PATIENCE if self._force and found.holder.get("pid") != os.getpid() else 0)
    while time.monotonic() < end and _runs(found):
      time.sleep(SETTLE)

  def _make(self) -> bool:
    """Writes the lock if there is none; returns whether it did."""
    if self._remote:
      self._path.write_text(self._content())
      return True
    try:
      with pathlib.Path(self._path).open("x") as file:
        self._names = _names(self._path, os.fstat(file.fileno()))
        file.write(self._content())
    except FileExistsError:
      return False
    return True

  def _content(self) -> str:
    own: dict[str, Any] = {
      "token": self._token,
      "program": self._program,
      "since": self._since,
      "file": self._names,
      "beats": f"{self._beats:09}",
    }
    own |= {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "machine": _machine()}
    return json.dumps(own) + "\n"

  def _alive(self, found: _Found) -> _Found | None:
    """Returns the lock of a holder that is alive, as it was seen last; None of one that is not."""
    if (runs := _runs(found)) is not None:
      return found if runs else None
    who = _named(found.holder)
    print(f"{self._folder} is locked by {who}; waiting {PATIENCE:.0f} s for a sign of life", flush=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(SETTLE)
      now = _read(self._path)
      if now is None:
        return None  # it has just ended
      if now.pulse != found.pulse:
        return now
    return None

  def _refusal(self, found: _Found | None) -> Exception:
    way = "wait until it has ended, or give another folder" + (f"; {self._hint}" if self._hint else "")
    text = f"{self._folder} is being written by {_named(found.holder if found else {})}: {way}"
    return ValueError(text) if found and _runs(found) else Busy(text)

  def _look(self) -> bool:
    """Returns whether the folder is surely held; `_lost` has the reason if not.

    A look without an answer changes nothing until others, who saw no beat either, may take this holder for dead.
    """
    try:
      found = _read(self._path)
    except Exception as error:  # stores have errors of their own
      if self._is_silent():
        self._lost = Unwritable(f"{self._folder} could not be read for {PATIENCE:.0f} s: {error}")
      return False
    self._heard = time.monotonic()
    if found is None:
      why = f"was removed, emptied or unmounted while it was written to: {LOCK} is gone"
      self._lost = Unwritable(f"{self._folder} {why}")
    elif found.holder.get("token") != self._token:
      who = _named(found.holder)
      self._lost = TakenOver(f"{self._folder} was taken over by {who}; this process writes to it no more")
    else:
      self._lost = None
    return self._lost is None

  def _is_silent(self) -> bool:
    return time.monotonic() - self._heard > PATIENCE

  def _live(self) -> None:
    """Gives signs of life, and looks for those of others, in a thread."""
    while not self._ended.wait(BEAT):
      with contextlib.suppress(Exception):  # storage may fail for a while: the next write to it raises the error
        if self._look() and not self._ended.is_set():  # a look may outlast the end, which removes the lock
          self._beat()

  def _beat(self) -> None:
    self._beats += 1
    if self._remote:
      self._path.write_text(self._content())
    else:
      os.utime(self._path)  # needs no room on the disk


class _Found(NamedTuple):
  """A lock that was read.

  A file that moves on this machine keeps one of its names; a copy that lies elsewhere has none of them.

  Attributes:
    holder: the lock's description of its holder.
    pulse: changes with every beat.
    names: names of its file.
  """

  holder: dict[str, Any]
  pulse: Any
  names: list[str]


def _read(path: epath.Path) -> _Found | None:
  """Reads the lock, None if there is none; the holder of a file that is no lock is unknown."""
  try:
    if is_remote(path):
      content = path.read_bytes()
      pulse: Any = content
      names = [str(path)]
    else:
      number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening makes NFS ask its server anew
      try:
        told = os.fstat(number)
        content = os.read(number, _MOST) if stat.S_ISREG(told.st_mode) else b""
        pulse, names = (content, told.st_mtime_ns), _names(path, told)
      finally:
        os.close(number)
  except (FileNotFoundError, NotADirectoryError):
    return None
  try:
    holder = json.loads(content)
  except (ValueError, RecursionError):
    holder = {}
  return _Found(holder if isinstance(holder, dict) else {}, pulse, names)


def _names(path: epath.Path, told: os.stat_result) -> list[str]:
  return [str(path), f"device {told.st_dev}, file {told.st_ino}"]


def _named(holder: dict[str, Any]) -> str:
  if not holder:
    return f"one that {LOCK} does not name"
  program, pid, host, since = (str(holder.get(key, "?"))[:80] for key in ("program", "pid", "host", "since"))
  return f"{program!r}, process {pid} on {host}, since {since}"


def _runs(found: _Found) -> bool | None:
  """Returns whether the process that took the lock still runs; None if only its beats can tell."""
  pid, then = found.holder.get("pid"), found.holder.get("started")
  if found.holder.get("machine") != _machine() or type(pid) is not int or pid <= 0:
    return None
  now = _started(pid)
  if now is None or (now != then and 0 not in (now, then)):
    return False
  # The holder may hold another folder, of which this one is a copy.
  made = found.holder.get("file")
  return True if isinstance(made, list) and any(name in made for name in found.names) else None


def _machine() -> list[str]:
  """Identity of this machine, since it was started, and of its process numbers."""
  parts = [socket.gethostname()]
  for source in (lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _namespace):
    try:
      parts.append(source())
    except OSError:  # no Linux
      parts.append("")
  return parts


def _namespace() -> str:
  return os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> int | None:
  """Start time of process `pid` of this machine, in the system's unit; None if there is none, 0 if unknown."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended
  except OSError:
    pass
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:
    pass
  return 0
