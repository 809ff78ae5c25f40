"""The head of a GMFlow policy: a Gaussian mixture a pixel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pflow_jax.core.policies import GMFlowPolicy, Policy
from pflow_jax.networks.heads.base import XAVIER, ZEROS, Head, Params, dense_zeros, tile
from pflow_jax.networks.layers import accumulation_dtype, gathered
from pflow_jax.torch_io.fields import Number, Size
from pflow_jax.torch_io.table import Row, dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFields:
  """Fields of PyTorch's config.json."""

  num_gaussians: Size = 16
  constant_logstd: Number | None = None
  logstd_inner_dim: Size = 1024
  gm_num_logstd_layers: Literal[2] = 2


class GMFlowHead(Head):
  """Gaussian mixture: means (B, K, *space, C), logits (B, K, *space), log_std (B,), float32.

  Attributes:
    num_components: K.
    log_std: "learned" (an MLP on the detached embedding) or a constant.
    logstd_inner_dim: width of that MLP.
    init_log_std: its output at the start.
  """

  num_components: int = 8
  log_std: str | float = "learned"
  logstd_inner_dim: int = 1024
  init_log_std: float = math.log(0.05)

  has_policy = True
  torch_prefix, torch_policy = "GM", "GMFlow"
  velocity_layer = "proj_out_means"

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float) -> Policy:
    return GMFlowPolicy.create(x, t, **outputs)

  @property
  def maps(self) -> int:
    return self.num_components

  @nn.nowrap
  def torch_rows(self, output: str) -> tuple[Row, ...]:
    layers = {name: name for name in ("proj_out_means", "proj_out_logweights")}
    if self.learns_log_std:
      layers |= {f"proj_out_logstds.{layer}": f"proj_out_logstds_{layer}" for layer in (1, 3)}
    return tuple(row for theirs, ours in layers.items() for row in dense(theirs, f"head/{ours}"))

  @classmethod
  def torch_schema(cls) -> type:
    return TorchFields

  @classmethod
  def options_from_torch(cls, config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    options = {"num_components": config["num_gaussians"]}
    if config["constant_logstd"] is not None:
      return options | {"log_std": float(config["constant_logstd"])}
    return options | {"logstd_inner_dim": config["logstd_inner_dim"]}

  @nn.nowrap
  def torch_fields(self) -> dict[str, Any]:
    return {
      "num_gaussians": self.num_components,
      "constant_logstd": None if self.learns_log_std else float(self.log_std),
      "logstd_inner_dim": self.logstd_inner_dim,
      "gm_num_logstd_layers": TorchFields.gm_num_logstd_layers,
    }

  @property
  def learns_log_std(self) -> bool:
    if isinstance(self.log_std, str) and self.log_std != "learned":
      raise ValueError(f'log_std: expected "learned" or a number, got {self.log_std!r}')
    return self.log_std == "learned"

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> dict[str, jax.Array]:
    means_shape, logits_shape = (self.num_components, self.channels), (self.num_components, 1)
    means = self._maps("proj_out_means", tokens, grid, means_shape, XAVIER, self.use_bias)
    logits = self._maps("proj_out_logweights", tokens, grid, logits_shape)[..., 0]
    return {"means": means, "logits": logits, "log_std": self._log_std(embedding)}

  def _log_std(self, embedding: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(embedding.dtype)
    if not self.learns_log_std:
      return jnp.full(embedding.shape[:1], float(self.log_std), dtype)
    # Detached: the mixture's width must not steer the backbone.
    h = nn.silu(jax.lax.stop_gradient(embedding).astype(dtype))
    dense = functools.partial(nn.Dense, dtype=dtype, dot_general=gathered("fsdp", None))
    h = dense(self.logstd_inner_dim, kernel_init=XAVIER, name="proj_out_logstds_1")(h)
    start = nn.initializers.constant(self.init_log_std)
    last = dense(1, kernel_init=ZEROS, bias_init=start, name="proj_out_logstds_3")
    return last(nn.silu(h))[:, 0]

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """Returns K copies of the teacher's layer with offset biases, logits 0, log-std constant."""
    width, rows = layer["kernel"].shape
    params = {
      "proj_out_means": tile(self, layer, np.ones(self.num_components), offset),
      "proj_out_logweights": dense_zeros(width, rows // self.channels * self.num_components),
    }
    if self.learns_log_std:
      inner = self.logstd_inner_dim
      params["proj_out_logstds_1"] = dense_zeros(width, inner)
      params["proj_out_logstds_1"]["kernel"] = XAVIER(key, (width, inner), jnp.float32)
      params["proj_out_logstds_3"] = dense_zeros(inner, 1)
      params["proj_out_logstds_3"]["bias"] = jnp.full(1, self.init_log_std, jnp.float32)
    return params
