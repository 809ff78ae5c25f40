"""Pickles as data: what PyTorch writes is understood, and nothing that a pickle names is looked up or called."""

import collections
import pickle
import tracemalloc

import pytest

from pflow_jax.files.inert import Made, Named, read_inert


def read(data):
  return read_inert(data, lambda name, arguments: (name, arguments), lambda identity: ("kept", identity))


class Outside(pickle.Pickler):
  """Keeps sets outside of the pickle."""

  def persistent_id(self, value):
    return ("set", *sorted(value)) if isinstance(value, set) else None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
  "value",
  [
    *(None, True, False, 0, 255, 256, 70_000, -3, 2**40, -(2**70), 2.5, "é", "x" * 300, (), (1,), (1, 2), (1, 2, 3)),
    *((1, 2, 3, 4), [], [1], [1, [2]], {}, {"a": 1}, {"a": {"b": (1, None)}, "c": []}, ["same"] * 3),
  ],
)
def test_plain_values_are_those_of_pythons_own_reader(value, protocol):
  data = pickle.dumps(value, protocol=protocol)
  assert read(data + b"more") == (value, len(data))


def test_one_value_in_two_places_stays_one():
  shared = ["x"]
  value, _ = read(pickle.dumps({"a": shared, "b": shared, "c": [shared]}, protocol=2))
  assert value["a"] is value["b"] is value["c"][0]


def test_calls_are_handed_over_as_names():
  value, _ = read(pickle.dumps([collections.OrderedDict(), complex(1, 2)], protocol=2))
  assert value == [("collections.OrderedDict", ()), ("__builtin__.complex", (1.0, 2.0))]
  assert read(pickle.dumps(pickle.Pickler, protocol=2))[0] == Named("pickle.Pickler")


def test_objects_have_their_state():
  data = b"\x80\x02c__torch__.some\nModule\n)\x81}(X\x01\x00\x00\x00aK\x05ub."
  value, _ = read_inert(data, lambda name, _: Made(name), lambda _: None)
  assert (value.name, value.state) == ("__torch__.some.Module", {"a": 5})


def test_what_is_outside_is_asked_for(tmp_path):
  with (tmp_path / "a").open("wb") as file:
    Outside(file, 2).dump([{3, 1}, 2])
  assert read((tmp_path / "a").read_bytes())[0] == [("kept", ("set", 1, 3)), 2]


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\x80\x02",
    b"\x80\x02.",
    b"\x80\x02K\x01K\x02.",
    b"\x80\x02(K\x01.",
    b"\x80\x02K\x01K\x02K\x03R.",
    b"\x80\x02cos\nmkdir\nK\x01R.",
    b"\x80\x02K\x01)R.",
    b"\x80\x02h\x07.",
    b"\x80\x02q\x07.",
    b"\x80\x02)a.",
    b"\x80\x02)K\x01a.",
    b"\x80\x02](K\x01e(t.",
    b"\x80\x02t.",
    b"\x80\x02}(K\x01u.",
    b"\x80\x02K\x01}b.",
    b"\x80\x02Q.",
    b"\x80\x02(ios\nmkdir\n.",
    b"\x80\x02X\xff\xff\xff\x7fabc.",
  ],
  ids=[
    *("empty", "no end", "no value", "two values", "open mark", "called number", "argument", "called 1", "no memory"),
    *(
      "nothing kept",
      "append to nothing",
      "append to a tuple",
      "marks",
      "no mark",
      "odd items",
      "state",
      "no identity",
    ),
    *("inst", "cut short"),
  ],
)
def test_malformed_pickles_are_refused(data):
  with pytest.raises(ValueError, match=r"expected|pickle|zip\(\)"):
    read(data)


def test_sets_are_lists_of_their_members():
  assert sorted(read(pickle.dumps({3, "a", (1, (2,))}, protocol=4))[0], key=str) == [(1, (2,)), 3, "a"]


KEYS = {  # operations that make a key
  "a deep tuple": b"N" + b"\x85" * 350_000,  # C's stack has no room for its hash
  "a wide tuple": b"N\x94" + b"".join(b"h%c\x86\x94" % n for n in range(60)),  # 2^60 values
  "a tuple of a tuple": b"N\x85\x85",
  "a long tuple": b"(" + b"N" * 65 + b"t",
  "a long number": b"\x8a\x09" + bytes(8) + b"\x01",
  "a tuple of a long number": b"\x8a\x09" + bytes(8) + b"\x01\x85",
  "an object": b"cos\nmkdir\n",
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("one", [True, False])
def test_keys_whose_hash_takes_long_are_refused(name, one):
  data = b"\x80\x04}" + KEYS[name] + b"Ns." if one else b"\x80\x04}(" + KEYS[name] + b"Nu."
  with pytest.raises(ValueError, match="expected text, numbers or a flat tuple of them as a key of a dict, got a"):
    read(data)


def test_nesting_of_members_and_states_is_no_matter():
  """A pickle that is nested deeply is read and let go of."""
  assert type(read(b"\x80\x04\x8f(" + KEYS["a deep tuple"] + b"\x90.")[0]) is list
  deep = b"\x80\x04" + b"ca\nb\n)\x81" * 30_000 + b"b" * 29_999 + b"."
  assert read_inert(deep, lambda name, _: Made(name))[0].name == "a.b"


def test_keys_of_plain_values_are_kept():
  value = {"a": 1, b"a": 2, 3: 3, -(2**62): 4, 0.5: 5, None: 6, ("a", 1, None): 7}
  assert read(pickle.dumps(value, protocol=4))[0] == value


def test_operations_are_limited():
  data = b"\x80\x04" + b"]" * 5 + b"a" * 4 + b"."
  assert read_inert(data, lambda *_: None, limit=11)[0] == [[[[[]]]]]
  with pytest.raises(ValueError, match="expected a pickle of at most 10 operations"):
    read_inert(data, lambda *_: None, limit=10)


@pytest.mark.parametrize(
  "operations", [b"]", b"}", b"\x8f", b"]\x94", b"}\x94", b"(", b"h\x00)\x81", b"h\x00)\x81\x94"]
)
def test_an_operation_takes_a_few_hundred_bytes_of_memory(operations):
  data = b"\x80\x04ca\nb\n\x94" + operations * 5000
  tracemalloc.start()
  with pytest.raises(ValueError, match="operations"):  # while all values are there
    read_inert(data + b"I1\n.", lambda name, _: Made(name))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 300 * 5000 * len(operations)
