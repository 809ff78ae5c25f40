"""What `pflow convert` refuses, before it writes anything."""

import json

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.conversion.program import convert
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from tests.conversion.folders import edit, write_torch

pytestmark = pytest.mark.usefixtures("float32")


def test_a_wrong_model_is_told_in_one_message_before_anything_is_written(tmp_path):
  write_torch(tmp_path / "torch", "flux", shard="1GB")

  def change(tensors):
    tensors["transformer_blocks.0.attn.to_q.wieght"] = tensors.pop("transformer_blocks.0.attn.to_q.weight")
    tensors["proj_out.bias"] = torch.zeros(3)
    tensors["extra"] = torch.zeros(1)

  edit(tmp_path / "torch", change)
  with pytest.raises(ValueError, match="does not hold the tensors") as error:
    convert(tmp_path / "torch", tmp_path / "run")
  text = str(error.value)
  assert "transformer_blocks.0.attn.to_q.weight (near: transformer_blocks.0.attn.to_q.wieght)" in text
  assert "proj_out.bias (expected (16,), got (3,))" in text
  assert "2 unexpected" in text
  assert "extra" in text
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(dtype="float16"), "^dtype: "),
    (dict(which="last"), "^which: "),
    (dict(max_shard_gb=0), "^max_shard_gb: "),
    (dict(base="teacher"), "^base: expected adapters"),
    (dict(mesh={"fsdp": -1}), "expected sizes of at least 1"),
    (dict(mesh={"fsdp": 3, "min_size": 1}), "table of shardings does not fit"),
  ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
  write_torch(tmp_path / "torch", "dit")
  with pytest.raises(ValueError, match=message):
    convert(tmp_path / "torch", tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"_class_name": "UNet2DModel"}, "_class_name must be one of"),
    ({"_class_name": "DiTTransformer2DModel", "out_channels": 7}, "twice that with a learned variance"),
    ({"_class_name": "DiTTransformer2DModel", "activation_fn": "geglu"}, "gelu-approximate"),
    ({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True}, "zero_cond_t: input should be False"),
    ({"_class_name": "GMFluxTransformer2DModel", "gm_num_logstd_layers": 3}, "gm_num_logstd_layers: input should be 2"),
    ([], "input should be an object"),
  ],
)
def test_models_that_this_package_lacks_are_refused(tmp_path, config, message):
  source = tmp_path / "torch"
  source.mkdir()
  (source / "config.json").write_text(json.dumps(config))
  torch.save({"a": torch.zeros(1)}, source / "diffusion_pytorch_model.bin")
  with pytest.raises(ValueError, match=message):
    convert(source, tmp_path / "out")


def test_other_sources_are_refused(tmp_path):
  with pytest.raises(ValueError, match="there is no file or folder"):
    convert(tmp_path / "none", tmp_path / "out")
  write_torch(tmp_path / "torch", "dit", shard="1GB")
  convert(tmp_path / "torch", tmp_path / "run")
  with pytest.raises(ValueError, match="^base, mesh, convention: expected a model of PyTorch"):
    convert(tmp_path / "run", tmp_path / "out", mesh={"fsdp": 2})
  edit(tmp_path / "torch", lambda tensors: tensors.update({"a.lora_A.weight": torch.zeros(1)}))
  with pytest.raises(ValueError, match="fuse them"):
    convert(tmp_path / "torch", tmp_path / "out")
  other = ConfigDict({"model": dict(kind="mlp", width=8, depth=1), "policy": dict(kind="velocity")})
  other.objective = dict(kind="pretrained")
  workdir.claim(tmp_path / "mlp", Settings.of(other, converted=True))
  with Checkpointer(tmp_path / "mlp" / workdir.CHECKPOINTS) as checkpointer:
    checkpointer.save(0, {"params": {"a": np.zeros(3, np.float32)}})
  with pytest.raises(ValueError, match="PyTorch has no class for 'mlp'"):
    convert(tmp_path / "mlp", tmp_path / "out")
  assert not (tmp_path / "out").exists()
