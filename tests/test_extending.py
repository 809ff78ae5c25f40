"""docs/extending.md: its blocks run, one after the other, and what they add behaves as if it were the package's own."""

import ast
import dataclasses
import json
import pathlib
import re
from unittest import mock

import jax
import numpy as np
import pytest

import pflow_jax as pf
from pflow_jax.commands import run as commands_run
from pflow_jax.commands.cli import main
from pflow_jax.conversion import to_torch
from pflow_jax.core.objectives import OBJECTIVES
from pflow_jax.data import registry as sources
from pflow_jax.data.prompts.records import MAX_LENGTHS, MODELS
from pflow_jax.evaluation import text_to_image
from pflow_jax.families import text
from pflow_jax.families.registry import FAMILIES
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.networks.heads import HEADS
from pflow_jax.networks.registry import NETWORKS, sharding_rules
from pflow_jax.torch_io.tensors import open_tensors
from pflow_jax.training.methods import METHODS

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """What the page's blocks define, run in a folder of their own; afterwards nobody knows it."""
  tables = (OBJECTIVES, HEADS, NETWORKS, METHODS, FAMILIES, MODELS, MAX_LENGTHS, sources._SOURCES)
  before = [dict(table) for table in tables]
  names = {"__name__": "extending"}
  folder = tmp_path_factory.mktemp("extending")
  try:
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
      patch.chdir(folder)
      for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec", dont_inherit=True), names)
    yield names | {"folder": folder}
  finally:
    for table, values in zip(tables, before, strict=True):
      table.clear()
      table.update(values)


def test_what_the_page_adds_trains_and_samples(page):
  for name in ("teacher", "student", "jumper"):
    run = page[name]
    assert run.steps == 2
    assert run.sample(3).shape == (3, 2)
  assert repr(page["student"]) == "Run(imitation, sine with head straight, 434 parameters, on rings, 2 steps)"
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


LAYERS = ("context_embedder", "time_embedder", "x_embedder")


@pytest.mark.parametrize(
  ("model", "name", "head"),
  [
    ("tiny/transformer", "TinyTransformer2DModel", "proj_out"),
    ("torch/tiny", "StraightTinyTransformer2DModel", "proj_straight"),
  ],
)
def test_pytorch_s_files_have_the_names_of_the_page(page, model, name, head):
  folder = page["folder"] / model
  fields = {"text_width": 8, "width": 16, "channels": 4}
  assert json.loads((folder / "config.json").read_text()) == {"_class_name": name, **fields}
  tensors = open_tensors(folder)
  assert set(tensors.places) == {f"{layer}.{leaf}" for layer in (*LAYERS, head) for leaf in ("weight", "bias")}
  assert json.loads(tensors.metadata.get("policy_config", "{}")) == ({"type": "Straight"} if "Straight" in name else {})
  params = {"tiny/transformer": page["painter"], "torch/tiny": page["tiny"]}[model].params
  np.testing.assert_array_equal(tensors.read("time_embedder.weight"), params["time_in"]["kernel"].T)
  np.testing.assert_array_equal(tensors.read(f"{head}.bias"), params["head"]["proj_out"]["bias"])


def test_what_comes_back_from_pytorch_is_the_same_student(page):
  tiny, again = page["tiny"], page["tiny_again"]
  assert again.settings.head == tiny.settings.head
  assert again.settings.objective.nfe == 2
  jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)
  np.testing.assert_array_equal(_pictures(page, again), _pictures(page, tiny))


def test_the_family_paints(page):
  pictures = _pictures(page, page["tiny"])
  assert pictures.shape == (2, 8, 8, 3)
  assert np.isfinite(pictures).all()
  np.testing.assert_array_equal(pictures[:1], page["pictures"])
  one = page["tiny"].pictures("a green bird", pipeline=page["folder"] / "tiny")  # a text is one prompt, not its letters
  np.testing.assert_array_equal(one, page["pictures"])
  assert np.abs(pictures[0] - pictures[1]).max() > 1e-3
  assert _pictures(page, page["tiny"], height=4, width=12).shape == (2, 4, 12, 3)
  codec = pf.load_autoencoder(page["folder"] / "tiny")
  jax.tree.map(np.testing.assert_array_equal, codec.params, dict(page["params"]))


def test_an_objective_without_a_policy_s_fields(page, monkeypatch, tmp_path):
  """It is measured in an even schedule, and cannot be told to PyTorch."""
  report = page["jumper"].evaluate(num_samples=128, teacher_steps=(4, 128), num_resamples=2, quiet=True)
  assert [row["nfe"] for row in report.rows] == [4, 128, 1]
  own = to_torch.read_run(page["folder"] / "runs" / "tiny")
  other = dataclasses.replace(own, kind="endpoint", objective=page["Endpoint"]())
  monkeypatch.setattr(to_torch, "read_run", lambda folder: other)
  with pytest.raises(ValueError, match="'endpoint' has no nfe, max_segment, final_scale, shift; give it such fields"):
    pf.convert(page["folder"] / "runs" / "tiny", tmp_path / "torch")
  assert not (tmp_path / "torch").exists()


def test_further_pictures_use_what_was_read(page, monkeypatch):
  first = _pictures(page, page["tiny"])
  again = mock.Mock(side_effect=AssertionError("this was read or compiled before"))
  for place, name in ((text_to_image, "load_autoencoder"), (text, "load_encoder"), (commands_run, "make_sampler")):
    monkeypatch.setattr(place, name, again)
  np.testing.assert_array_equal(_pictures(page, page["tiny"]), first)
  with pytest.raises(AssertionError, match="was read"):
    page["tiny"].pictures(["a green bird"], pipeline=page["folder"] / "another")


def _pictures(page, run, **options):
  return run.pictures(["a green bird", "a dog"], pipeline=page["folder"] / "tiny", **options)


def test_the_command_line_knows_the_family(page, capsys, monkeypatch):
  monkeypatch.chdir(page["folder"])
  main(["sample", "--workdir=runs/tiny", "--prompt=a green bird", "--pipeline=tiny", "--out=painted"])
  with np.load("painted/samples.npz") as arrays:
    np.testing.assert_allclose(
      pf.load_autoencoder("tiny").decode(arrays["x0"]), page["pictures"], atol=1e-6 * np.abs(page["pictures"]).max()
    )
  main(["convert", "--source=runs/tiny", "--out=torch/command"])
  assert json.loads(pathlib.Path("torch/command/config.json").read_text())["width"] == 16
  pathlib.Path("texts.txt").write_text("\n".join(page["texts"]))
  main(["cache", "--prompts=texts.txt", "--model=tiny", "--encoders=tiny", "--out=cached"])
  for name in ("null.record", "00000.array_record"):
    assert pathlib.Path("cached", name).read_bytes() == pathlib.Path("prompts", name).read_bytes()


@pytest.mark.parametrize("family", ["dit", "flux", "qwen_image"])
def test_its_head_has_a_class_in_pytorch_with_every_network(page, family):
  names, head = FAMILIES[family].names, page["StraightHead"]()
  name = names.class_of(head)
  assert names.classes[name] == "straight"
  assert name == "Straight" + {"dit": "DiT", "flux": "Flux", "qwen_image": "QwenImage"}[family] + "Transformer2DModel"
  kind = FAMILIES[family].network
  model = kind.defaults | dict(patch_size=2, width=32, depth=2, num_heads=2, num_classes=5, channels=4)
  rows = names.rows(model, head)
  assert [row.torch for row in rows if row.flax.startswith("head/")] == ["proj_straight.weight", "proj_straight.bias"]
  config = names.config_from_model(model, head)
  assert config["_class_name"] == name
  back = names.model_from_config(json.loads(json.dumps(config)), head)
  assert back == {key: model[key] for key in back}


def test_the_command_line_knows_it(page, capsys):
  main(["sample", "--workdir", str(page["folder"] / "runs/jumper"), "--num=4", "--out", str(page["folder"] / "x")])
  with np.load(page["folder"] / "x.npz") as arrays:
    np.testing.assert_allclose(arrays["x0_nfe1"], page["jumper"].sample(4), atol=1e-6)


def test_a_name_is_taken_once(page):
  arc = {"torch_policy": "ArcFlow"}
  for register, table in (
    (lambda: pf.register_head("gmflow", page["StraightHead"]), HEADS),
    (lambda: pf.register_network("dit", pf.NetworkKind(page["Sine"])), NETWORKS),
    (lambda: pf.register_objective("imitation", page["Endpoint"], page["EndpointMethod"]), OBJECTIVES),
    (lambda: pf.register_source("digits", page["rings"]), sources._SOURCES),
    (lambda: pf.register_family(pf.Family("tiny")), FAMILIES),
    (lambda: pf.register_head("other", type("Other", (page["StraightHead"],), {})), HEADS),
    (lambda: pf.register_head("other", type("Other", (page["StraightHead"],), {"torch_prefix": "O"} | arc)), HEADS),
    (lambda: pf.register_network("dit", pf.NetworkKind(pf.DiT, conditions=("classes",))), NETWORKS),
    (lambda: pf.register_objective("mine", pf.FlowMatching, page["EndpointMethod"]), OBJECTIVES),
    (lambda: pf.register_objective("mine", pf.FlowMatching, page["EndpointMethod"]), METHODS),
  ):
    before = dict(table)
    with pytest.raises(ValueError, match="already"):
      register()
    assert table == before


def test_a_definition_that_runs_again_takes_its_own_place(page):
  """As a notebook's cell does."""
  tables = (OBJECTIVES, HEADS, NETWORKS, METHODS, FAMILIES, MODELS, MAX_LENGTHS, sources._SOURCES)
  before = [dict(table) for table in tables]
  text = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))
  text = text.replace('model, length, text_width = "tiny", 16, 8', 'model, length, text_width = "tiny", 12, 6')
  cells = [
    node
    for node in ast.parse(text).body
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))
    or "register_" in ast.unparse(node)
    or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("RULES", "kind"))
  ]
  names = {"__name__": "extending"}
  try:
    exec(compile(ast.Module(cells, []), "cells", "exec", dont_inherit=True), names)
    assert OBJECTIVES["endpoint"] is names["Endpoint"] is not page["Endpoint"]
    assert METHODS[names["Endpoint"]] is names["EndpointMethod"]
    assert HEADS["straight"] is names["StraightHead"]
    assert NETWORKS["sine"].module is names["Sine"]
    assert sources._SOURCES["rings"] is names["rings"]
    assert FAMILIES["tiny"].encoder is names["Letters"]
    assert NETWORKS["tiny"].module is names["Tiny"]
    assert (MODELS["tiny"].text_width, MAX_LENGTHS["tiny"]) == (6, 12)
  finally:
    for table, values in zip(tables, before, strict=True):
      table.clear()
      table.update(values)


def test_what_was_added_changes_no_other_network_s_place(page):
  """Its last row takes every parameter, which is right for it alone."""
  assert (".*", ()) in sharding_rules("sine")
  layout = make_layout({"data": 1}, sharding_rules("dit"), 1, min_size=1)
  assert layout.shardings({"blocks": {"mlp_in": {"kernel": np.zeros((2, 4))}}})
  with pytest.raises(ValueError, match=r"new/kernel \(2, 4\): no row covers it"):
    layout.shardings({"new": {"kernel": np.zeros((2, 4))}})
