"""Tiny networks in the files of DiT's, SiT's and REPA's authors, of the weights in golden/authors_*.npz."""

import argparse

import numpy as np
import torch

from pflow_jax.families.dit.authors import NAMES as authors
from pflow_jax.families.dit.names import NAMES as release
from pflow_jax.networks.dit import DIT_SIZES
from pflow_jax.torch_io.table import to_flax, to_torch

TINY = dict(width=16, depth=2, num_heads=2)  # stands for a published size, whose heads are known
FIELDS = dict(num_attention_heads=2, num_layers=2, sample_size=8, num_embeds_ada_norm=5)
# Arguments of the authors' training scripts: those that tell whose they are, and some more.
ARGS = {
  "sit": dict(model="SiT-XL/2", path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, ckpt=None),
  "repa": dict(model="SiT-XL/2", path_type="linear", prediction="v", enc_type="dinov2-vit-b", proj_coeff=0.5),
  "dit": dict(model="DiT-XL/2", image_size=256, vae="ema"),
}


def publish(monkeypatch):
  """Makes the tiny size one whose heads are known."""
  monkeypatch.setitem(DIT_SIZES, "tiny", TINY)


def tensors(file):
  """State dict of a golden file."""
  weights = {name.partition("/")[2]: value for name, value in file.items() if name.startswith("weight/")}
  state = {name: value.astype(np.float32) for name, value in weights.items()}
  state |= {"pos_embed": file["pos_embed"]} if "pos_embed" in file else {}
  return {name: torch.tensor(value) for name, value in state.items()}


def checkpoint(state, kind):
  """The dict that a training script of the authors saves, with other weights beside their average."""
  other = {name: tensor + 1 for name, tensor in state.items()}
  moments = {i: {"step": torch.tensor(3.0), "exp_avg": tensor} for i, tensor in enumerate(other.values())}
  opt = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
  return {"model": other, "ema": state, "opt": opt, "args": argparse.Namespace(**ARGS[kind]), "steps": 3}


def attributes(state, kind, names=authors):
  """Attributes of the network with such weights, for a table of names."""
  times = {"sit": (1, True), "repa": (1, False), "dit": (1000, False)}[kind]
  fields = FIELDS | dict(zip(("num_timesteps", "flip_model_timesteps"), times, strict=True))
  fields |= {"_class_name": names.class_names[0], "attention_head_dim": len(state["x_embedder.proj.bias"]) // 2}
  outputs = len(state["final_layer.linear.bias"]) // 4
  return names.model_from_config(fields | {"out_channels": outputs if names is authors else 4})


def released(state, kind):
  """The same network by the names of π-Flow's release, as LakonLab has them: time as it is, velocity eps - x0."""
  params = to_flax(authors.rows(attributes(state, kind)), {name: tensor.numpy() for name, tensor in state.items()})
  back = to_torch(release.rows(attributes(state, kind, release)), params)
  return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in back.items()}


def per_block(state):
  """The same with an embedding for each block, as diffusers has them."""
  found = {name: tensor for name, tensor in state.items() if not name.startswith("emb.")}
  for i in range(2):
    block = f"transformer_blocks.{i}.norm1"
    found |= {f"{block}.{name}": tensor for name, tensor in state.items() if name.startswith("emb.")}
  return found
