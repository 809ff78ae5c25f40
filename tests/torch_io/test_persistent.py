"""Pickles of torch_utils.persistence: tensors to the bit, what they say of themselves, and nothing of theirs runs."""

import io
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

OBJECT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


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
  net = edm2.persistent("Precond")
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


def text(value):
  return b"X" + len(value).to_bytes(4, "little") + value.encode()


def network(arguments=b"}", modules=b"}", parameters=b"}"):
  """A pickle of a network, of operations that make parts of it."""
  state = text("_init_kwargs") + arguments + text("_modules") + modules + text("_parameters") + parameters
  return OBJECT + b"}(" + text("class_name") + text("A") + text("state") + b"}(" + state + b"uu\x85R"


def shared(inner, times, levels=4):
  """Operations that make a list of one list many times, and so on."""
  for level in range(levels):
    inner = b"](" + inner + b"q%c" % level + b"h%c" % level * (times - 1) + b"e"
  return inner


def about(path, pickled):
  path.write_bytes(b"\x80\x04" + pickled + b".")
  return open_tensors(path).metadata[PERSISTENT]


@pytest.mark.parametrize(
  "inner", [b"K\x01", b"N", text("a" * 2000), text("\0" * 1000)], ids=["numbers", "None", "text", "zeros"]
)
def test_what_is_told_is_bounded(tmp_path, inner):
  """One list in many places takes a few bytes of the file."""
  arguments = b"}(" + text("a") + b"K\x07" + text("b") + shared(inner, 200) + text("c") + b"K\x08u"
  told = about(tmp_path / "a.pkl", network(arguments))
  assert 5 * 10**4 < len(told) < 7 * 10**6  # six characters of JSON for a zero
  told = json.loads(told)
  assert list(told["arguments"]) == ["a", "b"]
  assert told["arguments"]["a"] == 7
  assert '"\\u2026"' in json.dumps(told)


def test_objects_that_share_their_arguments_are_bounded(tmp_path):
  arguments = b"}(" + b"".join(text(f"{n:050}") + b"N" for n in range(1000)) + b"uq\x05"
  state = b"}" + text("_init_kwargs") + b"h\x05s"
  others = b"".join(text(f"o{n}") + OBJECT + b"}" + text("state") + state + b"s\x85R" for n in range(500))
  told = about(tmp_path / "a.pkl", b"}(" + text("ema") + network(arguments) + others + b"u")
  assert 10**5 < len(told) < 3 * 10**6
  assert 10 < len(json.loads(told)["others"]) < 500


def test_what_is_told_of_other_values_is_short_and_the_same_each_time(tmp_path):
  values = {
    "deep": shared(b"K\x01", 1, 6),
    "tuple": b"K\x01\x85",
    "huge": b"\x8b" + (500).to_bytes(4, "little") + b"\x01" * 500,
    "minus": b"\x8a\x09" + b"\xff" * 7 + b"\x7f\xff",
    "infinite": b"G\x7f\xf0" + bytes(6),
    "none": b"G\x7f\xf8" + bytes(6),
    "class": b"ctorch\nfloat16\n",
    "object": b"ca\nb\n)R",
    "dict": b"}",
    "yes": b"\x88",
    "whole": b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
  }
  arguments = b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"
  told = json.loads(about(tmp_path / "a.pkl", network(arguments)))["arguments"]
  assert told == {
    **{"deep": [[[["list"]]]], "tuple": [1], "huge": "a number of more than 60 digits", "minus": str(-(2**63) - 1)},
    **{"infinite": "inf", "none": "nan", "class": "torch.float16", "object": "Made", "dict": "dict", "yes": True},
    "whole": 2**63 - 1,
  }


def modules(depth, name):
  return b"}" if not depth else b"}" + text(name) + network(modules=modules(depth - 1, name)) + b"s"


@pytest.mark.parametrize(
  ("parts", "match"),
  [
    (modules(5, "a" * 90), "expected names of tensors of at most 400 characters, got 'aaa.* in 'aaa"),
    (b"}K\x01" + network() + b"s", "expected names of tensors of at most 400 characters, got 1 in ''"),
    (b"}((K\x01K\x02t" + network() + b"u", r"expected names of tensors of at most 400 characters, got \(1, 2\)"),
  ],
)
def test_names_are_refused_before_they_are_put_together(tmp_path, parts, match):
  with pytest.raises(ValueError, match=match):
    about(tmp_path / "a.pkl", network(modules=parts))


def test_modules_that_share_their_tensors_are_bounded(tmp_path):
  """Each of 1000 modules has the same 1000 names."""
  names = b"}q\x01(" + b"".join(text(f"{n}") + b"N" for n in range(1000)) + b"u"
  inner = b"}(" + b"".join(text(f"{n}") + network(parameters=b"h\x01") for n in range(1000)) + b"u"
  with pytest.raises(ValueError, match="cannot be read: expected at most 131,072 names of tensors and modules"):
    about(tmp_path / "a.pkl", network(network(parameters=names), inner))


def test_a_storage_is_read_once(tmp_path, monkeypatch):
  """A pickle can ask for one string of bytes again in a few bytes."""
  file = io.BytesIO()
  torch.save(torch.zeros(3)._typed_storage(), file, _use_new_zipfile_serialization=False)
  stored = file.getvalue()
  held = b"ctorch.storage\n_load_from_bytes\nq\x00B" + len(stored).to_bytes(4, "little") + stored + b"\x85q\x01"
  real, read = persistent.load_old_storage, []
  monkeypatch.setattr(persistent, "load_old_storage", lambda *where: read.append(where) or real(*where))
  other = b"(" + held + b"R" + b"h\x00h\x01R" * 50 + b"t"
  about(tmp_path / "a.pkl", b"}(" + text("ema") + network() + text("other") + other + b"u")
  assert len(read) == 1


def test_operations_and_what_is_kept_are_bounded(tmp_path, monkeypatch):
  assert persistent.MAX_DESCRIPTION == 8 * 2**20
  monkeypatch.setattr(persistent, "MAX_OPERATIONS", 1000)
  with pytest.raises(ValueError, match="expected a pickle of at most 1,000 operations"):
    about(tmp_path / "a.pkl", b"(" + b"\x8f" * 1000 + b"t")
  monkeypatch.setattr(persistent, "MAX_DESCRIPTION", 10_000)
  with pytest.raises(ValueError, match="expected at most 9.766 KiB beside its tensors"):
    about(tmp_path / "a.pkl", text("a" * 11_000))


def test_tensors_do_not_count_as_kept(tmp_path, monkeypatch):
  """A network of many small tensors is larger than what may be kept of it."""
  path = edm2.snapshot(tmp_path / "a.pkl", "weak", torch.float32)
  monkeypatch.setattr(persistent, "MAX_DESCRIPTION", 150_000)
  assert path.stat().st_size > 150_000
  assert "unet.out_gain" in open_tensors(path).places
