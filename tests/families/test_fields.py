"""Fields of every class's config.json: the network does what they say, or they are refused by name."""

import dataclasses
import functools
import inspect
import json
import typing

import diffusers
import jax
import numpy as np
import pytest
import torch

from pflow_jax.conversion import models
from pflow_jax.families import autoencoder
from pflow_jax.families.dit.names import NAMES as dit
from pflow_jax.families.flux.names import NAMES as flux
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.kl_names import NAMES as vae
from pflow_jax.families.metadata import FlowMapStated
from pflow_jax.families.qwen_image.names import NAMES as qwen_image
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.families.qwen_image.vae_names import NAMES as qwen_vae
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.heads import VelocityHead
from pflow_jax.torch_io.fields import check_sizes, read_fields
from pflow_jax.torch_io.places import Place, Tensors
from tests.families.test_diffusers import FluxCase, QwenCase, params_of, relative, velocity

pytestmark = pytest.mark.usefixtures("float32")

# Of every class: the defaults' counterparts that all differ from them, and that our network has too.
HONOURED = {
  "DiTTransformer2DModel": dict(
    num_attention_heads=3,
    attention_head_dim=8,
    in_channels=3,
    out_channels=6,
    num_layers=2,
    dropout=0.3,
    norm_num_groups=5,
    sample_size=12,
    patch_size=3,
    num_embeds_ada_norm=7,
    upcast_attention=True,
    norm_eps=0.5,
  ),
  "FluxTransformer2DModel": dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    guidance_embeds=True,
    axes_dims_rope=(8, 2, 6),
  ),
  "QwenImageTransformer2DModel": dict(
    patch_size=1,
    in_channels=12,
    out_channels=12,
    num_layers=1,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=24,
    axes_dims_rope=(8, 2, 6),
  ),
  "AutoencoderKL": dict(
    in_channels=1,
    out_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(6, 12),
    layers_per_block=2,
    latent_channels=5,
    norm_num_groups=3,
    sample_size=7,
    scaling_factor=0.7,
    shift_factor=0.3,
    force_upcast=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
  ),
  "AutoencoderKLQwenImage": dict(
    base_dim=4,
    z_dim=3,
    dim_mult=[2, 1],
    num_res_blocks=1,
    temperal_downsample=[True],
    dropout=0.3,
    input_channels=4,
    latents_mean=[0.5, -1.0, 0.25],
    latents_std=[2.0, 0.5, 1.5],
  ),
}
# Those that it has no other value for.
REFUSED = {
  "DiTTransformer2DModel": dict(
    attention_bias=False, activation_fn="gelu", norm_type="ada_norm", norm_elementwise_affine=True
  ),
  "FluxTransformer2DModel": {},
  "QwenImageTransformer2DModel": dict(
    guidance_embeds=True, zero_cond_t=True, use_additional_t_cond=True, use_layer3d_rope=True
  ),
  "AutoencoderKL": dict(act_fn="relu", latents_mean=[0.5] * 4, latents_std=[2.0] * 4),
  "AutoencoderKLQwenImage": dict(attn_scales=[0.5]),
}
TABLES = {
  "DiTTransformer2DModel": dit,
  "FluxTransformer2DModel": flux,
  "QwenImageTransformer2DModel": qwen_image,
  "AutoencoderKL": vae,
  "AutoencoderKLQwenImage": qwen_vae,
}


def defaults_of(name):
  parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
  return {key: p.default for key, p in parameters.items() if key != "self"}


def randomised(model, seed=0):
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
  return model.eval()


@pytest.mark.parametrize("name", TABLES)
def test_every_argument_of_diffusers_is_a_field_with_its_default(name):
  defaults = defaults_of(name)
  assert set(HONOURED[name]) | set(REFUSED[name]) == set(defaults)
  plain = lambda value: list(value) if isinstance(value, (list, tuple)) else value
  fields = read_fields({"_class_name": name}, TABLES[name].schema(name))
  assert {key: plain(fields[key]) for key in defaults} == {key: plain(value) for key, value in defaults.items()}
  assert all(plain(value) != plain(defaults[key]) for key, value in (HONOURED[name] | REFUSED[name]).items())


@pytest.mark.parametrize(
  ("name", "field"), [(name, field) for name, fields in REFUSED.items() for field in fields if field]
)
def test_what_a_network_does_not_do_is_refused_by_name(name, field):
  with pytest.raises(ValueError, match=f"config.json of {name}: .*{field}") as error:
    TABLES[name].model_from_config({"_class_name": name, field: REFUSED[name][field]})
  assert "\n" not in str(error.value)


def test_a_dit_does_what_every_field_says():
  """Of a learned variance it keeps the velocity."""
  config = HONOURED["DiTTransformer2DModel"]
  model = randomised(diffusers.DiTTransformer2DModel(**config))
  for block in model.transformer_blocks:
    block.norm1.emb = model.transformer_blocks[0].norm1.emb
  attributes = dit.model_from_config({"_class_name": "DiTTransformer2DModel", **config})
  params = params_of(dit.rows(attributes), model)
  attributes.pop("out_channels")
  module = DiT(head=VelocityHead(3, 3), **attributes)
  x, t, labels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32), np.array([0.2, 0.9]), [1, 7]
  with torch.no_grad():
    out = model(torch.tensor(x).movedim(-1, 1), torch.tensor(1000 * t).float(), torch.tensor(labels)).sample
  want = out[:, :3].movedim(1, -1)
  call = lambda module: jax.jit(module.apply)({"params": params}, x, t.astype(np.float32), np.array(labels))
  assert relative(call(module), want) < 1e-5
  assert relative(call(module.clone(norm_eps=1e-6)), want) > 1e-2  # what ignoring norm_eps would give


@pytest.mark.parametrize(("case", "module"), [(FluxCase, Flux), (QwenCase, QwenImage)])
def test_text_models_do_what_every_field_says(case, module):
  name = f"{module.__name__}Transformer2DModel"
  model = randomised(getattr(diffusers, name)(**HONOURED[name]))
  attributes = case.table.model_from_config({"_class_name": name, **HONOURED[name]})
  params = params_of(case.table.rows(attributes), model)
  channels = attributes["channels"]
  x = case.inputs["x"][..., :channels]
  tensors = {key: torch.tensor(value) for key, value in (case.inputs | {"x": x}).items()}
  with torch.no_grad():
    want = velocity(case, model, tensors)
  times = np.array([0.1, 0.53, 1.0], np.float32)
  network = module(head=VelocityHead(channels, 2, layout="flux"), **attributes)
  got = jax.jit(network.apply)({"params": params}, x, times, case.cond(case.inputs))
  assert relative(got, want) < 1e-4


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLQwenImage"])
def test_autoencoders_do_what_every_field_says(name, tmp_path):
  model = randomised(getattr(diffusers, name)(**HONOURED[name]))
  model.save_pretrained(tmp_path)
  table = autoencoder.classes()[name]
  module = table.module(**table.model_from_config(json.loads((tmp_path / "config.json").read_text())))
  params = params_of(table.rows(table.model_from_config(HONOURED[name])), model)
  z = np.random.default_rng(0).normal(size=(1, 3, 2, module.latent_channels)).astype(np.float32)
  latent = torch.tensor(z).movedim(-1, 1)
  with torch.no_grad():
    if name == "AutoencoderKL":
      want = model.decode(latent / 0.7 + 0.3).sample
    else:
      mean, std = (torch.tensor(HONOURED[name][f"latents_{key}"])[:, None, None] for key in ("mean", "std"))
      want = model.decode((latent * std + mean)[:, :, None]).sample[:, :, 0]
  got = jax.jit(functools.partial(module.apply, method="decode"))({"params": params}, z)
  assert relative(got, want.movedim(1, -1)) < 1e-5


PUBLISHED = [
  dict(
    _class_name="Transformer2DModel",
    _diffusers_version="0.12.0.dev0",
    activation_fn="gelu-approximate",
    attention_bias=True,
    attention_head_dim=72,
    cross_attention_dim=None,
    dropout=0.0,
    in_channels=4,
    norm_elementwise_affine=False,
    norm_num_groups=32,
    norm_type="ada_norm_zero",
    num_attention_heads=16,
    num_embeds_ada_norm=1000,
    num_layers=28,
    num_vector_embeds=None,
    only_cross_attention=False,
    out_channels=8,
    patch_size=2,
    sample_size=32,
    upcast_attention=False,
    use_linear_projection=False,
  ),
  dict(
    _class_name="FluxTransformer2DModel",
    _diffusers_version="0.30.0.dev0",
    _name_or_path="../checkpoints/flux-dev/transformer",
    attention_head_dim=128,
    guidance_embeds=True,
    in_channels=64,
    joint_attention_dim=4096,
    num_attention_heads=24,
    num_layers=19,
    num_single_layers=38,
    out_channels=None,
    patch_size=1,
    pooled_projection_dim=768,
  ),
  dict(
    _class_name="QwenImageTransformer2DModel",
    _diffusers_version="0.34.0.dev0",
    attention_head_dim=128,
    axes_dims_rope=[16, 56, 56],
    guidance_embeds=False,
    in_channels=64,
    joint_attention_dim=3584,
    num_attention_heads=24,
    num_layers=60,
    out_channels=16,
    patch_size=2,
    pooled_projection_dim=768,
  ),
  dict(
    _class_name="GMDiTTransformer2DModelV2",
    _diffusers_version="0.35.1",
    activation_fn="gelu-approximate",
    attention_bias=True,
    attention_head_dim=72,
    class_dropout_prob=0.0,
    constant_logstd=None,
    dropout=0.0,
    gm_num_logstd_layers=2,
    in_channels=4,
    logstd_inner_dim=1024,
    norm_elementwise_affine=False,
    norm_eps=1e-5,
    norm_num_groups=32,
    norm_type="ada_norm_zero",
    num_attention_heads=16,
    num_embeds_ada_norm=1000,
    num_gaussians=32,
    num_layers=28,
    out_channels=None,
    patch_size=2,
    sample_size=32,
    upcast_attention=False,
  ),
  dict(
    _class_name="GMFluxTransformer2DModel",
    attention_head_dim=128,
    axes_dims_rope=[16, 56, 56],
    constant_logstd=None,
    gm_num_logstd_layers=2,
    guidance_embeds=True,
    in_channels=64,
    joint_attention_dim=4096,
    logstd_inner_dim=1024,
    logweights_channels=4,
    num_attention_heads=24,
    num_gaussians=8,
    num_layers=19,
    num_single_layers=38,
    out_channels=None,
    pooled_projection_dim=768,
  ),
  dict(
    _class_name="GMQwenImageTransformer2DModel",
    logweights_channels=4,
    num_gaussians=8,
    use_additional_t_cond=False,
    use_layer3d_rope=False,
    zero_cond_t=False,
  ),
  dict(_class_name="ArcQwenImageTransformer2DModel", logweights_channels=4, num_gaussians=16, out_channels=None),
  dict(_class_name="DXFluxTransformer2DModel", in_channels=64, out_channels=640, patch_size=1, guidance_embeds=True),
  dict(_class_name="DXDiTTransformer2DModel", in_channels=4, out_channels=40, class_dropout_prob=0.0),
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["_class_name"])
def test_published_configs_are_read(config):
  model = models.model_of_torch(config, {})
  assert model.attributes["num_heads"] in (16, 24)


STABLE_DIFFUSION = dict(
  _class_name="AutoencoderKL",
  _diffusers_version="0.4.2",
  act_fn="silu",
  block_out_channels=[128, 256, 512, 512],
  down_block_types=["DownEncoderBlock2D"] * 4,
  in_channels=3,
  latent_channels=4,
  layers_per_block=2,
  norm_num_groups=32,
  out_channels=3,
  sample_size=256,
  up_block_types=["UpDecoderBlock2D"] * 4,
)
FLUX_VAE = dict(
  force_upcast=True,
  latent_channels=16,
  latents_mean=None,
  latents_std=None,
  mid_block_add_attention=True,
  sample_size=1024,
  scaling_factor=0.3611,
  shift_factor=0.1159,
  use_post_quant_conv=False,
  use_quant_conv=False,
)


def test_published_autoencoders_are_read():
  assert vae.model_from_config(STABLE_DIFFUSION)["scale"] == 0.18215
  assert vae.model_from_config(STABLE_DIFFUSION | FLUX_VAE)["shift"] == 0.1159
  config = dict(_class_name="AutoencoderKLQwenImage", _diffusers_version="0.34.0.dev0", attn_scales=[], base_dim=96)
  config |= dict(dim_mult=[1, 2, 4, 4], dropout=0.0, num_res_blocks=2, temperal_downsample=[False, True, True])
  assert qwen_vae.model_from_config(config | {"z_dim": 16})["latent_channels"] == 16


@pytest.mark.parametrize("value", [3, "x", True, [1], {"a": 1}])
@pytest.mark.parametrize("name", TABLES)
def test_an_unknown_field_is_refused(name, value):
  with pytest.raises(
    ValueError, match=f"config.json of {name}: .*does not know.* new_field = .*; remove those that do"
  ):
    TABLES[name].model_from_config({"_class_name": name, "new_field": value})
  TABLES[name].model_from_config({"_class_name": name, "new_field": None, "_quiet": value})


WRONG = [None, True, False, "x", "3", 2.5, [], [3], {}, {"a": 1}, -1, 0, 10**8, 10**30, 1e-300, ["x", None]]
CLASSES = {name: names for name, (_, names) in models._classes().items()}


def message_of(config):
  """What is said of a config.json; None if it is taken."""
  try:
    model = models.model_of_torch(config, FlowMapStated("ayf_emd", 3.2).metadata)
  except ValueError as error:
    return str(error)
  assert max(n for n in model.attributes.values() if type(n) is int) < 2**20
  return None


@pytest.mark.parametrize("name", CLASSES)
def test_fields_of_wrong_types_are_refused_by_name(name):
  """Where a value is taken, it is one that the field may have."""
  whole = {"_class_name": name} | ({"in_channels": 8, "out_channels": 24} if name.startswith("DX") else {})
  types = typing.get_type_hints(schema := CLASSES[name].schema(name))
  for field in dataclasses.fields(schema):
    free = types[field.name] is typing.Any
    messages = [message_of(whole | {field.name: value}) for value in WRONG if not free]
    assert free or any(messages), field.name
    for message in filter(None, messages):
      assert field.name in message
      assert "\n" not in message
      assert len(message) < 400


def place(shape):
  return Place(None, 0, shape, np.dtype(np.float32))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"num_layers": 900}, "num_layers: 900 cannot be in files of 3 tensors"),
    ({"num_embeds_ada_norm": 2**20}, "num_embeds_ada_norm: 1048576 cannot be in files of 1.562 KiB"),
    ({"num_attention_heads": 30, "attention_head_dim": 30}, "the square of num_attention_heads x attention_head_dim"),
  ],
)
def test_sizes_that_the_files_cannot_hold_are_refused(config, message):
  tensors = Tensors({name: place(shape) for name, shape in {"a": (100,), "b": (10, 20), "c": (100,)}.items()})
  small = dict(num_layers=1, num_embeds_ada_norm=5, num_attention_heads=2, attention_head_dim=4)
  schema = dit.schema("DiTTransformer2DModel")
  check_sizes(read_fields(small, schema), schema, tensors)
  with pytest.raises(ValueError, match=message):
    check_sizes(read_fields(small | config, schema), schema, tensors)
  check_sizes(read_fields(small | config, schema), schema, tensors, ("num_gaussians",))
