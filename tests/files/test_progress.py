"""Bars on terminals and in notebooks, lines elsewhere."""

import importlib.util
import sys
import types

import pytest
import rich

from pflow_jax.files.progress import progress


def test_plain_lines_come_at_intervals(capsys, monkeypatch):
  now = iter([0.0, 1.0, 4.0, 10.0, 11.0, 12.0])
  monkeypatch.setattr("pflow_jax.files.progress.time.monotonic", lambda: next(now))
  with progress(26, initial=20, description="teacher", interval=10) as report:
    for step in range(21, 27):
      report.update(step, loss=0.5)
  out = capsys.readouterr().out.splitlines()
  assert out == [
    "teacher 21/26 loss 0.5",
    "teacher 24/26 0.3 steps/s  left 0:07  loss 0.5",
    "teacher 26/26 0.4 steps/s  left 0:00  loss 0.5",
  ]


def test_terminal_shows_a_bar(capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  with progress(3, description="student") as report:
    for step in (1, 2, 3):
      report.update(step, loss=0.25)
  out = capsys.readouterr().out
  assert "student" in out
  assert "3/3" in out
  assert "loss 0.25" in out


@pytest.mark.parametrize("widgets", [True, False])
def test_notebook_shows_a_bar_where_it_has_widgets(widgets, capsys, monkeypatch):
  """As IPython's kernel looks to rich: its module is there, the console is Jupyter's, the output is no terminal."""
  shown = []
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setattr(rich.get_console(), "is_jupyter", True)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if widgets and name == "ipywidgets" else None)
  monkeypatch.setattr(rich.progress.Progress, "start", lambda bar: shown.append(bar))
  with progress(3, description="student") as report:
    report.update(3, loss=0.25)
  assert len(shown) == int(widgets)
  assert ("student 3/3 loss 0.25" in capsys.readouterr().out) != widgets


def test_disabled_progress_is_silent(capsys):
  with progress(3, disable=True) as report:
    report.update(1)
    report.update(3)
  assert capsys.readouterr().out == ""
