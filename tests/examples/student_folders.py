"""Folders of tiny students and of their bases, as `pflow convert` writes them, from networks of this package."""

import functools
import json

import jax
import numpy as np
from safetensors.numpy import save_file

from pflow_jax.families.dit.names import NAMES as dit
from pflow_jax.families.flux.names import NAMES as flux
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.qwen_image.names import NAMES as qwen_image
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.mesh.partition import combine
from pflow_jax.networks import heads
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.lora import Adapter, init_adapters
from pflow_jax.torch_io.table import to_torch

CHANNELS, BATCH = 4, 2
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = dict(channels=CHANNELS, patch_size=2, depth=2, num_heads=2, head_dim=16, text_width=12, rope_axes=(4, 6, 6))
TEXT |= dict(mlp_ratio=4.0)
MODELS = {
  "dit": dict(channels=CHANNELS, patch_size=2, width=32, depth=2, num_heads=2, num_classes=5, mlp_ratio=4.0)
  | dict(time_scale=1000.0),
  "flux": TEXT | dict(single_depth=2, pooled_width=10, guidance=3.5),
  "qwen_image": TEXT,
}
MODULES = {"dit": DiT, "flux": Flux, "qwen_image": QwenImage}
CONVERT = {"dit": dit, "flux": flux, "qwen_image": qwen_image}
POLICIES = {
  "velocity": dict(kind="velocity"),
  "gmflow": dict(kind="gmflow", num_components=3, logstd_inner_dim=8),
  "gmflow_constant": dict(kind="gmflow", num_components=3, log_std=-1.5),
  "dx": dict(kind="dx", num_coefficients=3),
  "dx_polynomial": dict(kind="dx", num_coefficients=3, basis="polynomial", compat=True),
  "arc": dict(kind="arc", num_components=3),
}
HEADS = {"velocity": heads.VelocityHead, "gmflow": heads.GMFlowHead, "dx": heads.DXHead, "arc": heads.ArcHead}
SEGMENT, SHIFT = 1 / 1.5, 3.2  # of the training that this is for
STATED = {
  "gmflow": dict(type="GMFlow"),
  "gmflow_constant": dict(type="GMFlow"),
  "dx": dict(type="DX", segment_size=SEGMENT, shift=SHIFT),
  "dx_polynomial": dict(type="DX", segment_size=SEGMENT, shift=SHIFT, mode="polynomial"),
  "arc": dict(type="ArcFlow"),
}
SAMPLING = dict(nfe=2, final_scale=0.5, shift=3.2)
RELEASE = dict(release="lakonlab-0.2")
ADAPTED = {
  "flux": (
    Adapter("double_blocks/img_(mlp_in|q)", 3),
    Adapter("single_blocks/(mlp_in|out)", 2),
    Adapter("time_embed/.*", 4),
  ),
  "qwen_image": (Adapter("double_blocks/(img|txt)_mlp_(in|out)", 3), Adapter("time_embed/.*", 4)),
}


def inputs(backbone, batch=BATCH):
  """Noise and condition."""
  rng = np.random.default_rng(1)
  noise = rng.normal(size=(batch, 8, 12, CHANNELS)).astype(np.float32)
  if backbone == "dit":
    return noise, np.arange(batch) + 3
  text = rng.normal(size=(batch, 9, 12)).astype(np.float32)
  if backbone == "flux":
    return noise, dict(text=text, pooled=rng.normal(size=(batch, 10)).astype(np.float32))
  return noise, dict(text=text, mask=np.arange(9) < [[4], [7]])


def make(backbone, policy, seed=0, **attributes):
  """A network of `backbone` with the output layers of `policy`, and random parameters."""
  model = MODELS[backbone] | attributes
  options = {key: value for key, value in POLICIES[policy].items() if key != "kind"}
  layout = "dit" if backbone == "dit" else "flux"
  head = HEADS[POLICIES[policy]["kind"]](channels=CHANNELS, patch_size=2, layout=layout, **options)
  module = MODULES[backbone](**model, head=head)
  noise, cond = inputs(backbone)
  shapes = jax.eval_shape(module.init, jax.random.key(0), noise, np.ones(BATCH, np.float32), cond)["params"]
  return module, filled(shapes, seed)


def filled(shapes, seed):
  """Random parameters, none of which is the 0 or 1 that it may start from."""
  rng = np.random.default_rng(seed)

  def leaf(path, a):
    return (0.1 * rng.normal(size=a.shape) + (path[-1].key == "scale")).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def write(folder, config, tensors, metadata=None):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors, folder / WEIGHTS, metadata)
  return folder


def write_model(folder, backbone, policy_name, params, prefix="", **attributes):
  """The folder of a teacher, a student or an adapter, whatever is in `params`."""
  model, policy, convert = MODELS[backbone] | attributes, POLICIES[policy_name], CONVERT[backbone]
  head = HEADS[policy["kind"]](**{key: value for key, value in policy.items() if key != "kind"})
  tensors = {prefix + name: tensor for name, tensor in to_torch(convert.rows(model, head), params).items()}
  config = convert.config_from_model(model | dict(sample_size=8), head)
  metadata = {"policy_config": json.dumps(STATED.get(policy_name)), "sampling": json.dumps(SAMPLING | RELEASE)}
  return write(folder, config, tensors, metadata if policy_name in STATED else None)


def make_adapter(folder, backbone, policy, prefix=""):
  """Folders "base" and "student" in `folder`, of a teacher and of an adapter on it: its module and all parameters."""
  module, params = make(backbone, policy)
  _, teacher = make(backbone, "velocity", seed=1)
  write_model(folder / "base", backbone, "velocity", teacher)
  updates = jax.eval_shape(functools.partial(init_adapters, table=ADAPTED[backbone]), params, key=jax.random.key(0))
  own = combine({name: params[name] for name in ("head", "final_norm")}, filled(updates, 2))
  write_model(folder / "student", backbone, policy, own, prefix)
  return module, combine({name: value for name, value in teacher.items() if name not in ("head", "final_norm")}, own)
