"""The head of an ArcFlow policy: a mixture of momentum processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.policies import ArcPolicy, Policy
from pflow_jax.networks.heads.base import XAVIER, Head, Params, dense_zeros, join_rows, tile
from pflow_jax.torch_io.fields import Size
from pflow_jax.torch_io.table import Row, dense

GAMMA_RANGE = (0.2, 4.0)  # of ArcFlow's momentum components at the start, log-spaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFields:
  """Fields of PyTorch's config.json."""

  num_gaussians: Size = 16


class ArcHead(Head):
  """ArcFlow: velocities (B, K, *space, C), logits (B, K, *space), log_gammas (B, K-1, *space).

  Component 0 has no log-gamma: it moves straight. Float32.
  """

  num_components: int = 8

  has_policy = True
  torch_prefix, torch_policy = "Arc", "ArcFlow"
  velocity_layer = "proj_out_means"

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float) -> Policy:
    return ArcPolicy.create(x, t, **outputs)

  @property
  def maps(self) -> int:
    return self.num_components

  @nn.nowrap
  def torch_rows(self, output: str) -> tuple[Row, ...]:
    names = ["proj_out_means", "proj_out_logweights"]
    names += ["proj_out_loggamma"] if self.num_components > 1 else []
    return tuple(row for name in names for row in dense(name, f"head/{name}"))

  @classmethod
  def torch_schema(cls) -> type:
    return TorchFields

  @classmethod
  def options_from_torch(cls, config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_components": config["num_gaussians"]}

  @nn.nowrap
  def torch_fields(self) -> dict[str, Any]:
    return {"num_gaussians": self.num_components}

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> dict[str, jax.Array]:
    count = self.num_components
    shape = (count, self.channels)
    velocities = self._maps("proj_out_means", tokens, grid, shape, XAVIER, self.use_bias)
    logits = self._maps("proj_out_logweights", tokens, grid, (count, 1))[..., 0]
    if count == 1:
      log_gammas = logits[:, :0]
    else:
      sub_pixels = self.patch_size ** len(grid)

      def start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return self._log_gamma_rows(sub_pixels).astype(dtype)

      gammas = self._maps("proj_out_loggamma", tokens, grid, (count - 1, 1), bias_init=start)
      log_gammas = gammas[..., 0]
    return {"velocities": velocities, "logits": logits, "log_gammas": log_gammas}

  def _log_gamma_rows(self, sub_pixels: int) -> jax.Array:
    log_gammas = np.log(np.geomspace(*GAMMA_RANGE, self.num_components - 1))
    values = np.broadcast_to(log_gammas[:, None], (sub_pixels, self.num_components - 1, 1))
    return join_rows(jnp.asarray(values, jnp.float32), self.layout)

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """Returns K copies of the teacher's layer with offset biases, logits 0, gammas log-spaced."""
    width, rows = layer["kernel"].shape
    sub_pixels = rows // self.channels
    params = {
      "proj_out_means": tile(self, layer, np.ones(self.num_components), offset),
      "proj_out_logweights": dense_zeros(width, sub_pixels * self.num_components),
    }
    if self.num_components > 1:
      params["proj_out_loggamma"] = dense_zeros(width, sub_pixels * (self.num_components - 1))
      params["proj_out_loggamma"]["bias"] = self._log_gamma_rows(sub_pixels)
    return params
