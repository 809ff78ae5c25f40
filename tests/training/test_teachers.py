"""Teachers: how they are guided, which ones fit, and that a student keeps the one it started with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.network import make_network
from pflow_jax.training.state import create_state
from pflow_jax.training.teachers import load_teacher
from tests.networks.test_dit import perturbed_params
from tests.programs import quick, write_pretrained

pytestmark = pytest.mark.usefixtures("float32")

MODEL = dict(kind="mlp", width=8, depth=1, time_scale=1.0)
VELOCITY = dict(kind="velocity")


def digits_inputs(batch=3):
  x = jax.random.normal(jax.random.key(0), (batch, 8, 8, 1))
  return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch)


def scaled(params, factor):
  return jax.tree.map(lambda p: factor * p, params)


def write_teacher(folder, model=MODEL, steps=(1, 2), cond_dropout=0.0, name="digits"):
  """A teacher's run as `train` leaves it, with random parameters, for which nothing is compiled.

  The averages of step n are n times those of step 1, and twice the parameters beside them.
  """
  config = quick("digits", "teacher")
  config.data, config.model = dict(name=name), model
  config.objective.cond_dropout = cond_dropout
  dataset = data.load(name)
  x, t, label = jnp.zeros((1, *dataset.shape)), jnp.ones(1), jnp.zeros(1, jnp.int32)
  params = perturbed_params(make_network(Choice.of(config.model), Choice.of(config.head), dataset).module, x, t, label)
  workdir.claim(folder, Settings.of(config, converted=True))
  with Checkpointer(folder / workdir.CHECKPOINTS, max_to_keep=None) as checkpointer:
    for step in steps:
      state = create_state(scaled(params, step / 2), optax.identity())
      checkpointer.save(step, dataclasses.replace(state, ema=scaled(params, step)))
  return params


def student_of(folder, model=MODEL, variant="ayf_emd", **teacher):
  """Config of a student of the teacher in `folder`."""
  config = quick("digits", variant, folder)
  config.model = model
  config.teacher.update(teacher)
  return config


@functools.cache
def network_of(**model):
  return jax.jit(make_network(Choice.of(model), Choice.of(VELOCITY), data.load("digits")))


def field(model, params, factor, inputs):
  """What a network says whose parameters are `factor` times `params`."""
  return np.asarray(network_of(**model)(scaled(params, factor), *inputs))


def guided(teacher, inputs, scale=None):
  """The teacher's velocity, from one compiled program: op by op it takes longer."""
  return jax.jit(lambda params, scale: teacher.velocity(params, scale)(*inputs))(teacher.load(), scale)


def load(config, **options):
  return load_teacher(Settings.of(config), data.load("digits"), **options)


def refused(config, match, **options):
  with pytest.raises(ValueError, match=match):
    load(config, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """(folder, parameters of step 1) of a teacher with checkpoints 1 and 2, trained without the empty condition."""
  folder = tmp_path_factory.mktemp("plain")
  return folder, write_teacher(folder)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
  """The same teacher, as if it had been trained with the empty condition."""
  folder = tmp_path_factory.mktemp("conditional")
  return folder, write_teacher(folder, cond_dropout=0.1)


def test_newest_average_is_the_teacher_unless_told_otherwise(plain):
  folder, params = plain
  cases = ((dict(), 2), (dict(step=1), 1), (dict(which="params"), 1), (dict(step=1, which="params"), 0.5))
  for settings, factor in cases:
    teacher = load(student_of(folder, **settings))
    assert set(teacher.load()) == {"strong"}
    jax.tree.map(np.testing.assert_array_equal, teacher.load()["strong"], scaled(params, factor))


def test_an_early_checkpoint_of_its_own_run_guides(plain):
  folder, params = plain
  inputs = digits_inputs()
  strong, weak = (field(MODEL, params, factor, inputs) for factor in (2, 1))
  teacher = load(student_of(folder, guidance=1.75, weak_step=1))
  got = guided(teacher, inputs)
  np.testing.assert_allclose(got, 1.75 * strong - 0.75 * weak, rtol=1e-4, atol=1e-5)
  assert np.abs(strong - weak).max() > 0.1, "else nothing was guided"
  scales = jnp.array([1.0, 2.0, 0.5])
  got = guided(teacher, inputs, scales)
  wide = np.asarray(scales)[:, None, None, None]
  np.testing.assert_allclose(got, wide * strong + (1 - wide) * weak, rtol=1e-4, atol=1e-5)


def test_a_smaller_network_guides(plain, tmp_path):
  """Of another size and from another folder, its newest checkpoint unless told otherwise."""
  folder, params = plain
  small = MODEL | dict(width=4, depth=1)
  weak_params = write_teacher(tmp_path / "weak", small, steps=(1, 3))
  inputs = digits_inputs()
  settings = dict(guidance=2.0, weak_workdir=str(tmp_path / "weak"))
  teacher = load(student_of(folder, **settings))
  expected = 2 * field(MODEL, params, 2, inputs) - field(small, weak_params, 3, inputs)
  np.testing.assert_allclose(guided(teacher, inputs), expected, rtol=1e-4, atol=1e-5)
  early = load(student_of(folder, **settings, weak_step=1)).load()["weak"]
  jax.tree.map(np.testing.assert_array_equal, early, weak_params)


def test_the_empty_condition_guides_every_example_by_its_own_strength(conditional):
  folder, params = conditional
  x, t, label = inputs = digits_inputs()
  with_label, without = (field(MODEL, params, 2, (x, t, c)) for c in (label, jnp.full(3, 10)))
  assert np.abs(with_label - without).max() > 0.1
  teacher = load(student_of(folder, guidance=3.0, interval=(0.2, 0.8)))
  scales = jnp.array([3.0, 1.25, 1.5])
  for scale, at_half in ((None, 3.0), (scales, 1.25)):
    w = np.array([1.0, at_half, 1.0])[:, None, None, None]  # at t = 0.1 and 0.9, outside the interval, none
    got = guided(teacher, inputs, scale)
    np.testing.assert_allclose(got, w * with_label + (1 - w) * without, rtol=1e-4, atol=1e-5)
  everywhere = load(student_of(folder), strengths=(1.0, 3.0))
  w = np.asarray(scales)[:, None, None, None]
  got = guided(everywhere, inputs, scales)
  np.testing.assert_allclose(got, w * with_label + (1 - w) * without, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(guided(everywhere, inputs), with_label, rtol=1e-5, atol=1e-6)


def test_teachers_that_do_not_fit_are_refused(plain, tmp_path):
  folder, student = plain[0], tmp_path / "student"
  workdir.claim(student, Settings.of(student_of(folder), converted=True))
  refused(student_of(None), r"train a teacher first.*config\.teacher\.workdir")
  refused(student_of(folder, weak_step=1), "a weak teacher guides nothing at strength 1")
  refused(student_of(folder, guidance=2.0), "cond_dropout=0.1, or give a weak teacher")
  refused(student_of(folder), "cond_dropout=0.1", strengths=(1.0, 2.0))
  refused(student_of(folder, guidance=2.0, weak_step=7), r"no checkpoint of step 7.*there are \[1, 2\]")
  refused(student_of(folder, guidance=2.0, weak_workdir=str(student)), r"teacher\.weak_workdir: .*holds a student")
  refused(student_of(student), r"teacher\.workdir: .*holds a student")
  write_teacher(tmp_path / "points", steps=(1,), name="checkerboard")
  weak = str(tmp_path / "points")
  refused(
    student_of(folder, guidance=2.0, weak_workdir=weak),
    r"(?s)points was trained on other data.*data\.name: the teacher has 'checkerboard', the student 'digits'",
  )
  refused(
    student_of(folder, MODEL | dict(width=12)), r"(?s)another network.*model\.width: the teacher has 8, the student 12"
  )


def test_how_a_network_is_computed_may_differ(plain):
  load(student_of(plain[0], MODEL | dict(dtype="bfloat16")))


@pytest.mark.parametrize(("attention", "has_kernel"), [("xla", False), ("splash", True)])
def test_a_teacher_attends_as_its_student(attention, has_kernel, tmp_path):
  """Its own way may not exist where the student trains, and a converted one has none."""
  config = quick("flux", "gm")
  config.teacher.workdir = str(write_pretrained(config, tmp_path / "teacher"))
  config.model.attention = attention
  dataset = data.load(**config.data)
  teacher, cond = load_teacher(Settings.of(config), dataset), dataset.cond_shapes(2)
  inputs = jax.ShapeDtypeStruct((2, *dataset.shape), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32), cond
  program = jax.make_jaxpr(lambda params, *inputs: teacher.velocity(params)(*inputs))(teacher.shapes, *inputs)
  assert ("pallas_call" in str(program)) == has_kernel


def test_strengths_of_the_objective_reach_the_check_of_the_teacher(plain, conditional):
  config = student_of(plain[0])
  config.objective.guidance = (1.0, 2.0)
  with pytest.raises(ValueError, match="cond_dropout=0.1"):
    build(config)
  config.teacher.workdir = str(conditional[0])
  assert build(config).method.objective.guided
  config.teacher.update(workdir=str(plain[0]), weak_step=1)
  assert build(config).teacher.settings.autoguided


def test_weak_teacher_and_start_are_kept_as_they_were(tmp_path, monkeypatch):
  """A run names the steps of all three folders, and keeps them although the folders train on."""
  monkeypatch.chdir(tmp_path)
  for name in ("strong", "weak", "first"):
    write_teacher(tmp_path / name, steps=(1, 2))

  def pinned():
    config = student_of("strong", guidance=2.0, weak_workdir="weak")
    config.start.workdir = "first"
    config = workdir.pinned("run", Settings.of(config))
    return config

  def steps(config):
    return config.teacher.step, config.teacher.weak_step, config.start.step

  config = pinned()
  assert steps(config) == (2, 2, 2)
  folders = config.teacher.workdir, config.teacher.weak_workdir, config.start.workdir
  assert folders == tuple(str(tmp_path / name) for name in ("strong", "weak", "first"))
  workdir.claim("run", Settings.of(config, converted=True))
  (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
  for name in ("strong", "weak", "first"):
    write_teacher(tmp_path / name, steps=(3,))
  assert steps(pinned()) == (2, 2, 2)
  (tmp_path / "run" / "checkpoints" / "1").rmdir()
  assert steps(pinned()) == (3, 3, 3), "a run without a checkpoint starts anew"


def test_a_weak_step_of_the_own_run_stays_what_was_asked_for(plain, tmp_path):
  config = student_of(plain[0], guidance=2.0, weak_step=1)
  config = workdir.pinned(tmp_path, Settings.of(config))
  assert (config.teacher.step, config.teacher.weak_step, config.teacher.weak_workdir) == (2, 1, None)


def test_students_of_teachers_guided_by_another_model_are_not_compared(tmp_path):
  write_teacher(tmp_path / "teacher", steps=(1, 2, 3), name="checkerboard")
  for name, weak_step in (("one", 1), ("two", 2)):
    config = quick("checkerboard", "ayf_emd", tmp_path / "teacher")
    config.model = MODEL
    config.teacher.update(guidance=2.0, weak_step=weak_step)
    workdir.claim(tmp_path / name, Settings.of(config, converted=True))
  with pytest.raises(ValueError, match=r"(?s)share a teacher.*one.*two"):
    evaluate(workdir.load_config(tmp_path / "one"), tmp_path / "one", others=[tmp_path / "two"])
