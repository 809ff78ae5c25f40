"""The head of a DX policy: denoised states at several times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.policies import DXPolicy, Policy
from pflow_jax.networks.heads.base import Head, Params, tile
from pflow_jax.torch_io.fields import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFields:
  """Fields of PyTorch's config.json; π-Flow's files tell the coefficients by their channels."""

  n_grid: Size = 1
  p_order: Size = 1


class DXHead(Head):
  """DX coefficients: {"coefficients": (B, N, *space, C)}, float32; zero at the start.

  Attributes:
    num_coefficients: N.
    basis: of the policy that reads them, "grid" or "polynomial"; decides the start from a teacher.
    compat: read polynomials as the PyTorch release does, see `DXPolicy.create`; only then can they be converted for it.
  """

  num_coefficients: int = 10
  basis: str = "grid"
  compat: bool = False

  has_policy = True
  torch_prefix = "DX"
  torch_extends = True

  @property
  def torch_maps(self) -> int:
    return self.num_coefficients

  @classmethod
  def torch_schema(cls) -> type:
    return TorchFields

  @classmethod
  def options_from_torch(cls, config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    basis = stated.get("mode") or ("polynomial" if (config.get("p_order") or 1) > 1 else "grid")
    compat = basis == "polynomial" and stated.get("compat", True)
    return {"num_coefficients": _count(config), "basis": basis} | ({"compat": True} if compat else {})

  @nn.nowrap
  def torch_fields(self) -> dict[str, Any]:
    return {}  # the number of coefficients is told by that of the channels

  @nn.nowrap
  def torch_stated(self, segment: float, shift: float) -> dict[str, Any]:
    """Returns the segment, the shift and the basis; refuses a polynomial without `compat`.

    To a release every coefficient holds x_s, which changes with the sample: no change of weights would put it there.
    """
    stated: dict[str, Any] = {"segment_size": segment, "shift": shift}
    if self.basis != "polynomial":
      return stated
    if not self.compat:
      raise ValueError(
        "config.head.compat: expected True of a polynomial DX student, got False; no PyTorch release reads its "
        "polynomial, so train it with compat=True, or with basis='grid' (`pflow sample` draws from it as it is)"
      )
    return stated | {"mode": "polynomial"}

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float) -> Policy:
    return DXPolicy.create(x, t, **outputs, segment=segment, shift=shift, basis=self.basis, compat=self.compat)

  @property
  def maps(self) -> int:
    return self.num_coefficients

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> dict[str, jax.Array]:
    shape = (self.num_coefficients, self.channels)
    return {"coefficients": self._maps("proj_out", tokens, grid, shape, use_bias=self.use_bias)}

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """Returns, of a grid, the teacher's layer N times; of a polynomial once, the other coefficients zero."""
    if self.basis not in ("grid", "polynomial"):
      raise ValueError(f'basis: expected "grid" or "polynomial", got {self.basis!r}')
    first = np.arange(self.num_coefficients) == 0
    weights = np.ones(self.num_coefficients) if self.basis == "grid" else first
    return {"proj_out": tile(self, layer, weights, jnp.zeros_like(offset))}


def _count(config: Mapping[str, Any]) -> int:
  """Returns the coefficients of a model in PyTorch."""
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
