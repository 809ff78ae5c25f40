"""Names against names: everything in one message."""

import pytest

from pflow_jax.torch_io.check import check_tensors, listing


def test_all_problems_are_in_one_message():
  layers = {f"blocks.{i}.q.weight": (4, 4) for i in range(12)}
  expected = {"norm.weight": (4,), "out.bias": (2,), **layers}
  got = {
    "norm.weight": (5,),
    "out.bais": (2,),
    **{name: (4, 4) for name in list(layers)[3:]},
    "blocks.3.k.weight": (1,),
  }
  with pytest.raises(ValueError, match="the folder does not hold") as error:
    check_tensors(expected, got, "the folder")
  text = str(error.value)
  assert "4 missing:" in text
  assert "blocks.{0-2}.q.weight (near: blocks.3.k.weight)" in text
  assert "out.bias (near: out.bais)" in text
  assert "2 unexpected:" in text
  assert "blocks.3.k.weight (near: blocks." in text
  assert "norm.weight (expected (4,), got (5,))" in text
  assert "\n" not in text


def test_what_fits_passes():
  check_tensors({"a": (1, 2)}, {"a": (1, 2)}, "x")


def test_layers_fold_to_one_name():
  assert listing([f"a.{i}.b" for i in (0, 1, 2, 5)], []) == "a.{0-2,5}.b"
  assert listing(["a.0.b", "a.1.b"], [], {"a.0.b": ": x", "a.1.b": ": y"}) == "a.0.b: x, a.1.b: y"


def test_a_message_is_no_longer_for_a_million_names():
  """Names that are alike, too: to compare them takes time."""
  text = listing([f"{i}x{'a' * 300}" for i in range(10**5)], [f"{i}y{'a' * 300}" for i in range(10**5)])
  assert text.endswith(" and 99992 more")
  assert len(text) < 2000
