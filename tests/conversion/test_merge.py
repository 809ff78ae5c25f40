"""Merging: the run without adapters draws what the run with them does."""

import jax
import numpy as np
import pytest

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.conversion.merge import merge
from pflow_jax.evaluation.sample import sample
from pflow_jax.files.lock import Lock
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from pflow_jax.training.workdir import CHECKPOINTS, load_config
from tests.programs import quick

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory, teacher_run):
  folder = tmp_path_factory.mktemp("adapters")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    config = quick("digits", "arc_adapters", teacher_run)
    config.optimizer.learning_rate = 0.1  # so that three steps move the adapters far enough to be seen
    train(config, folder)
  return folder


def test_merged_run_is_plain_and_draws_the_same_samples(adapted_run, tmp_path):
  assert merge(adapted_run, tmp_path / "merged") == 3
  config = load_config(tmp_path / "merged")
  assert not config.adapters.table
  for which in ("ema", "params"):
    params = load_params(tmp_path / "merged" / CHECKPOINTS, which=which)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert not names & {"lora_a", "lora_b"}
    own = load_params(adapted_run / CHECKPOINTS, which=which)
    assert "lora_a" in own["blocks"]["mlp_in"]
    assert "kernel" not in own["blocks"]["mlp_in"]
    assert np.abs(own["blocks"]["mlp_in"]["lora_b"]).max() > 0.05
  shapes = jax.tree.map(np.shape, params)
  assert shapes == jax.tree.map(
    np.shape, jax.eval_shape(build(config).init, jax.random.key(0), build(config).load_frozen())
  )
  drawn = [
    sample(load_config(folder), folder, num=4).with_suffix(".npz") for folder in (adapted_run, tmp_path / "merged")
  ]
  with np.load(drawn[0]) as adapted, np.load(drawn[1]) as merged:
    np.testing.assert_allclose(adapted["x0_nfe1"], merged["x0_nfe1"], atol=1e-5)


def test_what_cannot_be_merged_is_refused(student_run, adapted_run, tmp_path):
  with pytest.raises(ValueError, match="expected a run with adapters"):
    merge(student_run, tmp_path / "out")
  with pytest.raises(ValueError, match="holds a run already"):
    merge(adapted_run, student_run)
  with Lock(tmp_path / "out", "pflow merge"), pytest.raises(ValueError, match="is being written by 'pflow merge'"):
    merge(adapted_run, tmp_path / "out")
  with pytest.raises(ValueError, match="no run in"):
    merge(tmp_path, tmp_path / "out")
