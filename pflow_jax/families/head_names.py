"""Output layers of teachers and students in PyTorch: names, fields of config.json, and the policy that they are for.

References: the released code of π-Flow and ArcFlow, whose files have the policy as JSON in their metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from pflow_jax.core.rollout import NEWEST, RELEASES
from pflow_jax.files.foreign import parse_json
from pflow_jax.torch_io.fields import Depth, Positive
from pflow_jax.torch_io.table import Row, dense

POLICY_CONFIG = "policy_config"
SAMPLING = "sampling"  # metadata of ours: how a student was trained to be sampled
# Policies by their names in PyTorch.
POLICY_TYPES = {"GMFlow": "gmflow", "DX": "dx", "ArcFlow": "arc"}
VELOCITY = {"kind": "velocity"}


@dataclasses.dataclass(frozen=True)
class _Policy:
  """What is read of a file's policy_config."""

  type: Literal["GMFlow", "DX", "ArcFlow"]
  mode: Literal["grid", "polynomial"] | None = None
  compat: bool | None = None
  segment_size: Annotated[float, Ge(0.001), Le(1)] | None = None
  shift: Positive | None = None


@dataclasses.dataclass(frozen=True)
class _Sampling:
  """What is read of the metadata SAMPLING."""

  nfe: Depth
  final_scale: Positive
  shift: Positive
  temperature: Annotated[float, Ge(0)] | Literal["auto"] | None = None
  release: Literal["piflow-0.1", "lakonlab-0.2"] | None = None


_LOGSTD_LAYERS = 2  # of the log-std MLP, which `heads.GMFlowHead` has


def head_rows(policy: Mapping[str, Any], output: str) -> tuple[Row, ...]:
  """Rows of the leaves "head/...".

  Args:
    policy: as the section of a config.   output: name of the layer that makes a velocity, or DX coefficients.
  Raises: ValueError for a policy that no PyTorch class has.
  """
  kind = policy["kind"]
  if kind in ("velocity", "dx"):
    return dense(output, "head/proj_out")
  names = ["proj_out_means", "proj_out_logweights"]
  if kind == "arc":
    names += ["proj_out_loggamma"] if policy.get("num_components", 8) > 1 else []
    return tuple(row for name in names for row in dense(name, f"head/{name}"))
  if kind == "gmflow":
    rows = [row for name in names for row in dense(name, f"head/{name}")]
    if policy.get("log_std", "learned") == "learned":
      for layer in (1, 3):
        rows += dense(f"proj_out_logstds.{layer}", f"head/proj_out_logstds_{layer}")
    return tuple(rows)
  raise ValueError(
    f"config.head.kind: {kind!r} has no counterpart in PyTorch, expected 'velocity', 'gmflow', 'dx' or 'arc'"
  )


def policy_from_config(kind: str, config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
  """The section `head` for a model's config.json and the metadata of its files.

  Args:
    kind: that its class is for.
  Raises: ValueError where they contradict each other, or say what this package does not have.
  """
  stated = stated_policy(metadata)
  if stated and POLICY_TYPES[stated["type"]] != kind:
    if kind != "velocity" or stated["type"] != "DX":  # π-Flow's DX models have their backbone's class
      raise ValueError(f"policy_config: {stated['type']} does not go with the class {config.get('_class_name')}")
    kind = "dx"
  if kind == "velocity":
    return dict(VELOCITY)
  if kind == "dx":
    count = _count(config)
    basis = stated.get("mode") or ("polynomial" if (config.get("p_order") or 1) > 1 else "grid")
    compat = basis == "polynomial" and stated.get("compat", True)
    return {"kind": "dx", "num_coefficients": count, "basis": basis} | ({"compat": True} if compat else {})
  policy: dict[str, Any] = {"kind": kind, "num_components": config.get("num_gaussians") or 16}
  if kind == "gmflow":
    if config.get("constant_logstd") is not None:
      policy["log_std"] = float(config["constant_logstd"])
    else:
      policy["logstd_inner_dim"] = config.get("logstd_inner_dim") or 1024
      layers = config.get("gm_num_logstd_layers") or _LOGSTD_LAYERS
      if layers != _LOGSTD_LAYERS:
        raise ValueError(f"config.json: gm_num_logstd_layers must be {_LOGSTD_LAYERS}, got {layers}")
  return policy


def _count(config: Mapping[str, Any]) -> int:
  """Coefficients of a DX model."""
  for field in ("n_grid", "p_order"):
    if (config.get(field) or 1) > 1:
      return config[field]
  count, rest = divmod(config.get("out_channels") or 0, config.get("in_channels") or 1)
  if not count or rest:
    raise ValueError(
      f"config.json: expected out_channels a multiple of in_channels, got {config.get('out_channels')} and "
      f"{config.get('in_channels')}"
    )
  return count


def stated_policy(metadata: Mapping[str, str]) -> dict[str, Any]:
  """The policy_config of a file's metadata; {} if it has none."""
  if POLICY_CONFIG not in metadata:
    return {}
  stated = parse_json(metadata[POLICY_CONFIG], _Policy, where=f"metadata {POLICY_CONFIG}")
  return {key: value for key, value in dataclasses.asdict(stated).items() if value is not None}


def policy_metadata(policy: Mapping[str, Any], segment: float, shift: float) -> dict[str, str]:
  """The metadata of a student's files that readers need; of a teacher's there is none.

  Args:
    segment, shift: of its training, see `policies.DXPolicy`.
  Raises: ValueError for a polynomial without `compat`, which no release reads: to them every coefficient holds x_s,
    which changes with the sample, so that no change of the weights would put it there.
  """
  names = {kind: name for name, kind in POLICY_TYPES.items()}
  if policy["kind"] not in names:
    return {}
  stated: dict[str, Any] = {"type": names[policy["kind"]]}
  if policy["kind"] == "dx":
    stated |= {"segment_size": segment, "shift": shift}
    if policy.get("basis", "grid") == "polynomial":
      if not policy.get("compat"):
        raise ValueError(
          "config.head.compat: expected True of a polynomial DX student, got False; no PyTorch release reads its "
          "polynomial, so train it with compat=True, or with basis='grid' (`pflow sample` draws from it as it is)"
        )
      stated["mode"] = "polynomial"
  return {POLICY_CONFIG: json.dumps(stated)}


def sampling_metadata(
  nfe: int, final_scale: float, shift: float, temperature: float | str, method: str
) -> dict[str, str]:
  """Metadata that only this package reads, of what the releases' files do not tell: see `sampling_of`.

  Args:
    method: of the run's own samples. A reader takes the steps of the release that it names, or else of the newest.
  """
  stated = {"nfe": nfe, "final_scale": final_scale, "shift": shift, "temperature": temperature}
  return {SAMPLING: json.dumps(stated | {"release": release_of(method)})}


def release_of(method: str) -> str:
  """The release whose samples those by a method of `core.rollout.rollout` are, or approach."""
  return method if method in RELEASES else "piflow-0.1" if method == "euler" else NEWEST


def config_from_policy(policy: Mapping[str, Any], outputs: int, sub_pixels: int = 0) -> dict[str, Any]:
  """Fields of config.json for the output layers.

  Args:
    outputs: channels of one velocity, as the field out_channels counts them.
    sub_pixels: that a token's log-weights are for, where config.json tells.
  """
  kind = policy["kind"]
  if kind == "velocity":
    return {"out_channels": outputs}
  if kind == "dx":
    return {"out_channels": policy.get("num_coefficients", 10) * outputs}
  fields = {"num_gaussians": policy.get("num_components", 8), "out_channels": outputs}
  if sub_pixels:
    fields["logweights_channels"] = sub_pixels
  if kind == "gmflow":
    log_std = policy.get("log_std", "learned")
    fields["constant_logstd"] = None if log_std == "learned" else float(log_std)
    fields |= {"logstd_inner_dim": policy.get("logstd_inner_dim", 1024), "gm_num_logstd_layers": _LOGSTD_LAYERS}
  return fields


def student_of(kind: str, classes: Mapping[str, str]) -> str:
  """The class of a policy of `kind`: of {class: kind} the first."""
  found = [name for name, own in classes.items() if own == kind]
  if not found:
    raise ValueError(f"config.head.kind: no PyTorch class has {kind!r}, only {sorted(set(classes.values()))}")
  return found[0]


def sampling_of(metadata: Mapping[str, str]) -> dict[str, Any]:
  """What the metadata of a student tell of its sampling: nfe, final_scale and shift, or nothing.

  And "temperature", a number or "auto", and "release", of `core.rollout.RELEASES`, where this package wrote the file.
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
