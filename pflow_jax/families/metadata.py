"""Metadata of students' files in PyTorch: their policy, and how they are sampled.

References:
  The released code of π-Flow and ArcFlow, whose files have the policy as JSON in their metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from pflow_jax.core.rollout import NEWEST, RELEASES
from pflow_jax.files.foreign import parse_json, shown
from pflow_jax.networks.heads import HEADS, Head
from pflow_jax.settings.tree import Choice
from pflow_jax.torch_io.fields import Depth, Positive

POLICY_CONFIG = "policy_config"
SAMPLING = "sampling"  # metadata of ours: how a student was trained to be sampled
FLOW_MAP = "flow_map"  # likewise, of a flow map


@dataclasses.dataclass(frozen=True)
class _Policy:
  """Part of a file's policy_config that is checked here; the rest is for the head that wrote it."""

  type: str
  mode: Literal["grid", "polynomial"] | None = None
  compat: bool | None = None
  segment_size: Annotated[float, Ge(0.001), Le(1)] | None = None
  shift: Positive | None = None


@dataclasses.dataclass(frozen=True)
class _Sampling:
  """Part of the metadata SAMPLING that is read."""

  nfe: Depth
  final_scale: Positive
  shift: Positive
  temperature: Annotated[float, Ge(0)] | Literal["auto"] | None = None
  release: Literal["piflow-0.1", "lakonlab-0.2"] | None = None


@dataclasses.dataclass(frozen=True)
class FlowMapStated:
  """Content of the metadata FLOW_MAP: what a flow map's files tell of its training.

  Attributes:
    objective: its kind.
    shift: time shift.
    guidance: lowest and highest strength that it was trained for; None for one that takes no strength.
    strength: of the teacher's guidance, at which it is sampled by default; None for one that takes no strength.
  """

  objective: str
  shift: Positive
  guidance: tuple[Positive, Positive] | None = None
  strength: Positive | None = None

  @property
  def metadata(self) -> dict[str, str]:
    """Metadata of a student's files."""
    return {FLOW_MAP: json.dumps(dataclasses.asdict(self))}

  @classmethod
  def read(cls, metadata: Mapping[str, str]) -> FlowMapStated:
    """Reads the metadata of a student's files.

    Raises:
      ValueError: they have none of a flow map, or of another type.
    """
    if FLOW_MAP not in metadata:
      raise ValueError(f"expected the metadata {FLOW_MAP!r} of a flow map, got {sorted(metadata)}")
    return parse_json(metadata[FLOW_MAP], cls, where=f"metadata {FLOW_MAP}")


def head_of_config(kind: str, config: Mapping[str, Any], metadata: Mapping[str, str]) -> Choice:
  """Returns the head that a config.json and the metadata of its files describe.

  Args:
    kind: of the head that its class has.
    config: all fields of the config.json.
    metadata: of its files.

  Raises:
    ValueError: they contradict each other, or describe a head that this package does not have.
  """
  stated = stated_policy(metadata)
  if stated and _policies()[stated["type"]] != kind:
    kind, of_class = _policies()[stated["type"]], HEADS[kind]
    # π-Flow's DX models have their backbone's class.
    if of_class.has_policy or not (of_class.torch_extends and HEADS[kind].torch_extends):
      raise ValueError(f"policy_config: {stated['type']} does not go with the class {config.get('_class_name')}")
  return Choice(kind, HEADS[kind].options_from_torch(config, stated))


def _policies() -> dict[str, str]:
  """Returns the kinds of heads by the names of their policies in metadata."""
  return {name: kind for kind, head in HEADS.items() if (name := head.policy_name())}


def stated_policy(metadata: Mapping[str, str]) -> dict[str, Any]:
  """Returns the policy_config of a file's metadata, all that is not null, or {} where there is none.

  Args:
    metadata: of the file.

  Raises:
    ValueError: it is of another type, or of a policy that no head has.
  """
  if POLICY_CONFIG not in metadata:
    return {}
  text, where = metadata[POLICY_CONFIG], f"metadata {POLICY_CONFIG}"
  checked = parse_json(text, _Policy, where=where)
  if checked.type not in _policies():
    raise ValueError(f"{where}: type: expected one of {list(_policies())}, got {shown(checked.type)}")
  stated = parse_json(text, where=where) | dataclasses.asdict(checked)
  return {key: value for key, value in stated.items() if value is not None}


def policy_metadata(head: Head, segment: float, shift: float) -> dict[str, str]:
  """Returns the metadata of a student's files that readers need.

  Args:
    head: of the student.
    segment: longest segment of its training, see `core.policies.DXPolicy`.
    shift: time shift of its training.

  Raises:
    ValueError: no PyTorch release reads such a policy.
  """
  return {POLICY_CONFIG: json.dumps({"type": head.policy_name(), **head.torch_stated(segment, shift)})}


def sampling_metadata(
  nfe: int, final_scale: float, shift: float, temperature: float | str, method: str
) -> dict[str, str]:
  """Returns metadata that only this package reads, of what the releases' files do not tell, see `sampling_of`.

  Args:
    nfe: network evaluations of its training.
    final_scale: length of the last segment, over that of the others.
    shift: time shift.
    temperature: of its samples.
    method: of the run's own samples. A reader takes the steps of the release that it names, or else of the newest.
  """
  stated = {"nfe": nfe, "final_scale": final_scale, "shift": shift, "temperature": temperature}
  return {SAMPLING: json.dumps(stated | {"release": release_of(method)})}


def release_of(method: str) -> str:
  """Returns the release whose samples those by a method of `core.rollout.rollout` are, or approach."""
  return method if method in RELEASES else "piflow-0.1" if method == "euler" else NEWEST


def sampling_of(metadata: Mapping[str, str]) -> dict[str, Any]:
  """Returns what a student's metadata tell of its sampling: nfe, final_scale and shift, or nothing.

  Where this package wrote the file, there are "temperature", a number or "auto", and "release", one of
  `core.rollout.RELEASES`, too.

  Args:
    metadata: of its files.
  """
  if SAMPLING in metadata:
    told = dataclasses.asdict(parse_json(metadata[SAMPLING], _Sampling, where=f"metadata {SAMPLING}"))
    return {key: value for key, value in told.items() if value is not None}
  stated = stated_policy(metadata)
  if "segment_size" not in stated:
    return {}
  total = 1 / stated["segment_size"]
  nfe = max(math.ceil(total - 1e-3), 1)
  return {"nfe": nfe, "final_scale": round(total - nfe + 1, 6), "shift": float(stated.get("shift", 1.0))}
