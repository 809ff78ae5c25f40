"""Configs: what does not fit is refused with the nearest name."""

import json

import jax
import pytest

from pflow_jax.networks.registry import sharding_rules
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import OF_A_FUNCTION, build, layout_of
from pflow_jax.training.step import make_program, make_step
from pflow_jax.training.train import train
from pflow_jax.training.workdir import load_config
from tests.programs import quick


def test_misspelt_keys_name_the_nearest(teacher_run, tmp_path):
  cases = {
    "objective": ("num_state", "num_states"),
    "model": ("depht", "depth"),
    "head": ("num_component", "num_components"),
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
    build(config)
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


def test_an_unknown_dtype_of_the_residual_stream_is_refused():
  config = quick("digits", "teacher")
  with config.model.unlocked():
    config.model.residual_dtype = "bf16"
  with pytest.raises(ValueError, match=r"config\.model\.residual_dtype: expected one of .*'bfloat16'.*, got 'bf16'"):
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
  refused(r"(?s)model\.depth.*model\.num_heads", model=dict(depth=3, num_heads=4))
  refused("cond_dropout=0.1", teacher_=dict(guidance=4.0))
  refused("does not train the head 'velocity'", head=dict(kind="velocity"))
  refused("does not train the head 'gmflow'", head=dict(kind="gmflow"), variant="ayf_emd")
  refused("expected one of", objective=dict(kind="gan"))
  refused("expected one of", head=dict(kind="spline"))


@pytest.mark.parametrize(
  ("section", "values", "message"),
  [
    ("model", dict(width="64"), r"config\.model\.width: input should be a valid integer, got '64'"),
    ("model", dict(width=10**6 + 1), r"config\.model\.width: expected > 0 and at most 1,000,000, got 1000001"),
    ("model", dict(depth=None), r"config\.model: depth must be set"),
    ("model", dict(kind=["dit"]), r"config\.model\.kind: "),
    ("head", dict(num_components=2.5), r"config\.head\.num_components: input should be a valid integer"),
    ("head", dict(num_components=10**5), r"config\.head\.num_components: expected > 0 and at most 10,000"),
    ("objective", dict(num_states=10**9), r"config\.objective: num_states and nfe: expected 1 to 1000, got 1000000000"),
    ("objective", dict(substeps=10**9), r"config\.objective: substeps and method: expected 1 to 100,000"),
    ("objective", dict(shift=float("inf")), r"config\.objective\.shift: expected a finite number, got inf"),
    ("data", dict(name=3), r"config\.data\.name: input should be a valid string, got 3"),
    ("data", dict(name=None), r"config\.data: name must be set"),
    ("data", dict(held_out="1"), r"config\.data: digits\.held_out: input should be a valid integer, got '1'"),
    (
      "data",
      dict(name="synthetic", num_records=10**9, shape=(99, 99, 3)),
      r"config\.data: synthetic: .* takes .* memory",
    ),
    ("data", dict(name="synthetic", shape=[9, "x", 3]), r"config\.data: synthetic\.shape: 1: .*got 'x'"),
    ("adapters", dict(table=3), r"config\.adapters\.table: input should be a valid tuple"),
    ("start", dict(step="x"), r"config\.start\.step: input should be a valid integer"),
  ],
)
def test_values_of_another_type_or_size_are_refused_by_their_key(section, values, message):
  config = quick("digits", "gmflow")
  changed = config[section].to_dict() | values
  with config.unlocked():
    config[section] = changed
  with pytest.raises(ValueError, match=message):
    build(config, abstract=True)


def test_flow_maps_keys_have_types_too():
  config = quick("digits", "ayf_emd")
  config.objective = config.objective.to_dict() | {"guidance": (1.0, float("inf"))}
  with pytest.raises(ValueError, match=r"config\.objective\.guidance: expected a finite number, got inf"):
    build(config, abstract=True)
  config.objective = config.objective.to_dict() | {"guidance": (1.0, 1.0), "anchr": 0.5}
  with pytest.raises(ValueError, match="no key 'anchr'; did you mean 'anchor'"):
    build(config, abstract=True)


def test_a_warm_up_that_is_longer_than_the_run_names_its_flag():
  config = quick("digits", "teacher", steps=50)
  config.optimizer.warmup_steps = 50
  with pytest.raises(
    ValueError, match=r"optimizer\.warmup_steps: 50 .*steps=50; set --config\.optimizer\.warmup_steps=5,"
  ):
    make_step(build(config))
  config.optimizer.schedule = "constant"
  make_step(build(config))


@pytest.mark.usefixtures("float32")
def test_a_checkpoint_of_another_network_than_its_config_s_is_refused(teacher_run, student_run):
  config = load_config(student_run)
  config.head.num_components = 5
  with pytest.raises(ValueError, match=r"another network than its config describes; .*head/proj_out_means/kernel"):
    build(config).load(student_run)
  config = quick("digits", "gmflow", teacher_run)
  config.model.width = 32
  with pytest.raises(ValueError, match=r"holds another network than the config beside it.*blocks/"):
    load_teacher_of(config, teacher_run)


def load_teacher_of(config, folder):
  """Builds the run of a student whose teacher's config, but not its checkpoint, is as wide as the student's."""
  path = folder / "config.json"
  kept = path.read_text()
  try:
    path.write_text(json.dumps(json.loads(kept) | {"model": config.model.to_dict()}))
    build(config)
  finally:
    path.write_text(kept)


@pytest.mark.usefixtures("float32")
def test_student_starts_as_its_teachers_one_step(teacher_run):
  """Without the noise on the biases, one evaluation at t = 1 moves as the teacher's velocity does."""
  config = quick("digits", "gmflow", teacher_run)
  config.teacher.bias_noise = 0.0
  made = build(config)
  noise = jax.random.normal(jax.random.key(0), (4, *made.dataset.shape))
  t, labels = jax.numpy.ones(4), jax.numpy.arange(4)
  policy = made.method.student(made.init(jax.random.key(1), made.load_frozen()))(noise, t, labels)
  moved = jax.vmap(lambda p, x: p.velocity(x, 1.0))(policy, noise)
  expected = made.teacher.velocity(made.teacher.load())(noise, t, labels)
  assert float(jax.numpy.abs(expected).max()) > 0
  assert jax.numpy.allclose(moved, expected, atol=1e-5)


@pytest.mark.usefixtures("float32")
@pytest.mark.slow
def test_segments_without_data_do_not_add_up_in_memory():
  """Three times the segments, of which each keeps its source alone for the backward pass: 1.3 times the memory."""

  def temporary_bytes(nfe):
    config = quick("imagenet", "gmrepa_1nfe", batch_size=8)
    config.objective.update(data_free=True, nfe=nfe)
    config.model.update(depth=12, width=64, num_heads=2, remat="full")
    experiment = build(config, abstract=True)
    program = make_program(experiment, layout_of(Settings.of(config), jax.devices()[:1]))
    return program.trace(None).lower().compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(6) < 1.4 * temporary_bytes(2)


def test_kernels_are_refused_where_they_are_not():
  config = quick("flux", "gm_data_free")
  config.model.attention = "splash"
  with pytest.raises(ValueError, match=r"config\.model\.attention: 'splash' is for TPUs, and this runs on cpu"):
    layout_of(Settings.of(config))
  assert layout_of(Settings.of(config), 4).platform is None, "to be planned"


def test_a_config_s_own_rows_come_before_the_network_s():
  config = quick("digits", "teacher")
  config.mesh.update(fsdp=2, min_size=3, rules=((".*mlp_in/kernel", ("tensor", ["fsdp", "data"])),))
  layout = layout_of(Settings.of(config), 8)
  own = (".*mlp_in/kernel", ("tensor", ("fsdp", "data")))
  assert layout.rules == (own, *sharding_rules("dit"), OF_A_FUNCTION)
  assert (layout.min_size, layout.mesh.shape["fsdp"], layout.mesh.shape["data"]) == (3, 2, 4)
