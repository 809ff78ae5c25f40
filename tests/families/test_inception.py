"""Inception against torch-fidelity, pytorch-fid and StyleGAN's program, and what is no file of it.

The networks have their real size. Weights are drawn by name and shape, as those of the golden file were.
"""

import functools

import jax
import numpy as np
import pytest
import torch

from pflow_jax.evaluation import feature_networks
from pflow_jax.evaluation.feature_networks import open_feature_network
from pflow_jax.families.inception.files import digest_of, load_inception
from pflow_jax.families.inception.names import NAMES
from pflow_jax.families.inception.network import Inception, average, kernel_shapes, resized
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.torch_io.table import flat_shapes

pytestmark = pytest.mark.usefixtures("float32")

TORCHVISION, STYLEGAN = NAMES
SIZES = ((37, 53), (256, 256), (299, 299), (512, 512))


def drawn(shapes):
  """Weights with which activations are of order 1, in the order of their names."""
  rng, tensors = np.random.default_rng(0), {}
  for name in sorted(shapes):
    x, shape = rng.standard_normal(shapes[name], np.float32), shapes[name]
    if len(shape) == 4:
      x *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
    elif len(shape) == 2:
      x *= np.float32(shape[1] ** -0.5)
    elif name.endswith(("bn.weight", "running_var")):
      x = 1 + np.clip(x, -2, 2) / 4
    else:
      x /= 10
    tensors[name] = x
  return tensors


def pictures():
  rng = np.random.default_rng(1)
  return [rng.integers(0, 256, (1, *size, 3), np.uint8) for size in SIZES]


def for_stylegan(tensors):
  """The same network by StyleGAN's names, which has no scales."""
  ends = [(getattr(TORCHVISION, part), getattr(STYLEGAN, part)) for part in ("kernel", "offset", "mean", "variance")]
  found = {
    STYLEGAN.stem(path) + ours: tensors[TORCHVISION.stem(path) + theirs]
    for path in kernel_shapes()[0]
    for theirs, ours in ends
  }
  return found | {"output.weight": tensors["fc.weight"], "output.bias": np.ones(1008, np.float32)}


class Program(torch.nn.Module):
  """A program of torch.jit.save: modules within modules, and tensors in them."""

  def __init__(self, tensors):
    super().__init__()
    inner = {}
    for name, tensor in tensors.items():
      own, _, rest = name.partition(".")
      if rest:
        inner.setdefault(own, {})[rest] = tensor
      else:
        self.register_buffer(own, torch.from_numpy(np.array(tensor)))
    for name, part in inner.items():
      self.add_module(name, Program(part))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x


def save_program(tensors, file):
  torch.jit.script(Program(tensors)).save(str(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The three files: a state dict as torch.save wrote it when these were published, and as today; a program."""
  folder = tmp_path_factory.mktemp("inception")
  tensors = drawn(TORCHVISION.shapes())
  state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()} | {"fc.bias": torch.ones(1008)}
  torch.save(state, folder / "scaled.pth", _use_new_zipfile_serialization=False)
  for name in tensors:
    if name.endswith("bn.weight"):
      tensors[name][:] = 1
  state |= {f"{TORCHVISION.stem(path)}.bn.num_batches_tracked": torch.tensor(0) for path in kernel_shapes()[0]}
  torch.save(state, folder / "plain.pth")
  save_program(for_stylegan(tensors), folder / "program.pt")
  return folder


@pytest.fixture(scope="module")
def params(folder):
  """Returns a function: the parameters in a file, which is read once."""
  return functools.cache(lambda name: load_inception(folder / name))


@pytest.fixture(scope="module")
def features(folder):
  """Returns a function: the features of all pictures in the network of a file, and its name."""
  layout = make_layout({}, (), jax.devices()[:1])

  def run(name, width=2048):
    network = open_feature_network(folder / name, layout, width, batch_size=1)
    found = [network(one) for one in pictures()]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found), network.name

  return run


def error_of(ours, theirs):
  """The largest relative error of a picture's features."""
  assert ours.shape == theirs.shape
  return np.max(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1))


def test_features_are_those_of_torch_fidelity_and_pytorch_fid(params, features, golden):
  numbers, (found, name) = golden("inception"), features("scaled.pth")
  for part in ("pool", "spatial", "logits"):
    assert error_of(getattr(found, part), numbers[part]) < 1e-5, part
  assert name == f"Inception-v3 of 2015-12-05, weights {digest_of(params('scaled.pth'))}"


@pytest.mark.parametrize("width", [64, 192, 768])
def test_narrower_features_are_those_of_torch_fidelity(features, golden, width):
  found, name = features("scaled.pth", width)
  assert error_of(found.pool, golden("inception")[f"pool_{width}"]) < 1e-5
  assert found.logits is None
  assert (found.spatial is None) == (width < 768)
  assert name.endswith(f", {width} features")


def test_another_width_is_refused(folder):
  with pytest.raises(ValueError, match=r"width: expected one of \(64, 192, 768, 2048\)"):
    open_feature_network(folder / "scaled.pth", make_layout({}, (), jax.devices()[:1]), 128)


def test_features_are_those_of_stylegans_program(features, golden):
  """Its resizing, by grid_sample, is that of TensorFlow up to rounding."""
  found, _ = features("program.pt")
  assert error_of(found.pool, golden("inception")["stylegan_pool"]) < 1e-5
  assert feature_networks._inception_run(2048)._cache_size() == 1, "compiled once for all files and sizes"


def test_a_network_is_the_same_from_each_kind_of_file(params):
  jax.tree.map(np.testing.assert_array_equal, params("plain.pth"), params("program.pt"))
  assert digest_of(params("plain.pth")) == digest_of(params("program.pt")) != digest_of(params("scaled.pth"))


PICTURE = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)


@pytest.fixture(scope="module")
def shapes():
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return jax.eval_shape(Inception().init, jax.random.key(0), PICTURE)


def test_parameters_are_those_of_the_module(params, shapes):
  assert flat_shapes(params("plain.pth")) == flat_shapes(shapes["params"])
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params("plain.pth")))


def test_products_are_of_full_precision(shapes):
  """On a TPU they would be bfloat16's."""
  text = str(jax.make_jaxpr(Inception().apply)(shapes, PICTURE))
  products = text.count("conv_general_dilated[") + text.count("dot_general[")
  assert products == 95
  assert text.count("precision=Precision.HIGHEST") + text.count("precision=(Precision.HIGHEST") == products


@pytest.mark.parametrize("size", [1, 2, 37, 100, 256])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_ramp_is_resized_without_a_shift_of_half_a_pixel(size, axis):
  """Pixel i of 299 lies at i * size / 299, and what is beyond the last pixel is the last."""
  shape = [1, 5, 5, 3]
  shape[axis] = size
  line = np.expand_dims(np.arange(size), [i for i in range(4) if i != axis])
  x = np.broadcast_to(line, shape).astype(np.uint8)
  want = (np.minimum(np.arange(299) * size / 299, size - 1) - 128) / 128
  found = np.moveaxis(np.asarray(resized(x)), axis, -1)
  assert found.shape == (1, 299, 3, 299)
  np.testing.assert_allclose(found, np.broadcast_to(want, found.shape), atol=1e-6)


def test_pictures_of_the_networks_size_are_not_touched():
  x = pictures()[2]
  np.testing.assert_array_equal(resized(x), (x.astype(np.float32) - 128) / 128)


def test_averages_at_a_border_count_the_pixels_that_are_there():
  np.testing.assert_allclose(average(np.ones((1, 3, 4, 2), np.float32)), 1, rtol=1e-6)
  x = np.random.default_rng(0).normal(size=(1, 4, 3, 2)).astype(np.float32)
  np.testing.assert_allclose(average(x)[0, 0, 2], x[0, :2, 1:].mean((0, 1)), rtol=1e-5)


def small(folder, change):
  """A state dict of the real names and shapes, whose tensors share their elements."""
  shared = torch.zeros(2048 * 1008)
  state = {name: shared[: np.prod(shape)].view(shape) for name, shape in TORCHVISION.shapes().items()}
  state |= {"fc.bias": torch.zeros(1)}
  change(state)
  torch.save(state, folder / "inception.pth")
  return folder / "inception.pth"


OTHERS = {
  "of ImageNet": (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), r"fc.weight \(expected \(1008, 2048\)"),
  "missing": (lambda s: s.pop("Mixed_6d.branch1x1.bn.bias"), "1 missing: Mixed_6d.branch1x1.bn.bias"),
  "more": (lambda s: s.update({"AuxLogits.fc.weight": torch.zeros(1)}), "1 unexpected: AuxLogits.fc.weight"),
  "whole numbers": (lambda s: s.update({"fc.weight": s["fc.weight"].int()}), "floating-point numbers, got int32"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_are_refused(name, tmp_path):
  change, message = OTHERS[name]
  with pytest.raises(ValueError, match=message):
    load_inception(small(tmp_path, change))


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_variances_below_zero_are_refused(tmp_path, value):
  name = "Mixed_6d.branch1x1.bn.running_var"
  file = small(tmp_path, lambda s: s.update({name: torch.full((192,), value)}))
  with pytest.raises(ValueError, match="finite weights .*mixed_6/conv/kernel"):
    load_inception(file)


def test_other_files_are_refused(tmp_path):
  torch.save({"decoder.weight": torch.ones(3)}, tmp_path / "other.pth")
  with pytest.raises(ValueError, match=r"expected inception-2015-12-05\.pt of StyleGAN.*'decoder.weight'"):
    load_inception(tmp_path / "other.pth")
  with pytest.raises(ValueError, match="runs code when it is loaded"):
    load_inception(tmp_path / "inception-2015-12-05.pkl")
  (tmp_path / "graph.pb").write_bytes(b"graph")
  with pytest.raises(ValueError, match=r"expected a folder, or a file \.safetensors"):
    load_inception(tmp_path / "graph.pb")


@pytest.mark.parametrize("name", ["scaled.pth", "plain.pth", "program.pt"])
def test_files_that_are_cut_short_are_refused(folder, tmp_path, name):
  part = tmp_path / name
  part.write_bytes((folder / name).read_bytes()[:-1000])
  with pytest.raises(ValueError, match=name) as error:
    load_inception(part)
  assert "\n" not in str(error.value)
