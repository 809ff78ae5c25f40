"""What a notebook calls: the twelve lines, without a folder and with one."""

import io
import os
import re
import signal
from unittest import mock

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import pflow_jax as pf
from pflow_jax.checkpoints import steps as saved_steps
from pflow_jax.commands import library
from pflow_jax.commands import run as commands_run
from pflow_jax.commands.cli import main
from pflow_jax.evaluation import figures
from pflow_jax.mesh.sharding import to_host
from pflow_jax.training.keeping import Keeper

pytestmark = pytest.mark.usefixtures("float32")
SMALL = dict(patch_size=2, width=16, depth=1, num_heads=2)
QUICK = dict(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2, quiet=True)


@pytest.fixture(scope="module")
def digits():
  return pf.data.load("digits")


@pytest.fixture(scope="module")
def teacher(digits):
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    objective = pf.FlowMatching(cond_dropout=0.1)
    return pf.train(objective, digits, pf.DiT(**SMALL), steps=4, batch_size=16, log_every=2)


@pytest.fixture(scope="module")
def student(teacher):
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return pf.distill(teacher, pf.Imitation(nfe=1), pf.GMFlowHead(num_components=3), steps=3, batch_size=16)


def test_the_twelve_lines(teacher, student, tmp_path, monkeypatch):
  x = student.sample(16, labels=[3, 7], seed=1)
  assert (x.shape, x.dtype) == ((16, 8, 8, 1), np.float32)
  assert not np.array_equal(x[0], x[2]), "each from its own noise"
  np.testing.assert_array_equal(x, student.sample(16, labels=["3", "7"], seed=1))
  assert list(teacher.history["step"]) == [2, 4]
  assert teacher.history["loss"].shape == (2,)
  assert re.fullmatch(r"Run\(imitation, dit with head gmflow, [\d,]+ parameters, on digits, 3 steps\)", repr(student))
  report = student.evaluate(**QUICK)
  assert [row["nfe"] for row in report.rows] == [4, 128, 1]
  assert "student, 1 NFE" in repr(report)
  assert report.samples["student, 1 NFE"].shape == (128, 8, 8, 1)
  teacher.save(tmp_path / "t")
  saved = student.save(tmp_path / "s")
  assert student.workdir == saved == str(tmp_path / "s")
  again = pf.load(saved)
  assert again.steps == 3
  with monkeypatch.context() as patched:
    patched.setattr(saved_steps, "agreed", mock.Mock(side_effect=AssertionError("one process alone asks for a repr")))
    assert repr(again) == repr(student)
  np.testing.assert_array_equal(again.history["loss"], student.history["loss"])
  np.testing.assert_allclose(again.sample(16, labels=[3, 7], seed=1), x, atol=1e-5)
  # The command line draws the same.
  main(["sample", "--workdir", saved, "--num=16", "--labels=3,7", "--seed=1", "--out", str(tmp_path / "drawn")])
  with np.load(tmp_path / "drawn.npz") as arrays:
    np.testing.assert_allclose(arrays["x0_nfe1"], x, atol=1e-5)
  with pytest.raises(ValueError, match="holds a run already"):
    student.save(saved)


def test_a_student_starts_as_its_teacher_in_memory(teacher, digits):
  """Untrained, without noise on the biases, its first velocity is the teacher's."""
  guidance = pf.TeacherSettings(bias_noise=0.0)
  student = pf.distill(
    teacher,
    pf.Imitation(),
    pf.GMFlowHead(num_components=2),
    steps=1,
    batch_size=8,
    guidance=guidance,
    optimizer=pf.OptimizerSettings(1e-30),
  )
  x, t, label = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), np.ones(4, np.float32), np.arange(4)
  theirs, mine = (run._experiment.method.velocity(run.params)(x, t, label) for run in (teacher, student))
  assert np.abs(theirs).max() > 0
  np.testing.assert_allclose(mine, theirs, atol=1e-5)
  with pytest.raises(ValueError, match="expected the student's network|with another network"):
    pf.distill(teacher, pf.Imitation(), pf.ArcHead(), steps=1, network=pf.DiT(**(SMALL | dict(width=8))))


def test_a_flow_map_and_arcflow_by_adapters(teacher, monkeypatch):
  flow_map = pf.distill(teacher, pf.ayf_emd(warmup_steps=2), steps=2, batch_size=8)
  assert flow_map.settings.kind == "ayf_emd"
  assert flow_map.sample(2, nfe=4).shape == (2, 8, 8, 1)
  own = pf.distill(teacher, pf.mean_flow(kappa=0.0, cond_dropout=0.0), steps=2, batch_size=8)
  assert own.settings.kind == "mean_flow"
  adapters = pf.AdapterSettings((("blocks/(mlp_in|mlp_out)", 2),))
  arc = pf.distill(teacher, pf.Imitation(nfe=2), pf.ArcHead(num_components=2), steps=2, batch_size=8, adapters=adapters)
  assert set(arc._state.params["blocks"]) == {"mlp_in", "mlp_out"}
  monkeypatch.setattr(commands_run, "to_host", mock.Mock(side_effect=to_host))  # arrays may span processes
  assert arc.trajectories(3).shape == (33, 3, 8, 8, 1)
  assert commands_run.to_host.call_count == 1


def test_the_adversarial_stage_is_an_argument(teacher):
  with mock.patch.object(library, "_run") as run:
    pf.distill(teacher, pf.ayf_emd(), steps=2, adversarial=pf.Adversarial(width=8), start=pf.StartSettings("runs/map"))
  settings = run.call_args.args[0]
  assert (settings.adversarial.width, settings.start.workdir) == (8, "runs/map")


def test_a_teacher_may_be_a_function(digits, tmp_path, monkeypatch):
  """With parameters and without; the student of a function that shrinks x learns to shrink it."""
  network = pf.DiT(**SMALL)
  own = {
    "params": {"Dense_0": {"kernel": np.full((128, 64), 0.5, np.float32)}}
  }  # no row of a network's table covers it
  shrink = lambda w, x, t, cond: w["params"]["Dense_0"]["kernel"][0, 0] * x
  teachers = (pf.Teacher(lambda x, t, cond: 0.5 * x), pf.Teacher(shrink, own))
  for first, teacher in zip((False, True), teachers, strict=True):
    student = pf.distill(
      teacher, pf.Imitation(), pf.ArcHead(num_components=2), data=digits, network=network, steps=2, batch_size=8
    )
    monkeypatch.setattr(commands_run, "is_first", lambda first=first: first)
    report = student.evaluate(out=tmp_path / "report", **QUICK)
    assert (tmp_path / "report").exists() == first, "one process writes"
    reference = report.samples["teacher, 128 steps"]
    noise = np.asarray(jax.random.normal(jax.random.key(1234), reference.shape))
    np.testing.assert_allclose(reference, noise * (1 - 0.5 / 128) ** 128, atol=1e-4)
  assert {path.name for path in (tmp_path / "report").iterdir()} == {
    *("evaluation.html", "evaluation.json", "evaluation.md", "samples.png")
  }
  with pytest.raises(ValueError, match="the student's data and network must be given"):
    pf.distill(teacher, pf.Imitation(), pf.ArcHead(), steps=1)
  with pytest.raises(ValueError, match="expected a function"):
    pf.Teacher(3)


def test_arrays_and_a_workdir_that_goes_on_to_the_bit(tmp_path):
  rng = np.random.default_rng(0)
  own = pf.data.from_arrays(rng.normal(size=(64, 2)), np.arange(64) % 3)
  assert (own.num_classes, own.class_names) == (3, ("0", "1", "2"))

  def run(steps, folder):
    optimizer = pf.OptimizerSettings(1e-3)
    network = pf.MLP(width=8, depth=1)
    return pf.train(
      pf.FlowMatching(), own, network, steps=steps, batch_size=8, optimizer=optimizer, workdir=folder, bar=False
    )

  whole = run(4, tmp_path / "whole")
  run(2, tmp_path / "parts")
  parts = run(4, tmp_path / "parts")
  jax.tree.map(np.testing.assert_array_equal, whole._state, parts._state)
  memory = run(4, None)
  jax.tree.map(np.testing.assert_array_equal, whole.params, memory.params)
  assert (tmp_path / "parts" / "metrics.jsonl").exists()
  assert pf.load(tmp_path / "parts").sample(2, nfe=2).shape == (2, 2)
  with pytest.raises(ValueError, match="the data of this run were arrays in memory"):
    pf.load(tmp_path / "parts").evaluate()


def test_an_interrupted_training_returns_what_it_has(digits, tmp_path, monkeypatch):
  own = Keeper.metrics

  def metrics(keeper, step, row):
    own(keeper, step, row)
    if step == 5:
      os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C, once steps run

  monkeypatch.setattr(Keeper, "metrics", metrics)
  run = pf.train(pf.FlowMatching(), digits, pf.DiT(**SMALL), steps=10**6, batch_size=8, bar=False, log_every=5)
  assert 5 < run.steps < 20
  assert run.sample(2, nfe=1).shape == (2, 8, 8, 1)
  assert list(tmp_path.iterdir()) == []


def test_a_student_of_pytorch_is_loaded(student, teacher, tmp_path, monkeypatch):
  base, saved = teacher.workdir or teacher.save(tmp_path / "t"), student.workdir or student.save(tmp_path / "s")
  main(["convert", "--source", saved, "--out", str(tmp_path / "torch")])
  loaded = pf.load(tmp_path / "torch")
  np.testing.assert_allclose(loaded.sample(4, seed=2), student.sample(4, seed=2), atol=1e-5)
  # A folder of diffusers is a teacher too, and outlives the workdir that is made of it.
  pf.convert(base, tmp_path / "base")
  against = pf.load(tmp_path / "torch", base=tmp_path / "base").evaluate(**QUICK)
  assert [row["nfe"] for row in against.rows] == [4, 128, 1]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"load: convert it first, pf.convert\('.*torch', a workdir that all"):
    pf.load(tmp_path / "torch")
  with pytest.raises(ValueError, match="is a run, which knows its teacher"):
    pf.load(saved, base=base)


def test_plots_are_figures(student, teacher):
  x = student.sample(4)
  assert isinstance(pf.plot.samples({"student": x, "teacher": teacher.sample(4, nfe=2)}), Figure)
  assert isinstance(pf.plot.samples(np.zeros((50, 2))), Figure)
  assert isinstance(pf.plot.trajectories(np.random.default_rng(0).normal(size=(5, 9, 2)), np.ones((9, 2))), Figure)
  figure = pf.plot.losses(teacher)
  assert isinstance(figure, Figure)
  assert Image.open(io.BytesIO(figure._repr_png_())).size == tuple(figure.bbox.size), "what a notebook shows"
  assert isinstance(pf.plot.losses({"a": teacher, "b": teacher.history}, metric="gradient_norm"), Figure)
  with pytest.raises(ValueError, match="metric: no run has 'los'; did you mean 'loss'"):
    pf.plot.losses(teacher, metric="los")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda d: pf.train(pf.FlowMatching(), "digits", pf.DiT(**SMALL), steps=1), "expected what pf.data.load"),
    (lambda d: pf.train(pf.FlowMatching(), d, pf.VelocityHead(), steps=1), "expected a network of"),
    (lambda d: pf.train(pf.FlowMatching(), d, pf.DiT(**SMALL), head=pf.MLP(1, 1), steps=1), "expected a head of"),
    (lambda d: pf.train(pf.FlowMatching(), d, pf.DiT(**SMALL), steps=0), "steps: expected at least 1"),
    (lambda d: pf.train(pf.Imitation(), d, pf.DiT(**SMALL), steps=1), "does not train the head 'velocity'"),
    (lambda d: pf.train("flow", d, pf.DiT(**SMALL), steps=1), "objective: expected settings such as"),
    (lambda d: pf.load("/nowhere"), "there is no file or folder /nowhere"),
  ],
)
def test_what_does_not_fit_is_told(call, message, digits):
  with pytest.raises(ValueError, match=message):
    call(digits)


def test_an_evaluation_is_a_page_in_a_notebook(teacher, monkeypatch):
  report = teacher.evaluate(**QUICK)
  page = report._repr_html_()
  assert "<th>sampler</th>" in page
  assert "<td>teacher, 128 steps</td>" in page
  assert "data:image/png;base64," in page
  monkeypatch.setattr(pf.plot, "samples", lambda *_: pytest.fail("the page is made once"))
  assert report._repr_html_() is page


def test_a_run_stands_for_its_samples(teacher, monkeypatch):
  drawn = []
  monkeypatch.setattr(figures, "image_grid", lambda *args, **_: drawn.append(next(a for a in args if a)))
  pf.plot.samples({"teacher": teacher})
  np.testing.assert_array_equal(drawn[0]["teacher"], teacher.sample(16))


def test_programs_are_kept_unless_the_user_said_otherwise(digits, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
  told = []
  monkeypatch.setattr(jax.config, "update", lambda *given: told.append(given))
  work = lambda: pf.check_teacher(lambda x, t, c: x[0], digits)
  work()
  assert told == [], "the tests have a folder of their own"
  monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
  work()
  assert told == [("jax_compilation_cache_dir", "/cache/pflow_jax/xla")]
  for call in (lambda: pf.train(pf.FlowMatching(), "digits", None, steps=1), lambda: pf.load("/nowhere")):
    told.clear()
    with pytest.raises(ValueError, match="expected|no file"):
      call()
    assert told
