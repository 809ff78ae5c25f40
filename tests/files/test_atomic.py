"""Files that appear whole or not at all."""

import os
import pathlib

import pytest
from etils import epath

from pflow_jax.files.atomic import write_atomically


@pytest.mark.parametrize(("content", "expected"), [(b"\0\xff", b"\0\xff"), ("π\n", "π\n".encode())])
def test_a_file_is_written_and_replaced(tmp_path, content, expected):
  for _ in range(2):
    write_atomically(tmp_path / "file", content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", expected)]
  write_atomically(str(tmp_path / "file"), "other")
  assert (tmp_path / "file").read_text() == "other"


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, method, error):
  kind = type(epath.Path(tmp_path))
  original = kind.write_bytes

  def fail(self, given):
    if method == "write_bytes":
      original(self, given[:1])
    raise error

  write_atomically(tmp_path / "file", "before")
  monkeypatch.setattr(kind, method, fail)
  with pytest.raises(type(error)):
    write_atomically(tmp_path / "file", "after")
  monkeypatch.undo()
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_at_the_end(tmp_path, monkeypatch):
  events, real, replace = [], os.fsync, pathlib.Path.replace

  def fsync(number):
    events.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
    real(number)

  def renamed(self, target):
    events.append("renamed")
    return replace(self, target)

  monkeypatch.setattr(os, "fsync", fsync)
  monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", renamed)
  write_atomically(tmp_path / "file", "text")
  assert events == [f"file.{os.getpid()}.partial", "renamed", tmp_path.name]


def test_what_cannot_be_removed_hides_no_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    write_atomically(tmp_path / "none" / "file", "text")
  (tmp_path / "no folder").touch()
  with pytest.raises(NotADirectoryError):
    write_atomically(tmp_path / "no folder" / "file", "text")
