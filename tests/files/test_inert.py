"""Pickles as data: what PyTorch writes is understood, and nothing that a pickle names is looked up or called."""

import collections
import pickle

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
