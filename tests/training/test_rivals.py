"""Networks of improved and decoupled MeanFlow and FreeFlow: their start, what trains, and policies from a flow map."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.methods import improved_mean_flow
from pflow_jax.training.step import make_step
from pflow_jax.training.train import train
from tests.networks.test_dit import equations
from tests.programs import quick, write_random

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return write_random(quick("digits", "flow_teacher"), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def flow_map(tmp_path_factory, teacher):
  folder = tmp_path_factory.mktemp("flow_map")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    train(quick("digits", "ayf_emd", teacher, steps=2), folder)
  return folder


TABLE = (("blocks/(mlp_in|mlp_out)", 2),)
STATES = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.3, 1, 4), jnp.arange(4)


def started(experiment):
  frozen = experiment.load_frozen()
  params = experiment.complete(experiment.init(jax.random.key(1), frozen), frozen)
  return params, experiment.teacher.velocity(frozen)(*STATES)


def close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.0, 8.0)])
def test_both_outputs_of_improved_mean_flow_start_as_the_teacher(teacher, guidance):
  config = quick("digits", "improved_mean_flow", teacher)
  config.objective.guidance = guidance
  experiment = build(config)
  params, expected = started(experiment)
  x, t, label = STATES
  close(experiment.method.jump(params)(x, t, t / 3, label), expected)
  inputs = experiment.method._inputs(2.0, t, (0.1, 0.8))
  assert set(inputs) == ({"guidance", "interval"} if guidance != (1.0, 1.0) else set())
  average, velocity = experiment.network(params, x, t, label, s=t / 3, with_velocity=True, **inputs)
  close(average, expected)
  close(velocity, expected)


def test_its_strength_and_interval_reach_the_network(teacher, caplog):
  config = quick("digits", "improved_mean_flow", teacher)
  config.objective.guidance = (1.0, 8.0)
  improved_mean_flow._tell_strength.cache_clear()
  config.sample.guidance = 2.0
  build(config)
  assert not caplog.messages
  config.sample.guidance = None
  experiment = build(config)
  assert caplog.messages == [
    "config.sample.guidance: not set, so samples are drawn at strength 1 (1 is no guidance); this network is trained "
    "for strengths from 1 to 8"
  ]
  params, _ = started(experiment)
  params = jax.tree_util.tree_map_with_path(
    lambda keys, leaf: leaf + 1 if "embed" in str(keys) and "out" in str(keys) else leaf, params
  )
  x, t, label = STATES
  asked = [(2.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (2.0, (0.2, 1.0)), (2.0, (0.0, 0.8))]
  outputs = [experiment.method.jump(params, *one)(x, t, t / 3, label) for one in asked]
  assert min(np.abs(outputs[0] - other).max() for other in outputs[1:]) > 1e-3


def test_decoupled_mean_flow_adds_no_parameter_and_is_its_teacher_where_s_is_t(teacher):
  experiment = build(quick("digits", "decoupled_mean_flow", teacher))
  params, expected = started(experiment)
  x, t, label = STATES
  close(experiment.method.jump(params)(x, t, t, label), expected)
  assert np.abs(experiment.method.jump(params)(x, t, t / 3, label) - expected).max() > 1e-3
  assert set(params) - set(experiment.frozen["strong"]) == {"log_variance"}


def test_its_scale_of_the_error_trains(teacher, tmp_path):
  state = train(quick("digits", "decoupled_mean_flow", teacher, steps=2), tmp_path)
  assert np.abs(state.params["log_variance"]["bias"]) > 0


@pytest.mark.parametrize(
  ("variant", "option", "value", "message"),
  [
    ("improved_mean_flow", "velocity_depth", None, "config.model.velocity_depth"),
    ("decoupled_mean_flow", "late_blocks", 0, "config.model.late_blocks"),
    ("decoupled_mean_flow", "late_blocks", 2, "fewer than all 2 blocks"),
  ],
)
def test_a_network_without_what_the_objective_needs_is_refused(teacher, variant, option, value, message):
  config = quick("digits", variant, teacher)
  del config.model[option]
  if value is not None:
    config.model[option] = value

  def start():
    experiment = build(config)
    jax.eval_shape(experiment.init, jax.random.key(0), experiment.frozen)

  with pytest.raises(ValueError, match=message):
    start()


def test_the_correction_of_free_flow_starts_at_nothing_and_its_network_follows_the_samples(teacher):
  experiment = build(quick("digits", "free_flow", teacher))
  corrector, frozen = make_step(experiment).adversary, experiment.load_frozen()
  params = experiment.init(jax.random.key(1), frozen)
  batch, zero = {"cond": STATES[2]}, jax.tree.map(jnp.zeros_like, params)
  follower = corrector.init(jax.random.key(0), frozen)
  step = jax.jit(lambda follower: corrector.step(follower, params, frozen, zero, batch, jax.random.key(2)))
  grads, followed, metrics = step(follower)
  # Its network is the teacher's so far: nothing is to be corrected.
  assert metrics["correction"] < 1e-6
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) < 1e-4
  _, _, later = step(followed)
  assert later["own_velocity_loss"] < metrics["own_velocity_loss"]
  assert later["correction"] > 1e-4


def test_free_flow_has_no_data(teacher):
  """The same gradient whatever the batch holds beside conditions."""
  experiment = build(quick("digits", "free_flow", teacher))
  frozen = experiment.load_frozen()
  params = experiment.init(jax.random.key(1), frozen)
  losses = [
    experiment.loss(params, frozen, {"x0": x0, "cond": STATES[2]}, jax.random.key(3), 5)[0]
    for x0 in (STATES[0], 9 * STATES[0])
  ]
  np.testing.assert_array_equal(*losses)


def test_a_policy_from_a_flow_map_first_makes_its_jump(teacher, flow_map):
  config = quick("digits", "gmflow_from_map", teacher)
  config.start.workdir, config.teacher.bias_noise = str(flow_map), 0.0
  experiment = build(config)
  start = experiment.start_params()
  params = experiment.init(jax.random.key(1), {}, start)
  x, _, label = STATES
  one = jnp.ones(len(x))
  source = build(quick("digits", "ayf_emd", teacher))
  jump = source.method.jump(source.load(flow_map))
  expected = x - jump(x, one, 0 * one, label)
  got = experiment.method.sampler(experiment.settings.sample, 1)(params, x, label, None)
  # The components lie at the jump's end; their spread moves the rest.
  assert np.sqrt(np.mean((got - expected) ** 2)) < 0.3 * np.sqrt(np.mean((x - expected) ** 2))
  own = build(quick("digits", "gmflow_from_map", teacher)).method
  np.testing.assert_allclose(own._end(jnp.array([1.0, 0.999])), 0.0)


@pytest.mark.parametrize(
  ("variant", "table", "own", "message"),
  [
    (
      "decoupled_mean_flow",
      (),
      (),
      "config.model.late_blocks is 1 there and None here; .* without it, such as 'ayf_emd'",
    ),
    ("improved_mean_flow", (), (), "config.model.velocity_depth is 1 there and None here"),
    ("ayf_emd", TABLE, (), "add its adapters .*, `pflow merge --workdir .* --out MERGED`, and start from MERGED"),
    ("ayf_emd", (), TABLE, "it trained without adapters; leave config.adapters out"),
  ],
)
def test_a_start_from_another_network_says_what_to_do(teacher, tmp_path, variant, table, own, message):
  there, config = quick("digits", variant, teacher), quick("digits", "gmflow_from_map", teacher)
  for values, rows in ((there, table), (config, own)):
    if rows:
      values.adapters.table = rows
  config.start.workdir = str(write_random(there, tmp_path))
  with pytest.raises(ValueError, match=rf"trained another network .* parameters that differ: .*; {message}"):
    build(config).start_params()


def test_segments_of_a_policy_that_is_told_their_ends(teacher):
  config = quick("digits", "gmflow_from_map", teacher)
  config.objective.update(nfe=2, final_scale=0.5, shift=3.0)
  method = build(config).method
  grid = np.array([1.0, 1 / 3, 0.0])
  flow = lambda r: 3.0 * r / (1 + 2.0 * r)
  got = method._end(jnp.asarray(flow(grid[:2])))
  np.testing.assert_allclose(got, flow(grid[1:]), atol=1e-6)


def test_an_adversary_joins_a_policy_of_one_evaluation_alone(teacher):
  config = quick("digits", "gmflow", teacher)
  config.model.time_scale = 1.0
  config.adversarial.update(weight=0.1, width=4)
  experiment = build(config)
  adversary, frozen = make_step(experiment).adversary, experiment.load_frozen()
  params = experiment.init(jax.random.key(1), frozen)
  key, x0 = jax.random.key(4), STATES[0]
  fake = adversary.generate(params, frozen, x0, STATES[2], key)
  noise = jax.random.normal(jax.random.split(key)[0], x0.shape)
  expected = experiment.method.sampler(experiment.settings.sample, 1)(params, noise, STATES[2], None)
  np.testing.assert_allclose(fake, expected, rtol=1e-3, atol=1e-3)
  config.objective.nfe = 2
  with pytest.raises(ValueError, match="one evaluation"):
    make_step(build(config))


@pytest.mark.parametrize(
  ("variant", "option"), [("ayf_emd", "velocity_depth"), ("teacher", "late_blocks"), ("gmflow", "late_blocks")]
)
def test_a_branch_of_the_network_that_the_objective_does_not_use_is_refused(teacher, variant, option):
  config = quick("digits", variant, None if variant == "teacher" else teacher)
  config.model[option] = 1
  with pytest.raises(ValueError, match=f"config.model.{option}: the objective .* does not use it"):
    build(config)


def at_two_precisions(teacher, variant):
  """Losses of a bfloat16 network whose derivative is in float32, and as the network's is, by that setting."""
  batch = {"x0": STATES[0], "cond": STATES[2]}
  config = quick("digits", variant, teacher)
  config.model.dtype = "bfloat16"
  for name in ("float32", "network"):
    config.objective.derivative_dtype = name
    experiment = build(config)
    frozen = experiment.load_frozen()
    yield lambda params, one=experiment, frozen=frozen: one.loss(params, frozen, batch, jax.random.key(3), 2000)[0]


@pytest.mark.parametrize("variant", ["ayf_emd", "improved_mean_flow", "decoupled_mean_flow", "free_flow"])
def test_a_derivative_as_the_network_computes_is_of_the_evaluation_of_the_value(teacher, variant):
  config = quick("digits", variant, teacher)
  experiment = build(config)
  params = jax.eval_shape(experiment.init, jax.random.key(1), experiment.frozen)

  def products(loss):
    """Number of products with the first kernels of the blocks' MLPs, by dtype."""
    dots = [e for e in equations(jax.make_jaxpr(loss)(params).jaxpr) if e.primitive.name == "dot_general"]
    return Counter(str(e.invars[0].aval.dtype) for e in dots if e.invars[1].aval.shape == (16, 64))

  with_copy, alone = map(products, at_two_precisions(teacher, variant))
  assert alone["float32"] == (experiment.method.objective.target == "teacher"), "the teacher's"
  copies = with_copy["float32"] - alone["float32"]
  assert copies >= 2
  assert alone["bfloat16"] == with_copy["bfloat16"] + copies // 2, "the other half is the value's"
  config.objective.derivative_dtype = "bfloat16"
  with pytest.raises(ValueError, match=r"derivative_dtype: expected one of \('float32', 'network'\), got 'bfloat16'"):
    build(config)


def test_a_derivative_as_the_network_computes_is_close_to_one_in_float32(teacher):
  experiment = build(quick("digits", "ayf_emd", teacher))
  params = experiment.init(jax.random.key(1), experiment.load_frozen())
  exact, rough = jax.jit(lambda params: [loss(params) for loss in at_two_precisions(teacher, "ayf_emd")])(params)
  assert np.abs(rough - exact).max() > 0
  np.testing.assert_allclose(rough, exact, rtol=0.02, atol=1e-5)


def test_parameters_start_on_a_mesh_without_its_kernels(teacher):
  """A kernel takes whole batches of the mesh, and the parameters are made for one example."""
  experiment = build(quick("digits", "ayf_emd", teacher))
  network = dataclasses.replace(experiment.network, module=experiment.network.module.clone(attention="flash_jvp"))
  layout = layout_of(experiment.settings, jax.devices()[:8])
  with layout.context():
    shapes = jax.eval_shape(lambda key: network.init(key, experiment.dataset, s=jnp.ones((1,))), jax.random.key(0))
  assert jax.tree.structure(shapes) == jax.tree.structure(experiment.method.shapes())
