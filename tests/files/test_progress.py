"""Bars on terminals and in notebooks, lines elsewhere."""

import re
import sys

import pytest
from rich.errors import LiveError
from rich.live import Live

from pflow_jax.files import progress as module
from pflow_jax.files.progress import progress


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test moves: clock["now"]."""
  state = {"now": 0.0}
  monkeypatch.setattr(module.time, "monotonic", lambda: state["now"])
  return state


def test_plain_lines_come_at_intervals(capsys, clock):
  with progress(26, initial=20, description="teacher", interval=10) as report:
    report.say("compiling")
    for step, now in zip(range(20, 27), (0.0, 1.0, 4.0, 10.0, 11.0, 12.0, 13.0), strict=True):
      clock["now"] = now
      report.update(step, loss=0.5)
  assert capsys.readouterr().out.splitlines() == [
    "compiling",
    "teacher 21/26  1.0 steps/s  left 0:05  loss 0.5",
    "teacher 24/26  0.4 steps/s  left 0:06  loss 0.5",
    "teacher 26/26  0.5 steps/s  in 0:13  loss 0.5",
  ]


def test_what_ends_early_says_so(capsys, clock):
  def work():
    with progress(26, description="compare", unit="runs") as report:
      report.update(0)
      clock["now"] = 120.0
      report.update(3)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    work()
  assert capsys.readouterr().out.splitlines()[-1] == "compare 3/26  stopped  40 s/run  in 2:00"


def test_what_was_done_before_is_not_said_to_have_stopped(capsys, clock):
  with progress(4, description="teacher") as report:
    report.update(4)
    report.say("already trained")
  assert capsys.readouterr().out == "already trained\n"


def test_a_delayed_bar_is_shown_once_it_takes_long(capsys, clock):
  for seconds, lines in ((1.0, 0), (3.0, 2)):
    with progress(4, description="sampling", delay=2.0) as report:
      for step in (1, 2, 3, 4):
        clock["now"] += seconds / 4
        report.update(step)
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_a_terminal_shows_bars_inside_bars(capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  with progress(3, description="compare") as outer:
    outer.say("run [1] of 3")
    with progress(7, description="student") as inner:
      inner.update(7, loss=0.25)
      inner._screen.told(inner, "")
    outer.update(3)
  out = capsys.readouterr().out
  assert "run [1] of 3" in out, "the text is no markup"
  assert "7/7 loss 0.25" in out
  last = out[out.rindex("compare") :]
  assert "3/3" in last
  assert "student" not in last, "its row went with its work"


@pytest.mark.parametrize(("done", "loss"), [(4000, "loss 0.1234"), (1000, "loss 0…")])
def test_a_terminal_of_80_columns_has_room_for_the_loss_and_cuts_nothing_else(done, loss, capsys, clock, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  monkeypatch.setenv("COLUMNS", "80")
  with progress(4000, description="flow_matching") as report:
    report.update(0)
    clock["now"] = done / 81.3
    report.update(done, loss=0.1234)
  last = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out.splitlines()[0])
  assert f"flow_matching {'━' * 3}" in last
  assert f" {done}/4000 " in last
  assert "81.3 steps/s" in last
  assert loss in last


def test_work_goes_on_without_a_bar_where_the_terminal_has_one_already(monkeypatch):
  def start(self):
    raise LiveError("Only one live display may be active at once")

  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  monkeypatch.setattr(Live, "start", start)
  with progress(3) as report:
    report.say("compiling")
    report.update(3)
  assert report.done == 3


def test_disabled_progress_is_silent(capsys):
  with progress(3, disable=True) as report:
    report.say("compiling")
    report.update(1)
    report.update(3)
  assert capsys.readouterr().out == ""
