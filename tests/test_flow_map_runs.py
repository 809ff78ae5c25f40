"""Flow maps as runs: their start, training to the same bits, samples at any step count, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pflow_jax.checkpoints.checkpoint import Checkpointer, load_params
from pflow_jax.core.objectives import flow_map
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.sample import sample
from pflow_jax.mesh.partition import path_of
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training import sample as program
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.methods import flow_map as flow_map_method
from pflow_jax.training.network import Network
from pflow_jax.training.state import create_state
from pflow_jax.training.step import abstract_batch
from pflow_jax.training.train import train
from pflow_jax.training.workdir import CHECKPOINTS, load_config
from tests.networks.test_dit import equations
from tests.programs import quick
from tests.training.test_network import leaves_of
from tests.training.test_teachers import MODEL, write_teacher

pytestmark = pytest.mark.usefixtures("float32")

DIT = dict(kind="dit", patch_size=2, width=8, depth=1, num_heads=2, time_scale=1.0)


def guided_config(teacher, model=MODEL, **train):
  """A student of every strength of guidance between 1 and 2."""
  config = quick("digits", "ayf_emd", teacher, **train)
  config.model = model
  config.optimizer.schedule = "constant"
  config.objective.update(guidance=(1.0, 2.0), warmup_steps=0)
  return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """A teacher that knows the empty condition."""
  folder = tmp_path_factory.mktemp("teacher")
  write_teacher(folder, cond_dropout=0.1)
  return folder


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory, teacher):
  """(workdir, final state) of three steps of a guided student."""
  folder = tmp_path_factory.mktemp("guided")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return folder, train(guided_config(teacher), folder)


def board(**train):
  config = quick("checkerboard", "mean_flow", **train)
  config.optimizer.schedule = "constant"
  return config


@pytest.fixture(scope="module")
def mean_flow_run(tmp_path_factory):
  """(workdir, final state) of three steps of MeanFlow on points, without a teacher."""
  folder = tmp_path_factory.mktemp("mean_flow")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    return folder, train(board(), folder)


def starts_as_its_teacher(experiment, trained):
  """Checks the average velocity wherever it lands, at several strengths."""
  x, t, label = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.3, 1, 4), jnp.arange(4)
  expected = jax.jit(experiment.teacher.velocity(experiment.load_frozen()))(x, t, label)
  assert np.abs(expected).max() > 0.1

  def outputs(trained):
    params = experiment.complete(trained, experiment.load_frozen())
    return [experiment.method.jump(params, w)(x, t, s, label) for s, w in ((t / 2, 1.0), (0 * t, 1.0), (t / 2, 1.5))]

  outputs = jax.jit(outputs)
  for average in outputs(trained):
    np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-5)
  # Not because s and the strength go nowhere: with other values in their layers they matter.
  changed = lambda keys, leaf: leaf + 1 if path_of(keys).endswith("embed/out/kernel") else leaf
  moved = outputs(jax.tree_util.tree_map_with_path(changed, trained))
  assert np.abs(moved[0] - moved[1]).max() > 1e-3, "s"
  assert np.abs(moved[0] - moved[2]).max() > 1e-3, "strength"


def test_starts_as_its_teacher_wherever_it_jumps_and_however_guided(tmp_path):
  write_teacher(tmp_path, DIT, steps=(1,), cond_dropout=0.1)
  experiment = build(guided_config(tmp_path, DIT))
  starts_as_its_teacher(experiment, jax.jit(experiment.init)(jax.random.key(1), experiment.load_frozen()))


def test_with_adapters_it_starts_as_its_teacher_too(teacher):
  """What the teacher lacks, the layers for s and the guidance, trains in full."""
  config = guided_config(teacher)
  config.adapters.table = (("time_embed/.*", 2),)
  experiment = build(config)
  trained = jax.jit(experiment.init)(jax.random.key(0), experiment.load_frozen())
  names = set(leaves_of(trained))
  assert {"length_embed/out/kernel", "guidance_embed/in/bias", "time_embed/in/lora_a", "head/proj_out/bias"} < names
  assert not names & {"time_embed/in/kernel", "point_embed/kernel"}
  starts_as_its_teacher(experiment, trained)


def test_objective_gets_the_network_and_its_teacher_at_the_strength_it_drew(teacher, monkeypatch):
  """Where F lands and how it is guided reach the network; the teacher is guided example by example."""
  experiment = build(guided_config(teacher))
  given = {}

  def noted(network, velocity, x0, cond, key, step, settings, **named):
    given.update(network=network, velocity=velocity, **named)
    return jnp.zeros(4), {}

  monkeypatch.setattr(flow_map_method, "flow_map_loss", noted)
  x, t, label = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.3, 1, 4), jnp.arange(4)
  cases = ((t / 2, 1.5), (t, 1.5), (t / 2, 2.0))
  strengths = jnp.array([1.0, 1.25, 1.5, 2.0])

  @jax.jit
  def outputs(frozen):
    start = experiment.init(jax.random.key(0), frozen)
    params = jax.tree_util.tree_map_with_path(lambda keys, p: p + ("embed/out" in path_of(keys)), start)
    experiment.loss(params, frozen, {"x0": x, "cond": label}, jax.random.key(0), 0)
    averages = [given["network"](x, t, s, label, jnp.full(4, w)) for s, w in cases]
    expected = [experiment.method.jump(params, w)(x, t, s, label) for s, w in cases]
    guided, plain = (experiment.teacher.velocity(frozen, w)(x, t, label) for w in (strengths, 1.0))
    return averages, expected, given["velocity"](x, t, label, strengths), guided, plain

  averages, expected, velocity, guided, plain = outputs(experiment.load_frozen())
  assert given["null_cond"] == 10
  assert given["precise"] is None
  np.testing.assert_allclose(averages, expected, rtol=1e-5, atol=1e-5)
  assert min(np.abs(averages[0] - other).max() for other in averages[1:]) > 1e-3
  np.testing.assert_allclose(velocity, guided, rtol=1e-5, atol=1e-5)
  assert np.abs(guided - plain).max() > 1e-3


def test_resumed_run_ends_in_the_same_bits(teacher, guided_run, tmp_path):
  half = train(guided_config(teacher, steps=2), tmp_path)
  parts = train(guided_config(teacher), tmp_path)
  assert (int(half.step), int(parts.step)) == (2, 3)
  jax.tree.map(np.testing.assert_array_equal, guided_run[1], parts)
  moved = {
    path for path, leaf in leaves_of(parts.params).items() if not np.array_equal(leaf, leaves_of(half.params)[path])
  }
  assert moved == set(leaves_of(parts.params)), "all of it trains, the layers for s and the guidance too"
  assert {"length_embed/out/kernel", "guidance_embed/out/kernel"} < moved


def drawn(folder, out, **changes):
  config = load_config(folder)
  config.sample.update(changes)
  sample(config, folder, num=6, out=out / "x")
  with np.load(out / "x.npz") as arrays:
    return dict(arrays)


def test_samples_at_any_step_count_and_strength(guided_run, tmp_path):
  folder, _ = guided_run
  experiment = build(load_config(folder))
  assert program.evaluations(experiment.method, SampleSettings()) == (1, 2, 4, 8)
  own = drawn(folder, tmp_path, nfe=(1, 3))
  assert (tmp_path / "x.png").stat().st_size > 1000
  assert set(own) == {"label", "noise", "x0_nfe1", "x0_nfe3"}
  assert all(np.isfinite(own[name]).all() for name in own)
  assert np.abs(own["x0_nfe1"] - own["x0_nfe3"]).max() > 0.01
  # One evaluation is one jump from noise to data at the strength of the teacher, unless told otherwise.
  noise, labels = program.draw_noise(experiment.dataset, 6, seed=0)
  params = experiment.load(folder)
  jump = jax.jit(
    lambda x: [experiment.method.jump(params, w)(x, jnp.ones(6), jnp.zeros(6), labels) for w in (1.0, 2.0)]
  )
  weak, strong = (noise - average for average in jump(noise))
  assert np.abs(weak - strong).max() > 1e-4
  np.testing.assert_allclose(own["x0_nfe1"], weak, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(drawn(folder, tmp_path, nfe=(1,), guidance=2.0)["x0_nfe1"], strong, rtol=1e-5, atol=1e-5)
  assert np.abs(drawn(folder, tmp_path, nfe=(3,), gamma=1.0)["x0_nfe3"] - own["x0_nfe3"]).max() > 0.01
  config = load_config(folder)
  config.sample.guidance = 2.5
  with pytest.raises(ValueError, match=r"sample\.guidance.*\[1\.0, 2\.0\].*2\.5"):
    sample(config, folder, num=1)


def test_evaluation_measures_every_step_count(tmp_path):
  """At its start a flow map's n evaluations are its teacher's n Euler steps."""
  write_teacher(tmp_path / "teacher", steps=(1,), name="checkerboard")
  config = quick("checkerboard", "ayf_emd", tmp_path / "teacher")
  config.model = MODEL
  config.sample.nfe = (1, 4)
  config.evaluate.teacher_steps = (1, 4, 128)
  experiment = build(config)
  state = create_state(jax.jit(experiment.init)(jax.random.key(0), experiment.load_frozen()), optax.identity())
  workdir.claim(tmp_path / "student", Settings.of(config, converted=True))
  with Checkpointer(tmp_path / "student" / workdir.CHECKPOINTS) as checkpointer:
    checkpointer.save(1, state)
  rows = {row["name"]: row for row in evaluate(config, tmp_path / "student")["rows"]}
  assert list(rows)[3:] == ["student, 1 NFE", "student, 4 NFE"]
  for name, like in (("student, 1 NFE", "teacher, 1 step"), ("student, 4 NFE", "teacher, 4 steps")):
    for key in ("alignment", "fd", "diversity"):
      np.testing.assert_allclose(rows[name][key], rows[like][key], rtol=1e-3)
  assert rows["teacher, 4 steps"]["alignment"] < 0.8 * rows["teacher, 1 step"]["alignment"]
  assert (tmp_path / "student" / "evaluation" / "trajectories.png").stat().st_size > 5000


def test_mean_flow_trains_without_a_teacher(mean_flow_run, tmp_path):
  folder, state = mean_flow_run
  experiment = build(load_config(folder))
  assert experiment.teacher is None
  assert experiment.load_frozen() == {}
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [row["skipped"] for row in rows] == [0, 0, 0]
  assert np.any(state.params["head"]["proj_out"]["kernel"]), "zero at the start"
  samples = drawn(folder, tmp_path, nfe=(2,))["x0_nfe2"]
  assert samples.shape == (6, 2)
  assert np.isfinite(samples).all()


def test_run_without_a_teacher_is_measured_at_its_own_step_counts(mean_flow_run, tmp_path):
  folder, _ = mean_flow_run
  config = load_config(folder)
  config.sample.nfe = (2,)
  report = evaluate(config, folder, out=tmp_path)
  assert any(row["nfe"] == 2 for row in report["rows"])


def dot_dtypes(jaxpr):
  return {e.invars[0].aval.dtype.name for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivative_is_taken_in_float32_whatever_the_network_computes_in(dtype, monkeypatch):
  config = board()
  config.model.dtype = dtype
  experiment = build(config)
  params = jax.eval_shape(experiment.init, jax.random.key(0), {})
  derived = set()
  jvp = jax.jvp

  def noted(function, primals, tangents):
    derived.update(dot_dtypes(jax.make_jaxpr(function)(*primals)))
    return jvp(function, primals, tangents)

  monkeypatch.setattr(flow_map.jax, "jvp", noted)
  batch = abstract_batch(experiment, 4)
  whole = jax.make_jaxpr(experiment.loss)(params, {}, batch, jax.random.key(0), 0)
  assert derived == {"float32"}
  assert dtype in dot_dtypes(whole)


def test_bfloat16_trains(tmp_path):
  config = board(steps=1)
  config.model.dtype = "bfloat16"
  state = train(config, tmp_path)
  row = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert row["skipped"] == 0
  assert row["gradient_norm"] > 0
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def refused(config, match):
  with pytest.raises(ValueError, match=match):
    build(config)


def test_attention_without_a_forward_rule_is_refused_by_name(tmp_path):
  write_teacher(tmp_path, DIT, steps=(1,))
  config = quick("digits", "ayf_emd", tmp_path)
  config.model = DIT | dict(attention="cudnn")
  refused(
    config,
    r"config\.model\.attention: 'cudnn' has no forward derivative.*set config\.model\.attention to .*"
    r"\['xla', 'flash_jvp'\]",
  )
  config = quick("digits", "arc", tmp_path)
  config.model = DIT | dict(attention="cudnn")
  assert build(config).network.module.attention == "cudnn", "imitation has no need of it"


def test_a_network_that_embeds_a_multiple_of_t_is_warned_of(caplog):
  for scale, told in ((1.0, False), (125.0, True)):
    config = board()
    config.model.time_scale = scale
    build(config, abstract=True)
    assert ("time_scale: a flow map is trained on its derivative in t, and the factor 125" in caplog.text) == told


def test_configs_that_do_not_fit_are_refused(teacher):
  config = guided_config(teacher)
  config.head = dict(kind="gmflow", num_components=2)
  refused(config, r"objective\.kind 'ayf_emd' does not train the head 'gmflow'.*'velocity'")
  config = guided_config(teacher)
  config.objective = dict(kind="imitation", nfe=1)
  refused(config, "'imitation' does not train the head 'velocity'")
  config = guided_config(teacher)
  with config.objective.unlocked():
    config.objective.anchr = 0.5
  refused(config, r"config\.objective has no key 'anchr'; did you mean 'anchor'")
  config = guided_config(teacher)
  config.objective.side = "left"
  refused(config, "side: expected one of .*'left'")
  config = guided_config(teacher)
  config.objective.kind = "ayf_edm"
  refused(config, r"config\.objective\.kind: expected one of .*'ayf_emd'")
  config = guided_config(None)
  refused(config, "train a teacher first")
  config = quick("digits", "teacher")
  config.adapters = dict(table=(("blocks/.*", 2),))
  refused(config, "a teacher trains in full")


def test_a_run_starts_from_a_finished_one(mean_flow_run, tmp_path):
  folder, _ = mean_flow_run
  ema, params, early = (
    load_params(folder / CHECKPOINTS, **options) for options in (dict(which="ema"), dict(which="params"), dict(step=2))
  )
  kernels = [tree["head"]["proj_out"]["kernel"] for tree in (ema, params, early)]
  assert min(np.abs(kernels[0] - other).max() for other in kernels[1:]) > 1e-6
  config = board(steps=1)
  config.start.workdir = str(folder)
  config.optimizer.learning_rate = 1e-30
  state = train(config, tmp_path)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-25), state.params, ema)
  assert int(state.step) == 1, "steps, optimizer and data begin anew"
  assert load_config(tmp_path).start.step == 3
  for changes, expected in ((dict(which="params"), params), (dict(which="ema", step=2), early)):
    config.start.update(changes)
    jax.tree.map(np.testing.assert_array_equal, build(config).start_params(), expected)


def test_another_network_to_start_from_is_refused_by_its_leaves(mean_flow_run, tmp_path):
  config = board()
  config.start.workdir = str(mean_flow_run[0])
  config.model.width = 32
  with pytest.raises(ValueError, match=r"config\.start\.workdir: .*another network.*'blocks_0/adaln/bias'.*start from"):
    train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config = board()
  config.start.workdir = str(mean_flow_run[0])
  config.model.depth = 2
  with pytest.raises(ValueError, match="'blocks_1/adaln/kernel'"):
    build(config).start_params()
  config.start = dict(folder="x")
  refused(config, r"config\.start has no key 'folder'")


def test_the_derivative_counts_more_with_every_step(teacher):
  """The run's step reaches the warm-up: else a run would regress on its teacher's velocity for good."""
  config = guided_config(teacher)
  config.objective.warmup_steps = 10
  experiment = build(config)
  batch = {"x0": jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), "cond": jnp.arange(4)}

  @jax.jit
  def warmup(frozen, step):
    trained = experiment.init(jax.random.key(0), frozen)
    return experiment.loss(trained, frozen, batch, jax.random.key(0), step)[1]["warmup"]

  got = [warmup(experiment.load_frozen(), step) for step in (0, 5, 100)]
  np.testing.assert_allclose(got, [0, 0.5, 0.99], rtol=1e-6)


def test_adapters_drop_out_alike_in_both_evaluations_of_a_step(teacher):
  """The derivative of the float32 network and the output of the bfloat16 one are of the same function."""
  config = guided_config(teacher, MODEL | dict(dtype="bfloat16"))
  config.adapters.table = (("time_embed/.*", 2, 2.0, 0.5),)
  experiment = build(config)
  keys = []

  class Noted(Network):
    def __call__(self, *args, key=None, **named):
      keys.append(key)
      return super().__call__(*args, key=key, **named)

  noted = Noted(**{field.name: getattr(experiment.network, field.name) for field in dataclasses.fields(Network)})
  experiment = dataclasses.replace(experiment, method=dataclasses.replace(experiment.method, network=noted))
  trained = experiment.init(jax.random.key(0), experiment.load_frozen())
  batch = {"x0": jnp.ones((2, 8, 8, 1)), "cond": jnp.arange(2)}
  experiment.loss(trained, experiment.load_frozen(), batch, jax.random.key(0), 0)
  assert len(keys) == 2
  np.testing.assert_array_equal(*map(jax.random.key_data, keys))


def test_the_derivative_asks_for_products_in_float32(teacher):
  """Accelerators round the factors to bfloat16 by default, whatever the arrays are."""
  config = guided_config(teacher, MODEL | dict(dtype="bfloat16"))
  experiment = build(config)
  batch = {"x0": jnp.ones((2, 8, 8, 1)), "cond": jnp.arange(2)}
  init = jax.eval_shape(experiment.init, jax.random.key(0), experiment.load_frozen())
  traced = jax.make_jaxpr(lambda p: experiment.loss(p, experiment.load_frozen(), batch, jax.random.key(0), 0)[0])(init)
  dots = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
  precise = [e for e in dots if "HIGHEST" in str(e.params["precision"])]
  assert precise
  assert all(v.aval.dtype == jnp.float32 for e in precise for v in e.invars)
  assert any(e.invars[0].aval.dtype == jnp.bfloat16 for e in dots if e not in precise), "the output, and the teacher"


@pytest.mark.slow
def test_edm2_network_trains_and_stays_normalised(tmp_path):
  """A teacher in EDM's preconditioning and a flow map of it, with EDM2's U-Net."""
  model = dict(kind="edm2", model_channels=8, channel_mult=(1, 2), num_blocks=0, attn_levels=(1,), channels_per_head=8)
  config = quick("digits", "flow_teacher", steps=2)
  config.model, config.head = model, dict(kind="denoiser", sigma_data=0.5)
  state = train(config, tmp_path / "teacher")
  student = quick("digits", "ayf_emd", tmp_path / "teacher", steps=2)
  student.model = model
  with pytest.raises(ValueError, match=r"head\.kind: the teacher has 'denoiser', the student 'velocity'"):
    build(student)
  student.head = dict(kind="denoiser", sigma_data=0.5)
  experiment = build(student)
  starts = jax.jit(experiment.init)(jax.random.key(1), experiment.load_frozen())
  x, t, label = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.3, 1, 4), jnp.arange(4)
  expected = experiment.teacher.velocity(experiment.load_frozen())(x, t, label)
  np.testing.assert_allclose(experiment.method.jump(starts)(x, t, t / 2, label), expected, rtol=1e-4, atol=1e-5)
  for trained in (state.params, train(student, tmp_path / "student").params):
    for path, leaf in leaves_of(trained).items():
      if path.endswith("mp_kernel"):
        np.testing.assert_allclose(np.sqrt(np.mean(leaf**2, tuple(range(leaf.ndim - 1)))), 1, atol=5e-3, err_msg=path)
  with pytest.raises(ValueError, match="holds a 'denoiser'"):
    build(quick("digits", "gmflow", tmp_path / "teacher"))
