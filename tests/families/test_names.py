"""Names in PyTorch that follow from a module or a head alone."""

import dataclasses
import importlib.util
import json
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
from annotated_types import Ge, Le
from flax import linen as nn

from pflow_jax.conversion import models
from pflow_jax.data.prompts.records import Fields
from pflow_jax.families import registry
from pflow_jax.families.dit.names import NAMES as dit
from pflow_jax.families.encoders import Encoder
from pflow_jax.families.metadata import policy_metadata, stated_policy
from pflow_jax.families.names import NetworkNames
from pflow_jax.networks.heads import HEADS, DenoiserHead, Head, VelocityHead
from pflow_jax.settings.tree import Choice
from pflow_jax.torch_io.fields import check_sizes, read_fields
from pflow_jax.torch_io.places import Place, Tensors

MODEL = dict(channels=4, patch_size=2, width=32, depth=1, num_heads=2, num_classes=5, mlp_ratio=4.0, time_scale=1000.0)


class SpeedHead(Head):
  """A head with attributes of its own."""

  count: int = 3
  rates: tuple[float, ...] = (0.5, 2.0)

  has_policy: ClassVar[bool] = True
  torch_prefix: ClassVar[str] = "Speed"


@pytest.fixture
def speed(monkeypatch):
  monkeypatch.setitem(HEADS, "speed", SpeedHead)
  return SpeedHead(count=5, rates=(1.0,))


def read(config, **metadata):
  return models.model_of_torch(json.loads(json.dumps(config)), metadata)


def test_attributes_of_a_head_are_fields_and_come_back(speed):
  config = dit.config_from_model(MODEL | dict(sample_size=8), speed)
  assert (config["_class_name"], config["count"], config["rates"]) == ("SpeedDiTTransformer2DModel", 5, (1.0,))
  model = read(config, policy_config='{"type": "Speed"}')
  assert model.head == Choice("speed", {"count": 5, "rates": (1.0,)})
  assert model.output == speed
  assert {row.flax for row in model.rows} >= {"head/proj_out/kernel", "head/proj_out/bias"}
  with pytest.raises(ValueError, match="SpeedDiTTransformer2DModel: count: .* got 'x'"):
    read(config | {"count": "x"})
  with pytest.raises(ValueError, match="count: .* got -1"):
    read(config | {"count": -1})


def test_metadata_of_another_head_are_refused(speed):
  config = dit.config_from_model(MODEL | dict(sample_size=8), speed)
  with pytest.raises(ValueError, match="policy_config: DX does not go with the class SpeedDiTTransformer2DModel"):
    read(config, policy_config='{"type": "DX"}')
  with pytest.raises(ValueError, match=r"policy_config: type: expected one of \[.*'Speed'.*\], got 'Sped'"):
    read(config, policy_config='{"type": "Sped"}')


def test_a_head_without_a_class_is_refused():
  with pytest.raises(ValueError, match="no PyTorch class has 'denoiser', only .*'gmflow'"):
    dit.config_from_model(MODEL, DenoiserHead())


class Net(nn.Module):
  """A network whose attribute has the name of a head's."""

  channels: int = 0
  count: int = 2
  head: Any = None
  dtype: str = "float32"


class NetNames(NetworkNames):
  module = Net
  class_names = ("NetTransformer2DModel",)


def test_a_field_of_the_network_and_of_its_head_is_refused(speed):
  names = NetNames()
  assert names.model_from_config({"_class_name": "NetTransformer2DModel", "count": 7}) == {"channels": 0, "count": 7}
  with pytest.raises(ValueError, match=r"expected .* in the network or in its head, got \['count'\] in both"):
    names.schema("SpeedNetTransformer2DModel")


class PowerHead(VelocityHead):
  """A head whose only attribute the files' metadata tell."""

  degree: int = 1

  has_policy: ClassVar[bool] = True
  torch_prefix: ClassVar[str] = "Power"

  @classmethod
  def torch_schema(cls):
    return dataclasses.make_dataclass("Fields", [])

  @nn.nowrap
  def torch_stated(self, segment, shift):
    return {"degree": self.degree, "shift": shift}

  @classmethod
  def options_from_torch(cls, config, stated):
    return {"degree": stated.get("degree", cls.degree)}


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_what_a_head_states_in_the_metadata_comes_back(monkeypatch, family):
  monkeypatch.setitem(HEADS, "power", PowerHead)
  names, head = registry.FAMILIES[family].names, PowerHead(degree=3)
  model = registry.FAMILIES[family].network.defaults | MODEL
  metadata = policy_metadata(head, 0.5, 2.0)
  assert stated_policy(metadata) == {"type": "Power", "degree": 3, "shift": 2.0}
  assert read(names.config_from_model(model, head), **metadata).head == Choice("power", {"degree": 3})
  with pytest.raises(ValueError, match="policy_config: shift: .* got 'x'"):
    stated_policy({"policy_config": '{"type": "Power", "shift": "x"}'})


@pytest.mark.parametrize("family", ["dit", "flux", "qwen_image"])
@pytest.mark.parametrize("has_policy", [False, True])
def test_a_head_without_a_class_is_refused_of_every_network(monkeypatch, family, has_policy):
  """Though it extends the output layer of a teacher's."""
  head = type("Mine", (VelocityHead,), {"torch_prefix": None, "has_policy": has_policy})
  monkeypatch.setitem(HEADS, "mine", head)
  with pytest.raises(ValueError, match="no PyTorch class has 'mine', only"):
    registry.FAMILIES[family].names.class_of(head())


class Deep(nn.Module):
  """A network of several layers, with an attribute of any type."""

  depth: int = 2
  rounds: Annotated[int, Ge(0), Le(1000)] = 3
  note: Any = 0
  channels: int = 0


class DeepNames(NetworkNames):
  module = Deep
  class_names = ("DeepTransformer2DModel",)


def test_sizes_of_a_network_from_outside_are_bounded_by_its_files():
  tensors = Tensors({name: Place(None, 0, (100,), np.dtype(np.float32)) for name in "abc"})
  schema = DeepNames().schema("DeepTransformer2DModel")
  check = lambda **fields: check_sizes(read_fields(fields, schema), schema, tensors)
  check(depth=3, rounds=500, note=10**9)
  with pytest.raises(ValueError, match="depth: 900 cannot be in files of 3 tensors"):
    check(depth=900)
  with pytest.raises(ValueError, match="depth: .* less than or equal to 1024, got 5000"):
    check(depth=5000)
  with pytest.raises(ValueError, match="rounds: .* less than or equal to 1000, got 1001"):
    check(rounds=1001)
  with pytest.raises(ValueError, match="channels: 9000 cannot be in files of 1.172 KiB"):
    check(channels=9000)


def test_encoders_and_the_data_room_agree_on_sizes():
  spec = importlib.util.find_spec("pflow_jax.data.prompts.records")
  records = importlib.util.module_from_spec(spec)  # as it is before any family registers
  spec.loader.exec_module(records)
  encoders = {name: family.encoder for name, family in registry.FAMILIES.items() if family.encoder is not None}
  assert {name: encoder.length for name, encoder in encoders.items()} == records.MAX_LENGTHS
  sizes = {name: (each.text_width, each.masked, each.pooled_width) for name, each in encoders.items()}
  assert sizes == {name: (each.text_width, each.masked, each.pooled_width) for name, each in records.MODELS.items()}


def test_an_encoder_is_made_before_its_family_is_known():
  encoder = type("Mine", (Encoder,), {"model": "mine", "length": 4, "text_width": 2})
  assert encoder("folder", 3, "float32").fields == Fields(text_width=2)
  with pytest.raises(ValueError, match="mine takes 1 to any number of tokens, got 0"):
    encoder("folder", 0, "float32")


def test_an_encoder_of_another_family_is_refused():
  family = dataclasses.replace(registry.FAMILIES["flux"], name="other")
  with pytest.raises(ValueError, match=r"FluxEncoder.model: expected 'other', its family, got 'flux'"):
    registry.register_family(family)
  assert "other" not in {*registry.FAMILIES, *registry.NETWORKS}
