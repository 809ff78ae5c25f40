"""Samples of trained runs."""

import functools
import shutil
import types

import jax
import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.core.guidance import guided
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.data.prompts.records import MODELS, Fields
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.sample import sample, save_picture
from pflow_jax.evaluation.text_to_image import family_of
from pflow_jax.families.encoders import Encoder
from pflow_jax.families.family import Family
from pflow_jax.families.registry import FAMILIES
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.training import sample as program
from pflow_jax.training.experiment import build
from pflow_jax.training.workdir import load_config
from tests.programs import quick, write_random
from tests.prompt_folders import write

pytestmark = pytest.mark.usefixtures("float32")


def test_arrays_and_picture_are_written(student_run, tmp_path):
  config = load_config(student_run)
  assert program.evaluations(build(config).method, SampleSettings()) == (1,), "what it was trained for"
  config.sample.nfe = (1, 2)
  picture = sample(config, student_run, num=5, seed=3, out=tmp_path / "out")
  assert picture == tmp_path / "out.png"
  assert picture.stat().st_size > 1000
  with np.load(tmp_path / "out.npz") as arrays:
    assert set(arrays) == {"label", "noise", "x0_nfe1", "x0_nfe2"}
    assert arrays["x0_nfe2"].shape == arrays["noise"].shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(arrays["label"], range(5))
    experiment = build(config)
    run = program.make_sampler(experiment.method, SampleSettings(), 1)
    again = run(experiment.load(student_run), arrays["noise"], arrays["label"], jax.random.split(jax.random.key(0), 5))
    np.testing.assert_allclose(again, arrays["x0_nfe1"], atol=1e-5)


def test_a_run_on_embeddings_is_asked_with_their_encoder(tmp_path, monkeypatch):
  encoder = type("Words", (Encoder,), {"model": "words", "pooled_width": 3})
  monkeypatch.setitem(FAMILIES, "words", Family("words", encoder=encoder))
  monkeypatch.setitem(MODELS, "words", Fields(pooled_width=3))
  run = lambda folder: types.SimpleNamespace(model=types.SimpleNamespace(kind="dit"), data={"embeddings": str(folder)})
  for model in ("minilm", "words"):
    assert family_of(run(write(tmp_path / model, model, shape=None))).name == model
  with pytest.raises(ValueError, match=r"flux: expected .* of one of \['minilm', 'words'\], got those of 'flux'"):
    family_of(run(write(tmp_path / "flux", "flux", shape=None)))
  with pytest.raises(ValueError, match=r"gone: expected the run's embeddings, .* \['minilm', 'words'\], got none"):
    family_of(run(tmp_path / "gone"))
  monkeypatch.delitem(FAMILIES, "words")
  assert family_of(run(tmp_path / "gone")).name == "minilm"


def test_the_same_seed_gives_the_same_samples_whatever_the_batch(student_run, tmp_path):
  config = load_config(student_run)
  results = []
  for batch_size, seed in ((64, 0), (3, 0), (64, 1)):
    config.sample.update(batch_size=batch_size, h=0.5, nfe=(2,))
    sample(config, student_run, num=8, seed=seed, labels=[7], out=tmp_path / "x")
    with np.load(tmp_path / "x.npz") as arrays:
      results.append(arrays["x0_nfe2"])
      assert set(arrays["label"]) == {7}
  np.testing.assert_allclose(results[0], results[1], atol=1e-5)
  assert np.abs(results[0] - results[2]).max() > 0.1


def test_a_preview_draws_from_the_keys_of_seed_0_and_not_from_those_of_its_noise(monkeypatch):
  experiment, drawn = build(quick("digits", "teacher"), abstract=True), {}

  def in_batches(run, layout, size, noise, cond, keys):
    drawn.update(noise=noise, keys=jax.random.key_data(keys))
    return noise

  monkeypatch.setattr(program, "in_batches", in_batches)
  assert program.preview(experiment, None, lambda *picture: None, 3)({}, "picture.png") == "picture.png"
  noise, _ = program.draw_noise(experiment.dataset, 3, seed=0)
  np.testing.assert_array_equal(drawn["noise"], noise)
  np.testing.assert_array_equal(drawn["keys"], jax.random.key_data(program.sample_keys(3, seed=0)))


def test_more_samples_than_the_machine_holds_are_refused(student_run, tmp_path):
  config = load_config(student_run)
  with pytest.raises(ValueError, match=r"1000000000 samples: takes 1\.4\d+ TiB of memory, .*; ask for fewer \(--num"):
    program.draw_noise(build(config).dataset, 10**9, seed=0)
  with pytest.raises(ValueError, match=r"config.sample: expected at most 10,000 evaluations"):
    sample(config, student_run, num=2, nfe=10**9, out=tmp_path / "x")


@pytest.mark.parametrize("channels", [2, 4])
def test_latents_have_a_picture_of_their_first_channels(tmp_path, channels):
  dataset = types.SimpleNamespace(shape=(8, 8, channels), class_names=(), autoencoder="")
  rows = {"1 NFE": np.zeros((3, 8, 8, channels), np.float32)}
  save_picture(dataset, rows, np.zeros(3, int), tmp_path / "x.png")
  assert (tmp_path / "x.png").stat().st_size > 500


def test_long_names_of_classes_are_in_the_picture(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(figures, "save", lambda *_: None)
  monkeypatch.setattr(figures, "image_grid", lambda rows, column_labels, **_: drawn.append(column_labels))
  dataset = types.SimpleNamespace(shape=(8, 8, 3), class_names=("cat", "automobile", "People & Body"), autoencoder="")
  rows = {"1 NFE": np.zeros((3, 8, 8, 3), np.float32)}
  save_picture(dataset, rows, np.array([1, 2, 1]), tmp_path / "x.png")
  assert drawn == [["automobile", "People & Body", "automobile"]]


def test_stochastic_and_tempered_sampling_change_the_samples(student_run):
  config = load_config(student_run)
  experiment = build(config)
  params = experiment.init(jax.random.key(0), experiment.teacher.load())
  noise, labels = program.draw_noise(experiment.dataset, 4, seed=0)
  draw = lambda key=0, **kw: program.make_sampler(experiment.method, SampleSettings(**kw), 2)(
    params, noise, labels, jax.random.split(jax.random.key(key), 4)
  )
  plain = draw()
  np.testing.assert_array_equal(plain, draw(key=1))
  assert not np.allclose(plain, draw(h=1.0))
  assert not np.allclose(draw(h=1.0), draw(h=1.0, key=1))
  assert not np.allclose(plain, draw(temperature=0.1))
  np.testing.assert_array_equal(draw(temperature=0.1), draw(auto_temperature=True))


def test_teacher_runs_are_sampled_too(teacher_run, tmp_path):
  sample(load_config(teacher_run), teacher_run, num=2, nfe=3, out=tmp_path / "t")
  with np.load(tmp_path / "t.npz") as arrays:
    assert np.isfinite(arrays["x0_nfe3"]).all()


def test_a_teacher_is_sampled_by_the_solver_that_flags_name(tmp_path):
  """The check of a published teacher, small: an SDE, guided in an interval; each sample from its own key."""
  config = quick("digits", "teacher")
  config.objective.cond_dropout = 0.1
  folder = write_random(config, tmp_path / "run")
  flags = ["--config.sample.guidance=1.8", "--config.sample.interval=(0,.7)", "--seed=3", f"--workdir={folder}"]
  drawn = {}
  for solver, nfe in (("sde", 6), ("heun", 5), ("dpmpp_2m", 6), ("euler", 6)):
    out = tmp_path / solver
    command = ["sample", *flags, f"--config.sample.solver={solver}", f"--nfe={nfe}", "--num=5", f"--out={out}"]
    main([*command, "--config.sample.batch_size=3"])
    with np.load(f"{out}.npz") as arrays:
      drawn[solver], noise, labels = arrays[f"x0_nfe{nfe}"], arrays["noise"], arrays["label"]
  experiment = build(load_config(folder), run=folder)
  velocity = experiment.method.velocity(experiment.load(folder))
  teacher = guided(velocity, experiment.dataset.null_cond, scale=1.8, interval=(0.0, 0.7))
  keys = program.sample_keys(5, 3)
  for solver, steps in (("sde", 6), ("heun", 3), ("dpmpp_2m", 6), ("euler", 6)):
    wanted = jax.jit(functools.partial(sample_teacher, teacher, steps=steps, solver=solver))(noise, labels, keys)
    np.testing.assert_allclose(drawn[solver], wanted, atol=2e-5)
    others = [drawn[other] for other in drawn if other != solver]
    assert min(np.abs(drawn[solver] - other).max() for other in others) > 1e-3
  method, sampling = experiment.method, SampleSettings(guidance=1.8, interval=(0.0, 0.7), solver="heun")
  path = jax.jit(method.trajectory(sampling, 5))(experiment.load(folder), noise, labels)
  np.testing.assert_allclose(path[-1], drawn["heun"], atol=2e-5)
  assert len(path) == len(method.times(5, len(path) - 1)) == 4
  assert program.evaluations(method, sampling) == (127,)
  config = load_config(folder)
  config.sample.update(solver="heun", nfe=(5, 6))
  with pytest.raises(ValueError, match="odd number, got 6"):
    sample(config, folder, num=5, out=tmp_path / "none")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(solver="rk4"), r"solver: expected one of \('euler', 'heun', 'dpmpp_2m', 'sde', 'edm'\), got 'rk4'"),
    (dict(solver="heun", h=0.5), "h: expected 0 with solver='heun', got 0.5"),
    (dict(diffusion="SBDM"), "diffusion: expected one of"),
    (dict(terminal=1.0), "terminal: expected a flow time"),
    (dict(interval=(0.7, 0.1)), r"interval: expected flow times .* got \(0.7, 0.1\)"),
  ],
)
def test_settings_of_a_solver_are_checked(settings, message):
  with pytest.raises(ValueError, match=message):
    SampleSettings(**settings)


def classes(*names, count=None):
  return types.SimpleNamespace(class_names=names, num_classes=len(names) if count is None else count)


def test_classes_are_given_by_number_or_by_name():
  dataset = classes("circle", "Red Square", "10", "2")
  assert program.class_numbers([3, "circle", "1", "red square", "Red Square"], dataset) == [3, 0, 1, 1, 1]
  assert program.class_numbers(["2", "10", "0"], dataset) == [3, 2, 0], "a name before a number"
  assert program.class_numbers(["0"], classes()) == [0], "a set without classes has one"
  assert program.class_numbers(["7"], classes(count=10)) == [7]
  for label, message in {
    "cirkle": r"no class 'cirkle'; did you mean 'circle'\? \(expected one of circle, Red Square, 10, 2, or a number",
    "xyz": r"no class 'xyz' \(expected",
    "-1": "no class '-1'",
    "4": r"expected classes in \[0, 4\), got \[4\]",
    "": "no class ''",
  }.items():
    with pytest.raises(ValueError, match=message):
      program.class_numbers([label], dataset)
  with pytest.raises(ValueError, match=r"no class 'a' \(expected a number in \[0, 1\)\)"):
    program.class_numbers(["a"], classes())


def test_class_names_are_understood_and_nearest_is_named(student_run, tmp_path, monkeypatch):
  config = load_config(student_run)
  drawn = program.draw_noise(build(config, run=student_run).dataset, 4, 0, labels=["7", 3])[1]
  np.testing.assert_array_equal(drawn, [7, 3, 7, 3])
  with pytest.raises(ValueError, match="no class 'three'"):
    sample(config, student_run, num=2, labels=["three"])


def stub_grid(monkeypatch):
  """Pictures are not drawn; returns what they would show."""
  calls = []
  monkeypatch.setattr(figures, "save", lambda *_: None)
  monkeypatch.setattr(figures, "image_grid", lambda rows, **options: calls.append((rows, options)))
  return calls


@pytest.mark.parametrize(("num", "shown", "title"), [(64, 64, None), (150, 128, "the first 128 of 150 samples")])
def test_a_picture_shows_all_samples_or_says_that_it_does_not(student_run, tmp_path, monkeypatch, num, shown, title):
  calls = stub_grid(monkeypatch)
  config = load_config(student_run)
  config.sample.nfe = (1,)
  sample(config, student_run, num=num, out=tmp_path / "x")
  ((rows, options),) = calls
  assert [len(x) for x in rows.values()] == [shown]
  assert options["title"] == title
  assert options["column_labels"] == [str(i % 10) for i in range(shown)]
  assert options["columns"] == 16
  with np.load(tmp_path / "x.npz") as arrays:
    assert len(arrays["x0_nfe1"]) == len(arrays["noise"]) == len(arrays["label"]) == num


def test_long_names_of_classes_are_shown(tmp_path, monkeypatch):
  calls = stub_grid(monkeypatch)
  dataset = types.SimpleNamespace(shape=(8, 8, 1), class_names=("a star of seven points", "circle"), autoencoder="")
  rows = {"1 NFE": np.zeros((3, 8, 8, 1), np.float32)}
  save_picture(dataset, rows, np.array([1, 0, 1]), tmp_path / "x.png")
  assert calls[0][1]["column_labels"] == ["circle", "a star of seven points", "circle"]


def test_samples_that_are_not_finite_are_told(caplog):
  x = np.zeros((5, 2, 2, 1), np.float32)
  params = {"w": np.ones(3, np.float32), "n": np.ones(3, np.int32)}
  program.warn_of_gaps("2 NFE", x, params)
  assert not caplog.text
  x[1, 0, 0, 0], x[3] = np.nan, np.inf
  program.warn_of_gaps("2 NFE", x, params)
  assert "2 NFE: 2 of 5 samples are not finite" in caplog.text
  assert "config.sample" in caplog.text
  caplog.clear()
  program.warn_of_gaps("2 NFE", x, params | {"w": np.array([1, np.nan, 1], np.float32)})
  assert "so are the run's parameters" in caplog.text


def test_more_samples_than_there_is_memory_for_are_refused_before_any_work(student_run, tmp_path, monkeypatch):
  monkeypatch.setattr("pflow_jax.evaluation.sample.make_sampler", lambda *_: pytest.fail("compiled"))
  config = load_config(student_run)
  with pytest.raises(ValueError, match=r"num=1000000000: takes .*this machine has .*ask for fewer"):
    sample(config, student_run, num=10**9)
  config.evaluate.num_samples = 10**9
  with pytest.raises(ValueError, match=r"config\.evaluate\.num_samples=1000000000: takes"):
    evaluate(config, student_run)


def test_prompts_that_are_gone_are_asked_for(tmp_path):
  """A run of prompts needs no data but for their own embeddings."""
  options = {"name": f"prompts:{write(tmp_path / 'prompts')}"}
  dataset = data.Description.of(data.load(**options), options).dataset()
  assert program.draw_noise(dataset, 2, 0)[1]["text"].shape[0] == 2
  shutil.rmtree(tmp_path / "prompts")
  dataset = data.Description.of(dataset, options).dataset()
  with pytest.raises(ValueError, match=r"draws its own prompts: prompts:.*--config\.data\.name, or give --prompt"):
    program.draw_noise(dataset, 2, 0)


def test_bad_requests_are_refused(student_run, tmp_path):
  config = load_config(student_run)
  with pytest.raises(ValueError, match=r"\[0, 10\).*12"):
    sample(config, student_run, num=2, labels=[12])
  with pytest.raises(ValueError, match="at least 1"):
    sample(config, student_run, num=0)
  with pytest.raises(ValueError, match="no checkpoint"):
    sample(config, tmp_path, num=1)
  with pytest.raises(ValueError, match="at most 10,000 evaluations .*1000000000"):
    sample(config, student_run, num=1, nfe=10**9)
  config.sample.nfe = (0,)
  with pytest.raises(ValueError, match="nfe"):
    sample(config, student_run, num=1)
