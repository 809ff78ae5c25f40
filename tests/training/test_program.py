"""The training step on meshes: the same numbers on all of them, parameters in parts, and what the devices exchange."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from pflow_jax.core.batches import AXES
from pflow_jax.mesh.partition import path_of
from pflow_jax.planning import hlo
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.sample import SampleSettings, draw_noise, in_batches, make_sampler
from pflow_jax.training.step import make_program
from tests.programs import quick
from tests.training.test_network import leaves_of
from tests.training.test_teachers import write_teacher

pytestmark = pytest.mark.usefixtures("float32")

MODEL = dict(kind="dit", patch_size=2, width=32, depth=2, num_heads=4, time_scale=1.0)
VARIANTS = {"π-ID": "gmflow", "ArcFlow": "arc_adapters", "AYF-EMD": "ayf_emd"}
# Sizes of AXES.
MESHES = {
  "1": (1, 1, 1, 1),
  "8 data": (1, 8, 1, 1),
  "8 fsdp": (1, 1, 8, 1),
  "2 x 4": (1, 2, 4, 1),
  "2 x 2 x 2": (1, 2, 2, 2),
  "2 slices": (2, 2, 2, 1),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  folder = tmp_path_factory.mktemp("teacher")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    write_teacher(folder, MODEL, steps=(1,))
  return folder


class Case:
  """A method's step on a mesh, run once from the same start."""

  def __init__(self, teacher, method, mesh):
    config = quick("digits", VARIANTS[method], teacher)
    config.model = MODEL
    config.mesh.update(dict(zip(AXES, MESHES[mesh], strict=True)))
    config.mesh.min_size = 64
    if method == "AYF-EMD":
      config.objective.warmup_steps = 0  # else the start, its teacher's velocity, has no gradient
    self.experiment = experiment = build(config)
    devices = jax.devices()[: math.prod(MESHES[mesh])]
    self.program = make_program(experiment, layout_of(Settings.of(config), devices))
    layout = self.program.layout
    self.frozen = experiment.load_frozen(layout)
    key = layout.everywhere(jax.random.key(4))
    self.state = self.program.init(key, self.frozen)
    self.start = jax.device_get(self.state.params)
    rng = np.random.default_rng(0)
    batch = {"x0": rng.normal(size=(8, 8, 8, 1)).astype("f4"), "cond": np.arange(8, dtype="i4")}
    traced = self.program.trace()
    self.jaxpr, compiled = str(traced.jaxpr), traced.lower().compile()
    self.text = compiled.as_text()
    self.after, self.metrics = compiled(self.state, self.frozen, layout.shard_batch(batch, 8), key)


@pytest.fixture(scope="module")
def case(teacher):
  @functools.cache
  def get(method, mesh):
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
      return Case(teacher, method, mesh)

  return get


# Slices are one more axis of the batch: one method says it all.
CASES = [(method, mesh) for method in VARIANTS for mesh in list(MESHES)[1:] if mesh != "2 slices" or method == "π-ID"]


@pytest.mark.parametrize(("method", "mesh"), CASES)
def test_a_step_gives_the_same_loss_and_parameters_on_every_mesh(case, method, mesh):
  one, other = case(method, "1"), case(method, mesh)
  np.testing.assert_allclose(other.metrics["loss"], one.metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(other.metrics["gradient_norm"], one.metrics["gradient_norm"], rtol=1e-4)
  ones, others = jax.device_get((one.after, other.after))
  start, before, after = leaves_of(one.start), leaves_of(ones.params), leaves_of(others.params)
  assert set(before) == set(after)
  # The first moment is a tenth of the gradient: Adam's first step, its sign, says nothing where it is near zero. Sums
  # that cancel, such as the gradient of a mixture's width, have the tolerance of their terms.
  moments, other_moments = leaves_of(ones.opt_state), leaves_of(others.opt_state)
  first = {path: moment for path, moment in moments.items() if "/mu/" in path}
  largest = max(np.abs(moment).max() for moment in first.values())
  for path, moment in first.items():
    scale = max(np.abs(moment).max(), 1e-2 * largest)
    np.testing.assert_allclose(other_moments[path] / scale, moment / scale, atol=5e-4, err_msg=path)
    leaf = path.split("/mu/")[1]
    clear = np.abs(moment) > 1e-2 * scale
    step = np.abs(before[leaf] - start[leaf]).max()
    difference = np.abs(after[leaf] - before[leaf])[clear]
    assert difference.max(initial=0) <= 0.02 * step, path


@pytest.mark.parametrize(("method", "mesh"), [(method, mesh) for method, mesh in CASES if mesh != "8 data"])
def test_parameters_lie_in_parts(case, method, mesh):
  """Every array of what trains, its average and moments, and the frozen teacher: what is not small is split."""
  c = case(method, mesh)
  mesh = c.program.layout.mesh
  parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
  split = 0
  for keys, leaf in jax.tree_util.tree_leaves_with_path((c.after, c.frozen)):
    path = path_of(keys)
    if leaf.size < 64 or path.endswith(("bias", "class_embed/embedding")):
      assert leaf.is_fully_replicated, path
      continue
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    assert leaf.size / shard in (mesh.shape["fsdp"], parts), path
    split += 1
  assert split > 20
  kernel = c.frozen["strong"]["blocks"]["qkv"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // mesh.shape["fsdp"], 96 // mesh.shape["tensor"])


@pytest.mark.parametrize(("method", "mesh"), CASES)
def test_policies_and_losses_are_work_of_each_device_alone(case, method, mesh):
  c = case(method, mesh)
  assert "shard_map" in c.jaxpr
  assert "shard_map" in c.text
  # Of every collective's line in the compiled program, the operation of JAX that it was made for.
  names = re.findall(rf'= .*? (?:{"|".join(hlo.KINDS)})(?:-start)?\(.*op_name="([^"]*)"', c.text)
  assert names
  assert not [name for name in names if "shard_map" in name]


@pytest.mark.parametrize("method", VARIANTS)
def test_data_parallel_steps_sum_gradients_and_nothing_else(case, method):
  kinds = {name for name, traffic in hlo.collectives(case(method, "8 data").text).ici.items() if traffic.count}
  assert kinds == {"all-reduce"}


@pytest.mark.parametrize("method", VARIANTS)
def test_fsdp_gathers_weights_and_moves_no_tokens(case, method):
  """Nothing but gathers of weights, and sums: GSPMD left to itself permutes and exchanges activations."""
  kinds = {name for name, traffic in hlo.collectives(case(method, "2 x 4").text).ici.items() if traffic.count}
  assert "all-gather" in kinds
  assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_samples_are_the_same_on_every_mesh(case):
  results = []
  for mesh in ("1", "2 x 2 x 2"):
    c = case("π-ID", mesh)
    params = c.program.layout.place(jax.device_get(c.experiment.init(jax.random.key(0), c.experiment.load_frozen())))
    noise, labels = draw_noise(c.experiment.dataset, 5, seed=0)
    run = functools.partial(make_sampler(c.experiment.method, SampleSettings(h=0.5), 2), params)
    keys = jax.random.split(jax.random.key(1), 5)
    results.append(in_batches(run, c.program.layout, 64, noise, labels, keys))
  assert results[0].shape == (5, 8, 8, 1)
  for other in results[1:]:
    np.testing.assert_allclose(other, results[0], atol=2e-5)
