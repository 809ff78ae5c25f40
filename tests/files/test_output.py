"""Output that nobody reads, and what belongs in a log."""

import errno
import logging
import os
import subprocess
import sys
import threading

import pytest

from pflow_jax.files.output import LOG, logged, logged_tracebacks, tolerant_output, without_tracebacks
from tests.programs import ROOT

# By its path: the package would bring JAX, which takes seconds.
PROGRAM = """
import runpy, sys
with runpy.run_path("pflow_jax/files/output.py")["tolerant_output"]():
  for i in range(20000):
    print("a line that is long enough to fill the buffer of a pipe", flush=i % 2 == 0)
  print("on the terminal", file=sys.stderr)
  with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno()} went on")
  sys.exit(130)
"""


@pytest.mark.parametrize("redirect", ["| head -1", "| true", ">&-", ">&- 2>&- <&-", ">/dev/full", ">/dev/full 2>&1"])
def test_a_program_goes_on_and_keeps_its_code_when_nobody_reads(tmp_path, redirect):
  script = f'set -o pipefail; "$0" -c "$1" "$2" {redirect}'
  run = subprocess.run(
    ["bash", "-c", script, sys.executable, PROGRAM, tmp_path / "end"], capture_output=True, text=True, cwd=ROOT
  )
  assert run.returncode == 130
  assert run.stderr in ("on the terminal\n", "")
  number, _, rest = (tmp_path / "end").read_text().partition(" ")
  assert rest == "went on"
  assert int(number) > 2, "no file has the number of the output, which libraries write to"


def test_a_stream_that_is_full_is_tried_again(capsys):
  with tolerant_output():
    stream = sys.stdout
    real, stream._stream = stream._stream, Full()
    print("lost", flush=True)
    stream._stream = real
    print("kept")
    assert not stream.isatty()
  assert capsys.readouterr().out == "kept\n"


class Full:
  def write(self, text=""):
    raise OSError(errno.ENOSPC, "No space left on device")

  flush = write


def test_tracebacks_of_libraries_are_for_the_log(tmp_path, caplog, monkeypatch):
  monkeypatch.delenv("PFLOW_TRACEBACK", raising=False)
  logger = logging.getLogger("a library")
  with logged(str(tmp_path)):
    assert not (tmp_path / LOG).exists()
    logger.info("nothing")
    logger.warning("a word")
    try:
      raise OSError("disk full")
    except OSError:
      logger.exception("it failed")
  logger.warning("later")
  text = (tmp_path / LOG).read_text()
  assert "WARNING a library: a word\n" in text
  assert "ERROR a library: it failed\nTraceback" in text
  assert "later" not in text
  assert [without_tracebacks(record) for record in caplog.records if record.levelno >= logging.WARNING] == [1, 0, 1]
  monkeypatch.setenv("PFLOW_TRACEBACK", "1")
  assert all(map(without_tracebacks, caplog.records))


def test_errors_that_nobody_can_catch_are_logged(caplog, capsys):
  class Ends:
    def __del__(self):
      raise KeyError("at its end")

  hooks = sys.unraisablehook, threading.excepthook
  with logged_tracebacks():
    ends = Ends()
    del ends
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
  assert [type(record.exc_info[1]) for record in caplog.records] == [KeyError, ZeroDivisionError]
  assert capsys.readouterr().err == ""
  assert (sys.unraisablehook, threading.excepthook) == hooks


@pytest.mark.parametrize("place", ["missing", "file/below", "full"])
def test_a_log_that_cannot_be_written_is_no_error(tmp_path, capsys, place):
  (tmp_path / "file").touch()
  if place == "full":
    (tmp_path / "full").mkdir()
    os.symlink("/dev/full", tmp_path / "full" / LOG)
  with logged(str(tmp_path / place)):
    logging.getLogger("a library").error("it failed")
  assert "Traceback" not in capsys.readouterr().err


def test_there_is_no_log_in_an_object_store():
  before = list(logging.getLogger().handlers)
  with logged("gs://bucket/run"):
    assert logging.getLogger().handlers == before
