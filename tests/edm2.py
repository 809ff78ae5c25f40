"""Tiny EDM2s by the names of NVIDIA's code, with weights that are drawn by their names."""

import contextlib
import pickle
import sys
import types
import zlib
from unittest import mock

import numpy as np
import torch

from pflow_jax.families.edm2.names import NAMES
from pflow_jax.networks.heads import DenoiserHead
from pflow_jax.torch_io.table import flat_shapes, to_flax, to_torch, torch_shapes_of

# Arguments of NVIDIA's class by kind. Those of 64 have attention where the published ones do.
KINDS = {
  "img64": dict(img_resolution=64, img_channels=3, label_dim=5, model_channels=8, num_blocks=1, channels_per_head=8),
  "img512": dict(img_resolution=64, img_channels=4, label_dim=0, model_channels=8, num_blocks=1, channels_per_head=8),
  **{
    name: dict(img_resolution=16, img_channels=3, label_dim=5, model_channels=width, channel_mult=[1, 2], num_blocks=1)
    | dict(attn_resolutions=[8], channels_per_head=8)
    for name, width in (("strong", 16), ("weak", 8))
  },
}
KINDS["uncond"] = KINDS["weak"] | dict(label_dim=0)
CLIPPED = "unet.dec.8x8_in1.emb_gain"  # of "img512": so large that the block's output is clipped
SIGMA = (0.3, 20.0)  # of the examples


def weight(kind, name, shape):
  """A tensor of NVIDIA's class (float32): noise as at its start, and gains that let all of it be seen."""
  rng = np.random.default_rng(zlib.crc32(f"{kind} {name}".encode()))
  if name.endswith("gain"):
    return np.float32(3000.0 if (kind, name) == ("img512", CLIPPED) else 0.6 + 0.2 * rng.standard_normal())
  if name.endswith("phases"):
    return np.float32(2 * np.pi * rng.random(shape))
  scale = 2 * np.pi * 0.3 if name.endswith("freqs") else 1.0
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def batch(kind):
  """States (2, H, W, C), of noise levels SIGMA, and a cotangent of the same shape."""
  rng = np.random.default_rng(1)
  shape = (2, *(KINDS[kind]["img_resolution"],) * 2, KINDS[kind]["img_channels"])
  y = rng.standard_normal(shape) * np.sqrt(0.25 + np.square(SIGMA))[:, None, None, None]
  return np.float32(y), np.float32(rng.standard_normal(shape))


def probes(size):
  """Places in a flat weight at which gradients are kept."""
  return np.unique(np.linspace(0, size - 1, 9).astype(int))


def network(kind, **options):
  """Our module with those weights: module, head, parameters, rows."""
  import jax

  head = DenoiserHead()
  attributes = NAMES.model_from_config({"_class_name": "Precond", **KINDS[kind]}, head)
  rows = NAMES.rows(attributes, head)
  side = attributes.pop("sample_size")
  module = NAMES.module(**attributes, **options)
  x = jax.ShapeDtypeStruct((1, side, side, attributes["channels"]), np.float32)
  one, label = jax.ShapeDtypeStruct((1,), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
  shapes = flat_shapes(jax.eval_shape(module.init, jax.random.key(0), x, one, label)["params"])
  names = {name: shape for row in rows for name, shape in torch_shapes_of(row, shapes[row.flax]).items()}
  assert len(rows) == len(shapes)
  return module, head, to_flax(rows, {name: weight(kind, name, shape) for name, shape in names.items()}), rows


def state_dict(kind):
  """Tensors of NVIDIA's class by name, those that estimate its loss too."""
  _, _, params, rows = network(kind)
  tensors = to_torch(rows, params) | {name: np.ones_like(value) for name, value in NAMES.constants({}).items()}
  return {name: torch.tensor(value) for name, value in tensors.items()}


def persistent(name, source="import os\nos.mkdir('ran')\n", base=torch.nn.Module, **arguments):
  """An object that is pickled as `torch_utils.persistence` pickles one of a class, with the source of its module."""

  class Persistent(base):
    def __reduce__(self):
      state = {**self.__dict__, "_init_args": (), "_init_kwargs": arguments}
      meta = dict(type="class", version=6, module_src=source, class_name=name, state=state)
      return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None

  return Persistent()


@contextlib.contextmanager
def _nvidias_modules():
  """Has what a snapshot names be there while it is pickled, under its names."""
  made = {name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")}

  def _reconstruct_persistent_obj(meta):
    raise AssertionError("it was called")

  easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
  _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
  _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
  made["dnnlib.util"].EasyDict = easy
  made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
  with mock.patch.dict(sys.modules, made):
    yield easy


def snapshot(path, kind, dtype=torch.float16, **changes):
  """Writes the snapshot of a training as NVIDIA's code does, or with other things in it: a pickle with classes.

  Args:
    path: of the file.
    kind: of the network, one of KINDS.
    dtype: of its tensors.
    changes: entries beside "ema" and "encoder".
  """
  root = persistent("Precond", use_fp16=True, **KINDS[kind])
  for name, tensor in state_dict(kind).items():
    *parents, leaf = name.split(".")
    module = root
    for i, part in enumerate(parents):
      if part not in module._modules:
        child = torch.nn.ModuleDict() if part in ("enc", "dec") else persistent("UNet" if not i else "Block")
        module.add_module(part, child)
      module = module._modules[part]
    if leaf in ("freqs", "phases"):
      module.register_buffer(leaf, tensor.to(dtype))
    else:
      module.register_parameter(leaf, torch.nn.Parameter(tensor.to(dtype), requires_grad=False))
  with _nvidias_modules() as easy:
    data = easy(encoder=persistent("StandardRGBEncoder", base=object), dataset_kwargs=easy(path="x"), loss_fn=None)
    data.update(changes)
    data["ema"] = root
    path.write_bytes(pickle.dumps(data))
  return path
