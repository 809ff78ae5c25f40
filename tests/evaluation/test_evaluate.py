"""The evaluation of tiny runs: files, numbers that must agree, refusals."""

import io
import json
import os
import pickle
import shutil
import types
import zipfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

import pflow_jax as pf
from pflow_jax.evaluation import evaluate as program
from pflow_jax.evaluation import metrics, samplers
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.report import metrics_by_nfe
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from pflow_jax.training.workdir import load_config
from tests.events import events
from tests.programs import quick, write_random

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def report(student_run):
  import jax

  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    config = load_config(student_run)
    config.sample.nfe = (1, 2)
    config.train.tensorboard = True
    return evaluate(config, student_run)


def test_rows_and_files(report, student_run, teacher_run):
  folder = student_run / "evaluation"
  assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(report))
  names = [row["name"] for row in report["rows"]]
  assert names == ["teacher, 4 steps", "teacher, 128 steps", "student, 1 NFE", "student, 2 NFE"]
  table = (folder / "evaluation.md").read_text()
  assert all(name in table for name in names)
  assert report["features"] == "classifier, 5 steps"
  assert "* FD: Fréchet distance to the data (classifier, 5 steps)" in table
  assert (folder / "samples.png").stat().st_size > 5000
  assert (teacher_run / "evaluation" / "classifier_5_steps.npz").exists(), "kept with the teacher, for all its students"


def test_it_is_shown_in_tensorboard_at_the_runs_step(report, student_run):
  """In a folder of its own: TensorBoard reads the newest file of a folder alone, and a training may be in progress."""
  assert not list((student_run / "tensorboard").glob("events.*"))
  shown = events(student_run / "tensorboard/evaluation")
  found = {(event.step, value.tag): value for event in shown for value in event.summary.value}
  for row in report["rows"][2:]:
    sampler = {"student, 1 NFE": "student_1_nfe", "student, 2 NFE": "student_2_nfe"}[row["name"]]
    assert found[3, f"eval/alignment/{sampler}"].simple_value == pytest.approx(row["alignment"])
    assert found[3, f"eval/fd_ratio/{sampler}"].simple_value == pytest.approx(row["fd_ratio"][0])
  table = found[3, "eval/table/text_summary"].tensor.string_val[0].decode()
  assert all(row["name"] in table for row in report["rows"])
  with Image.open(student_run / "evaluation" / "samples.png") as picture:
    image = found[3, "eval/samples"].image
    assert (image.width, image.height) == picture.size


def test_yardsticks_are_one_and_nothing_is_missing(report):
  rows = {row["name"]: row for row in report["rows"]}
  assert rows["teacher, 4 steps"]["alignment_ratio"][0] == 1.0
  assert rows["teacher, 128 steps"]["fd_ratio"] == rows["teacher, 128 steps"]["diversity_ratio"] == 1.0
  assert "alignment" not in rows["teacher, 128 steps"]
  assert report["step"] == 3
  for name in ("student, 1 NFE", "student, 2 NFE"):
    row = rows[name]
    keys = ("alignment", "alignment_ratio", "fd", "fd_ratio", "fd_pixels_ratio", "diversity", "precision", "recall")
    assert all(np.all(np.isfinite(row[key])) for key in (*keys, "accuracy", "images_per_second"))


def test_a_teacher_is_measured_with_other_solvers_too(tmp_path):
  """Euler's rows as ever, each other solver's with as many evaluations as it says, and its own section `sample`."""
  config = quick("digits", "teacher")
  config.objective.cond_dropout = 0.1
  folder = write_random(config, tmp_path / "run")
  config.evaluate.solvers = ("heun",)
  config.sample.update(solver="sde", nfe=(6,), guidance=1.8, interval=(0.0, 0.7))
  rows = evaluate(config, folder)["rows"]
  own = "teacher, sde, guidance 1.8 in [0, 0.7], 6 NFE"
  counts = {"teacher, 4 steps": 4, "teacher, 128 steps": 128, "teacher, heun, 3 NFE": 3, "teacher, heun, 127 NFE": 127}
  assert {row["name"]: row["nfe"] for row in rows} == counts | {own: 6}
  assert all(np.isfinite(row["fd"]) for row in rows)
  errors = {row["name"]: row["alignment"] for row in rows if "alignment" in row}
  assert errors["teacher, heun, 127 NFE"] < errors["teacher, heun, 3 NFE"] < errors[own]
  lines = metrics_by_nfe(types.SimpleNamespace(rows=rows)).axes[0].get_legend_handles_labels()[1]
  assert set(lines) == {"teacher", "teacher, heun", "teacher, sde, guidance 1.8 in [0, 0.7]"}


def test_rows_of_a_teacher_by_its_solvers():
  method, velocity = types.SimpleNamespace(shift=1.0), lambda params: None
  asked = pf.EvaluateSettings(teacher_steps=(1, 2, 4, 128), solvers=("heun", "dpmpp_2m", "sde"))
  found = samplers.velocity_samplers(method, velocity, {}, asked)
  assert [one.name for one in found[:4]] == [samplers.teacher_name(n) for n in (1, 2, 4, 128)]
  assert [(one.solver, one.nfe) for one in found[4:]] == [
    *[("heun", n) for n in (1, 3, 127)],
    *[("dpmpp_2m", n) for n in (1, 2, 4, 128)],
    *[("sde", n) for n in (2, 4, 128)],
  ]
  assert not any(one.is_student for one in found)
  assert len({one.name for one in found}) == len(found)


def test_solvers_of_an_evaluation_are_checked():
  for solvers in (("euler",), ("rk4",)):
    with pytest.raises(ValueError, match="config.evaluate.solvers: expected some of"):
      pf.EvaluateSettings(solvers=solvers)


def test_student_that_is_its_teacher_is_measured_as_such(teacher_run, tmp_path):
  """An untrained student, without noise on its biases and with hardly any variance, is the teacher's one Euler step."""
  config = quick("digits", "gmflow", teacher_run, steps=1)
  config.teacher.bias_noise = 0.0
  config.head.log_std = -10.0
  config.optimizer.update(learning_rate=1e-30, schedule="constant")
  config.evaluate.teacher_steps = (1, 4, 128)
  config.sample.nfe = (1,)
  train(config, tmp_path)
  rows = {row["name"]: row for row in evaluate(load_config(tmp_path), tmp_path)["rows"]}
  for key in ("alignment", "fd", "diversity"):
    np.testing.assert_allclose(rows["student, 1 NFE"][key], rows["teacher, 1 step"][key], rtol=1e-2)


def test_students_of_one_teacher_share_a_table(report, student_run, teacher_run, tmp_path):
  config = quick("digits", "gmflow", teacher_run, steps=2)
  config.objective.nfe = 2
  two = tmp_path / "two" / student_run.name
  train(config, two)
  both = load_config(student_run)
  both.evaluate.nearest_k = 100
  few = report
  report = evaluate(both, student_run, others=[two], out=tmp_path / "both")
  # Larger balls hold more; of 5 neighbours they were.
  for one, other in zip(few["rows"][:2], report["rows"][:2], strict=True):
    assert one["name"] == other["name"]
    assert one["precision"] + one["recall"] < other["precision"] + other["recall"]
  names = [row["name"] for row in report["rows"]]
  assert names[-2:] == [
    f"student, {nfe} NFE ({run.parent.name}/{run.name})" for nfe, run in ((1, student_run), (2, two))
  ]
  train(quick("digits", "teacher", steps=2), tmp_path / "teacher")
  train(quick("digits", "gmflow", tmp_path / "teacher", steps=2), tmp_path / "stranger")
  with pytest.raises(ValueError, match=r"(?s)share a teacher.*stranger"):
    evaluate(load_config(student_run), student_run, others=[tmp_path / "stranger"])


def test_points_have_trajectories_and_no_classifier(tmp_path):
  train(quick("checkerboard", "teacher"), tmp_path / "teacher")
  train(quick("checkerboard", "gmflow", tmp_path / "teacher"), tmp_path / "student")
  report = evaluate(load_config(tmp_path / "student"), tmp_path / "student")
  assert report["features"] == "coordinates"
  assert all("accuracy" not in row for row in report["rows"])
  folder = tmp_path / "student" / "evaluation"
  assert (folder / "trajectories.png").stat().st_size > 5000
  assert (folder / "samples.png").stat().st_size > 5000


def test_samples_of_more_classes_than_there_are_differ_from_each_other():
  """The picture of every class is another one, so that the samples are as diverse as all pictures."""
  x0 = np.random.default_rng(0).normal(size=(300, 8, 8, 1)).astype(np.float32)
  dataset = pf.data.from_arrays(x0, np.arange(300))
  run = pf.train(pf.FlowMatching(), dataset, pf.DiT(patch_size=4, width=16, depth=1, num_heads=2), steps=1)
  report = run.evaluate(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2, quiet=True)
  for row in report.rows:
    x = report.samples[row["name"]]
    assert row["diversity"] == pytest.approx(metrics.diversity(x, np.zeros(128, int)))


def test_too_few_samples_are_refused_before_any_are_drawn(student_run, capsys):
  config = load_config(student_run)
  config.evaluate.num_samples = 50
  with pytest.raises(ValueError, match=r"num_samples.*at least 96.*got 50"):
    evaluate(config, student_run)
  assert "sampling" not in capsys.readouterr().out


@pytest.mark.parametrize("k", [0, 128])
def test_there_are_as_many_neighbours_as_asked_for(k, student_run):
  config = load_config(student_run)
  config.evaluate.nearest_k = k
  with pytest.raises(ValueError, match=r"nearest_k: expected 1 to 127"):
    evaluate(config, student_run)


def test_yardsticks_cannot_be_left_out(student_run):
  config = load_config(student_run)
  config.evaluate.teacher_steps = (1, 128)
  with pytest.raises(ValueError, match="4 and 128"):
    evaluate(config, student_run)


def test_damaged_classifier_is_named(student_run, teacher_run, tmp_path, report):
  shutil.copytree(teacher_run, tmp_path / "teacher")
  path = tmp_path / "teacher" / "evaluation" / "classifier_5_steps.npz"
  path.write_bytes(path.read_bytes()[:100])
  config = load_config(student_run)
  config.teacher.workdir = str(tmp_path / "teacher")
  with pytest.raises(ValueError, match=r"classifier_5_steps\.npz"):
    evaluate(config, student_run, out=tmp_path / "out")


def test_a_teachers_samples_are_drawn_once(report, student_run, capsys):
  again = evaluate(load_config(student_run), student_run)
  out = capsys.readouterr().out
  assert "sampling: teacher" not in out
  assert "sampling: student, 1 NFE" in out
  assert again["rows"][:2] == report["rows"][:2]
  config = load_config(student_run)
  config.evaluate.seed = 1
  evaluate(config, student_run)
  assert "sampling: teacher, 128 steps" in capsys.readouterr().out, "other noise, other samples"


def test_kept_samples_belong_to_the_teachers_content(student_run, teacher_run, tmp_path):
  """Not to its folder, where another may be trained."""
  experiment = build(load_config(student_run), run=student_run)
  shutil.copytree(teacher_run, tmp_path / "teacher")
  config = load_config(student_run)
  config.teacher.workdir = str(tmp_path / "teacher")
  assert program.described_teacher(build(config, run=student_run)) == program.described_teacher(experiment)
  assert str(teacher_run) not in program.described_teacher(experiment)
  config.teacher.which = "params"
  assert program.described_teacher(build(config, run=student_run)) != program.described_teacher(experiment)


SHAPE = (6, 2, 2, 1)


def kept(path, **changes):
  """A file of kept samples, as an evaluation writes one, with other arrays."""
  values = {"what": "this", "samples": np.ones(SHAPE, np.float32), "images_per_second": 2.5} | changes
  np.savez(path, **values)


def lying(path, shape):
  """A file whose header says that there are more samples than it holds."""
  kept(path)
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
  members["samples.npy"] = header.getvalue() + bytes(4 * 24)
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in members.items():
      archive.writestr(name, content)


def bad_samples(value):
  samples = np.ones(SHAPE, np.float32)
  samples[3, 0, 0, 0] = value
  return samples


UNUSABLE = {
  "nan": lambda path: kept(path, samples=bad_samples(np.nan)),
  "infinite": lambda path: kept(path, samples=bad_samples(np.inf)),
  "shape": lambda path: kept(path, samples=np.ones((6, 4), np.float32)),
  "fewer": lambda path: kept(path, samples=np.ones((5, 2, 2, 1), np.float32)),
  "more": lambda path: kept(path, samples=np.ones((7, 2, 2, 1), np.float32)),
  "double": lambda path: kept(path, samples=np.ones(SHAPE)),
  "strings": lambda path: kept(path, samples=np.full(SHAPE, "x")),
  "objects": lambda path: kept(path, samples=np.full(SHAPE, None)),
  "no samples": lambda path: np.savez(path, what="this", images_per_second=1.0),
  "speed": lambda path: kept(path, images_per_second=np.nan),
  "speeds": lambda path: kept(path, images_per_second=np.ones(3)),
  "no speed": lambda path: kept(path, images_per_second=0.0),
  "title": lambda path: kept(path, what=np.array([1])),
  "cut": lambda path: (kept(path), path.write_bytes(path.read_bytes()[:-40])),
  "empty": lambda path: path.write_bytes(b""),
  "text": lambda path: path.write_text("samples"),
  "pickled": lambda path: path.write_bytes(pickle.dumps(np.ones(SHAPE))),
  "large": lambda path: kept(path, samples=np.ones((2**19,), np.float32)),
  "lies": lambda path: lying(path, (10**9, 2, 2, 1)),
  "folder": lambda path: path.mkdir(),
  "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("name", list(UNUSABLE))
def test_kept_samples_that_are_none_are_drawn_anew_with_a_word(name, tmp_path, capsys):
  path = tmp_path / "samples.npz"
  UNUSABLE[name](path)
  drawn = np.zeros(SHAPE, np.float32), 9.0
  samples, speed = program._draw_once(lambda: drawn, epath.Path(path), "this", SHAPE)
  assert speed == 9.0
  np.testing.assert_array_equal(samples, drawn[0])
  said = capsys.readouterr().out
  assert f"{path} cannot be used (" in said
  assert "drawn anew" in said
  if name not in ("folder", "pipe"):
    again, speed = program._draw_once(lambda: pytest.fail("drawn"), epath.Path(path), "this", SHAPE)
    np.testing.assert_array_equal(again, drawn[0])
    assert speed == 9.0


def test_kept_samples_of_others_are_drawn_anew_without_a_word(tmp_path, capsys):
  path = tmp_path / "deep" / "samples.npz"
  first = program._draw_once(lambda: (np.zeros(SHAPE, np.float32), 1.0), epath.Path(path), "this", SHAPE)
  other = program._draw_once(lambda: (np.ones(SHAPE, np.float32), 2.0), epath.Path(path), "that", SHAPE)
  assert (first[1], other[1]) == (1.0, 2.0)
  assert not capsys.readouterr().out


def test_samples_that_cannot_be_kept_are_returned(tmp_path, capsys):
  (tmp_path / "evaluation").write_text("no folder")
  path = epath.Path(tmp_path / "evaluation" / "samples.npz")
  assert program._draw_once(lambda: (np.ones(SHAPE, np.float32), 2.0), path, "this", SHAPE)[1] == 2.0
  assert "cannot be written" in capsys.readouterr().out
