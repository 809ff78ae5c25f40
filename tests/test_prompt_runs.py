"""Students of text-to-image models as runs: buckets, pictures on the way, samples, tables, several processes."""

import json

import jax
import numpy as np
import pytest

import pflow_jax as pf
from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.conversion.merge import merge
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.sample import preview_size, sample, save_picture
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.train import train
from tests.programs import quick, write_pretrained
from tests.prompt_folders import write
from tests.test_processes import Processes

pytestmark = pytest.mark.usefixtures("float32")
PROMPTS = [*("a", "bb", "a cat", "the dog", "red", "two", "a red", "no"), *("a photo of two", "a photo of the dog")]
SHAPE = (4, 4, 16)


@pytest.fixture
def config(tmp_path):
  """A student of a random Qwen-Image on a folder of prompts with latents, texts of up to 16 tokens."""
  config = quick("qwen_image", "gm", steps=4, batch_size=16, accumulation=2, sample_every=2)
  folder = write(tmp_path / "prompts", prompts=PROMPTS, shape=SHAPE)
  config.data = dict(name=f"prompts:{folder}", model="qwen_image", buckets=(6, 32))
  config.model.text_width = data.load(**config.data).embedding.text_width
  config.teacher.update(workdir=str(write_pretrained(config, tmp_path / "teacher")), dtype="float32")
  config.evaluate.update(num_samples=8, teacher_steps=(4, 128))
  config.sample.batch_size = 8
  return config


@pytest.mark.slow
def test_a_run_with_buckets_is_trained_sampled_and_measured(config, tmp_path, capsys):
  assert build(config).dataset.lengths == (6, 32)
  folder = tmp_path / "run"
  train(config, folder, picture=(save_picture, preview_size))
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert all(np.isfinite(row["loss"]) for row in rows)
  costs = [row["tflops_per_second"] / row["images_per_second"] for row in rows]
  assert max(costs) > 1.01 * min(costs), "two lengths of text"
  assert len(list((folder / "samples").glob("*.png"))) == 2
  own = workdir.load_config(folder)
  assert own.data.max_length == 16, "what prompts are to be cut to when they are sampled"
  with np.load(sample(own, folder, num=3).with_suffix(".npz")) as drawn:
    assert drawn["x0_nfe4"].shape == (3, *SHAPE)
  report = evaluate(own, folder)
  assert [row["name"] for row in report["rows"]] == ["teacher, 4 steps", "teacher, 128 steps", "student, 4 NFE"]
  assert np.isfinite([(row["alignment"], row["diversity_ratio"]) for row in report["rows"][::2]]).all()
  assert "alignment" in (folder / "evaluation" / "evaluation.md").read_text()


def test_a_teacher_of_texts_is_guided_away_from_its_datas_empty_prompt(tmp_path):
  """What a run carries of its data has none, so that it is read from there."""
  config = quick("emoji", "teacher", steps=2)
  folder = write(tmp_path / "prompts", "minilm", prompts=PROMPTS, shape=(8, 8, 3))
  config.data = dict(name=f"prompts:{folder}")
  config.optimizer.update(learning_rate=0.5)  # its output begins as zeros
  train(config, tmp_path / "run")
  own, drawn = workdir.load_config(tmp_path / "run"), {}
  for strength in (None, 1.0, 3.0):
    own.sample.guidance = strength
    with np.load(sample(own, tmp_path / "run", num=3, nfe=1, out=tmp_path / str(strength)).with_suffix(".npz")) as file:
      drawn[strength] = file["x0_nfe1"]
  np.testing.assert_array_equal(drawn[1.0], drawn[None])
  assert np.abs(drawn[3.0] - drawn[1.0]).max() > 1e-3
  write(tmp_path / "without", "minilm", prompts=PROMPTS, shape=(8, 8, 3), null=False)
  own.data.name = f"prompts:{tmp_path}/without"
  with pytest.raises(ValueError, match="needs the empty prompt's embedding, which prompts:.*without lacks"):
    sample(own, tmp_path / "run", num=3, nfe=1, out=tmp_path / "no")


def test_prompts_alone_are_no_data_to_start_from(config, tmp_path):
  folder = write(tmp_path / "alone", prompts=PROMPTS, shape=None)
  config.data = dict(name=f"prompts:{folder}", model="qwen_image", shape=SHAPE)
  with pytest.raises(ValueError, match="'imitation' starts from data, and .*alone has none; train without"):
    build(config)


def test_adapters_on_a_teacher_in_low_precision_are_not_merged(config, tmp_path):
  for dtype, message in {"float32": "no checkpoint yet", "bfloat16": "its teacher is kept in bfloat16"}.items():
    config.teacher.dtype = dtype
    workdir.claim(tmp_path / dtype, Settings.of(config, converted=True))
    with pytest.raises(ValueError, match=message):
      merge(tmp_path / dtype, tmp_path / "merged")
  assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(config, tmp_path):
  """Each reads its own rows of every batch."""
  config.data.buckets = (32,)
  config.train.update(steps=2, sample_every=0, accumulation=1)
  config.mesh.update(fsdp=2, min_size=64)
  workdir.claim(tmp_path / "shared", Settings.of(config, converted=True))
  read = f"get_config = lambda: load_config({str(tmp_path / 'shared')!r})"
  code = f"from pflow_jax.training.workdir import load_config\n{read}\n"
  (tmp_path / "config.py").write_text(code)
  for count in (1, 2):
    flags = (f"--config={tmp_path / 'config.py'}",)
    with Processes(tmp_path / f"logs{count}", tmp_path / f"run{count}", count, 4 // count, flags, own=()) as processes:
      assert processes.wait() == [0] * count, processes.log(0)
  one, two = (load_params(tmp_path / f"run{count}" / workdir.CHECKPOINTS, which="params") for count in (1, 2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)


@pytest.mark.slow
def test_a_loaded_student_of_a_guided_teacher_of_texts_is_measured(tmp_path):
  """The empty prompt, which guides the teacher, is not in what a workdir says of its data."""
  train(quick("emoji", "teacher"), tmp_path / "teacher")
  train(quick("emoji", "gmflow", tmp_path / "teacher"), tmp_path / "student")
  run = pf.load(tmp_path / "student")
  assert run.data.null_cond is None
  report = run.evaluate(num_samples=16, teacher_steps=(4, 128), num_resamples=2, nearest_k=2, quiet=True)
  assert np.isfinite(report.rows[-1]["alignment"])
