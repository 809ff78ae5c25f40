"""Imports point down the rooms of the package."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pflow_jax"

# From the ground up: a room imports from those before it, and from itself.
ROOMS = (
  *("files", "core", "data", "settings", "torch_io", "mesh", "networks", "checkpoints", "families"),
  *("training", "evaluation", "planning", "conversion", "page", "commands"),
)
# Modules that import without anything that takes time, of JAX not to speak.
PURE = ("flax", "ml_collections", "optax", "orbax")


def dotted(path):
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# The library, and `python -m pflow_jax`, which import from the rooms.
FRONTS = ("pflow_jax", "pflow_jax.__main__")
MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
  """Dotted names that a module imports, at the top or inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in MODULES else node.module


def room_of(name):
  return name.split(".")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FRONTS])
def test_imports_point_down(name):
  own = ROOMS.index(room_of(name))
  for other in imports(MODULES[name]):
    if other.split(".")[0] == "pflow_jax":
      assert other != "pflow_jax", f"{name} imports the package's own front"
      assert ROOMS.index(room_of(other)) <= own, f"{name} imports {other}, which lies above it"


def test_no_file_is_longer_than_400_lines():
  assert not {name: count for name, path in MODULES.items() if (count := len(path.read_text().splitlines())) > 400}


def test_no_circles():
  graph = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
  done, active = set(), []

  def visit(name):
    assert name not in active, f"circle: {' -> '.join([*active, name])}"
    if name in done:
      return
    active.append(name)
    for other in graph[name]:
      visit(other)
    active.pop()
    done.add(name)

  for name in graph:
    visit(name)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("pflow_jax.core")])
def test_the_mathematics_knows_neither_flax_nor_configs(name):
  assert not {other.split(".")[0] for other in imports(MODULES[name])} & set(PURE)


def test_the_root_holds_rooms_and_the_two_fronts():
  found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
  assert found == {"__init__.py", "__main__.py", "py.typed", *ROOMS}
  assert len(ROOMS) <= 15
