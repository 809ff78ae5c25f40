"""The files of an evaluation: what they say, that they need no other file, and that no text breaks out of them."""

import base64
import dataclasses
import html.parser
import io
import json
import types

import numpy as np
import pytest
from PIL import Image

from pflow_jax.evaluation import figures
from pflow_jax.evaluation.measure import Report
from pflow_jax.evaluation.report import EvaluatedRun, best, losses, markdown, metrics_by_nfe, samples_of, save_report

VOID = ("meta", "img")


class Parsed(html.parser.HTMLParser):
  """What is in a page.

  Attributes:
    tags: opened tags with their attributes.
    text: all text.
    bold: texts in bold.
  """

  def __init__(self, page):
    super().__init__()
    self.tags, self.text, self.bold, self._open = [], "", [], []
    self.feed(page)
    assert self._open == [], "every element ends"

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if self._open and self._open[-1] == "b":
      self.bold.append(data)


def row(name, nfe, alignment, fd, recall):
  own = {} if alignment is None else {"alignment": alignment, "alignment_ratio": (alignment / 0.1, 0.01)}
  fd = {"fd": fd, "fd_ratio": 1.0 if alignment is None else (fd / 0.3, 0.02)}
  return {"name": name, "nfe": nfe, "images_per_second": 100.0, **own, **fd, "diversity_ratio": 0.9, "recall": recall}


@pytest.fixture
def report(dataset):
  rows = [
    row("teacher, 1 step", 1, 0.4, 9.0, 0.1),
    row("teacher, 4 steps", 4, 0.1, 2.0, 0.97),
    row("teacher, 8 steps", 8, 0.01, 0.4, 0.98),
    row("teacher, 128 steps", 128, None, 0.3, 0.99),
    row("student, 1 NFE (<one>)", 1, 0.08, 0.39, 0.96),
    row("student, 4 NFE (four)", 4, 0.04, 0.39, 0.95),
  ]
  about = {"data": "a <b>", "num_samples": 1200, "num_real": 1797, "features": "classifier, 5 steps", "device": "cpu"}
  samples = {one["name"]: np.full((12, 8, 8, 1), i / 9) for i, one in enumerate(rows)}
  students = {one["name"] for one in rows if one["name"].startswith("student")}
  return Report(rows, about, samples, np.arange(12) % 10, np.zeros((20, 8, 8, 1)), {}, students, dataset)


@pytest.fixture
def dataset():
  return types.SimpleNamespace(
    name="a <b>", shape=(8, 8, 1), num_classes=10, class_names=tuple("0123456789"), autoencoder=""
  )


@pytest.fixture
def runs():
  settings = types.SimpleNamespace(plain=lambda: {"data": {"name": "</pre><script>alert(1)</script>"}})
  history = {"step": np.arange(1, 5) * 100, "loss": np.array([1.0, 0.5, np.nan, 0.2])}
  return {"runs/<one>": EvaluatedRun(settings, history), "runs/four": EvaluatedRun(settings, {})}


ABOUT = {"when": "2026-08-02T10:11:12+00:00", "versions": {"python": "3.11.7", "jax": "0.10.2"}}


def test_best_values_are_among_equals(report):
  """The teacher's 8 and 128 steps are beyond a student's evaluations, and speed is no merit; ties are all best."""
  found = best(report)
  name = lambda i: report.rows[i]["name"]
  by_column = {key: {name(i) for i, k in found if k == key} for _, key in found}
  four, one = "student, 4 NFE (four)", "student, 1 NFE (<one>)"
  assert by_column["alignment"] == by_column["alignment_ratio"] == {four}
  assert by_column["fd"] == by_column["fd_ratio"] == {one, four}
  assert by_column["recall"] == {"teacher, 4 steps"}
  assert len(by_column["diversity_ratio"]) == 4
  assert "images_per_second" not in by_column
  report.rows[4]["recall"] = float("nan")
  assert {report.rows[i]["name"] for i, key in best(report) if key == "recall"} == {"teacher, 4 steps"}
  alone = dataclasses.replace(report, rows=report.rows[:4], students=set())
  assert {key: alone.rows[i]["name"] for i, key in best(alone)}["fd"] == "teacher, 8 steps"


def test_the_table_has_a_title_conditions_units_and_marks(report):
  text = markdown(report, report.about | ABOUT)
  assert text.startswith("# Evaluation on a <b>\n\n1,200 samples of every sampler")
  for part in ("1,797 of the data", "2026-08-02 10:11 UTC", "on cpu", "jax 0.10.2", " **0.040** |", "at most 4"):
    assert part in text, part
  for title in report.columns.values():
    assert title == "sampler" or f"* {title}: " in text
  assert "in units of the data (images are in [-1, 1]); lower is better" in text
  assert "Fréchet distance to the data (classifier, 5 steps); lower is better" in text


def test_files_of_an_evaluation(report, dataset, runs, tmp_path):
  content = save_report(report, tmp_path / "deep" / "out", runs)
  folder = tmp_path / "deep" / "out"
  names = {"evaluation.json", "evaluation.md", "evaluation.html", "samples.png"}
  assert {path.name for path in folder.iterdir()} == names
  assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(content))
  assert content["workdirs"] == list(runs)
  assert set(content["versions"]) == {"python", "pflow-jax", "jax", "jaxlib", "flax", "numpy"}
  text = (folder / "evaluation.html").read_text(encoding="utf-8")
  page = Parsed(text)
  # One file: no link, no script, no picture but those that it holds.
  assert not [one for one in page.tags if one[0] in ("script", "link", "a", "iframe") or "href" in one[1]]
  sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
  assert len(sources) == 3, "samples, metrics, loss"
  assert "url(" not in text
  for source in sources:
    kind, _, content = source.partition(";base64,")
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
      image.load()
  assert base64.b64decode(sources[0].partition(",")[2]) == (folder / "samples.png").read_bytes()
  # Texts stay texts, whatever they are.
  assert "</pre><script>alert(1)</script>" in page.text
  assert "student, 1 NFE (<one>)" in page.text
  assert "0.040" in page.bold
  assert [attrs for tag, attrs in page.tags if tag == "html"] == [{"lang": "en"}]


def test_the_picture_has_the_error_of_every_row(report, dataset):
  texts = [text.get_text() for text in samples_of(report)["samples.png"].texts]
  for one in ("error", "reference", "0.100", "0.400", "0.040", "0.080", "teacher, 128 steps"):
    assert one in texts, one
  assert "teacher, 8 steps" not in texts
  assert any("root-mean-square distance to the teacher's 128 steps" in text.replace("\n", " ") for text in texts)


def test_points_have_their_trajectories(report):
  dataset = types.SimpleNamespace(name="board", shape=(2,), num_classes=1, class_names=())
  points = {name: np.random.default_rng(0).normal(size=(50, 2)) for name in report.samples}
  paths = {name: np.zeros((3, 4, 2)) for name in ("teacher, 128 steps", "student, 4 NFE (four)")}
  drawn = samples_of(dataclasses.replace(report, samples=points, real=np.ones((9, 2)), paths=paths, dataset=dataset))
  assert [axes.get_title() for axes in drawn["trajectories.png"].axes] == list(paths)
  assert [axes.get_title() for axes in drawn["samples.png"].axes][:2] == ["data", "teacher, 128 steps"]


def test_curves_by_evaluations_and_losses(report, runs, monkeypatch):
  monkeypatch.setattr(figures, "curve_panels", lambda panels, **_: panels)
  monkeypatch.setattr(figures, "curves", lambda series, **options: (series, options))
  report.rows[0]["fd_ratio"], report.rows[1]["fd_ratio"] = (30.0, np.nan), (np.inf, 1.0)
  alignment, fd = metrics_by_nfe(report).values()
  assert alignment["teacher"] == ([1, 4, 8], pytest.approx([4, 1, 0.1]), [0.01] * 3)
  assert (fd["teacher"][0], fd["teacher"][2]) == ([1, 8, 128], [0.0, 0.02, 0.0]), "what is not finite is not drawn"
  assert list(fd) == ["teacher", "<one>", "four"]
  series, options = losses(runs)
  assert {name: [list(values) for values in one] for name, one in series.items()} == {
    "<one>": [[100, 200, 400], [1.0, 0.5, 0.2]]
  }
  assert (options["yscale"], options["xscale"]) == ("log", "linear")
  settings = runs["runs/four"].settings
  negative = {"a": EvaluatedRun(settings, {"step": np.arange(2), "loss": np.array([-1.0, 1.0])})}
  assert losses(negative)[1]["yscale"] == "linear"
  alike = {f"{folder}/same": runs["runs/<one>"] for folder in "ab"}
  assert list(losses(alike)[0]) == ["a/same", "b/same"]
  assert losses({"a": EvaluatedRun(settings, {})}) is None
