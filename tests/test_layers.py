"""Imports point down the layers; see the map of the code in the README."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pflow_jax"

# From the top. A module may import from lower layers, and from its own (without a circle).
LAYERS = [
  {"cli"},
  {"cli_files"},
  {
    "train",
    "sample",
    "evaluate",
    "evaluate_samplers",
    "merge",
    "plan",
    "plan_report",
    "compare",
    "compare_report",
    "defaults",
    "config_help",
    "cache",
  }
  | {"convert", "autoencoder", "text_to_image"},
  {"analytic", "step", "adversary", "experiment", "teachers", "networks", "sections", "workdir"}
  | {"rescue", "origins", "inputs"},
  {"objectives"},
  {"sampler"},
  {"guidance", "integrate"},
  {"policies"},
  {"schedule"},
  {"models"},
  {
    "data",
    "sharding",
    "optim",
    "state",
    "checkpoint",
    "checkpoint_stream",
    "command",
    "config_file",
    "checksums",
    "writer",
    "metrics",
    "features",
    "figures",
    "densities",
    "lettering",
    "flops",
    "partition",
    "distributed",
    "lock",
    "output",
    "hlo",
    "hlo_module",
    "chips",
    "encoder_checks",
    "text",
    "array_files",
  },
  {"foreign"},
  {"folders", "checks"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
  return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def layer_of(dotted):
  return dotted.split(".")[1] if "." in dotted else None


def imports(path):
  """Modules of the package that `path` imports, at the top or inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" if node.module == "pflow_jax" else node.module for alias in node.names]
    else:
      continue
    yield from (name for name in names if name.split(".")[0] == "pflow_jax")


def dotted(path):
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  return name.removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_down(path):
  own = layer_of(dotted(path))
  assert own in LEVEL, f"{path.name}: give it a layer in this test"
  for name in imports(path):
    other = layer_of(name)
    assert other in LEVEL, f"{path.name} imports {name}"
    assert LEVEL[other] >= LEVEL[own], f"{dotted(path)} imports {name}, which lies above it"


def test_no_circles():
  graph = {dotted(p): set(imports(p)) for p in modules()}
  done, active = set(), []

  def visit(name):
    assert name not in active, f"circle: {' -> '.join([*active, name])}"
    if name in done:
      return
    active.append(name)
    for other in graph.get(name, ()):
      visit(other)
    active.pop()
    done.add(name)

  for name in graph:
    visit(name)


@pytest.mark.parametrize("layer", ["schedule", "policies", "integrate", "guidance", "sampler", "objectives"])
def test_pure_layers_know_neither_flax_nor_configs(layer):
  files = [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else (PACKAGE / layer).glob("*.py")
  for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
      roots = []
      if isinstance(node, ast.Import):
        roots = [alias.name.split(".")[0] for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        roots = [(node.module or "").split(".")[0]]
      assert not {"flax", "ml_collections", "optax", "orbax"} & set(roots), f"{path} imports {roots}"
