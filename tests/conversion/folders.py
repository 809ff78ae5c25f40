"""Tiny models of PyTorch and runs of ours in folders, that the tests of conversion share."""

import json

import jax
import numpy as np
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.settings.defaults import default_config
from pflow_jax.settings.tree import Settings
from pflow_jax.torch_io.table import same_bits
from pflow_jax.torch_io.tensors import WEIGHTS, open_tensors
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build

SIZES = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16)
TEXT = SIZES | dict(in_channels=16, joint_attention_dim=12, axes_dims_rope=(4, 6, 6))
FLUX = TEXT | dict(num_single_layers=2, pooled_projection_dim=10, guidance_embeds=True)
QWEN = TEXT | dict(out_channels=4)
DIT = SIZES | dict(num_embeds_ada_norm=5, sample_size=8)

CLASSES = {
  "flux": (FluxTransformer2DModel, FLUX),
  "qwen_image": (QwenImageTransformer2DModel, QWEN),
  "dit": (DiTTransformer2DModel, DIT),
}

POLICIES = {
  "gmflow": dict(kind="gmflow", num_components=3, logstd_inner_dim=8),
  "constant": dict(kind="gmflow", num_components=2, log_std=-3.0),
  "dx": dict(kind="dx", num_coefficients=3, basis="grid"),
  "polynomial": dict(kind="dx", num_coefficients=3, basis="polynomial", compat=True),
  "arc": dict(kind="arc", num_components=3),
}
ADAPTERS = {
  "flux": (("single_blocks/(mlp_in|out)", 3), ("double_blocks/(img|txt)_mlp_(in|out)", 4), ("time_embed/.*", 4)),
  "qwen_image": (("double_blocks/(img|txt)_mlp_(in|out)", 4), ("time_embed/.*", 4)),
  "dit": (("blocks/(qkv|mlp_in)", 4), ("time_embed/.*", 4)),
}
SAMPLING = dict(nfe=3, final_scale=0.5, shift=2.5)


def make_torch(kind, dtype=torch.float32, seed=0, **fields):
  """A random model of diffusers, with the one embedding in all blocks that this package's DiT has."""
  torch.manual_seed(seed)
  cls, sizes = CLASSES[kind]
  model = cls(**(sizes | fields)).eval()
  if kind == "dit":
    for block in model.transformer_blocks:
      block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
  for parameter in model.parameters():
    if parameter.ndim == 1:  # biases and scales too are no constants
      parameter.data += 0.1 * torch.randn(parameter.shape)
  if kind == "dit":  # again, now that they were changed
    for block in model.transformer_blocks:
      block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
  return model.to(dtype)


def write_torch(folder, kind, dtype=torch.float32, shard="40KB", **fields):
  make_torch(kind, dtype, **fields).save_pretrained(folder, max_shard_size=shard)
  return folder


def edit(folder, change, **config):
  """Changes the tensors of a folder of one file, by `change(dict)`, and its config.json."""
  tensors = load_file(folder / WEIGHTS)
  change(tensors)
  save_file(tensors, folder / WEIGHTS, {"format": "pt"})
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))


def assert_same_tensors(got, want):
  """Two folders, bit by bit."""
  got, want = open_tensors(got), open_tensors(want)
  assert set(got.places) == set(want.places)
  assert [name for name in got.places if not same_bits(got.read(name), want.read(name))] == []


def config_of(kind, policy, teacher, table, method="auto"):
  config = default_config("imitation")
  if kind == "dit":
    config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=5)
  else:
    config.data = dict(name="synthetic_prompts", model=kind, shape=(8, 8, 4), text=(6, 12))
  if kind == "flux":
    config.data.pooled = 10
  config.model = workdir.load_config(teacher).model.to_dict()
  config.head = POLICIES[policy]
  config.teacher.workdir = str(teacher)
  config.adapters.table = table
  config.objective.update(**SAMPLING)
  config.sample.update(temperature=0.7, method=method)
  config.train.update(steps=1, batch_size=1)
  config.optimizer.learning_rate = 1e-3
  return config


def write_run(folder, kind, policy, teachers, table=None, **changes):
  """A run of random parameters, as if it had trained; returns its params and ema."""
  config = config_of(kind, policy, teachers / "run" / kind, ADAPTERS[kind] if table is None else table, **changes)
  experiment = build(config)
  shapes = jax.eval_shape(experiment.init, jax.random.key(0), experiment.frozen)
  rng = np.random.default_rng(0)
  params, ema = (jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes) for _ in range(2))
  workdir.claim(folder, Settings.of(config, converted=True))
  with Checkpointer(folder / workdir.CHECKPOINTS) as checkpointer:
    checkpointer.save(7, {"params": params, "ema": ema})
  return params, ema


def metadata_of(folder):
  with safe_open(folder / WEIGHTS, "pt") as file:
    return file.metadata()
