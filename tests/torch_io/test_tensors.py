"""Files of tensors: what is read, and that none is believed which says what cannot be."""

import argparse
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from pflow_jax.torch_io.pickled import ARGUMENTS, CHOSEN
from pflow_jax.torch_io.tensors import INDEX, WEIGHTS, open_tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_numpy(tensor):
  """Bits of a tensor as NumPy has them."""
  dtypes = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
  if tensor.dtype in dtypes:
    whole = tensor.contiguous().view(torch.uint8).numpy()
    return whole.view(dtypes[tensor.dtype]).reshape(tensor.shape)
  return tensor.numpy()


TENSORS = {
  "a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
  "half": torch.arange(6.0).reshape(2, 3).bfloat16(),
  "byte": torch.arange(4.0).to(torch.float8_e4m3fn),
  "scalar": torch.tensor(2.5),
  "count": torch.tensor([1, 2, 3]),
}


def assert_holds(tensors, want):
  assert set(tensors.places) == set(want)
  for name, tensor in want.items():
    got, expected = tensors.read(name), as_numpy(tensor)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    assert got.tobytes() == expected.tobytes(), name


def test_safetensors_are_read_exactly(tmp_path):
  save_file(TENSORS, tmp_path / WEIGHTS, {"policy_config": "{}"})
  for path in (tmp_path, tmp_path / WEIGHTS):
    tensors = open_tensors(path)
    assert_holds(tensors, TENSORS)
    assert tensors.metadata == {"policy_config": "{}"}
  assert tensors.nbytes == sum(t.numel() * t.element_size() for t in TENSORS.values())
  np.testing.assert_array_equal(tensors.read("a.weight", slice(1, 3)), TENSORS["a.weight"][1:3])


def test_nothing_is_read_but_what_is_asked_for(tmp_path, monkeypatch):
  save_file(TENSORS, tmp_path / WEIGHTS)
  tensors = open_tensors(tmp_path)
  counts = []
  empty = np.empty
  monkeypatch.setattr(np, "empty", lambda count, dtype: counts.append(count) or empty(count, dtype))
  tensors.read("a.weight", slice(2, 3))
  assert counts == [4 * 4]


def write_shards(folder, weight_map=None, **files):
  files = files or {"one.safetensors": ["a.weight", "half"], "two.safetensors": ["byte", "scalar", "count"]}
  for file, names in files.items():
    save_file({name: TENSORS[name] for name in names}, folder / file, {"format": "pt"})
  weight_map = weight_map or {name: file for file, names in files.items() for name in names}
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_one_model(tmp_path):
  write_shards(tmp_path)
  tensors = open_tensors(tmp_path)
  assert_holds(tensors, TENSORS)
  assert tensors.metadata == {"format": "pt"}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda m: m | {"half": "../one.safetensors"}, "do not trust"),
    (lambda m: m | {"half": "/etc/passwd"}, "do not trust"),
    (lambda m: m | {"half": "three.safetensors"}, r"not there: \['three.safetensors'\]"),
    (lambda m: m | {"half": "two.safetensors"}, "1 tensors are not where it says"),
    (lambda m: {k: v for k, v in m.items() if k != "half"}, "does not know 1"),
    (lambda m: [1], "weight_map: input should be an object"),
  ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, message):
  write_shards(tmp_path)
  weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": change(weight_map)}))
  with pytest.raises(ValueError, match=message):
    open_tensors(tmp_path)
  (tmp_path / INDEX).write_text("{")
  with pytest.raises(ValueError, match="cannot be read as JSON"):
    open_tensors(tmp_path)


def header(entries, data=b"\0" * 16, length=None):
  text = json.dumps(entries).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, stop, shape=(2,), dtype="F32"):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\0" * 4,
    header({"a": entry(0, 8), "b": entry(8, 16)})[:-1],
    header({"a": entry(0, 8), "b": entry(8, 16)}, length=2**40),
    header({"a": entry(0, 8), "b": entry(8, 16)}, length=2**63),
    header({"a": entry(0, 8), "b": entry(4, 12)}, data=b"\0" * 12),
    header({"a": entry(0, 8), "b": entry(8, 24, (4,))}),
    header({"a": entry(0, 8), "b": entry(12, 20)}, data=b"\0" * 20),
    header({"a": entry(0, 8), "b": entry(8, 16)}, data=b"\0" * 32),
    header({"a": entry(0, 8, (2**62, 8))}, data=b"\0" * 8),
    header({"a": entry(8, 0)}),
    struct.pack("<Q", 9) + b'{"a": nope',
    header([1, 2]),
  ],
  ids=[
    *("empty", "no header", "truncated", "header too long", "header far too long", "overlapping", "outside"),
    *("hole", "more data", "overflowing shape", "negative", "no JSON", "no object"),
  ],
)
def test_malformed_safetensors_are_refused(tmp_path, content):
  (tmp_path / WEIGHTS).write_bytes(content)
  with pytest.raises(ValueError, match="no intact safetensors file"):
    open_tensors(tmp_path)


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path):
  save_numpy({"a": np.ones(100, np.float32)}, tmp_path / WEIGHTS)
  tensors = open_tensors(tmp_path)
  os.truncate(tmp_path / WEIGHTS, 300)
  with pytest.raises(ValueError, match="ended while it was read"):
    tensors.read("a")


def test_odd_dtypes_are_named(tmp_path):
  (tmp_path / WEIGHTS).write_bytes(header({"a": entry(0, 8, (1,), "C64")}, data=b"\0" * 8))
  with pytest.raises(ValueError, match="C64"):
    open_tensors(tmp_path)


def test_a_pickled_state_dict_is_read_exactly(tmp_path):
  base = torch.arange(12.0).reshape(3, 4)
  state = TENSORS | {"turned": base.T, "rows": base[1:], "same": TENSORS["half"], "parameter": torch.nn.Parameter(base)}
  torch.save(state, tmp_path / "model.pth")
  tensors = open_tensors(tmp_path / "model.pth")
  assert_holds(tensors, {name: tensor.detach() for name, tensor in state.items()})
  np.testing.assert_array_equal(tensors.read("turned", slice(1, 3)), base.T[1:3])


def test_a_state_dict_within_is_chosen_by_its_key(tmp_path):
  torch.save({"state_dict": TENSORS, "step": 3}, tmp_path / "one.pt")
  assert_holds(open_tensors(tmp_path / "one.pt"), TENSORS)
  torch.save({"net": {"b": {"a": torch.ones(1)}}, "teacher": {"a": torch.zeros(1)}}, tmp_path / "two.pt")
  with pytest.raises(ValueError, match=r"\['net.b', 'teacher'\]"):
    open_tensors(tmp_path / "two.pt")
  assert open_tensors(tmp_path / "two.pt", "net.b").read("a") == 1
  assert open_tensors(tmp_path / "two.pt", "teacher").read("a") == 0
  torch.save([1, 2], tmp_path / "three.pt")
  with pytest.raises(ValueError, match="expected a dict of tensors"):
    open_tensors(tmp_path / "three.pt")


def test_of_a_trainings_checkpoint_the_average_is_taken(tmp_path):
  """Beside it are the weights as they are, the optimizer's moments, and arguments, whose plain values are kept."""
  step = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
  args = argparse.Namespace(model="SiT-XL/2", seed=2**40, rate=1e-4, ema=True, none=None, far=float("inf"), sizes=[1])
  whole = {"model": {"a": torch.ones(1)}, "ema": {"a": torch.zeros(1)}, "opt": step, "args": args, "steps": 7}
  torch.save(whole, tmp_path / "ema.pt")
  tensors = open_tensors(tmp_path / "ema.pt")
  assert tensors.read("a") == 0
  assert tensors.metadata[CHOSEN] == "ema"
  plain = {"model": "SiT-XL/2", "seed": 2**40, "rate": 1e-4, "ema": True, "none": None}
  assert json.loads(tensors.metadata[ARGUMENTS]) == plain
  assert open_tensors(tmp_path / "ema.pt", "model").read("a") == 1
  assert open_tensors(tmp_path / "ema.pt", "opt.state.0").read("exp_avg").tolist() == [1, 1]
  del whole["ema"]
  torch.save(whole, tmp_path / "model.pt")
  assert open_tensors(tmp_path / "model.pt").metadata[CHOSEN] == "model"
  with pytest.raises(ValueError, match=r"expected --key for one of .*'opt.state.0'.*got 'ema'"):
    open_tensors(tmp_path / "model.pt", "ema")


class Arguments(argparse.Namespace):
  """Arguments with the state of something else, or whose making calls something."""

  def __init__(self, how):
    self.how = how

  def __reduce__(self):
    if self.how == "state":
      return argparse.Namespace, (), [1, 2]
    return argparse.Namespace, (torch.ones(1),)


@pytest.mark.parametrize("how", ["state", "call"])
def test_arguments_are_data_and_nothing_else(tmp_path, how):
  torch.save({"ema": {"a": torch.zeros(1)}, "args": Arguments(how)}, tmp_path / "odd.pt")
  if how == "state":
    assert ARGUMENTS not in open_tensors(tmp_path / "odd.pt").metadata
  else:
    with pytest.raises(ValueError, match="cannot be read"):
      open_tensors(tmp_path / "odd.pt")
  assert "argparse" not in str(torch.serialization.get_safe_globals())


class Code:
  """What a pickle can do to whoever loads it."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
  torch.save({"a": torch.ones(1), "b": Code(tmp_path / "ran")}, tmp_path / "bad.pth")
  with pytest.raises(ValueError, match=r"a call of posix\.mkdir.*was not loaded"):
    open_tensors(tmp_path / "bad.pth")
  assert not (tmp_path / "ran").exists()


def test_damaged_pickles_are_refused(tmp_path):
  torch.save(TENSORS, tmp_path / "model.bin")
  whole = (tmp_path / "model.bin").read_bytes()
  (tmp_path / "model.bin").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="cut short"):
    open_tensors(tmp_path / "model.bin")


def test_small_pickles_that_say_much_are_told_in_bounds(tmp_path):
  """A value in many places takes the memory of one, and what is written out of it would take that of all."""
  long = "n" * 10**5
  arguments = {str(i): long for i in range(100)}
  torch.save({"ema": {"a": torch.zeros(1)}, "args": arguments, long: {"a": torch.ones(1)}}, tmp_path / "args.pt")
  tensors = open_tensors(tmp_path / "args.pt")
  assert (tensors.read("a"), tensors.metadata) == (0, {})
  one = {"a": torch.zeros(1)}
  torch.save([dict(one) for _ in range(20_001)], tmp_path / "many.pt")
  with pytest.raises(ValueError, match="expected at most 20,000 dicts of tensors"):
    open_tensors(tmp_path / "many.pt")
  within = one
  for _ in range(10):
    within = {"in": within}
  torch.save({"out": one | {"b": one["a"]}, "deep": within}, tmp_path / "deep.pt")
  assert set(open_tensors(tmp_path / "deep.pt").places) == {"a", "b"}


def test_what_is_no_model_is_said(tmp_path):
  with pytest.raises(ValueError, match="no file or folder"):
    open_tensors(tmp_path / "none")
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(ValueError, match=r"expected .*got \['notes.txt'\]"):
    open_tensors(tmp_path)
  with pytest.raises(ValueError, match="expected a folder, or a file"):
    open_tensors(tmp_path / "notes.txt")
