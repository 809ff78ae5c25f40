"""Tiny models of PyTorch in folders, that the tests of conversion share."""

import json

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from pflow_jax.torch_io.table import same_bits
from pflow_jax.torch_io.tensors import WEIGHTS, open_tensors

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
