"""Samples of trained runs."""

import types

import jax
import numpy as np
import pytest

from pflow_jax import sample as program
from pflow_jax.experiment import build
from pflow_jax.workdir import load_config

pytestmark = pytest.mark.usefixtures("float32")


def test_arrays_and_picture_are_written(student_run, tmp_path):
  config = load_config(student_run)
  assert program.evaluations(build(config), program.SampleSettings()) == (1,), "what it was trained for"
  config.sample.nfe = (1, 2)
  picture = program.sample(config, student_run, num=5, seed=3, out=tmp_path / "out")
  assert picture == tmp_path / "out.png"
  assert picture.stat().st_size > 1000
  with np.load(tmp_path / "out.npz") as arrays:
    assert set(arrays) == {"label", "x0_nfe1", "x0_nfe2"}
    assert arrays["x0_nfe2"].shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(arrays["label"], range(5))


def test_the_same_seed_gives_the_same_samples_whatever_the_batch(student_run, tmp_path):
  config = load_config(student_run)
  results = []
  for batch_size, seed in ((64, 0), (3, 0), (64, 1)):
    config.sample.update(batch_size=batch_size, h=0.5, nfe=(2,))
    program.sample(config, student_run, num=8, seed=seed, labels=[7], out=tmp_path / "x")
    with np.load(tmp_path / "x.npz") as arrays:
      results.append(arrays["x0_nfe2"])
      assert set(arrays["label"]) == {7}
  np.testing.assert_allclose(results[0], results[1], atol=1e-5)
  assert np.abs(results[0] - results[2]).max() > 0.1


def test_more_samples_than_the_machine_holds_are_refused(student_run, tmp_path):
  config = load_config(student_run)
  with pytest.raises(ValueError, match=r"1000000000 samples: takes 1\.48\d TiB of memory, .*; ask for fewer \(--num"):
    program.draw_noise(build(config), 10**9, seed=0)
  with pytest.raises(ValueError, match=r"config.sample: expected at most 10,000 evaluations"):
    program.sample(config, student_run, num=2, nfe=10**9, out=tmp_path / "x")


@pytest.mark.parametrize("channels", [2, 4])
def test_latents_have_a_picture_of_their_first_channels(tmp_path, channels):
  dataset = types.SimpleNamespace(shape=(8, 8, channels), class_names=())
  rows = {"1 NFE": np.zeros((3, 8, 8, channels), np.float32)}
  program.save_picture(types.SimpleNamespace(dataset=dataset), rows, np.zeros(3, int), tmp_path / "x.png")
  assert (tmp_path / "x.png").stat().st_size > 500


def test_long_names_of_classes_are_in_the_picture(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(program.figures, "image_grid", lambda path, rows, column_labels: drawn.append(column_labels))
  dataset = types.SimpleNamespace(shape=(8, 8, 3), class_names=("cat", "automobile", "People & Body"))
  rows = {"1 NFE": np.zeros((3, 8, 8, 3), np.float32)}
  program.save_picture(types.SimpleNamespace(dataset=dataset), rows, np.array([1, 2, 1]), tmp_path / "x.png")
  assert drawn == [["automobile", "People & Body", "automobile"]]


def test_stochastic_and_tempered_sampling_change_the_samples(student_run):
  config = load_config(student_run)
  experiment = build(config)
  params = experiment.init(jax.random.key(0), experiment.teacher.load())
  noise, labels = program.draw_noise(experiment, 4, seed=0)
  draw = lambda key=0, **kw: program.make_sampler(experiment, program.SampleSettings(**kw), 2)(
    params, noise, labels, jax.random.split(jax.random.key(key), 4)
  )
  plain = draw()
  np.testing.assert_array_equal(plain, draw(key=1))
  assert not np.allclose(plain, draw(h=1.0))
  assert not np.allclose(draw(h=1.0), draw(h=1.0, key=1))
  assert not np.allclose(plain, draw(temperature=0.1))
  np.testing.assert_array_equal(draw(temperature=0.1), draw(auto_temperature=True))


def test_teacher_runs_are_sampled_too(teacher_run, tmp_path):
  program.sample(load_config(teacher_run), teacher_run, num=2, nfe=3, out=tmp_path / "t")
  with np.load(tmp_path / "t.npz") as arrays:
    assert np.isfinite(arrays["x0_nfe3"]).all()


def test_bad_requests_are_refused(student_run, tmp_path):
  config = load_config(student_run)
  with pytest.raises(ValueError, match=r"\[0, 10\).*12"):
    program.sample(config, student_run, num=2, labels=[12])
  with pytest.raises(ValueError, match="at least 1"):
    program.sample(config, student_run, num=0)
  with pytest.raises(ValueError, match="no checkpoint"):
    program.sample(config, tmp_path, num=1)
  config.sample.nfe = (0,)
  with pytest.raises(ValueError, match="nfe"):
    program.sample(config, student_run, num=1)
