"""One writer to a folder: who is refused, what is stale, and what a holder sees when its folder is gone."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from pflow_jax import lock as module
from pflow_jax.lock import LOCK, Lock, TakenOver, Unwritable


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
  (folder / LOCK).write_text(json.dumps(own | {"token": "another"} | changes))


def refused(folder, **options):
  with pytest.raises(ValueError, match="is being written by") as error:
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
    os.utime(tmp_path / LOCK, (0, 0))
    beats = threading.Timer(0.1, lambda: os.utime(tmp_path / LOCK, (1, 1)))
    beats.start()
    refused(tmp_path)
    beats.join()
    (tmp_path / LOCK).unlink()
  assert "waiting 0 s for a sign of life" in capsys.readouterr().out


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
    except ValueError as error:
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


def test_what_storage_refuses_names_the_folder(tmp_path):
  with Lock(tmp_path, "pflow train") as lock:
    with pytest.raises(Unwritable, match=f"{tmp_path} cannot be written: .*No space left"), lock.writing():
      raise OSError(28, "No space left on device")
    with pytest.raises(Unwritable, match=f"^{tmp_path}/x is full$"), lock.writing():
      raise OSError(f"{tmp_path}/x is full")
    with pytest.raises(ZeroDivisionError), lock.writing():
      raise ZeroDivisionError


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
  with Lock(bucket, "pflow train") as lock:
    path.unlink()
    wait_for(lambda: lock._lost)
    with pytest.raises(Unwritable, match="is gone"):
      lock.check()
