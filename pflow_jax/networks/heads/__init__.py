"""Output layers by the names that a config gives them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.files.registering import enter
from pflow_jax.networks.heads.arc import GAMMA_RANGE as GAMMA_RANGE
from pflow_jax.networks.heads.arc import ArcHead as ArcHead
from pflow_jax.networks.heads.base import FROM_NETWORK as FROM_NETWORK
from pflow_jax.networks.heads.base import SHARDING as SHARDING
from pflow_jax.networks.heads.base import Head as Head
from pflow_jax.networks.heads.dx import DXHead as DXHead
from pflow_jax.networks.heads.gmflow import GMFlowHead as GMFlowHead
from pflow_jax.networks.heads.start import head_params_from_teacher as head_params_from_teacher
from pflow_jax.networks.heads.start import student_params_from_teacher as student_params_from_teacher
from pflow_jax.networks.heads.velocity import DenoiserHead as DenoiserHead
from pflow_jax.networks.heads.velocity import VelocityHead as VelocityHead

HEADS: dict[str, type[Head]] = {
  "velocity": VelocityHead,
  "denoiser": DenoiserHead,
  "gmflow": GMFlowHead,
  "dx": DXHead,
  "arc": ArcHead,
}
"""Output layers by the names that a config gives them; another one is added by `register_head`."""


def register_head(kind: str, head: type[Head]) -> None:
  """Makes a head known to configs.

  Args:
    kind: the name, as config.head.kind.
    head: its class.

  Raises:
    ValueError: another head has that name, there or in PyTorch.
  """
  names = {"torch_prefix": head.torch_prefix, "torch_policy": head.policy_name()}
  for name, other in HEADS.items():
    if name != kind and other is not head:
      others = {"torch_prefix": other.torch_prefix, "torch_policy": other.policy_name()}
      for what, value in names.items():
        if value is not None and value == others[what]:
          raise ValueError(
            f"{head.__name__}: there is a head with {what} {value!r} already, {name!r}; take another, or None for a "
            "head without a class in PyTorch"
          )
  enter(HEADS, kind, head, f"there is a head {kind!r} already, {HEADS.get(kind, head).__name__}")


def attributes_of(module: nn.Module, hidden: tuple[str, ...]) -> dict[str, Any]:
  """Returns the attributes of a module as a config keeps them.

  Args:
    module: of Flax.
    hidden: names of the attributes that are left out.
  """
  own = {field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.init}
  kept = {name: value for name, value in own.items() if name not in ("parent", "name", *hidden)}
  return kept | ({"dtype": jnp.dtype(kept["dtype"]).name} if kept.get("dtype") is not None else {})


def head_options_of(head: Head) -> tuple[str, dict[str, Any]]:
  """Returns the name of a head in a config, and its options.

  Args:
    head: of a kind that is registered.

  Raises:
    ValueError: it is not.
  """
  names = [name for name, kind in HEADS.items() if kind is type(head)]
  if not names:
    known = sorted(kind.__name__ for kind in HEADS.values())
    raise ValueError(f"expected a head of {known}, got {type(head).__name__}; make another one known by register_head")
  if not head.use_bias:
    raise ValueError("head: expected use_bias=True, which the networks of this package have, got False")
  return names[0], attributes_of(head, FROM_NETWORK)
