"""One writer to a folder: a lock that names its holder, and that shows when it is gone.

The lock is a file in the folder, on whatever that lies (a disk, NFS, gs://), and no lock of the operating system, which
few of these have for several machines. A holder on this machine is asked for by its process. Of one on another machine
it is waited for whether it still beats: clocks of machines are not compared.
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
from typing import Any

from etils import epath

from pflow_jax.folders import absolute, is_remote

LOCK = "lock.json"
BEAT = 15.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a holder on another machine counts as dead
SETTLE = 0.5  # seconds in which two that take a lock at once see each other

_MOST = 2**16  # bytes of a lock that are looked at


class Unwritable(OSError):
  """A folder that was written to takes nothing more, or is not there any more."""


class TakenOver(RuntimeError):
  """Another has taken the folder over."""


class Lock:
  """Holds a folder, which is made if need be, while the context lasts.

  Args:
    program: what the folder is written by.
    force: take it over from whoever holds it.
    hint: how a user does that, for the refusal.
    active: False does nothing, for all processes of a program but the first.
  Raises on entering: ValueError if another holds the folder, and is alive.
  """

  def __init__(
    self, folder: str | os.PathLike, program: str, *, force: bool = False, hint: str = "", active: bool = True
  ):
    self._folder, self._program, self._force, self._hint, self._active = str(folder), program, force, hint, active
    self._path = absolute(folder) / LOCK
    self._remote = is_remote(folder)
    self._token, self._beats = uuid.uuid4().hex, 0
    self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    self._lost: Exception | None = None
    self._ended = threading.Event()
    self._heart: threading.Thread | None = None

  def __enter__(self) -> Lock:
    if self._active:
      self._acquire()
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
    with contextlib.suppress(OSError, TakenOver):
      self._look()
      self._path.unlink()

  def refuse_early(self) -> None:
    """Raises what entering would where that can be told at once; before work that would be in vain."""
    found = _read(self._path) if self._active and not self._force else None
    if found is not None and _is_of_here(found[0]) and _runs(found[0]):
      raise ValueError(self._refusal(found[0]))

  def check(self) -> None:
    """Raises Unwritable if the folder is not the one that was locked, TakenOver if it belongs to another by now."""
    if self._active and not self._remote:
      self._look()
    elif self._lost is not None:
      raise self._lost  # seen by `_live`: a look into a bucket takes longer than a step

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """What is written meanwhile; raises Unwritable for an OSError, and as `check` before."""
    self.check()
    try:
      yield
    except Unwritable:
      raise
    except OSError as error:
      text = str(error)
      raise Unwritable(text if self._folder in text else f"{self._folder} cannot be written: {text}") from error

  def _acquire(self) -> None:
    found = _read(self._path)
    if found is None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if self._make() and not self._remote:
        return
    else:
      holder, pulse = found
      if not self._force and self._is_alive(holder, pulse):
        raise ValueError(self._refusal(holder))
      print(f"{self._folder}: taking over the lock of {_named(holder)}", flush=True)
      self._path.unlink(missing_ok=True)
      self._make()
      self._let_stop(holder)
    # Of several that have come so far the last one has it, and all see that.
    time.sleep(SETTLE)
    holder, _ = _read(self._path) or ({}, None)
    if holder.get("token") != self._token:
      raise ValueError(self._refusal(holder))

  def _let_stop(self, holder: dict[str, Any]) -> None:
    """Waits for one from whom the lock was taken by force: it sees that before it writes again, and still saves."""
    end = time.monotonic() + (PATIENCE if self._force and holder.get("pid") != os.getpid() else 0)
    while time.monotonic() < end and _is_of_here(holder) and _runs(holder):
      time.sleep(SETTLE)

  def _make(self) -> bool:
    """Writes the lock if there is none; whether it did."""
    if self._remote:
      self._path.write_text(self._content())
      return True
    try:
      with pathlib.Path(self._path).open("x") as file:
        file.write(self._content())
    except FileExistsError:
      return False
    return True

  def _content(self) -> str:
    own: dict[str, Any] = {
      "token": self._token,
      "program": self._program,
      "since": self._since,
      "beats": f"{self._beats:09}",
    }
    own |= {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "machine": _machine()}
    return json.dumps(own) + "\n"

  def _is_alive(self, holder: dict[str, Any], pulse: Any) -> bool:
    if _is_of_here(holder):
      return _runs(holder)
    print(f"{self._folder} is locked by {_named(holder)}; waiting {PATIENCE:.0f} s for a sign of life", flush=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(SETTLE)
      now = _read(self._path)
      if now is None:
        return False  # it has just ended
      if now[1] != pulse:
        return True
    return False

  def _refusal(self, holder: dict[str, Any]) -> str:
    way = "wait until it has ended, or give another folder" + (f"; {self._hint}" if self._hint else "")
    return f"{self._folder} is being written by {_named(holder)}: {way}"

  def _look(self) -> None:
    try:
      found = _read(self._path)
    except OSError as error:
      raise Unwritable(f"{self._folder} cannot be read any more: {error}") from error
    if found is None:
      raise Unwritable(f"{self._folder} was removed, emptied or unmounted while it was written to: {LOCK} is gone")
    if found[0].get("token") != self._token:
      raise TakenOver(f"{self._folder} was taken over by {_named(found[0])}; this process writes to it no more")

  def _live(self) -> None:
    """Gives signs of life, and looks for those of others, in a thread."""
    while not self._ended.wait(BEAT):
      try:
        self._look()
        self._beats += 1
        if self._remote:
          self._path.write_text(self._content())
        else:
          os.utime(self._path)  # needs no room on the disk
        self._lost = None
      except (Unwritable, TakenOver) as lost:
        self._lost = lost
      except Exception:  # of a store that does not answer for a while; who writes to it will say so
        continue


def _read(path: epath.Path) -> tuple[dict[str, Any], Any] | None:
  """What a lock says of its holder, and what changes with its beats; None if there is no lock.

  Of a file that is no lock nothing is known.
  """
  try:
    if is_remote(path):
      content = path.read_bytes()
      pulse: Any = content
    else:
      number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opened, NFS asks its server anew
      try:
        told = os.fstat(number)
        content = os.read(number, _MOST) if stat.S_ISREG(told.st_mode) else b""
        pulse = (content, told.st_mtime_ns)
      finally:
        os.close(number)
  except (FileNotFoundError, NotADirectoryError):
    return None
  try:
    holder = json.loads(content)
  except (ValueError, RecursionError):
    holder = {}
  return (holder if isinstance(holder, dict) else {}), pulse


def _named(holder: dict[str, Any]) -> str:
  if not holder:
    return f"one that {LOCK} does not name"
  program, pid, host, since = (str(holder.get(key, "?"))[:80] for key in ("program", "pid", "host", "since"))
  return f"{program!r}, process {pid} on {host}, since {since}"


def _is_of_here(holder: dict[str, Any]) -> bool:
  """Whether the holder is a process of this machine, of which all is known."""
  return holder.get("machine") == _machine() and type(holder.get("pid")) is int and holder["pid"] > 0


def _runs(holder: dict[str, Any]) -> bool:
  """Whether a process of this machine is still the one that took the lock."""
  now, then = _started(holder["pid"]), holder.get("started")
  return now is not None and (now == then or 0 in (now, then))


def _machine() -> list[str]:
  """What tells this machine, since it was started, from all others that see its processes under other numbers."""
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
  """When process `pid` of this machine was started, in a unit of the system's; None if there is none, 0 if unknown."""
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
