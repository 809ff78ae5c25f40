"""Pickles of torch_utils.persistence: tensors to the bit, what they say of themselves, and nothing of theirs runs."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch

from pflow_jax.torch_io import persistent
from pflow_jax.torch_io.persistent import PERSISTENT
from pflow_jax.torch_io.pickled import CHOSEN
from pflow_jax.torch_io.tensors import open_tensors
from tests import edm2
from tests.torch_io.test_tensors import Code


@pytest.fixture(scope="module")
def state():
  return edm2.state_dict("weak")


def test_tensors_are_read_exactly_and_nothing_runs(tmp_path, state, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(torch, "load", None)
  for dtype in (torch.float16, torch.float32, torch.bfloat16):
    tensors = open_tensors(edm2.snapshot(tmp_path / "a.pkl", "weak", dtype))
    assert tensors.places.keys() == state.keys()
    for name, want in state.items():
      got = tensors.read(name)
      assert str(got.dtype) == str(dtype).removeprefix("torch.")
      np.testing.assert_array_equal(got.astype(np.float32), want.to(dtype).float().numpy(), err_msg=name)
  assert not os.path.exists("ran")
  about = json.loads(tensors.metadata[PERSISTENT])
  assert (about["class"], about["positional"]) == ("Precond", 0)
  assert about["arguments"] == edm2.KINDS["weak"] | {"use_fp16": True}
  assert about["others"]["encoder"]["class"] == "StandardRGBEncoder"
  assert CHOSEN not in tensors.metadata


def test_long_tensors_are_passed_over(tmp_path, monkeypatch, state):
  """What is read of a file does not grow with its tensors."""
  path = edm2.snapshot(tmp_path / "a.pkl", "weak", torch.float32)
  monkeypatch.setattr(persistent, "_WHOLE", 16_000)
  tensors = open_tensors(path)
  name = max(state, key=lambda name: state[name].numel())
  assert state[name].numel() * 4 > 16_000
  np.testing.assert_array_equal(tensors.read(name), state[name].numpy())
  monkeypatch.setattr(persistent, "MAX_DESCRIPTION", 20_000)
  with pytest.raises(ValueError, match="a.pkl cannot be read: expected at most 19.53 KiB beside its tensors"):
    open_tensors(path)


def test_a_key_chooses_a_network(tmp_path):
  net = edm2._persistent("Precond")
  net.register_buffer("a", torch.arange(3.0))
  path = edm2.snapshot(tmp_path / "a.pkl", "weak", net=net)
  assert open_tensors(path).metadata[CHOSEN] == "ema"
  np.testing.assert_array_equal(open_tensors(path, "net").read("a"), [0, 1, 2])
  with pytest.raises(ValueError, match=r"expected a network 'encoder' .* got \['net', 'ema'\] among .*; give --key"):
    open_tensors(path, "encoder")


HOSTILE = {
  "a call": lambda: Code("ran"),
  "a set": lambda: {1, 2},
  "an array": lambda: np.arange(3),
  "a function": lambda: os.mkdir,
  "a dtype": lambda: torch.float16,
  "a device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_objects_are_not_made(tmp_path, monkeypatch, name):
  """What stands beside the network stays what it is made of."""
  monkeypatch.chdir(tmp_path)
  path = edm2.snapshot(tmp_path / "a.pkl", "weak", other=HOSTILE[name]())
  assert "unet.out_gain" in open_tensors(path).places
  assert os.listdir() == ["a.pkl"]


def test_code_within_a_storage_is_refused(tmp_path, monkeypatch):
  """torch.storage._load_from_bytes is torch.load without its guard."""
  monkeypatch.chdir(tmp_path)
  path = edm2.snapshot(tmp_path / "a.pkl", "weak")
  content = path.read_bytes()
  at = content.index(b"\x80\x02\x8a\x0al\xfc\x9cF")
  code = pickle.dumps(Code("ran"), 2)
  path.write_bytes(content[:at] + code + content[at + len(code) :])
  with pytest.raises(ValueError, match="a.pkl cannot be read: "):
    open_tensors(path)
  assert os.listdir() == ["a.pkl"]


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (pickle.dumps({"ema": 3}), r"expected a network with tensors, as torch_utils.persistence pickles it, got \[\]"),
    (pickle.dumps([]), "expected a network with tensors"),
    (b"", "cannot be read"),
    (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "cut short or damaged"),
    (b"\x80\x04B\xff\xff\xff\x7f", "cut short or damaged"),
  ],
)
def test_other_files_end_in_a_sentence(tmp_path, content, match):
  (tmp_path / "a.pkl").write_bytes(content)
  with pytest.raises(ValueError, match=match):
    open_tensors(tmp_path / "a.pkl")


def test_cut_files_end_in_a_sentence(tmp_path):
  path = edm2.snapshot(tmp_path / "a.pkl", "weak")
  content, rng = path.read_bytes(), random.Random(0)
  for _ in range(30):
    path.write_bytes(content[: rng.randrange(len(content))])
    with pytest.raises(ValueError, match="a.pkl cannot be read: "):
      open_tensors(path)
