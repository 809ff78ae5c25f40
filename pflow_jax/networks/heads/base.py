"""Output layers: tokens -> a velocity or a policy's parameters, and their start from a teacher.

A head is called as `head(tokens, embedding, grid)`: tokens (B, T, D) after the network's last norm
and modulation, embedding (B, D) the conditioning embedding before its SiLU, grid the space shape in
patches, () for points. Heads compute in float32 (or wider) whatever the backbone computes in.

Rows of an output layer with M maps of C channels and p x p sub-pixels: ((p1 p + p2) M + m) C + c in
layout "dit", ((m C + c) p + p1) p + p2 in layout "flux". Layers have the PyTorch releases' names.

References:
  pi-Flow, arXiv:2510.14974; ArcFlow; their released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from pflow_jax.networks.layers import accumulation_dtype, gathered, unpatchify
from pflow_jax.torch_io.fields import schema_of
from pflow_jax.torch_io.table import Row, dense

Params = dict[str, Any]
# Where the parameters lie on a mesh, see `mesh.sharding.Layout`.
SHARDING = (("(velocity_)?head/.*/kernel", ("fsdp", None)),)

FROM_NETWORK = ("channels", "patch_size", "layout", "use_bias")  # attributes that are filled in for the network

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros


class Head(nn.Module):
  """Base of the output layers.

  Attributes:
    channels: C of the data. Whoever trains a network on data fills in this and the next two.
    patch_size: side of a patch, as in the network; 1 for points.
    layout: row order of the output layers, "dit" or "flux".
    use_bias: whether the layer that makes velocities has a bias (FLUX.2's has none).
  """

  channels: int = 0
  patch_size: int = 1
  layout: str = "dit"
  use_bias: bool = True

  def _maps(
    self,
    name: str,
    tokens: jax.Array,
    grid: tuple[int, ...],
    shape: tuple[int, int],
    kernel_init: Any = ZEROS,
    use_bias: bool = True,
    bias_init: Any = ZEROS,
  ) -> jax.Array:
    """Applies a Dense layer to every token and puts the maps back in space.

    Args:
      name: of the layer.
      tokens: (B, T, D).
      grid: shape of space in patches.
      shape: (M, C), of maps and channels.
      kernel_init: initializer.
      use_bias: whether there is one.
      bias_init: initializer.

    Returns:
      (B, M, *space, C).
    """
    batch, count, width = tokens.shape
    groups, channels = shape
    dense = nn.Dense(
      self.patch_size ** len(grid) * groups * channels,
      use_bias=use_bias,
      dtype=accumulation_dtype(tokens.dtype),
      kernel_init=kernel_init,
      bias_init=bias_init,
      dot_general=gathered("fsdp", None),
      name=name,
    )
    # Two axes, not three: the weight gradient is then one plain matmul.
    rows = dense(tokens.reshape(-1, width)).reshape(batch, count, dense.features)
    return unpatchify(rows, grid, self.patch_size, groups, self.layout)

  has_policy: ClassVar[bool] = False
  """Whether its outputs are a policy's; else they are a velocity."""

  velocity_layer: ClassVar[str] = "proj_out"
  """Name of the layer that makes its velocity-like maps."""

  starts_policies: ClassVar[bool] = False
  """Whether the output layer of a policy can start from this one."""

  torch_prefix: ClassVar[str | None] = None
  """Start of the names of PyTorch's classes with this head, before the network's; None where there are no such."""

  torch_policy: ClassVar[str | None] = None
  """Name of its policy in the metadata of PyTorch's files; by default `torch_prefix`."""

  torch_extends: ClassVar[bool] = False
  """Whether its layer is the output layer of the network's PyTorch class, perhaps with more channels."""

  @classmethod
  def policy_name(cls) -> str | None:
    """Returns the name of its policy in the metadata of PyTorch's files; None where it has none."""
    return (cls.torch_policy or cls.torch_prefix) if cls.has_policy else None

  @property
  def torch_maps(self) -> int:
    """Velocities that out_channels in PyTorch's config.json counts."""
    return 1

  @nn.nowrap
  def torch_rows(self, output: str) -> tuple[Row, ...]:
    """Returns the names of its parameters in PyTorch: rows whose leaves begin with "head/".

    Args:
      output: name of the layer that makes a velocity in the network's PyTorch class.
    """
    return dense(output, f"head/{self.velocity_layer}")

  @classmethod
  def torch_schema(cls) -> type:
    """Returns a dataclass of its fields in PyTorch's config.json; by default its own attributes."""
    own: Any = cls
    return schema_of(own, FROM_NETWORK)

  @classmethod
  def options_from_torch(cls, config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns its options.

    Args:
      config: fields of config.json, those that it leaves unsaid too.
      stated: what the files' metadata say of the policy.

    Raises:
      ValueError: they contradict each other, or describe another head.
    """
    return {field.name: config[field.name] for field in dataclasses.fields(cls.torch_schema()) if field.name in config}

  @nn.nowrap
  def torch_fields(self) -> dict[str, Any]:
    """Returns its fields of PyTorch's config.json but for out_channels, the way back of `options_from_torch`."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self.torch_schema())}

  @nn.nowrap
  def torch_stated(self, segment: float, shift: float) -> dict[str, Any]:
    """Returns what PyTorch's metadata say of its policy beside the name.

    Args:
      segment: longest segment of the student, in schedule time.
      shift: time shift of the student.

    Raises:
      ValueError: no PyTorch release reads such a policy.
    """
    return {}

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """Returns parameters that start as a teacher's output layer.

    Args:
      layer: the teacher's, {"kernel": (D, p^n C), "bias": (p^n C,)}, checked.
      key: for what is drawn.
      offset: (M, C), goes on the biases of the copies.
    """
    raise NotImplementedError

  @property
  def maps(self) -> int:
    """Number of velocity-like maps (components, coefficients) that the head makes."""
    raise NotImplementedError

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float):
    """Returns the policy of one example.

    Args:
      x: state at `t`, (*space, C).
      t: flow time ().
      outputs: what the head returned for it.
      segment: longest segment of the student, in schedule time.
      shift: time shift of the student.
    """
    raise NotImplementedError

  @nn.nowrap
  def field(self, apply: Callable[[jax.Array, jax.Array, Any], Any]) -> Callable[[jax.Array, jax.Array, Any], Any]:
    """Returns what a network with this head computes, (x, t, cond) -> outputs.

    Args:
      apply: (x, t, cond) -> what its module returns.
    """
    return apply


def dense_zeros(width: int, rows: int) -> Params:
  """Returns a Dense layer of zeros, from `width` channels to `rows`."""
  return {"kernel": jnp.zeros((width, rows), jnp.float32), "bias": jnp.zeros(rows, jnp.float32)}


def join_rows(a: jax.Array, layout: str) -> jax.Array:
  """Joins (..., sub-pixels, M, C) to (..., rows) in the order of `layout`."""
  return rearrange(a, "... q m c -> ... (q m c)" if layout == "dit" else "... q m c -> ... (m c q)")


def tile(head: Head, layer: Params, weights: np.ndarray, offset: jax.Array) -> Params:
  """Copies an output layer into the maps of a head.

  Args:
    head: of the copies.
    layer: to be copied.
    weights: (M,), factors of the copies.
    offset: (M, C), goes on the biases.
  """
  pattern = "... (q c) -> ... q 1 c" if head.layout == "dit" else "... (c q) -> ... q 1 c"
  scale = jnp.asarray(weights, jnp.float32)[:, None]

  def copies(a: jax.Array) -> jax.Array:
    single = rearrange(a, pattern, c=head.channels)
    return single * scale.reshape((1,) * (single.ndim - 2) + scale.shape)

  tiled = {name: copies(a) for name, a in layer.items()}
  if "bias" in tiled:
    tiled["bias"] = tiled["bias"] + offset[None]
  return {name: join_rows(a, head.layout) for name, a in tiled.items()}
