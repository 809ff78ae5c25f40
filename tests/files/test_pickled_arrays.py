"""Pickles of arrays: what is read, and that nothing is run, nor memory taken, on a pickle's word."""

import collections
import io
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest

from pflow_jax.files.inert import read_inert
from pflow_jax.files.pickled_arrays import read_pickled

VALUE = {
  "mean": np.arange(5.0),
  "cov": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
  "big": np.arange(3, dtype=">i4"),
  "parts": [np.ones((2, 1), np.float16), np.zeros((0, 3)), np.array(7, np.uint8)],
  "strided": np.arange(10)[::3],
  "one": np.float64(2.5),
  "plain": {
    "n": 10**30,
    "x": -0.5,
    "s": "猫",
    "b": b"\xff\0",
    "none": None,
    "yes": True,
    "t": (1, (2, 3)),
  },
  "flag": np.array([True, False]),
}


@pytest.fixture
def path(tmp_path):
  return tmp_path / "a.pkl"


def same(a, b):
  if isinstance(b, (np.ndarray, np.generic)):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
  elif isinstance(b, (dict, list, tuple)):
    assert type(a) is type(b)
    assert len(a) == len(b)
    for key in b if isinstance(b, dict) else range(len(b)):
      same(a[key], b[key])
  else:
    assert a == b


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_plain_values_come_back(path, protocol):
  path.write_bytes(pickle.dumps(VALUE, protocol))
  same(read_pickled(path), VALUE)


@pytest.mark.parametrize("protocol", [2, 4])
def test_modules_may_have_the_names_of_older_versions_of_numpy(path, protocol):
  content = pickle.dumps(collections.OrderedDict(a=np.arange(3.0)), protocol)
  assert b"numpy._core.multiarray" in content
  if protocol == 2:  # names are lines
    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
  else:  # and here they follow their lengths, as does the frame
    content = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    content = content[:3] + struct.pack("<Q", struct.unpack("<Q", content[3:11])[0] - 1) + content[11:]
  path.write_bytes(content)
  np.testing.assert_array_equal(read_pickled(path)["a"], np.arange(3.0))


def test_what_is_met_twice_is_one_and_a_circle_is_none(path):
  shared = np.arange(4)
  path.write_bytes(pickle.dumps([shared, {"again": shared}]))
  first, second = read_pickled(path)
  assert first is second["again"]
  circle = []
  circle.append(circle)
  path.write_bytes(pickle.dumps(circle))
  assert (read := read_pickled(path))[0] is read


class Call:
  def __init__(self, function, *arguments):
    self._reduced = function, arguments

  def __reduce__(self):
    return self._reduced


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
  "hostile",
  [
    Call(os.mkdir, "ran"),
    Call(eval, "1"),
    Call(bytearray, 2**40),
    Call(np.zeros, 2**40),
    Call(np.ndarray, (2**40,)),
    np.array([Call(os.mkdir, "ran")], dtype=object),
    np.zeros(2, "M8[s]"),
    np.zeros(2, [("a", "f4")]),
    np.array(["text"]),
    os.mkdir,
    io.BytesIO,
  ],
  ids=lambda value: type(value).__name__,  # the same in all processes
)
def test_anything_else_is_refused_and_nothing_runs(path, monkeypatch, hostile, protocol):
  monkeypatch.chdir(path.parent)
  content = pickle.dumps({"a": np.ones(3), "b": hostile}, protocol)
  monkeypatch.setattr(pickle, "loads", None)
  path.write_bytes(content)
  with pytest.raises(ValueError, match="a.pkl cannot be read as a pickle of arrays: ") as caught:
    read_pickled(path)
  assert "\n" not in str(caught.value)
  assert os.listdir() == ["a.pkl"]


def test_a_call_is_named(path):
  path.write_bytes(pickle.dumps(Call(os.system, "true"), 2))
  with pytest.raises(ValueError, match=r"it holds more than arrays, a call of (posix|nt)\.system, and was not loaded"):
    read_pickled(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "pickle exhausted"),
    (b"\x80\x04", "pickle exhausted"),
    (b"\x80\x04.", "expected a pickle of one value, got 0"),
    (b"\x80\x04(K\x01.", "expected a pickle of one value"),
    (b"\x80\x04h\x05.", "expected a value in place 5"),
    (b"\x80\x04K\x01r\xff\xff\xff\xff.", "^1$"),  # a place beyond all memory, if places were a list
    (b"\x80\x04K\x01K\x02s.", "expected 1 values on the pickle's stack|expected a dict to add to"),
    (b"\x80\x04]K\x01e.", "expected a mark"),
    (b"\x80\x04B\xff\xff\xff\x7fxx.", "expected [0-9]+ bytes in a bytes4, but only 3 remain"),
    (b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"x.", "expected [0-9]+ bytes in a bytes8, but only 2 remain"),
    (b"\x80\x02Pmine\n.", "expected operations of a pickle of plain values, got 'PERSID'"),
    (b"\x80\x02K\x01Q.", "got 'BINPERSID'"),
    (b"\x80\x02\x82\x01.", "got 'EXT1'"),
    (b"I1\n.", "got 'INT'"),
    (b"\x80\x04}]K\x01s.", "as a key of a dict, got a list"),
    (b"\x80\x04)\x93.", "expected 2 values"),
    (b"\x80\x04K\x01)R.", "expected a name and arguments to REDUCE, got int"),
    (b"\x80\x04K\x01}b.", "expected an object that has a state, got int"),
    (b"\x80\x02cnumpy\ndtype\n)R.", "expected an array, got 'dtype'"),
    (b"\x80\x02cnumpy\nndarray\n.", "expected arrays and plain values, got 'numpy.ndarray'"),
    (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "recursion|nested"),
  ],
)
def test_damaged_pickles_are_refused(path, content, message):
  path.write_bytes(content)
  if message == "^1$":
    assert read_pickled(path) == 1
    return
  with pytest.raises(ValueError, match=message):
    read_pickled(path)


def test_an_array_has_the_bytes_that_it_says(path):
  content = pickle.dumps(np.arange(4, dtype=np.uint8), 4)
  assert content.count(b"K\x04\x85") == 1  # the shape (4,)
  path.write_bytes(content.replace(b"K\x04\x85", b"K\x05\x85"))
  with pytest.raises(ValueError, match=r"says it is uint8 of shape \(5,\), for which there are 4 bytes"):
    read_pickled(path)


def test_a_pickle_beyond_the_memory_is_refused_before_it_is_read(path, monkeypatch):
  path.write_bytes(pickle.dumps(np.zeros(10**6, np.uint8)))
  monkeypatch.setattr("pflow_jax.files.foreign.machine_memory", lambda: 2**20)
  monkeypatch.setattr(pickletools, "genops", None)
  with pytest.raises(ValueError, match="a.pkl: takes 2.861 MiB of memory, this machine has 1 MiB"):
    read_pickled(path)
  with pytest.raises(ValueError, match="there is no such file"):
    read_pickled(path.with_name("b.pkl"))


def test_a_pickle_of_many_small_values_is_refused(path, monkeypatch):
  """A value takes a hundred times the memory of its operation."""
  monkeypatch.setattr("pflow_jax.files.pickled_arrays.MAX_OPERATIONS", 100)
  path.write_bytes(pickle.dumps([np.zeros(3), {}]))
  assert len(read_pickled(path)) == 2
  path.write_bytes(pickle.dumps([{} for _ in range(100)]))
  with pytest.raises(ValueError, match="expected a pickle of at most 100 operations"):
    read_pickled(path)


def test_a_pickle_may_be_followed_by_another(path):
  first = pickle.dumps([1, 2], 2)
  assert read_inert(first + pickle.dumps(3), lambda *_: None) == ([1, 2], len(first))
