"""DiT, SiT and REPA against their authors' own code, see golden/README.md: outputs, gradients, samples, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.conversion import models
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.families.dit.authors import NAMES as authors
from pflow_jax.families.names import Source
from pflow_jax.mesh.partition import path_of
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.heads import VelocityHead
from pflow_jax.torch_io.places import Place, Tensors
from pflow_jax.torch_io.table import to_flax
from tests.authors import attributes, tensors

pytestmark = pytest.mark.usefixtures("float32")

TRAINED = ("sit", "repa")
RIGHT, WRONG = 0.25, 0.6  # of the norm: what a tiny network misses, and what another time or sign does


def relative(got, want, least=0.0):
  got, want = (np.asarray(a, np.float64) for a in (got, want))
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), least)


def last(x):
  return np.moveaxis(x, 1, -1)


def network(file, kind):
  """Our module with the weights of a golden file, and its rows."""
  state = {name: tensor.numpy() for name, tensor in tensors(file).items()}
  own = attributes(state, kind)
  rows = authors.rows(own)
  own.pop("out_channels", None)
  return DiT(head=VelocityHead(4, 2), **own), to_flax(rows, state), rows


@pytest.mark.parametrize("kind", ["sit", "repa", "dit"])
def test_outputs_and_gradients_are_the_authors(golden, kind):
  """Float32, of random weights: outputs to 1e-5, gradients of the state and of every weight to 1e-4 of their norm."""
  file = golden(f"authors_{kind}")
  module, params, rows = network(file, kind)
  sign = -1 if kind == "sit" else 1  # v = eps - x0, SiT's is x0 - eps at time 1 - t
  times = {"sit": 1 - file["in_t"], "repa": file["in_t"], "dit": file["in_t"] / 1000}[kind]
  cotangent = last(file["in_cotangent"])

  def contracted(params, x):
    v = module.apply({"params": params}, x, times.astype(np.float32), file["in_y"])
    return jnp.sum(v * cotangent), v

  gradients, v = jax.jit(jax.grad(contracted, (0, 1), has_aux=True))(params, last(file["in_x"]))
  assert relative(v, sign * last(file["out"])) < 1e-5
  assert relative(gradients[1], sign * last(file["out_grad_x"])) < 1e-4
  theirs = {name.partition("/")[2]: sign * value for name, value in file.items() if name.startswith("out_grad/")}
  wanted = to_flax(rows, theirs)  # which turns the sign of the last layer, and so that of its gradient
  least = 1e-4 * np.linalg.norm(cotangent)  # where the exact gradient is 0, as that of a key's bias
  for (keys, got), want in zip(jax.tree_util.tree_leaves_with_path(gradients[0]), jax.tree.leaves(wanted), strict=True):
    assert relative(got, want, least) < 1e-4, path_of(keys)


def trained(golden, kind):
  """A network that the authors' loss trained on x0 = m + z of three classes, and the other time and sign of it."""
  file = golden(f"authors_{kind}_trained")
  module, params, _ = network(file, kind)
  other = module.clone(flip_time=not module.flip_time)

  def field(module, sign):
    return lambda x, t, cond: sign * module.apply({"params": params}, x, t, cond)

  return file, field(module, 1), [field(other, 1), field(module, -1), field(other, -1)]


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_network_is_the_velocity_of_its_gaussians(golden, kind):
  """E[eps - x0 | x] of unit normal numbers about m is known, and x does not tell the time, which has to be right."""
  file, velocity, others = trained(golden, kind)
  rng = np.random.default_rng(0)
  labels = np.arange(48) % 3
  mean = last(file["in_means"])[labels]
  x0, eps = mean + rng.standard_normal(mean.shape), rng.standard_normal(mean.shape)
  for t in (0.2, 0.8):
    x = (1 - t) * x0 + t * eps
    want = (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - (1 - t) * mean) - mean
    inputs = np.float32(x), np.full(48, t, np.float32), labels
    right, *wrong = (relative(field(*inputs), want) for field in (velocity, *others))
    assert right < RIGHT
    assert min(wrong) > WRONG


@pytest.mark.parametrize("kind", TRAINED)
def test_samples_of_a_trained_network_are_the_authors_and_lie_on_the_data(golden, kind):
  """The authors' Euler sampler from the same noise, which the exact flow takes to m + eps; others miss its path."""
  file, velocity, others = trained(golden, kind)
  noise, labels = last(file["in_noise"]), file["in_labels"]
  mean = last(file["in_means"])[labels]

  def draw(field):
    return np.asarray(jax.jit(lambda x: sample_teacher(field, x, labels, steps=32, trajectory=True))(noise))

  def distance(path):  # half way the standard deviation is 0.5 ** 0.5
    return max(relative(path[-1], mean + noise), relative(path[16], mean / 2 + noise * 0.5**0.5))

  path = draw(velocity)
  np.testing.assert_allclose(path[-1], last(file["out_samples"]), atol=1e-4)
  assert distance(path) < RIGHT
  assert min(distance(draw(field)) for field in others) > WRONG


def published(projectors):
  """Shapes of a file of XL/2, as the authors' classes have them, without the table of positions."""
  width = 1152
  layers = {"x_embedder.proj": (width, 4, 2, 2), "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
  for i in range(28):
    rows = {"attn.qkv": 3 * width, "attn.proj": width, "mlp.fc1": 4 * width, "adaLN_modulation.1": 6 * width}
    layers |= {f"blocks.{i}.{name}": (count, width) for name, count in rows.items()}
    layers[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
  layers |= {"final_layer.linear": (16, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
  if projectors:
    layers |= {"projectors.0.0": (2048, width), "projectors.0.2": (2048, 2048), "projectors.0.4": (768, 2048)}
  shapes = {f"{name}.weight": shape for name, shape in layers.items()}
  shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
  return shapes | {"y_embedder.embedding_table.weight": (1001, width)}


@pytest.mark.parametrize(("projectors", "convention"), [(True, None), (False, "sit")])
def test_files_of_the_published_size_are_whole(projectors, convention):
  """No tensor is read: names and shapes alone say that it is an XL of 675 million parameters."""
  shapes = published(projectors)
  places = {name: Place(None, 0, shape, np.dtype(np.float32)) for name, shape in shapes.items()}
  source = models.recognise(Source(Tensors(places), file="last.pt", convention=convention))
  model = models.model_of_torch(source.config, {}, source.tensors)
  assert model.torch_shapes() == source.tensors.shapes
  assert set(shapes) - set(source.tensors.places) == {name for name in shapes if name.startswith("projectors.")}
  # DiT-XL/2 has 675,129,632: these, four more outputs and the table of positions.
  assert sum(int(np.prod(shape)) for shape in model.shapes().values()) == 674_816_272
  own = model.attributes
  assert (own["width"], own["depth"], own["num_heads"], own["num_classes"], own["norm_eps"]) == (
    1152,
    28,
    16,
    1000,
    1e-6,
  )
  assert (own["time_scale"], own["flip_time"]) == (1, convention == "sit")
