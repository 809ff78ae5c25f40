"""Tables of (pattern, value) on a parameter's path, and splitting parameters in trained and frozen.

A pattern is a regular expression for the whole "/"-joined path of a leaf; the first row that matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

PyTree = Any
Params = dict[str, Any]


def path_of(keys: Sequence[Any]) -> str:
  """Joins the keys of a leaf, as jax.tree_util gives them, with "/"."""
  return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def differing(tree: PyTree, other: PyTree) -> list[str]:
  """Paths of leaves whose shapes differ in two trees, or that one of them lacks."""
  shapes, others = (
    {path_of(keys): tuple(leaf.shape) for keys, leaf in jax.tree_util.tree_leaves_with_path(one)}
    for one in (tree, other)
  )
  return sorted(path for path in shapes | others if shapes.get(path) != others.get(path))


def first_match(patterns: Iterable[str], path: str) -> int | None:
  """Index of the first pattern that matches the whole of `path`, or None."""
  for i, pattern in enumerate(patterns):
    try:
      if re.fullmatch(pattern, path):
        return i
    except re.error as error:
      raise ValueError(f"pattern {pattern!r}: expected a regular expression, got: {error}") from error
  return None


def match(table: Sequence[tuple[str, Any]], tree: PyTree) -> PyTree:
  """Returns the value of the first matching row for every leaf of `tree`, in its structure.

  Raises:
    ValueError: no row matches a leaf, or a row decides no leaf (a typo, or an earlier row took its leaves); the message
      names all of them. A last row ".*" may decide none.
  """
  paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
  rows = [first_match((pattern for pattern, _ in table), path) for path in paths]
  uncovered = [path for path, row in zip(paths, rows, strict=True) if row is None]
  idle = [pattern for i, (pattern, _) in enumerate(table) if i not in rows and pattern != ".*"]
  if uncovered or idle:
    problems = [f"no row matches {uncovered}; add a row, or a last row '.*'"] if uncovered else []
    problems += [f"rows {idle} decide no leaf of {paths}; correct them, move them up or leave them out"] if idle else []
    raise ValueError(f"table: {'; '.join(problems)}")
  return jax.tree.unflatten(jax.tree.structure(tree), [table[row][1] for row in rows if row is not None])


def split(params: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[Params, Params]:
  """Splits nested dicts in (trained, frozen): the leaves where `chosen` is true, and the others.

  Leaves stay the same objects; branches without a leaf are left out. `combine` undoes it.
  """
  trained: Params = {}
  frozen: Params = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      for side, part in zip((trained, frozen), split(value, chosen[name]), strict=True):
        if part:
          side[name] = part
    else:
      (trained if chosen[name] else frozen)[name] = value
  return trained, frozen


def without(params: Mapping[str, Any], other: Mapping[str, Any]) -> Params:
  """The leaves of nested dicts that `other` lacks, the same objects; branches without a leaf are left out."""
  rest: Params = {}
  for name, value in params.items():
    if not isinstance(value, Mapping):
      if name not in other:
        rest[name] = value
    elif part := without(value, other.get(name, {})):
      rest[name] = part
  return rest


def combine(*trees: Mapping[str, Any]) -> Params:
  """Returns the union of nested dicts, the leaves the same objects.

  Raises:
    ValueError: two hold the same leaf.
  """
  union: Params = {}
  for tree in trees:
    _add(union, tree, "")
  return union


def _add(union: Params, tree: Mapping[str, Any], prefix: str) -> None:
  for name, value in tree.items():
    if isinstance(value, Mapping) and isinstance(union.setdefault(name, {}), dict):
      _add(union[name], value, f"{prefix}{name}/")
    elif name in union:
      raise ValueError(f"{prefix}{name}: expected in one of the trees, found in two; take it out of one")
    else:
      union[name] = value
