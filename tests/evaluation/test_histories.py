"""Curves of runs: what is read, what is left out, and how they are drawn in a terminal and in a picture."""

import io
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

import pflow_jax as pf
from pflow_jax.commands.cli import main
from pflow_jax.evaluation.histories import HEIGHT, as_text, histories_of, is_logarithmic, series_of, smoothed
from pflow_jax.training.writer import write_metrics

LONG = {"step": np.arange(1, 101), "loss": 1.0 / np.arange(1, 101), "margin": np.linspace(-1, 1, 100)}
SHORT = {"step": np.array([10, 20]), "loss": np.array([0.5, np.nan]), "loss_t0.00-0.25": np.array([0.1, 0.2])}


@pytest.fixture
def runs(tmp_path):
  """Two runs, one of which still trains: the line that it writes is not complete."""
  for name, history in {"long": LONG, "short": SHORT}.items():
    write_metrics(tmp_path / name, history)
    (tmp_path / name / "config.json").write_text("{}")
  with (tmp_path / "short" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 30, "lo')
  return tmp_path


def rows(text):
  """The plot's rows, without the numbers at the left."""
  return [line.partition("|")[2] for line in text.splitlines() if "|" in line]


def test_a_terminal_shows_them_in_80_columns_without_colours(runs, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  main(["plot", f"{runs}/long", f"{runs}/short/"])
  out = capsys.readouterr().out
  assert out.isascii()
  assert "\x1b" not in out
  assert max(map(len, out.splitlines())) <= 80
  assert out.splitlines()[0] == "loss, logarithmic"
  assert out.splitlines()[-2:] == ["* long   0.01 at step 100", "o short  0.5 at step 10"]
  drawn = rows(out)
  assert len(drawn) == HEIGHT
  assert drawn[0][0] == "*"
  assert drawn[-1][-1] == "*"
  assert "".join(drawn).count("o") == 1, "the only value, which is finite, at a tenth of the way"


def test_lines_lie_where_their_values_are():
  """Height and place of a straight line and of its logarithm, exactly."""
  series = {"": (np.array([0, 100]), np.array([0.0, 16.0]))}
  text = as_text(series, "x", log=False, width=80)
  columns = text.count("-")
  heights = [next(i for i, row in enumerate(rows(text)) if row[c : c + 1].strip()) for c in range(columns)]
  np.testing.assert_allclose(heights, HEIGHT - 1 - np.linspace(0, 16, columns), atol=0.51)
  series = {"": (np.arange(101), np.exp(np.linspace(0, 5, 101)))}
  assert rows(as_text(series, "x", log=True, width=80))[HEIGHT // 2].strip().count("*") >= 3, "straight too"
  assert rows(as_text({"": (np.array([5]), np.array([3.0]))}, "x", log=True))[HEIGHT // 2][0] == "*", "one value"


def test_a_picture_has_them_too(runs, capsys):
  main(["plot", f"{runs}/long", "--out", str(runs / "new" / "curves.png"), f"{runs}/short", "--smooth=0.5"])
  with Image.open(runs / "new" / "curves.png") as picture:
    assert picture.format == "PNG"
  assert "wrote" in capsys.readouterr().out
  figure = pf.plot.losses([runs / "long", str(runs / "short")], smooth=0.5)
  assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["long", "short"]
  long, short = figure.axes[0].lines
  np.testing.assert_allclose(long.get_ydata(), smoothed(LONG["loss"], 0.5))
  assert (long.get_marker(), len(short.get_xdata())) == ("", 1)
  assert short.get_marker() != "", "a lone point is seen"
  assert figure.axes[0].get_yscale() == "log"
  assert pf.plot.losses(runs / "long", metric="margin").axes[0].get_yscale() == "linear"
  assert Image.open(io.BytesIO(figure._repr_png_())).width > 500


def test_runs_without_the_metric_are_left_out_and_none_is_an_error(runs, caplog):
  told = histories_of([runs / "long", runs / "short"])
  assert list(series_of(told, "margin")) == ["long"]
  assert "short: has no values of 'margin' so far" in caplog.text
  with pytest.raises(ValueError, match="metric: no run has 'margn'; did you mean 'margin'"):
    series_of(told, "margn")
  with pytest.raises(ValueError, match=r"runs: there is no run in .*nothing"):
    histories_of(runs / "nothing")
  (runs / "fresh").mkdir()
  (runs / "fresh" / "config.json").write_text("{}")
  assert list(series_of(histories_of([runs / "fresh", runs / "long"]), "loss")) == ["long"], "it has just begun"
  with pytest.raises(ValueError, match="runs: expected at least one"):
    histories_of([])


def test_names_of_metrics_may_have_groups_and_patterns(runs):
  told = histories_of({"a": LONG, "b": runs / "short"})
  np.testing.assert_array_equal(series_of(told, "train/loss")["a"][1], LONG["loss"])
  assert list(series_of(told, "loss*")) == ["a loss", "b loss", "b loss_t0.00-0.25"]


def test_names_of_runs_tell_them_apart(runs):
  write_metrics(runs / "other" / "long", LONG)
  assert list(histories_of([runs / "long", runs / "short"])) == ["long", "short"]
  assert list(histories_of([runs / "long", runs / "other" / "long"])) == [f"{runs.name}/long", "other/long"]
  assert list(histories_of([LONG, SHORT])) == ["run (1)", "run (2)"]
  assert list(histories_of([runs / "long"] * 2)) == ["long (1)", "long (2)"]


def test_smoothing_is_tensorboards():
  """By its definition: weights 1, s, s^2 ... from the newest on, that sum to 1."""
  values = np.random.default_rng(0).normal(size=20)
  weights = 0.8 ** np.arange(20)
  expected = [np.dot(weights[: i + 1], values[i::-1]) / weights[: i + 1].sum() for i in range(20)]
  np.testing.assert_allclose(smoothed(values, 0.8), expected)
  np.testing.assert_array_equal(smoothed(values, 0.0), values)


def test_a_logarithmic_axis_is_refused_where_it_cannot_be(runs, capsys):
  with pytest.raises(ValueError, match="log: expected values above 0"):
    is_logarithmic({"": (np.arange(2), np.array([0.0, 1.0]))}, True)
  for argv, message in (
    (["--metric=margin", "--log", f"{runs}/long"], "--log: expected values above 0"),
    (["--smooth=1", f"{runs}/long"], "--smooth: expected a share in"),
    ([], "runs: expected at least one"),
    (["--out=/etc/x.png", f"{runs}/long"], "lies among the files of the system"),
  ):
    with pytest.raises(SystemExit) as stopped:
      main(["plot", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_on_an_object_store(bucket, capsys):
  write_metrics(bucket, LONG)
  main(["plot", bucket, f"--out={bucket}/curves.png"])
  assert "* run  0.01 at step 100\n" in capsys.readouterr().out
  assert (epath.Path(bucket) / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_an_early_version_is_read(tmp_path):
  """Its lines have no group, no memory and no noise levels, and are all that is asked of it."""
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "time": 1.0, "loss": 0.5, "skipped": 0}) + "\n")
  assert series_of(histories_of(tmp_path), "train/loss")[tmp_path.name][1] == [0.5]
