"""Tables by path: first match wins, nothing goes uncovered; split and combine are inverse."""

import jax
import numpy as np
import pytest

from pflow_jax.mesh.partition import combine, first_match, match, path_of, split, without

PARAMS = {
  "blocks": {"mlp_in": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}, "qkv": {"kernel": np.ones(4)}},
  "head": {"proj_out": {"kernel": np.ones(5)}},
}


def same(a, b):
  """Equal nesting and the same leaf objects."""
  if isinstance(a, dict):
    return isinstance(b, dict) and set(a) == set(b) and all(same(a[k], b[k]) for k in a)
  return a is b


def test_path_of():
  paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
  assert paths == ["blocks/mlp_in/bias", "blocks/mlp_in/kernel", "blocks/qkv/kernel", "head/proj_out/kernel"]


def test_first_match_wins_on_the_whole_path():
  table = [("blocks/mlp_in/kernel", 1), ("blocks/.*", 2), ("head", 3), ("head/.*", 4)]
  with pytest.raises(ValueError, match=r"rows \['head'\] decide no leaf of \['blocks/mlp_in/bias', "):
    match(table, PARAMS)  # "head" is no leaf
  del table[2]
  assert match(table, PARAMS) == {
    "blocks": {"mlp_in": {"kernel": 1, "bias": 2}, "qkv": {"kernel": 2}},
    "head": {"proj_out": {"kernel": 4}},
  }


def test_all_problems_are_named_at_once():
  with pytest.raises(ValueError, match=r"no row matches \['blocks/qkv/kernel', 'head/proj_out/kernel'\]") as caught:
    match([("blocks/mlp_in/.*", 1), ("haed/.*", 2)], PARAMS)
  assert "['haed/.*']" in str(caught.value)
  with pytest.raises(ValueError, match=r"no row matches \['head/proj_out/kernel'\]; add a row, or a last row '.*'$"):
    match([("blocks/.*", 1)], PARAMS)
  with pytest.raises(ValueError, match=r"\['head/.*'\] decide no leaf"):
    match([(".*", 1), ("head/.*", 2)], PARAMS)  # in the wrong order
  with pytest.raises(ValueError, match=r"'\(head': expected a regular expression, got: missing \)"):
    first_match(["(head"], "head")


def test_a_last_row_for_the_rest_may_stand_idle():
  assert match([("head/.*", 1), (".*", 2)], {"head": {"bias": 0}}) == {"head": {"bias": 1}}


def test_split_and_combine_are_inverse():
  trained, frozen = split(PARAMS, match([(".*/mlp_in/.*", True), (".*", False)], PARAMS))
  assert same(trained, {"blocks": {"mlp_in": PARAMS["blocks"]["mlp_in"]}})
  assert same(frozen, {"blocks": {"qkv": PARAMS["blocks"]["qkv"]}, "head": PARAMS["head"]})
  assert same(combine(trained, frozen), PARAMS)
  assert same(combine(frozen, trained), PARAMS)


def test_all_or_nothing():
  for chosen, index in ((True, 0), (False, 1)):
    parts = split(PARAMS, match([(".*", chosen)], PARAMS))
    assert same(parts[index], PARAMS)
    assert parts[1 - index] == {}


def test_combine_changes_no_input():
  first, second = {"a": {"x": 1}}, {"a": {"y": 2}, "b": 3}
  assert combine(first, second, {"a": {"z": 4}}) == {"a": {"x": 1, "y": 2, "z": 4}, "b": 3}
  assert (first, second) == ({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})


@pytest.mark.parametrize("other", [{"a": {"x": 5}}, {"a": {"x": {"y": 5}}}])
def test_combine_refuses_overlap(other):
  for trees in [({"a": {"x": 1}}, other), (other, {"a": {"x": 1}})]:
    with pytest.raises(ValueError, match="a/x: expected in one of the trees, found in two"):
      combine(*trees)


def test_without_keeps_what_the_other_lacks():
  params = {"a": {"w": 1, "b": 2}, "c": {"d": {"w": 3}}, "e": 4}
  assert without(params, {"a": {"w": 0}, "c": {"d": {"w": 0}}}) == {"a": {"b": 2}, "e": 4}
  assert without(params, {}) == params
  assert without(params, params) == {}
