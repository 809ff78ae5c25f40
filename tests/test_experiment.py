"""Configs: what does not fit is refused with the nearest name."""

import jax
import pytest

from pflow_jax.experiment import build, layout_of, make_optimizer
from pflow_jax.step import make_program
from pflow_jax.train import train
from tests.programs import quick


def test_misspelt_keys_name_the_nearest(teacher_run, tmp_path):
  cases = {
    "objective": ("num_state", "num_states"),
    "model": ("depht", "depth"),
    "policy": ("num_component", "num_components"),
    "data": ("held_outt", "held_out"),
  }
  for section, (wrong, right) in cases.items():
    config = quick("digits", "gmflow", teacher_run)
    with config[section].unlocked():
      config[section][wrong] = 1
    with pytest.raises(ValueError, match=f"{wrong}.*{right}"):
      build(config)
  config = quick("digits", "teacher")
  with config.optimizer.unlocked():
    config.optimizer.learning_rat = 1.0
  with pytest.raises(ValueError, match="learning_rate"):
    make_optimizer(config)
  for section in ("train", "mesh", "ema"):
    config = quick("digits", "teacher")
    with config[section].unlocked():
      config[section].no_such_key = 1
    with pytest.raises(ValueError, match="no_such_key"):
      train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
  config = quick("digits", "teacher")
  config.trian = dict(steps=1)
  with pytest.raises(ValueError, match="'train'"):
    build(config)


def test_sections_that_do_not_belong_together_are_refused(teacher_run, student_run):
  def refused(match, variant="gmflow", teacher=teacher_run, **sections):
    config = quick("digits", variant, teacher)
    for section, values in sections.items():
      section = section.rstrip("_")
      with config.unlocked():
        config[section] = config[section].to_dict() | values
    with pytest.raises(ValueError, match=match):
      build(config)

  refused("train a teacher first", teacher=None)
  refused("holds a student", teacher=student_run)
  refused("no run in", teacher="/nonexistent")
  refused(r"data\.held_out: the teacher has '\(default\)', the student 10", data=dict(name="digits", held_out=10))
  refused(r"(?s)model\.depth.*model\.num_heads", model=dict(depth=2, num_heads=4))
  refused("cond_dropout=0.1", teacher_=dict(guidance=4.0))
  refused("does not train the policy 'velocity'", policy=dict(kind="velocity"))
  refused("does not train the policy 'gmflow'", objective=dict(kind="flow_matching"))
  refused("expected one of", objective=dict(kind="gan"))
  refused("expected one of", policy=dict(kind="spline"))


@pytest.mark.usefixtures("float32")
def test_student_starts_as_its_teachers_one_step(teacher_run):
  """Without the noise on the biases, one evaluation at t = 1 moves as the teacher's velocity does."""
  config = quick("digits", "gmflow", teacher_run)
  config.teacher.bias_noise = 0.0
  made = build(config)
  noise = jax.random.normal(jax.random.key(0), (4, *made.dataset.shape))
  t, labels = jax.numpy.ones(4), jax.numpy.arange(4)
  policy = made.student(made.init(jax.random.key(1), made.load_frozen()))(noise, t, labels)
  moved = jax.vmap(lambda p, x: p.velocity(x, 1.0))(policy, noise)
  expected = made.teacher.velocity(made.teacher.load())(noise, t, labels)
  assert float(jax.numpy.abs(expected).max()) > 0
  assert jax.numpy.allclose(moved, expected, atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_segments_without_data_do_not_add_up_in_memory():
  """Three times the segments, of which each keeps its source alone for the backward pass: 1.3 times the memory."""

  def temporary_bytes(nfe):
    config = quick("imagenet", "gmflow", batch_size=8)
    config.objective.update(kind="imitation_data_free", nfe=nfe)
    config.model.update(depth=12, width=64, num_heads=2, remat="full")
    experiment = build(config, abstract=True)
    program = make_program(config, experiment, layout_of(config, jax.devices()[:1]))
    return program.trace(None).lower().compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(6) < 1.4 * temporary_bytes(2)


def test_kernels_are_refused_where_they_are_not():
  config = quick("flux", "gm_data_free")
  config.model.attention = "splash"
  with pytest.raises(ValueError, match=r"config\.model\.attention: 'splash' is for TPUs, and this runs on cpu"):
    layout_of(config)
  assert layout_of(config, 4).platform is None, "to be planned"
