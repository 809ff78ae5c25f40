"""Workdirs that version 0.1.0 wrote (see golden/README.md) are gone on with, sampled, evaluated and exported."""

import json
import tarfile

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.commands.cli import main
from pflow_jax.training.train import train
from pflow_jax.training.workdir import load_config
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("float32")
STUDENTS = ("board_gmflow", "board_ayf", "digits_arc")


@pytest.fixture
def runs(tmp_path):
  with tarfile.open(GOLDEN / "old_runs.tar.xz") as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


@pytest.fixture(scope="module")
def expected():
  with np.load(GOLDEN / "old_runs.npz") as arrays:
    return dict(arrays)


def below(expected, prefix):
  found = {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}
  assert found
  return found


def assert_close(got, expected, atol):
  assert set(got) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", ["board_teacher", "digits_teacher", "imported_teacher", "imported_arc", *STUDENTS])
def test_they_draw_what_they_drew(name, runs, expected):
  numbers = {"board_ayf": "(1,2)"}.get(name, "(4,)" if name.endswith("teacher") else "(1,)")
  argv = ["sample", "--workdir", str(runs / name), f"--config.sample.nfe={numbers}", "--num=4", "--seed=3"]
  main([*argv, "--out", str(runs / "drawn")])
  with np.load(runs / "drawn.npz") as arrays:
    assert_close(dict(arrays), below(expected, f"{name}/sample/"), atol=1e-5)


@pytest.mark.parametrize("name", ["board_gmflow", "digits_arc"])
def test_they_are_gone_on_with(name, runs, expected):
  """The third step is the old one's but for what is drawn at random, whose keys are others now.

  A lost optimizer state or average makes a step of another size in another direction.
  """
  averages = lambda step: flatten_dict(load_params(f"{runs / name}/checkpoints", which="ema", step=step), sep="/")
  before = averages(2)
  config = load_config(runs / name)
  config.train.steps = 3
  assert int(train(config, runs / name).step) == 3
  now, then = averages(3), below(expected, f"{name}/third/")
  assert now.keys() == then.keys()
  step = lambda after: np.concatenate([np.ravel(after[path] - before[path]) for path in sorted(before)])
  assert np.linalg.norm(step(now) - step(then)) < 0.4 * np.linalg.norm(step(then))


def test_they_are_evaluated(runs, expected):
  argv = ["evaluate", "--workdir", str(runs / "board_gmflow"), "--config.evaluate.num_samples=128"]
  main([*argv, "--config.evaluate.teacher_steps=(4,128)", "--config.evaluate.num_resamples=2"])
  rows = json.loads((runs / "board_gmflow/evaluation/evaluation.json").read_text())["rows"]
  got = {f"{row['name']}/{key}": row[key] for row in rows for key in ("alignment", "fd") if key in row}
  assert_close(got, below(expected, "board_gmflow/evaluation/"), atol=1e-4)


@pytest.mark.parametrize("name", ["digits_teacher", "digits_arc"])
def test_they_are_exported(name, runs, expected):
  from safetensors.numpy import load_file

  main(["convert", "--source", str(runs / name), "--out", str(runs / "torch")])
  (file,) = (runs / "torch").glob("*.safetensors")
  assert_close(load_file(file), below(expected, f"{name}/torch/"), atol=0)
