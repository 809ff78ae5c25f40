"""The compiled step and the runs it makes: what adapters train, what is kept of it, and how much memory that takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.mesh.partition import path_of
from pflow_jax.settings.optimizer import EmaSettings, OptimizerSettings
from pflow_jax.training import optim
from pflow_jax.training.experiment import build
from pflow_jax.training.network import Network
from pflow_jax.training.sample import SampleSettings, make_sampler
from pflow_jax.training.state import create_state
from pflow_jax.training.step import Step, abstract_batch, make_step
from pflow_jax.training.train import train
from pflow_jax.training.workdir import CHECKPOINTS
from tests.programs import quick
from tests.training.test_network import leaves_of
from tests.training.test_teachers import write_teacher

pytestmark = pytest.mark.usefixtures("float32")

ADAPTED = ("blocks/mlp_in", "blocks/mlp_out", "time_embed/in", "time_embed/out")
IN_FULL = ("final_norm/adaln", "head/proj_out_means", "head/proj_out_logweights", "head/proj_out_loggamma")
TRAINED = {f"{layer}/lora_{ab}" for layer in ADAPTED for ab in "ab"}
TRAINED |= {f"{layer}/{name}" for layer in IN_FULL for name in ("kernel", "bias")}


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory, teacher_run):
  """(experiment, workdir, final state) of three steps with adapters."""
  folder = tmp_path_factory.mktemp("adapters")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    config = quick("digits", "arc_adapters", teacher_run)
    state = train(config, folder)
    return build(config), folder, state


def test_state_and_checkpoint_hold_what_trains_alone(adapted_run):
  _, folder, state = adapted_run
  assert set(leaves_of(state.params)) == set(leaves_of(state.ema)) == TRAINED
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 2 * size
  for which in ("params", "ema"):
    assert set(leaves_of(load_params(folder / CHECKPOINTS, which=which))) == TRAINED
  saved = [leaf for leaf in jax.tree.leaves(load_params(folder / CHECKPOINTS, which="opt_state")) if np.ndim(leaf)]
  assert sum(leaf.size for leaf in saved) == 2 * size


def test_frozen_leaves_stay_where_their_neighbours_move(adapted_run, teacher_run):
  experiment, folder, _ = adapted_run
  teacher = leaves_of(load_params(teacher_run / CHECKPOINTS))
  key_init, _ = jax.random.split(jax.random.key(0))
  key_params, _ = jax.random.split(key_init)
  start = leaves_of(experiment.init(key_params, experiment.load_frozen()))
  after = leaves_of(experiment.load(folder))
  assert set(after) == TRAINED | {path for path in teacher if not path.startswith(("head/", "final_norm/"))}
  for path, leaf in after.items():
    if path in TRAINED:
      assert np.abs(leaf - start[path]).max() > 1e-4, path
    else:
      np.testing.assert_array_equal(leaf, teacher[path], err_msg=path)
  assert {"blocks/mlp_in/kernel", "blocks/qkv/kernel", "time_embed/in/bias"} <= set(after) - TRAINED


def test_every_draw_of_a_step_has_a_key_of_its_own():
  """The loss, each of its micro-batches and the adversary, at every step."""

  def drawn(params, frozen, batch, key, step):
    u = jax.random.uniform(key, batch["x0"].shape)
    return params["a"] * batch["x0"], {"drawn": u, "squared": u * u}

  class Judge:
    def step(self, opponent, params, frozen, grads, batch, key):
      return grads, opponent, {"judged": jax.random.uniform(key)}

  def numbers(accumulation):
    step = Step(drawn, optax.apply_if_finite(optax.sgd(0.1), 3), lambda step: 0.9, accumulation, adversary=Judge())
    params = {"a": jnp.ones(())}
    state, found = create_state(params, step.optimizer), []
    for _ in range(3):
      state, metrics = step(state, {}, {"x0": jnp.ones(accumulation)}, jax.random.key(0))
      found += [float(metrics["drawn"]), float(metrics["judged"])]
      variance = metrics["squared"] - metrics["drawn"] ** 2
      assert (variance > 1e-6) == (accumulation == 2), "two micro-batches draw two numbers"
    return found

  assert len(set(numbers(1))) == 6
  assert len(set(numbers(2))) == 6


def test_merged_run_says_what_the_adapted_one_says(adapted_run):
  """As plain parameters of the plain config; three steps move an adapter too little to see, so they are enlarged."""
  experiment, folder, _ = adapted_run
  enlarged = lambda keys, leaf: 30 * leaf if "lora" in path_of(keys) else leaf
  params = jax.tree_util.tree_map_with_path(enlarged, experiment.load(folder))
  plain = build(quick("digits", "arc", experiment.teacher.settings.workdir))
  inputs = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.1, 1, 4), jnp.arange(4)
  run = jax.jit(plain.network)
  adapted, merged = jax.jit(experiment.network)(params, *inputs), run(experiment.network.merged(params), *inputs)
  assert set(adapted) == {"velocities", "logits", "log_gammas"}
  for name, out in adapted.items():
    np.testing.assert_allclose(merged[name], out, rtol=1e-4, atol=1e-5)
  unadapted = run(params, *inputs)
  assert np.abs(unadapted["velocities"] - adapted["velocities"]).max() > 1e-3, "the adapters do something"


def test_preview_of_a_run_with_adapters(teacher_run, tmp_path):
  train(quick("digits", "arc_adapters", teacher_run, sample_every=3), tmp_path, picture=(save_picture, preview_size))
  assert (tmp_path / "samples" / "0000003.png").stat().st_size > 1000


def test_log_gammas_move_at_a_tenth_of_the_rate(adapted_run, teacher_run):
  """The optimizer of the config on its own parameters; Adam's first step is as long as the rate, whatever the loss."""
  start = adapted_run[2].params

  def moved(rates):
    config = quick("digits", "arc_adapters", teacher_run)
    if rates is not None:
      config.optimizer.rates = rates
    step = make_step(build(config))
    loss_fn = lambda params, *_: (sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), {})
    one = Step(loss_fn, step.optimizer, step.ema_decay)
    state, _ = jax.jit(one)(create_state(start, step.optimizer), {}, {}, jax.random.key(0))
    return leaves_of(jax.tree.map(lambda a, b: np.median(np.abs(a - b)), state.params, start))

  own, even = moved(None), moved(())
  assert set(own) == TRAINED
  for path in TRAINED:
    factor = 0.1 if "loggamma" in path else 1.0
    np.testing.assert_allclose(even[path], 2e-3, rtol=1e-3, err_msg=path)
    np.testing.assert_allclose(own[path], factor * 2e-3, rtol=1e-3, err_msg=path)


def memory(variant, teacher, model):
  """(bytes of the step's arguments, of the teacher, of one copy of what trains, of outputs that are no argument's)."""
  config = quick("digits", variant, teacher)
  config.model = model
  config.objective.update(num_states=1, window=0.0, dropout=0.0)  # less to compile, the same arguments
  experiment = build(config)
  step = make_step(experiment)
  key, frozen = jax.random.key(0), experiment.load_frozen()
  state = jax.eval_shape(lambda key, frozen: step.init(key, experiment.init(key, frozen)), key, frozen)
  lowered = jax.jit(step, donate_argnums=0).lower(state, frozen, abstract_batch(experiment, 8), key)
  analysis = lowered.compile().memory_analysis()
  base, trained = (
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (frozen, state.params)
  )
  fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return analysis.argument_size_in_bytes, base, trained, fresh


def test_student_average_and_moments_share_the_teachers_frozen_weights(tmp_path):
  """One base for all: training in full holds five, the teacher's, the student's, its average's and two moments'."""
  model = dict(kind="dit", patch_size=2, width=256, depth=2, num_heads=2)
  write_teacher(tmp_path, model, steps=(1,))
  batch_and_counters = 10_000
  arguments, base, trained, fresh = memory("arc_adapters", tmp_path, model)
  assert trained < 0.1 * base
  assert 0 <= arguments - (base + 4 * trained) < batch_and_counters
  assert arguments < 1.4 * base
  assert fresh < batch_and_counters, "the new state takes the old one's place"
  arguments, base, trained, fresh = memory("arc", tmp_path, model)
  assert 0 <= arguments - (base + 4 * trained) < batch_and_counters
  assert arguments > 4.9 * base


def test_dropout_of_adapters_engages_in_training_alone(adapted_run, monkeypatch):
  """The student is called with a key by the loss, and without one to sample; the teacher never gets one."""
  experiment, folder, state = adapted_run
  calls = []
  call = Network.__call__

  def noted(network, *args, key=None, **named):
    calls.append((bool(network.adapters.table), key is not None))
    return call(network, *args, key=key, **named)

  monkeypatch.setattr(Network, "__call__", noted)
  batch, key = abstract_batch(experiment, 2), jax.random.key(0)
  jax.eval_shape(experiment.loss, state.params, experiment.load_frozen(), batch, key, 0)
  assert set(calls) == {(True, True), (False, False)}
  calls.clear()
  draw = make_sampler(experiment.method, SampleSettings(), 2)
  jax.eval_shape(draw, experiment.load(folder), batch["x0"], batch["cond"], jax.random.split(key, 2))
  assert set(calls) == {(True, False)}


def test_parameters_are_brought_back_to_their_surface_before_they_are_averaged():
  unit = lambda params: {"w": params["w"] / jnp.linalg.norm(params["w"])}
  loss_fn = lambda params, *_: (jnp.sum(params["w"]), {})
  optimizer = optim.make_optimizer(OptimizerSettings(learning_rate=0.5))
  step = Step(loss_fn, optimizer, optim.make_ema_decay(EmaSettings(kind="constant", decay=0.5)), project=unit)
  state, _ = jax.jit(step)(create_state({"w": jnp.array([0.6, 0.8])}, optimizer), {}, {}, jax.random.key(0))
  expected = np.array([0.1, 0.3]) / np.hypot(0.1, 0.3)
  np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)
  np.testing.assert_array_equal(state.ema["w"], state.params["w"])
