"""FLUX, Qwen-Image and DiT against diffusers: outputs, gradients, and the published sizes, by the name tables."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel

from pflow_jax.families.dit.names import NAMES as dit
from pflow_jax.families.flux.names import NAMES as flux
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.qwen_image.names import NAMES as qwen_image
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.mesh.partition import path_of
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.heads import VelocityHead
from pflow_jax.networks.layers import patchify, unpatchify
from pflow_jax.torch_io.table import to_flax, torch_shapes_of

pytestmark = pytest.mark.usefixtures("float32")

SIZE = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2)
TEXT = dict(joint_attention_dim=24, axes_dims_rope=(4, 6, 6))


def randomised(module):
  """No parameter at its neutral value."""
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
      parameter.copy_(scale * torch.randn_like(parameter))
  return module.eval()


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def relative(got, want):
  """Norm of the difference over that of what is expected."""
  got, want = (np.asarray(a, np.float64) for a in (got, want))
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)


def packed(x):
  """Latents (B, H, W, C) as diffusers' pipelines pack them."""
  return torch.tensor(np.array(patchify(jnp.asarray(x), 2, "flux")))


def unpacked(tokens, grid):
  return unpatchify(jnp.asarray(tokens), grid, 2, 1, "flux")[:, 0]


class FluxCase:
  """3 examples of 6 x 10 latents, 7 text tokens."""

  module = Flux
  table = flux
  inputs: ClassVar = {"x": draw(3, 6, 10, 16), "text": draw(3, 7, 24), "pooled": draw(3, 20)}

  @staticmethod
  def theirs(guidance=True):
    config = dict(**SIZE, **TEXT, num_single_layers=2, pooled_projection_dim=20, guidance_embeds=guidance)
    return randomised(FluxTransformer2DModel(**config))

  @staticmethod
  def call(model, x, text, pooled, t):
    rows, columns = np.indices((x.shape[1] // 2, x.shape[2] // 2)).reshape(2, -1)
    ids = torch.tensor(np.stack([0 * rows, rows, columns], 1)).float()
    guidance = torch.full((len(t),), 3.5) if model.config.guidance_embeds else None
    return model(
      hidden_states=x_packed(x),
      encoder_hidden_states=text,
      pooled_projections=pooled,
      timestep=t,
      img_ids=ids,
      txt_ids=torch.zeros(text.shape[1], 3),
      guidance=guidance,
    ).sample

  @staticmethod
  def cond(arrays):
    return {"text": arrays["text"], "pooled": arrays["pooled"]}


class QwenCase:
  """3 examples of 6 x 10 latents, 7, 3 and 5 text tokens."""

  module = QwenImage
  table = qwen_image
  inputs: ClassVar = {"x": draw(3, 6, 10, 16), "text": draw(3, 7, 24)}
  mask = np.arange(7) < np.array([[7], [3], [5]])

  @staticmethod
  def theirs():
    return randomised(QwenImageTransformer2DModel(**SIZE, **TEXT))

  @classmethod
  def call(cls, model, x, text, t):
    return model(
      hidden_states=x_packed(x),
      encoder_hidden_states=text,
      encoder_hidden_states_mask=torch.tensor(cls.mask),
      timestep=t,
      img_shapes=[[(1, x.shape[1] // 2, x.shape[2] // 2)]] * len(x),
    ).sample

  @classmethod
  def cond(cls, arrays):
    return {"text": arrays["text"], "mask": cls.mask}


class DiTCase:
  """3 examples of 8 x 8 latents."""

  module = DiT
  table = dit
  inputs: ClassVar = {"x": draw(3, 8, 8, 4)}
  labels = np.array([0, 4, 10])

  @staticmethod
  def theirs(**changes):
    config = dict(in_channels=4, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero")
    model = randomised(DiTTransformer2DModel(**(SIZE | config | dict(out_channels=4) | changes)))
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
      block.norm1.emb.load_state_dict(first.state_dict())  # as in the released files
    return model

  @classmethod
  def call(cls, model, x, t):
    out = model(x.permute(0, 3, 1, 2), timestep=1000 * t, class_labels=torch.tensor(cls.labels)).sample
    return out[:, : x.shape[-1]].permute(0, 2, 3, 1)

  @classmethod
  def cond(cls, arrays):
    return cls.labels


CASES = {"flux": FluxCase, "qwen_image": QwenCase, "dit": DiTCase}
TIMES = np.array([0.1, 0.53, 1.0], np.float32)


def x_packed(x):
  """`packed` of a tensor, with its gradient."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4).reshape(b, -1, 4 * c)


def velocity(case, model, tensors, t=TIMES):
  """diffusers' output in space."""
  out = case.call(model, *tensors.values(), torch.tensor(t))
  if out.ndim == 4:
    return out
  b, h, w, c = tensors["x"].shape
  return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, h, w, c)


def ours(case, model, **changes):
  """Our module for diffusers' config, and the rows of its table."""
  attributes = case.table.model_from_config({**model.config, "_class_name": type(model).__name__})
  table = case.table.rows(attributes)
  attributes.pop("out_channels", None)
  patch = attributes["patch_size"]
  head = VelocityHead(attributes["channels"], patch, layout="dit" if case is DiTCase else "flux")
  return case.module(head=head, **(attributes | changes)), table


def params_of(table, model):
  return to_flax(table, {name: value.detach().numpy() for name, value in model.state_dict().items()})


def arrays_and_tensors(case):
  return case.inputs, {name: torch.tensor(value, requires_grad=True) for name, value in case.inputs.items()}


def test_packing_of_the_test():
  x = draw(2, 4, 6, 16)
  np.testing.assert_array_equal(x_packed(torch.tensor(x)), packed(x))
  np.testing.assert_array_equal(unpacked(np.array(packed(x)), (2, 3)), x)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
  """Float32: outputs to 1e-4, gradients with respect to every input and weight to 1e-3 of their norm."""
  case = CASES[name]
  model = case.theirs()
  module, table = ours(case, model)
  params = params_of(table, model)
  arrays, tensors = arrays_and_tensors(case)
  weight = draw(*case.inputs["x"].shape, seed=1)

  def loss(params, arrays):
    out = module.apply({"params": params}, arrays["x"], TIMES, case.cond(arrays))
    return jnp.sum(weight * out), out

  gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, arrays)
  expected = velocity(case, model, tensors)
  assert relative(out, expected.detach()) < 1e-4
  (expected * torch.tensor(weight)).sum().backward()
  for key, tensor in tensors.items():
    assert relative(gradients[1][key], tensor.grad) < 1e-3, key
  theirs = {
    key: np.zeros(tensor.shape, np.float32) if tensor.grad is None else tensor.grad.numpy()
    for key, tensor in model.named_parameters()
  }
  for row in table:
    if row.tied:  # what is one leaf has the sum of its copies' gradients
      theirs |= dict.fromkeys(row.names, sum(theirs[key] for key in row.names))
  for (keys, got), want in zip(
    jax.tree_util.tree_leaves_with_path(gradients[0]), jax.tree.leaves(to_flax(table, theirs)), strict=True
  ):
    # Where the exact gradient is 0, as that of a key's bias, rounding is all there is.
    scale = max(float(np.linalg.norm(want)), 1e-4 * float(np.linalg.norm(weight)))
    assert float(np.linalg.norm(got - want)) / scale < 1e-3, path_of(keys)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
  """To 2 % of the norm, which is what PyTorch's bfloat16 differs by from its own float32, or less."""
  case = CASES[name]
  model = case.theirs()
  module, table = ours(case, model, dtype="bfloat16")
  arrays, tensors = arrays_and_tensors(case)
  out = jax.jit(module.apply)({"params": params_of(table, model)}, arrays["x"], TIMES, case.cond(arrays))
  assert 1e-4 < relative(out, velocity(case, model, tensors).detach()) < 0.02


def test_schnell_has_no_guidance():
  model = FluxCase.theirs(guidance=False)
  module, table = ours(FluxCase, model)
  assert module.guidance is None
  arrays, tensors = arrays_and_tensors(FluxCase)
  out = jax.jit(module.apply)({"params": params_of(table, model)}, arrays["x"], TIMES, FluxCase.cond(arrays))
  assert relative(out, velocity(FluxCase, model, tensors).detach()) < 1e-4


def test_learned_variance_is_left_out():
  model = DiTCase.theirs(out_channels=8)
  module, table = ours(DiTCase, model)
  out = jax.jit(module.apply)({"params": params_of(table, model)}, DiTCase.inputs["x"], TIMES, DiTCase.labels)
  assert relative(out, velocity(DiTCase, model, arrays_and_tensors(DiTCase)[1]).detach()) < 1e-4


PUBLISHED = {
  "FLUX.1-dev": (FluxCase, lambda: FluxTransformer2DModel(guidance_embeds=True), 11_901_408_320),
  "FLUX.1-schnell": (FluxCase, lambda: FluxTransformer2DModel(guidance_embeds=False), 11_891_178_560),
  "Qwen-Image": (QwenCase, QwenImageTransformer2DModel, 20_430_401_088),
  "DiT-XL/2": (
    DiTCase,
    lambda: DiTTransformer2DModel(
      num_attention_heads=16,
      attention_head_dim=72,
      in_channels=4,
      out_channels=4,
      num_layers=28,
      sample_size=32,
      patch_size=2,
      num_embeds_ada_norm=1000,
      norm_type="ada_norm_zero",
    ),
    None,
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  """Names and shapes of all tensors, without one: what the table makes of our shapes is what PyTorch's class has."""
  case, make, count = PUBLISHED[name]
  with torch.device("meta"):
    model = make()
  module, table = ours(case, model)
  cond = case.cond({key: np.zeros((1, 4, size), np.float32) for key, size in widths(model).items()})
  if isinstance(cond, dict):
    cond = {key: value[:1, :4] if key != "pooled" else value[:1, 0] for key, value in cond.items()}
  else:
    cond = cond[:1]
  x = jax.ShapeDtypeStruct((1, 32, 32, module.channels), "float32")
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), "float32"), cond)["params"]
  rows = {row.flax: row for row in table}
  leaves = {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  assert set(rows) == set(leaves)
  expected = {}
  for path, shape in leaves.items():
    expected |= torch_shapes_of(rows[path], shape)
  theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
  assert expected == theirs
  if count is not None:
    assert sum(np.prod(shape, dtype=int) for shape in leaves.values()) == count
    assert sum(value.numel() for value in model.parameters()) == count


def widths(model):
  config = model.config
  return {"text": config.get("joint_attention_dim", 1), "pooled": config.get("pooled_projection_dim", 1)}
