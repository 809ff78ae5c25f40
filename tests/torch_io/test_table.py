"""Rows: what each layout means, that it is undone to the bit, and what is said of shapes without data."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from pflow_jax.networks.layers import patchify
from pflow_jax.torch_io.table import (
  Row,
  conv,
  dense,
  lora_rows,
  read_layer,
  rows_for,
  same_bits,
  strip_prefix,
  to_flax,
  to_torch,
  torch_shapes_of,
)

TABLE = (
  *dense("block.{i}.layer", "blocks/layer"),
  *dense(("block.{i}.q", "block.{i}.k", "block.{i}.v"), "blocks/qkv"),
  *dense("norm", "norm", layout="swap_linear"),
  *dense("no_bias", "no_bias", bias=False),
  *conv("conv", "conv"),
  *conv("conv3d", "conv3d", layout="conv3d"),
  Row("patch.weight", "patch/kernel", "patch", patch_size=2),
  *(dataclasses.replace(row, negate=True) for row in dense("turned", "turned")),
  Row(("first.table", "second.table"), "table", tied=True),
)


def random(*shape, dtype=np.float32, seed=0):
  """Random bits, NaNs among them."""
  rng = np.random.default_rng([seed, *shape])
  return np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def tensors(dtype):
  """Random tensors for all rows of TABLE."""
  shapes = {"norm.weight": (6, 4), "norm.bias": (6,), "no_bias.weight": (3, 5), "first.table": (7, 2)}
  shapes |= {"conv.weight": (3, 4, 5, 6), "conv.bias": (3,), "conv3d.weight": (2, 3, 4, 5, 6), "conv3d.bias": (2,)}
  shapes |= {"patch.weight": (5, 3, 2, 2), "turned.weight": (3, 5), "turned.bias": (3,)}
  for i in range(3):
    for name in ("layer", "q", "k", "v"):
      shapes |= {f"block.{i}.{name}.weight": (3, 4), f"block.{i}.{name}.bias": (3,)}
  made = {name: random(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}
  return made | {"second.table": made["first.table"]}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_there_and_back_is_exact(dtype):
  before = tensors(dtype)
  params = to_flax(TABLE, before)
  after = to_torch(TABLE, params)
  assert after.keys() == before.keys()
  assert [name for name in before if not same_bits(after[name], before[name])] == []
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}


def test_shapes_are_known_without_data():
  before = tensors(np.float32)
  flat = {"/".join(keys): leaf for keys, leaf in flatten_dict(to_flax(TABLE, before)).items()}
  rows = rows_for(TABLE, flat)
  expected = {
    name: shape for path, row in rows.items() for name, shape in torch_shapes_of(row, flat[path].shape).items()
  }
  assert expected == {name: tensor.shape for name, tensor in before.items()}


def test_layouts_compute_what_pytorch_does():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape)
  before = {
    "l.weight": normal(3, 4),
    "c.weight": normal(5, 2, 3, 3),
    "c.bias": normal(5),
    "p.weight": normal(5, 3, 2, 2),
  }
  table = (*dense("l", "l", bias=False), *conv("c", "c"), Row("p.weight", "p/kernel", "patch", patch_size=2))
  params = to_flax(table, before)
  t = {name: torch.from_numpy(value) for name, value in before.items()}
  x = normal(2, 4)
  np.testing.assert_allclose(x @ params["l"]["kernel"], torch.from_numpy(x) @ t["l.weight"].T, rtol=1e-12)
  x = normal(1, 6, 6, 2)
  want = torch.nn.functional.conv2d(torch.from_numpy(x).movedim(-1, 1), t["c.weight"], t["c.bias"])
  dims = ("NHWC", "HWIO", "NHWC")
  got = jax.lax.conv_general_dilated(x, params["c"]["kernel"], (1, 1), "VALID", dimension_numbers=dims)
  np.testing.assert_allclose(got + params["c"]["bias"][None, None, None], want.movedim(1, -1), rtol=1e-10)
  x = normal(1, 4, 6, 3)
  want = torch.nn.functional.conv2d(torch.from_numpy(x).movedim(-1, 1), t["p.weight"], stride=2)
  got = patchify(x, 2) @ params["p"]["kernel"]
  np.testing.assert_allclose(got.reshape(1, 2, 3, 5), want.movedim(1, -1), rtol=1e-10)


def test_swap_changes_the_halves_of_the_last_axis():
  before = {"n.weight": np.arange(8.0).reshape(4, 2), "n.bias": np.arange(4.0)}
  params = to_flax(dense("n", "n", layout="swap_linear"), before)["n"]
  np.testing.assert_array_equal(params["bias"], [2, 3, 0, 1])
  np.testing.assert_array_equal(params["kernel"], [[4, 6, 0, 2], [5, 7, 1, 3]])


def test_take_keeps_the_first_of_every_group():
  row = Row("out.bias", "out", take=(2, 4))
  tensor = np.arange(12.0)
  np.testing.assert_array_equal(read_layer(row, {"out.bias": tensor}.__getitem__), [0, 1, 4, 5, 8, 9])
  assert torch_shapes_of(row, (6,)) == {"out.bias": (12,)}
  assert torch_shapes_of(row, (6,), exported=True) == {"out.bias": (6,)}


def test_tied_tensors_that_differ_are_refused():
  before = tensors(np.float32)
  before["second.table"] = before["second.table"].copy()
  before["second.table"].view(np.uint8)[0, 0] ^= 1
  with pytest.raises(ValueError, match=r"second\.table differs from first\.table"):
    to_flax(TABLE, before)


def test_adapters_follow_from_the_kernel():
  a, b = lora_rows(TABLE[0])
  assert (a.torch, a.flax) == ("block.{i}.layer.lora_A.weight", "blocks/layer/lora_a")
  assert (b.torch, b.flax) == ("block.{i}.layer.lora_B.weight", "blocks/layer/lora_b")
  params = {"blocks": {"qkv": {"lora_a": random(2, 4, 3), "lora_b": random(2, 3, 9)}}}
  exported = to_torch(TABLE, params)
  assert len(exported) == 12
  for i in range(2):
    for part, name in enumerate("qkv"):
      np.testing.assert_array_equal(exported[f"block.{i}.{name}.lora_A.weight"], params["blocks"]["qkv"]["lora_a"][i].T)
      want = params["blocks"]["qkv"]["lora_b"][i][:, 3 * part : 3 * part + 3].T
      np.testing.assert_array_equal(exported[f"block.{i}.{name}.lora_B.weight"], want)
  assert same_bits(to_flax(lora_rows(TABLE[2]), exported)["blocks"]["qkv"]["lora_b"], params["blocks"]["qkv"]["lora_b"])
  with pytest.raises(ValueError, match="Linear"):
    lora_rows(TABLE[7])  # a convolution's


def test_swapped_adapters_add_up_to_the_swapped_kernel():
  a, b = random(2, 4), np.arange(12.0).reshape(6, 2)
  a = np.nan_to_num(a, nan=1.0).clip(-2, 2)
  names = {"norm.lora_A.weight": a, "norm.lora_B.weight": b}
  low_rank = to_flax(lora_rows(TABLE[4]), names)["norm"]
  full = to_flax(TABLE[4:5], {"norm.weight": b @ a})["norm"]["kernel"]
  np.testing.assert_allclose(low_rank["lora_a"] @ low_rank["lora_b"], full, rtol=1e-6)


def test_paths_without_a_row_are_all_named():
  with pytest.raises(ValueError, match=r"2 parameters") as error:
    rows_for(TABLE, ["blocks/layer/kernel", "blocks/layer/kernal", "elsewhere/lora_a"])
  assert "blocks/layer/kernal (near: blocks/layer/kernel)" in str(error.value)
  assert "elsewhere/lora_a" in str(error.value)


def test_prefix_is_stripped_only_from_all():
  assert strip_prefix(["transformer.a", "transformer.b"]) == {"a": "transformer.a", "b": "transformer.b"}
  names = ["transformer.a", "transformer_blocks.b"]
  assert strip_prefix(names) == dict(zip(names, names, strict=True))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(torch="a", flax="b", layout="liner"), "layout must be one of"),
    (dict(torch=("a.{i}", "b"), flax="b"), "in all of its names or in none"),
    (dict(torch=("a", "b"), flax="b", take=(1, 2)), "expected one name"),
  ],
)
def test_rows_that_contradict_themselves_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Row(**fields)
