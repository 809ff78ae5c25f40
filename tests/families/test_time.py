"""Teachers that count time otherwise: π-Flow's SiT from noise to data, in its config or in nothing but its name."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.conversion import models
from pflow_jax.conversion.program import convert
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.torch_io.table import flat_shapes
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.network import make_network
from tests.conversion.folders import make_torch
from tests.programs import quick

pytestmark = pytest.mark.usefixtures("float32")

FIELDS = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16, num_embeds_ada_norm=5, sample_size=8)
FIELDS |= {"_class_name": "DiTTransformer2DModelMod", "num_timesteps": 1}


def write_teacher(folder, name="teacher.pth", **fields):
  """A state dict as π-Flow's release has them, and its network."""
  folder.mkdir(exist_ok=True)
  model = make_torch("dit")
  state = {}
  for key, tensor in model.state_dict().items():
    block, _, rest = key.partition(".norm1.emb.")
    if not rest or block == "transformer_blocks.0":
      state[f"emb.{rest}" if rest else key] = tensor
  state.pop("pos_embed.pos_embed", None)
  torch.save(state, folder / name)
  (folder / "config.json").write_text(json.dumps(FIELDS | fields))
  for block in model.transformer_blocks:  # whose sinusoid is that of the original DiT
    block.norm1.emb.time_proj = Timesteps(256, True, downscale_freq_shift=0)
  return model


def velocity_of(folder, x, t, labels):
  config = workdir.load_config(folder)
  params = load_params(folder / workdir.CHECKPOINTS, which="params")
  model = models.model_of_run(Settings.of(config, converted=True), flat_shapes(params), {"sample_size": 8})
  return np.asarray(
    make_network(Choice.of(config.model), Choice.of(config.head), model._dataset())(params, x, t, labels)
  )


def relative(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_time_that_runs_from_noise_to_data_is_honoured_there_and_back(tmp_path, capsys):
  model = write_teacher(tmp_path / "sit", flip_model_timesteps=True)
  write_teacher(tmp_path / "repa")
  x, labels = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32), np.array([1, 5])
  t = np.array([0.1, 0.8], np.float32)
  with torch.no_grad():
    want = model(torch.tensor(x).movedim(-1, 1), torch.tensor(1 - t), torch.tensor(labels)).sample.movedim(1, -1)
  for name in ("sit", "repa"):
    convert(tmp_path / name / "teacher.pth", tmp_path / f"{name}_run")
    noted = "taken to be given time from data, 0, to noise, 1, and to return eps - x0" in capsys.readouterr().out
    assert noted == (name == "repa")
  assert relative(velocity_of(tmp_path / "sit_run", x, t, labels), want.numpy()) < 1e-5
  assert relative(velocity_of(tmp_path / "repa_run", x, t, labels), want.numpy()) > 0.005
  convert(tmp_path / "sit_run", tmp_path / "back")
  config = json.loads((tmp_path / "back" / "config.json").read_text())
  assert (config["num_timesteps"], config["flip_model_timesteps"]) == (1, True)
  convert(tmp_path / "back", tmp_path / "again")
  assert workdir.load_config(tmp_path / "again").model == workdir.load_config(tmp_path / "sit_run").model


def test_a_converted_teacher_fits_its_students_recipe(tmp_path):
  """π-Flow's layout of REPA's teacher, small: the recipe's network is the file's, and so is its way of telling time."""
  write_teacher(tmp_path / "repa")
  convert(tmp_path / "repa" / "teacher.pth", tmp_path / "run")
  config = quick("imagenet", "gmrepa_1nfe", tmp_path / "run")
  config.data.num_classes, config.model.width = FIELDS["num_embeds_ada_norm"], 32
  teacher = build(config).teacher
  assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher.load())} == {"bfloat16"}
  for variant, key in (("gmdit_1nfe", "time_scale"), ("gmrepa_1nfe", "norm_eps")):
    other = quick("imagenet", variant, tmp_path / "run")
    other.data.num_classes, other.model.width = FIELDS["num_embeds_ada_norm"], 32
    if key == "norm_eps":
      other.model.norm_eps = 1e-6
    with pytest.raises(ValueError, match=rf"model\.{key}: the teacher has"):
      build(other)


def test_a_file_of_sit_that_does_not_tell_its_time_is_refused(tmp_path):
  """But for the published one, which is known by its name."""
  write_teacher(tmp_path / "torch", "SiT-XL-2.pth")
  with pytest.raises(
    ValueError, match=r"do not tell how .*sit \(time from noise, 0, to data, 1, vel.*eps - x0"
  ) as error:
    convert(tmp_path / "torch" / "SiT-XL-2.pth", tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
  write_teacher(tmp_path / "torch", "sit_imagenet.pth")
  convert(tmp_path / "torch" / "sit_imagenet.pth", tmp_path / "run")
  assert workdir.load_config(tmp_path / "run").model.flip_time
  write_teacher(tmp_path / "told", "sit_imagenet.pth", flip_model_timesteps=False)
  convert(tmp_path / "told" / "sit_imagenet.pth", tmp_path / "other")
  assert not workdir.load_config(tmp_path / "other").model.flip_time


@pytest.mark.parametrize(
  "fields", [{"flip_model_timesteps": 1}, {"num_timesteps": 0}, {"num_timesteps": "1"}, {"denoising_mean_mode": "X0"}]
)
def test_times_that_make_no_sense_are_refused(tmp_path, fields):
  write_teacher(tmp_path / "torch", **fields)
  with pytest.raises(ValueError, match=next(iter(fields))):
    convert(tmp_path / "torch" / "teacher.pth", tmp_path / "run")
