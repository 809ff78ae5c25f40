"""AutoencoderKL against diffusers: outputs, gradients, sizes, names; and its attention in parts."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from pflow_jax.families.kl_names import NAMES as names
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.networks import vae
from pflow_jax.networks.vae import AutoencoderKL
from pflow_jax.torch_io.table import to_flax, to_torch, torch_shapes_of
from tests.networks.test_dit import equations

LEVELS = 3
TINY = dict(
  block_out_channels=[8, 16, 16],
  layers_per_block=1,
  norm_num_groups=4,
  down_block_types=["DownEncoderBlock2D"] * LEVELS,
  up_block_types=["UpDecoderBlock2D"] * LEVELS,
)
CONFIGS = {
  "sd": TINY,
  "flux": TINY
  | dict(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
  ),
  "uneven": TINY
  | dict(layers_per_block=2, use_post_quant_conv=False, mid_block_add_attention=False, in_channels=2, out_channels=2),
}
PUBLISHED = dict(
  block_out_channels=[128, 256, 512, 512],
  layers_per_block=2,
  down_block_types=["DownEncoderBlock2D"] * 4,
  up_block_types=["UpDecoderBlock2D"] * 4,
)
FLUX_CONFIG = {key: value for key, value in CONFIGS["flux"].items() if key not in TINY}
FLUX = dict(latent_channels=16, scale=0.3611, shift=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def randomised(network, seed=0):
  """A PyTorch network in float32 with no parameter at its neutral value, and no vanishing signal."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in network.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.numel() > parameter.shape[0]:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
      else:
        parameter.add_(0.3 * noise)
  return network.eval()


def tensors_of(network):
  return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def settings(network):
  """Of a diffusers network, without its notes about them."""
  return {key: value for key, value in network.config.items() if not key.startswith("_")}


def to_torch_image(x):
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def from_torch_image(x):
  return np.moveaxis(x.detach().float().numpy(), 1, -1)


def error(got, expected):
  """Norm of the difference over the norm of what is expected."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  assert got.shape == expected.shape
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def normal(shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(module, params, method, *inputs):
  return jax.jit(functools.partial(module.apply, method=method))({"params": params}, *inputs)


def check_gradients(module, params, method, x, weight, torch_loss, network, table):
  """Of sum(weight * output), with respect to input and parameters, against PyTorch's."""

  def loss(params, x):
    return jnp.sum(weight * module.apply({"params": params}, x, method=method))

  by_params, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
  torch_x = to_torch_image(x).requires_grad_()
  network.zero_grad()
  torch_loss(torch_x).backward()
  assert error(by_x, from_torch_image(torch_x.grad)) < 1e-3
  expected = to_flax(
    table,
    {
      name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
      for name, parameter in network.named_parameters()
    },
  )
  expected, got = flatten_dict(expected, sep="/"), flatten_dict(by_params, sep="/")
  assert expected.keys() == got.keys()
  # Biases before a norm, say, have gradients of nothing but rounding errors.
  floor = 1e-4 * max(np.linalg.norm(leaf) for leaf in expected.values())
  wrong = {
    path: distance
    for path, leaf in expected.items()
    if (distance := np.linalg.norm(got[path] - leaf) / max(np.linalg.norm(leaf), floor)) > 1e-3
  }
  assert not wrong
  return got


def check_dtypes(module, params, method, x):
  """Convolutions in bfloat16; norms, what follows them and softmax in float32."""
  jaxpr = jax.make_jaxpr(functools.partial(module.apply, method=method))({"params": params}, x)
  dtypes = {}
  for equation in equations(jaxpr.jaxpr):
    dtypes.setdefault(equation.primitive.name, set()).add(equation.outvars[0].aval.dtype.name)
  assert dtypes["conv_general_dilated"] == {"bfloat16"}
  assert dtypes["rsqrt"] == dtypes["logistic"] == dtypes["exp"] == {"float32"}


def check_names(module, table, network):
  """Tensors of a table, for the shapes of a module, are those of the PyTorch class; nothing is allocated."""
  image = jax.ShapeDtypeStruct((1, module.down_factor, module.down_factor, module.channels), jnp.float32)
  shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), image)["params"], sep="/")
  assert all(leaf.dtype == jnp.float32 for leaf in shapes.values())
  assert sorted(row.flax for row in table) == sorted(shapes)
  got = {}
  for row in table:
    got |= torch_shapes_of(row, shapes[row.flax].shape)
  assert got == {name: tuple(parameter.shape) for name, parameter in network.state_dict().items()}
  return sum(leaf.size for leaf in shapes.values())


def check_whole_on_a_mesh(module, table):
  """No device lacks a part of a parameter, whatever the mesh."""
  image = jnp.zeros((1, module.down_factor, module.down_factor, module.channels), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
  layout = make_layout(dict(fsdp=4, tensor=2), table, min_size=0)
  assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(layout.shardings(shapes)))


@functools.cache
def models(name):
  """diffusers' network, ours, its parameters and the table between them."""
  network = randomised(diffusers.AutoencoderKL(**CONFIGS[name]))
  if name == "uneven":
    with torch.no_grad():
      network.quant_conv.bias[-1] -= 60  # a log-variance out of range
  model = names.model_from_config(CONFIGS[name])
  table = names.rows(model)
  return network, AutoencoderKL(**model), to_flax(table, tensors_of(network)), table


def scaled(network, latent):
  shift = network.config.shift_factor or 0.0
  return (latent - shift) * network.config.scaling_factor


def unscaled(network, z):
  return z / network.config.scaling_factor + (network.config.shift_factor or 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_encodes_as_diffusers(name):
  network, module, params, _ = models(name)
  x = normal((2, 12, 20, module.channels), seed=1)
  with torch.no_grad():
    expected = network.encode(to_torch_image(x)).latent_dist
  key = jax.random.key(3)
  mean, logvar, mode, sample = call(
    module, params, lambda vae, x, key: (*vae.moments(x), vae.encode(x), vae.encode(x, key)), x, key
  )
  assert mean.shape == (2, 3, 5, module.latent_channels)
  assert error(mean, from_torch_image(expected.mean)) < 1e-4
  assert error(logvar, from_torch_image(expected.logvar)) < 1e-4
  assert error(mode, from_torch_image(scaled(network, expected.mode()))) < 1e-4
  noise = jax.random.normal(key, mean.shape, jnp.float32)
  noisy = scaled(network, expected.mean + expected.std * to_torch_image(noise))
  assert error(sample, from_torch_image(noisy)) < 1e-4
  assert error(mode, sample) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_decodes_as_diffusers(name):
  network, module, params, _ = models(name)
  z = normal((2, 3, 5, module.latent_channels), seed=2)
  with torch.no_grad():
    expected = from_torch_image(network.decode(unscaled(network, to_torch_image(z))).sample)
  got = call(module, params, "decode", z)
  assert got.shape == (2, 12, 20, module.channels)
  assert error(got, expected) < 1e-4


def test_gradients_are_those_of_diffusers():
  network, module, params, table = models("sd")
  x, z = normal((2, 8, 12, 3), seed=1), normal((2, 2, 3, 4), seed=2)

  def encoded(x):
    return (scaled(network, network.encode(x).latent_dist.mean) * to_torch_image(z)).sum()

  def decoded(z):
    return (network.decode(unscaled(network, z)).sample * to_torch_image(x)).sum()

  check_gradients(module, params, "encode", x, z, encoded, network, table)
  check_gradients(module, params, "decode", z, x, decoded, network, table)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_within_its_precision(method):
  """Within 2 % of float32; outputs are float32 even so."""
  _, module, params, _ = models("flux")
  x = normal((2, 12, 20, 3), 1) if method == "encode" else normal((2, 3, 5, 16), 2)
  check_dtypes(module.clone(dtype=jnp.bfloat16), params, method, x)
  got = call(module.clone(dtype=jnp.bfloat16), params, method, x)
  assert got.dtype == jnp.float32
  assert 1e-4 < error(got, call(module, params, method, x)) < 0.02


@pytest.mark.parametrize(
  ("model", "config", "count"),
  [({}, {}, 83_653_863), (FLUX, FLUX_CONFIG, 83_819_683)],
  ids=["sd", "flux"],
)
def test_published_sizes(model, config, count):
  with torch.device("meta"):
    network = diffusers.AutoencoderKL(**PUBLISHED, **config)
  assert AutoencoderKL(**names.model_from_config(PUBLISHED | config)) == AutoencoderKL(**model)
  assert check_names(AutoencoderKL(**model), names.rows(model), network) == count


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_exact(name):
  network, module, params, table = models(name)
  check_names(module, table, network)
  back, tensors = to_torch(table, params), tensors_of(network)
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def test_reads_the_names_of_old_files(tmp_path):
  """Of Stable Diffusion 1.x's first files; diffusers reads them too."""
  network, *_ = models("sd")
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  state = {}
  for name, tensor in network.state_dict().items():
    stem, middle, rest = name.partition("attentions.0.")
    layer, _, leaf = rest.rpartition(".")
    state[f"{stem}{middle}{old.get(layer, layer)}.{leaf}" if middle else name] = tensor
  assert sum("proj_attn" in name for name in state) == 4
  network.save_config(tmp_path)
  save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
  read = diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict()
  renamed = {names.current_name(name): tensor for name, tensor in state.items()}
  assert renamed.keys() == read.keys()
  assert all(torch.equal(renamed[name], read[name]) for name in read)


def test_refuses_other_networks():
  config = PUBLISHED | dict(act_fn="relu", latents_std=[2.0] * 4)
  config["up_block_types"] = [*PUBLISHED["up_block_types"][:3], "AttnUpDecoderBlock2D"]
  with pytest.raises(ValueError, match=r"up_block_types.*Attn.*act_fn.*relu.*latents_std"):
    names.model_from_config(config)
  with pytest.raises(ValueError, match="out_channels"):
    names.model_from_config(PUBLISHED | dict(out_channels=1))
  with pytest.raises(ValueError, match="widths: expected multiples of groups 32, got"):
    AutoencoderKL(widths=(48, 64)).init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))


def test_refuses_shapes_that_do_not_fit():
  _, module, params, _ = models("sd")
  for shape in ((1, 12, 18, 3), (1, 13, 12, 3), (1, 12, 12, 4), (12, 12, 3), (1, 0, 4, 3)):
    with pytest.raises(ValueError, match=r"expected shape \(B, H, W, 3\) with H and W multiples of 4"):
      module.apply({"params": params}, jnp.zeros(shape), method="encode")
  for shape in ((1, 3, 3, 3), (3, 3, 4), (1, 0, 3, 4)):
    with pytest.raises(ValueError, match=r"expected latents of shape \(B, h, w, 4\)"):
      module.apply({"params": params}, jnp.zeros(shape), method="decode")


def test_parameters_are_whole_on_a_mesh():
  check_whole_on_a_mesh(models("sd")[1], vae.SHARDING)


def test_attention_in_parts_is_that_of_all_queries(monkeypatch):
  """15 tokens in 6 parts: outputs and gradients."""
  q, k, v = (jax.random.normal(jax.random.key(i), (2, 15, 1, 4), jnp.float32) for i in range(3))

  def value_and_grads():
    loss = lambda *args: jnp.sum(jnp.sin(vae.attend(*args)))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

  whole, whole_grads = value_and_grads()
  monkeypatch.setattr(vae, "SCORES", 40)
  parts, grads = value_and_grads()
  assert error(parts, whole) < 1e-6
  for got, expected in zip(grads, whole_grads, strict=True):
    assert error(got, expected) < 1e-5


def test_a_large_picture_does_not_hold_all_scores():
  """Decoding 1024 x 1024: shapes alone, of the program and of its backward pass."""
  z = jax.ShapeDtypeStruct((1, 128, 128, 16), jnp.float32)
  module = AutoencoderKL(**FLUX)
  params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
  loss = lambda params, z: jnp.sum(module.apply(params, z, method="decode"))
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=1))(params, z)
  scores = {
    out.aval.shape
    for equation in equations(jaxpr.jaxpr)
    for out in equation.outvars
    if out.aval.shape and out.aval.shape[-1] == 128 * 128
  }
  assert (1, 1, 1024, 128 * 128) in scores
  assert max(map(np.prod, scores)) == vae.SCORES
