"""The head of a DX policy: denoised states at several times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.policies import DXPolicy, Policy
from pflow_jax.networks.heads.base import Head, Params, tile


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
    """Grid: the teacher's layer N times. Polynomial: once, the other coefficients zero."""
    if self.basis not in ("grid", "polynomial"):
      raise ValueError(f'basis: expected "grid" or "polynomial", got {self.basis!r}')
    first = np.arange(self.num_coefficients) == 0
    weights = np.ones(self.num_coefficients) if self.basis == "grid" else first
    return {"proj_out": tile(self, layer, weights, jnp.zeros_like(offset))}
