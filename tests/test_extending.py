"""docs/extending.md: its blocks run, one after the other, and what they add behaves as if it were the package's own."""

import pathlib
import re

import jax
import numpy as np
import pytest

import pflow_jax as pf
from pflow_jax.commands.cli import main
from pflow_jax.core.objectives import OBJECTIVES
from pflow_jax.data import registry as sources
from pflow_jax.networks.heads import HEADS
from pflow_jax.networks.registry import NETWORKS, sharding_rules
from pflow_jax.training.methods import METHODS

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """What the page's blocks define, run in a folder of their own; afterwards nobody knows it."""
  tables = (OBJECTIVES, HEADS, NETWORKS, METHODS, sources._SOURCES)
  before = [dict(table) for table in tables]
  names = {"__name__": "extending"}
  folder = tmp_path_factory.mktemp("extending")
  with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    patch.chdir(folder)
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)):
      exec(compile(block, f"{PAGE.name}, block {number}", "exec", dont_inherit=True), names)
  yield names | {"folder": folder}
  for table, values in zip(tables, before, strict=True):
    table.clear()
    table.update(values)


def test_what_the_page_adds_trains_and_samples(page):
  for name in ("teacher", "student", "jumper"):
    run = page[name]
    assert run.steps == 2
    assert run.sample(3).shape == (3, 2)
  assert repr(page["student"]) == "Run(imitation, sine with head straight, on rings, 2 steps)"
  np.testing.assert_allclose(page["again"].sample(4), page["jumper"].sample(4), atol=1e-6)
  assert page["student"].evaluate(num_samples=128, teacher_steps=(4, 128), num_resamples=2, quiet=True).rows


def test_the_student_starts_as_its_teacher(page):
  """The head's own way from the teacher's output layer was taken."""
  optimizer = pf.OptimizerSettings(1e-30)
  options = dict(steps=1, batch_size=8, optimizer=optimizer, bar=False)
  student = pf.distill(page["teacher"], pf.Imitation(), page["StraightHead"](), **options)
  noise = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
  t, label = np.ones(4, np.float32), np.arange(4) % 2
  theirs, mine = (run._experiment.method.velocity(run.params)(noise, t, label) for run in (page["teacher"], student))
  np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_its_parameters_lie_where_its_table_says(page):
  rules = dict(sharding_rules("sine"))
  assert rules["hidden/kernel"] == (None, "fsdp")
  run = pf.train(
    pf.FlowMatching(),
    page["data"],
    page["Sine"](width=16),
    steps=1,
    batch_size=8,
    mesh=pf.MeshSettings(data=2, fsdp=4, min_size=1),
    bar=False,
  )
  assert run.params["hidden"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_the_command_line_knows_it(page, capsys):
  main(["sample", "--workdir", str(page["folder"] / "runs/jumper"), "--num=4", "--out", str(page["folder"] / "x")])
  with np.load(page["folder"] / "x.npz") as arrays:
    np.testing.assert_allclose(arrays["x0_nfe1"], page["jumper"].sample(4), atol=1e-6)


def test_a_name_is_taken_once(page):
  for register, table in (
    (lambda: pf.register_head("gmflow", page["StraightHead"]), HEADS),
    (lambda: pf.register_network("dit", pf.NetworkKind(page["Sine"])), NETWORKS),
    (lambda: pf.register_objective("imitation", page["Endpoint"], page["EndpointMethod"]), OBJECTIVES),
    (lambda: pf.register_source("digits", page["rings"]), sources._SOURCES),
  ):
    before = dict(table)
    with pytest.raises(ValueError, match="already"):
      register()
    assert table == before


def test_what_was_added_changes_no_other_network_s_place(page):
  """Its last row takes every parameter, which is right for it alone."""
  own = sharding_rules("dit")
  assert own.index(("(qkv|mlp_in)/kernel", ("fsdp", "tensor"))) < own.index((".*", ()))
