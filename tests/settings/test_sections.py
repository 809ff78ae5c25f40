"""The keys of a section have the types of the arguments that they are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from pflow_jax.settings.sections import call, check_sections, choose


@dataclasses.dataclass(frozen=True)
class Settings:
  steps: int
  rate: float = 0.1
  on: bool = False
  name: str = "a"
  pair: tuple[float, float] = (0.0, 1.0)
  table: Sequence[tuple[str, float]] = ()
  guidance: float | None = None
  seed: int = 0


def test_values_of_the_right_type_are_passed_on():
  values = ConfigDict({"steps": 3, "rate": 1, "pair": [0, 2], "table": (("a", 1),), "guidance": None, "seed": 2**31})
  made = call(Settings, "train", values)
  assert made == Settings(3, 1.0, pair=(0.0, 2.0), table=(("a", 1.0),), seed=2**31)
  assert isinstance(made.rate, float)
  assert isinstance(made.pair, tuple)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("steps", "3", "steps: input should be a valid integer, got '3'"),
    ("steps", 3.0, "steps: input should be a valid integer, got 3.0"),
    ("steps", True, "steps: input should be a valid integer, got True"),
    ("steps", (3,), "steps: input should be a valid integer"),
    ("steps", {"a": 3}, "steps: input should be a valid integer"),
    ("steps", 10**30, "steps: expected a whole number below 2.31, got 1000"),
    ("steps", 2**31, "steps: expected a whole number below 2.31"),
    ("seed", 2**32, "seed: expected a whole number below 2.32"),
    ("rate", True, "rate: input should be a valid number, got True"),
    ("rate", float("inf"), "rate: expected a finite number, got inf"),
    ("rate", float("nan"), "rate: expected a finite number, got nan"),
    ("rate", 10**400, "rate: "),
    ("on", 1, "on: input should be a valid boolean, got 1"),
    ("name", 1, "name: input should be a valid string, got 1"),
    ("pair", (1.0, float("inf")), "pair: expected a finite number, got inf"),
    ("pair", (1.0, "x"), "pair: 1: input should be a valid number, got 'x'"),
    ("pair", (1.0,), "pair: 1: field required"),
    ("pair", "(1, 2", "pair: .*got '\\(1, 2'; on the shell quote a tuple"),
    ("table", (("a", 1.0), 3), "table: 1: .*got 3"),
    ("table", "((head, 1),)", "table: .*; on the shell quote a tuple"),
    ("stepps", 3, "config.train has no key 'stepps'; did you mean 'steps'"),
    ("stepps", None, "config.train has no key 'stepps'"),
  ],
)
def test_another_type_is_refused_by_the_key_s_name(key, value, message):
  with pytest.raises(ValueError, match=message) as caught:
    call(Settings, "train", {"steps": 1, key: value})
  assert str(caught.value).startswith("config.train")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [None, 3, "x", (1,), True])
def test_what_is_no_section_is_refused(values):
  with pytest.raises(ValueError, match="config.train: expected a section, keys with their values, got "):
    call(Settings, "train", values)
  with pytest.raises(ValueError, match="config.model: expected a section"):
    choose({"a": Settings}, "model", values)


@pytest.mark.parametrize("kind", [None, 3, (), {"a": 1}, "b", ["a"]])
def test_a_kind_is_one_of_the_names(kind):
  with pytest.raises(ValueError, match=r"config.model.kind: expected one of \['a'\], got "):
    choose({"a": Settings}, "model", ConfigDict({"kind": kind}))


def test_a_network_s_own_attributes_are_no_keys():
  class Module(nn.Module):
    width: int = 3

  assert call(Module, "model", {"width": 4}).width == 4
  with pytest.raises(ValueError, match="no key 'name'"):
    call(Module, "model", {"name": "x"})


def test_a_function_of_any_keys_is_checked_by_whose_settings_they_are():
  def make(**changes: Any) -> Settings:
    return Settings(**({"steps": 1} | changes))

  assert call(make, "objective", {"rate": 2}, settings=Settings, steps=5) == Settings(5, 2.0)
  with pytest.raises(ValueError, match="config.objective.rate: input should be a valid number"):
    call(make, "objective", {"rate": "x", "steps": 1}, settings=Settings)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"train": 3}, "config.train: expected a section"),
    ({"train": {}, "seed": "x"}, "config.seed: input should be a valid integer"),
    ({"train": {}, "seed": -1}, "config.seed: input should be greater than or equal to 0"),
    ({"train": {}, "seed": 2**32}, "config.seed: input should be less than"),
    ({"train": {"kind": 3}}, "config.train.kind: input should be a valid string"),
    ({"seed": 0}, r"config: the sections \['train'\] must be set"),
    ({"train": None}, r"config: the sections \['train'\] must be set"),
    ({"train": {}, "tain": {}}, "config has no key 'tain'; did you mean 'train'"),
  ],
)
def test_sections_of_a_config_are_looked_at_before_their_keys(values, message):
  with pytest.raises(ValueError, match=message):
    check_sections(ConfigDict(values), ("seed", "train"), required=("train",))
