"""One writer to a folder: who is refused, what is stale, and what a holder sees when its folder is gone."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from pflow_jax.files import lock as module
from pflow_jax.files.lock import LOCK, Busy, Lock, TakenOver, Unwritable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(module, "SETTLE", 0.05)
  monkeypatch.setattr(module, "BEAT", 0.05)
  monkeypatch.setattr(module, "PATIENCE", 0.5)


def written(folder, **changes):
  """The lock of another holder: by default a process of this machine that is alive, this one."""
  with Lock(folder, "pflow train") as lock:
    own = json.loads(lock._content())
  folder.mkdir(exist_ok=True)
  (folder / LOCK).touch()
  own |= {"token": "another", "file": module._names(folder / LOCK, os.stat(folder / LOCK))}
  (folder / LOCK).write_text(json.dumps(own | changes))


def refused(folder, kind=ValueError, **options):
  with pytest.raises(kind, match="is being written by") as error:
    Lock(folder, "pflow train", **options).__enter__()
  return str(error.value)


def test_one_holder_at_a_time_who_is_named(tmp_path):
  folder = tmp_path / "run"
  with Lock(folder, "pflow train"):
    message = refused(folder, hint="--force takes it over")
    assert f"{folder} is being written by 'pflow train', process {os.getpid()} on " in message
    assert message.endswith("--force takes it over")
    with pytest.raises(ValueError, match="is being written by"):
      Lock(folder, "pflow train").refuse_early()
    Lock(folder, "pflow train", force=True).refuse_early()
    Lock(folder, "pflow train", active=False).refuse_early()
  with Lock(folder, "pflow merge") as lock:
    lock.check()
  assert list(folder.iterdir()) == [], "a lock goes with its holder"


def test_an_error_ends_it_and_other_processes_of_the_program_have_none(tmp_path):
  with pytest.raises(KeyboardInterrupt), Lock(tmp_path, "pflow train"):
    raise KeyboardInterrupt
  with Lock(tmp_path / "none", "pflow train", active=False) as lock, lock.writing():
    pass
  assert list(tmp_path.iterdir()) == []


def zombie():
  """A process that has ended and was not waited for."""
  child = subprocess.Popen([sys.executable, "-c", ""])
  while "Z" not in subprocess.run(["ps", "-o", "stat=", "-p", str(child.pid)], capture_output=True, text=True).stdout:
    time.sleep(0.01)
  return child


def test_a_process_of_this_machine_that_has_ended_holds_nothing(tmp_path, capsys):
  child = zombie()
  cases = [{"started": 1}, {"pid": child.pid, "started": module._started(os.getpid())}, {"pid": 2**30}]
  for changes in cases:
    written(tmp_path, **changes)
    Lock(tmp_path, "pflow train").refuse_early()
    with Lock(tmp_path, "pflow train") as lock:
      lock.check()
  child.wait()
  assert capsys.readouterr().out.count("taking over the lock of 'pflow train', process") == len(cases)


def test_of_another_machine_a_sign_of_life_is_waited_for(tmp_path, capsys):
  """Its pid says nothing here, and its clock may be wrong: a lock counts that changes."""
  for machine in (["other", "", ""], ["other", *module._machine()[1:]], [*module._machine()[:2], "other container"]):
    written(tmp_path, machine=machine, pid=1)
    with Lock(tmp_path, "pflow train"):
      pass
    written(tmp_path, machine=machine, pid=os.getpid())
    refused_by_one_that_beats(tmp_path)
  assert "waiting 0 s for a sign of life" in capsys.readouterr().out


def refused_by_one_that_beats(folder):
  os.utime(folder / LOCK, (0, 0))
  beats = threading.Timer(0.1, lambda: os.utime(folder / LOCK, (1, 1)))
  beats.start()
  refused(folder, Busy)  # another try may find that it has ended, as one that is preempted does after its last save
  beats.join()
  (folder / LOCK).unlink()


def test_a_copy_of_a_folder_is_not_held_by_who_holds_the_folder(tmp_path):
  with Lock(tmp_path / "a", "pflow train") as lock:
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    Lock(tmp_path / "b", "pflow train").refuse_early()
    with Lock(tmp_path / "b", "pflow train") as other:
      other.check()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with Lock(tmp_path / "c", "pflow train", force=True) as other:
      other.check()
    lock.check()
    (tmp_path / "a").rename(tmp_path / "renamed")
    refused(tmp_path / "renamed")


def test_a_folder_that_another_mount_shows_is_held_by_who_beats(tmp_path):
  """There the lock may be another file by number, on the holder's own machine."""
  for made in (["elsewhere", "device 1, file 2"], None, 3, {}):
    written(tmp_path, file=made)
    Lock(tmp_path, "pflow train").refuse_early()
    refused_by_one_that_beats(tmp_path)
  written(tmp_path, file=[str(tmp_path / LOCK), "device 1, file 2"])  # of storage that numbers files as it likes
  refused(tmp_path)


def test_a_holder_gives_signs_of_life(tmp_path):
  with Lock(tmp_path, "pflow train"):
    before = os.stat(tmp_path / LOCK).st_mtime_ns
    wait_for(lambda: os.stat(tmp_path / LOCK).st_mtime_ns > before)


def wait_for(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it took too long"
    time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"pid": "x", "machine": 4}', "[" * 100_000, "\ud800"])
def test_a_lock_that_is_none_is_taken_when_nobody_keeps_it(tmp_path, content):
  (tmp_path / LOCK).write_bytes(content.encode(errors="surrogatepass"))
  with Lock(tmp_path, "pflow train") as lock:
    lock.check()


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / LOCK)
  with Lock(tmp_path, "pflow train") as lock:
    lock.check()


def test_force_takes_it_over_and_the_other_stops_before_it_writes(tmp_path):
  with Lock(tmp_path, "pflow train") as first:
    with Lock(tmp_path, "pflow train", force=True) as second:
      with pytest.raises(TakenOver, match=f"was taken over by 'pflow train', process {os.getpid()}"), first.writing():
        (tmp_path / "file").touch()
      second.check()
    with pytest.raises(Unwritable, match="is gone"):
      first.check()
  assert list(tmp_path.iterdir()) == [], "nor does the first one remove the second one's lock, or write"


def test_of_many_that_find_a_stale_lock_at_once_one_has_it(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "SETTLE", 0.5)
  written(tmp_path, pid=2**30)
  start, held, refusals = threading.Barrier(8), [], []

  def take():
    start.wait()
    try:
      with Lock(tmp_path, "pflow train") as lock:
        lock.check()
        held.append(lock)
        time.sleep(1)
    # Busy while another writes it; TakenOver, before any write, by one that had still seen the stale one.
    except (ValueError, Busy, TakenOver) as error:
      refusals.append(str(error))

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(held), len(refusals)) == (1, 7)


@pytest.mark.parametrize("end", ["removed", "emptied", "moved", "made anew"])
def test_a_folder_that_is_gone_is_noticed_before_the_next_write(tmp_path, end):
  folder = tmp_path / "run"
  with Lock(folder, "pflow train") as lock:
    lock.check()
    if end == "emptied":
      (folder / LOCK).unlink()
    elif end == "moved":
      folder.rename(tmp_path / "elsewhere")
    else:
      shutil.rmtree(folder)
    if end == "made anew":
      folder.mkdir()
    with pytest.raises(Unwritable, match=f"{folder} was removed, emptied or unmounted"), lock.writing():
      (folder / "file").touch()
  assert not (folder / "file").exists()
  assert not (folder / LOCK).exists()


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
  return tmp_path / "run" if request.param == "disk" else request.getfixturevalue("bucket")


class StoreError(Exception):
  """As libraries of object stores raise them."""


@pytest.mark.parametrize("error", [OSError(errno.ETIMEDOUT, "Connection timed out"), StoreError("503")])
def test_a_look_that_is_not_answered_says_nothing_until_all_have_been_for_long(folder, error, monkeypatch):
  failed = []

  def fail(path):
    failed.append(path)
    raise error

  with Lock(folder, "pflow train") as lock:
    with monkeypatch.context() as patch:
      patch.setattr(module, "PATIENCE", 3600)
      patch.setattr(module, "_read", fail)
      wait_for(lambda: len(failed) > 2)
      with lock.writing():
        pass
    with monkeypatch.context() as patch:
      patch.setattr(module, "_read", fail)
      wait_for(lambda: lock._lost)
      with pytest.raises(Unwritable, match=f"{folder} could not be read for 0 s: .*(timed out|503)"), lock.writing():
        pass
    wait_for(lambda: lock._lost is None)
    with lock.writing():
      pass
  assert not (epath.Path(folder) / LOCK).exists()


def test_who_was_kept_from_looking_looks_before_it_gives_up(bucket):
  with Lock(bucket, "pflow train") as lock:
    stop(lock)
    time.sleep(module.PATIENCE)
    lock.check()
    (epath.Path(bucket) / LOCK).unlink()
    lock.check()
    time.sleep(module.PATIENCE)
    with pytest.raises(Unwritable, match="is gone"):
      lock.check()


def stop(lock):
  lock._ended.set()
  lock._heart.join()


def test_a_lock_that_cannot_be_removed_does_not_fail_what_is_done(folder, monkeypatch):
  def unlink(path, missing_ok=False):
    raise StoreError("503")

  with Lock(folder, "pflow train") as lock:
    monkeypatch.setattr(type(lock._path), "unlink", unlink)


def test_a_beat_that_hangs_until_after_the_end_leaves_no_lock(bucket, monkeypatch):
  read, began, goes_on = module._read, threading.Event(), threading.Event()

  def hang(path):
    found = read(path)
    if threading.current_thread() is not threading.main_thread():
      began.set()
      goes_on.wait(30)
    return found

  with Lock(bucket, "pflow train") as lock:
    monkeypatch.setattr(module, "_read", hang)
    assert began.wait(30)
  assert not lock._path.exists()
  goes_on.set()
  lock._heart.join(30)
  assert not lock._path.exists()


def test_what_storage_refuses_names_the_folder(tmp_path):
  with Lock(tmp_path, "pflow train") as lock:
    with pytest.raises(Unwritable, match=f"{tmp_path} cannot be written: .*No space left"), lock.writing():
      raise OSError(28, "No space left on device")
    with pytest.raises(Unwritable, match=f"^{tmp_path}/x is full$"), lock.writing():
      raise OSError(f"{tmp_path}/x is full")
    with pytest.raises(ZeroDivisionError), lock.writing():
      raise ZeroDivisionError


def test_a_folder_that_goes_while_it_is_written_to_is_said_to_be_gone(tmp_path):
  """Whatever the library says that finds it so."""
  folder = tmp_path / "run"
  with Lock(folder, "pflow train") as lock:
    saving = lock.writing()
    saving.__enter__()
    folder.rename(tmp_path / "elsewhere")
    error = OSError("no metadata of an array")
    with pytest.raises(Unwritable, match=f"{folder} was removed, emptied or unmounted"):
      saving.__exit__(OSError, error, None)
    (tmp_path / "elsewhere").rename(folder)


def test_in_an_object_store(bucket):
  path = epath.Path(bucket) / LOCK
  with Lock(bucket, "pflow train") as lock:
    before = path.read_text()
    wait_for(lambda: path.read_text() != before)
    refused(bucket)
    with Lock(bucket, "pflow train", force=True):
      wait_for(lambda: lock._lost)
      with pytest.raises(TakenOver), lock.writing():
        pass
  assert not path.exists()
  with Lock(bucket, "pflow train"):
    epath.Path("gs://bucket/copy").mkdir()
    path.copy("gs://bucket/copy/lock.json")
    with Lock("gs://bucket/copy", "pflow train") as other:
      other.check()
  with Lock(bucket, "pflow train") as lock:
    path.unlink()
    wait_for(lambda: lock._lost)
    with pytest.raises(Unwritable, match="is gone"):
      lock.check()
