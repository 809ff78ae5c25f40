"""Benchmarks and examples are run by hand; what they take from the package is there."""

import ast
import importlib
import pathlib

import pytest

import pflow_jax as pf

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = sorted(p.relative_to(ROOT) for folder in ("benchmarks", "examples") for p in ROOT.glob(f"{folder}/*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_what_is_imported_is_there(path):
  tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pflow_jax":
      module = importlib.import_module(node.module)
      for name in node.names:
        assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}"), name.name
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pf":
      assert hasattr(pf, node.attr), node.attr


def test_they_are_found():
  assert {path.parts[0] for path in PROGRAMS} == {"benchmarks", "examples"}
