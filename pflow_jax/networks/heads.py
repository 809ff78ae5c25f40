"""Output layers: tokens -> a velocity or a policy's parameters, and their start from a teacher.

A head is called as `head(tokens, embedding, grid)`: tokens (B, T, D) after the network's last norm
and modulation, embedding (B, D) the conditioning embedding before its SiLU, grid the space shape in
patches, () for points. Heads compute in float32 (or wider) whatever the backbone computes in.

Rows of an output layer with M maps of C channels and p x p sub-pixels: ((p1 p + p2) M + m) C + c in
layout "dit", ((m C + c) p + p1) p + p2 in layout "flux". Layers have the PyTorch releases' names.
References: pi-Flow, arXiv:2510.14974; ArcFlow; their released code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from pflow_jax.core.policies import ArcPolicy, DXPolicy, GMFlowPolicy, Policy
from pflow_jax.networks.denoiser import denoiser_velocity, edm_denoiser
from pflow_jax.networks.layers import accumulation_dtype, check_layout, gathered, unpatchify

Params = dict[str, Any]
# Where the parameters lie on a mesh, see `sharding.Layout`.
SHARDING = (("head/.*/kernel", ("fsdp", None)),)
FROM_NETWORK = ("channels", "patch_size", "layout", "use_bias")  # attributes that are filled in for the network
GAMMA_RANGE = (0.2, 4.0)  # of ArcFlow's momentum components at the start, log-spaced

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


class Head(nn.Module):
  """What all heads share.

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
    kernel_init: Any = _zeros,
    use_bias: bool = True,
    bias_init: Any = _zeros,
  ) -> jax.Array:
    """Dense layer `name` on every token, put back in space; shape is (M, C): (B, M, *space, C)."""
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

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """Parameters from a checked teacher layer; offset (M, C) goes on the biases of the copies."""
    raise NotImplementedError

  @property
  def maps(self) -> int:
    """How many velocity-like maps (components, coefficients) the head makes."""
    raise NotImplementedError

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float):
    """The policy of one example.

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
    """What a network with this head computes, (x, t, cond) -> outputs, from what its module returns."""
    return apply


class VelocityHead(Head):
  """The velocity itself: (B, *space, C), float32. A teacher's head; zero at the start."""

  starts_policies = True

  @property
  def maps(self) -> int:
    return 1

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    shape = (1, self.channels)
    return self._maps("proj_out", tokens, grid, shape, use_bias=self.use_bias)[:, 0]

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """The teacher's layer."""
    return {"proj_out": layer}


class DenoiserHead(VelocityHead):
  """A network in EDM's preconditioning, whose velocity is that of its denoised image.

  A teacher of EDM or EDM2 has it, and a flow map of such a teacher.

  Attributes:
    sigma_data: standard deviation of the data, see `networks.denoiser`.
    max_sigma: highest noise level that the network was trained for.
    min_sigma: lowest one.
  """

  sigma_data: float = 0.5
  max_sigma: float = 80.0
  min_sigma: float = 0.002

  starts_policies = False

  @nn.nowrap
  def field(self, apply: Callable[[jax.Array, jax.Array, Any], Any]) -> Callable[[jax.Array, jax.Array, Any], Any]:
    # The modules take flow time, whose logit is log sigma.
    denoise = edm_denoiser(lambda x, c_noise, cond: apply(x, jax.nn.sigmoid(4 * c_noise), cond), self.sigma_data)
    return denoiser_velocity(denoise, self.max_sigma, self.min_sigma)


class GMFlowHead(Head):
  """Gaussian mixture: means (B, K, *space, C), logits (B, K, *space), log_std (B,), float32.

  Attributes:
    num_components: K.
    log_std: "learned" (an MLP on the detached embedding) or a constant.
    logstd_inner_dim: width of that MLP.   init_log_std: what it returns at the start.
  """

  num_components: int = 8
  log_std: str | float = "learned"
  logstd_inner_dim: int = 1024
  init_log_std: float = math.log(0.05)

  has_policy = True
  velocity_layer = "proj_out_means"

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float) -> Policy:
    return GMFlowPolicy.create(x, t, **outputs)

  @property
  def maps(self) -> int:
    return self.num_components

  @property
  def learns_log_std(self) -> bool:
    if isinstance(self.log_std, str) and self.log_std != "learned":
      raise ValueError(f'log_std: expected "learned" or a number, got {self.log_std!r}')
    return self.log_std == "learned"

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> dict[str, jax.Array]:
    means_shape, logits_shape = (self.num_components, self.channels), (self.num_components, 1)
    means = self._maps("proj_out_means", tokens, grid, means_shape, _xavier, self.use_bias)
    logits = self._maps("proj_out_logweights", tokens, grid, logits_shape)[..., 0]
    return {"means": means, "logits": logits, "log_std": self._log_std(embedding)}

  def _log_std(self, embedding: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(embedding.dtype)
    if not self.learns_log_std:
      return jnp.full(embedding.shape[:1], float(self.log_std), dtype)
    # Detached: the mixture's width must not steer the backbone.
    h = nn.silu(jax.lax.stop_gradient(embedding).astype(dtype))
    dense = functools.partial(nn.Dense, dtype=dtype, dot_general=gathered("fsdp", None))
    h = dense(self.logstd_inner_dim, kernel_init=_xavier, name="proj_out_logstds_1")(h)
    start = nn.initializers.constant(self.init_log_std)
    last = dense(1, kernel_init=_zeros, bias_init=start, name="proj_out_logstds_3")
    return last(nn.silu(h))[:, 0]

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """K copies of the teacher's layer with offset biases, logits 0, log-std constant."""
    width, rows = layer["kernel"].shape
    params = {
      "proj_out_means": _tile(self, layer, np.ones(self.num_components), offset),
      "proj_out_logweights": _dense_zeros(width, rows // self.channels * self.num_components),
    }
    if self.learns_log_std:
      inner = self.logstd_inner_dim
      params["proj_out_logstds_1"] = _dense_zeros(width, inner)
      params["proj_out_logstds_1"]["kernel"] = _xavier(key, (width, inner), jnp.float32)
      params["proj_out_logstds_3"] = _dense_zeros(inner, 1)
      params["proj_out_logstds_3"]["bias"] = jnp.full(1, self.init_log_std, jnp.float32)
    return params


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
    return {"proj_out": _tile(self, layer, weights, jnp.zeros_like(offset))}


class ArcHead(Head):
  """ArcFlow: velocities (B, K, *space, C), logits (B, K, *space), log_gammas (B, K-1, *space).

  Component 0 has no log-gamma: it moves straight. Float32.
  """

  num_components: int = 8

  has_policy = True
  velocity_layer = "proj_out_means"

  @nn.nowrap
  def policy(self, x: jax.Array, t: jax.Array, outputs: Mapping[str, Any], *, segment: float, shift: float) -> Policy:
    return ArcPolicy.create(x, t, **outputs)

  @property
  def maps(self) -> int:
    return self.num_components

  @nn.compact
  def __call__(self, tokens: jax.Array, embedding: jax.Array, grid: tuple[int, ...]) -> dict[str, jax.Array]:
    count = self.num_components
    shape = (count, self.channels)
    velocities = self._maps("proj_out_means", tokens, grid, shape, _xavier, self.use_bias)
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
    return _join_rows(jnp.asarray(values, jnp.float32), self.layout)

  def params_from_teacher(self, layer: Params, key: jax.Array, offset: jax.Array) -> Params:
    """K copies of the teacher's layer with offset biases, logits 0, gammas log-spaced."""
    width, rows = layer["kernel"].shape
    sub_pixels = rows // self.channels
    params = {
      "proj_out_means": _tile(self, layer, np.ones(self.num_components), offset),
      "proj_out_logweights": _dense_zeros(width, sub_pixels * self.num_components),
    }
    if self.num_components > 1:
      params["proj_out_loggamma"] = _dense_zeros(width, sub_pixels * (self.num_components - 1))
      params["proj_out_loggamma"]["bias"] = self._log_gamma_rows(sub_pixels)
    return params


def _dense_zeros(width: int, rows: int) -> Params:
  return {"kernel": jnp.zeros((width, rows), jnp.float32), "bias": jnp.zeros(rows, jnp.float32)}


def _join_rows(a: jax.Array, layout: str) -> jax.Array:
  """(..., sub-pixels, M, C) -> (..., rows) in the order of `layout`."""
  return rearrange(a, "... q m c -> ... (q m c)" if layout == "dit" else "... q m c -> ... (m c q)")


def _tile(head: Head, layer: Params, weights: np.ndarray, offset: jax.Array) -> Params:
  """Copies an output layer weights (M,) times each into M maps; offset (M, C) on the biases."""
  pattern = "... (q c) -> ... q 1 c" if head.layout == "dit" else "... (c q) -> ... q 1 c"
  scale = jnp.asarray(weights, jnp.float32)[:, None]

  def copies(a: jax.Array) -> jax.Array:
    single = rearrange(a, pattern, c=head.channels)
    return single * scale.reshape((1,) * (single.ndim - 2) + scale.shape)

  tiled = {name: copies(a) for name, a in layer.items()}
  if "bias" in tiled:
    tiled["bias"] = tiled["bias"] + offset[None]
  return {name: _join_rows(a, head.layout) for name, a in tiled.items()}


def _teacher_layer(head: Head, teacher: Mapping[str, Any]) -> Params:
  """Returns the teacher's output layer, copied and checked against the student's head."""
  check_layout(head.layout)
  if set(teacher) != {"proj_out"}:
    raise ValueError(f'teacher head: expected a velocity head with the one layer "proj_out", got {sorted(teacher)}')
  layer = {name: jnp.array(value, jnp.float32) for name, value in teacher["proj_out"].items()}
  rows = layer["kernel"].shape[1]
  sub_pixels, rest = divmod(rows, head.channels)
  if rest or sub_pixels not in [head.patch_size**axes for axes in range(4)]:
    raise ValueError(
      f"teacher output layer: expected channels * patch_size^n rows with channels {head.channels} "
      f"and patch_size {head.patch_size}, got {rows}; give the student's head the teacher's"
    )
  if "bias" in layer and not head.use_bias:
    raise ValueError("teacher output layer: expected no bias for use_bias=False, got one")
  if head.use_bias:
    layer.setdefault("bias", jnp.zeros(rows, jnp.float32))
  return layer


def head_params_from_teacher(
  head: Head,
  teacher_head_params: Mapping[str, Any],
  key: jax.Array,
  *,
  bias_noise: float = 0.05,
  noise: jax.Array | None = None,
) -> Params:
  """Parameters of a student's head that starts as its teacher's velocity.

  Args:
    head: a head of this module, with the channels, patch_size and layout of the teacher's.
    teacher_head_params: {"proj_out": {"kernel": (D, p^n C), "bias": (p^n C,)}}, float32.
    key: for the noise and for the first layer of the log-std MLP.
    bias_noise: standard deviation of what is added to the biases of mixture components (GMFlow,
      ArcFlow), one value per (component, channel), shared by the sub-pixels. At 0 the student's
      first prediction is exactly the teacher's velocity.
    noise: standard normal values (K, C) to use instead of drawing them.

  Returns: the head's parameters, new arrays.
  Raises: ValueError if the teacher's layer does not fit the head.
  References: the released initialisation of pi-Flow and ArcFlow.
  """
  layer = _teacher_layer(head, teacher_head_params)
  shape = (head.maps, head.channels)
  noise_key, other_key = jax.random.split(key)
  if noise is None:
    noise = jax.random.normal(noise_key, shape, jnp.float32)
  if jnp.shape(noise) != shape:
    raise ValueError(f"noise: expected shape (maps, channels) = {shape}, got {jnp.shape(noise)}")
  offset = bias_noise * jnp.asarray(noise, jnp.float32)
  return head.params_from_teacher(layer, other_key, offset)


def student_params_from_teacher(
  teacher_params: Mapping[str, Any],
  student: nn.Module,
  key: jax.Array,
  *,
  bias_noise: float = 0.05,
  noise: jax.Array | None = None,
) -> Params:
  """Parameters of a student network: the teacher's backbone, and a head that starts from its own.

  Args:
    teacher_params: of the same backbone with a `VelocityHead`, under "head".
    student: the student's network, or its head.
    key, bias_noise, noise: see `head_params_from_teacher`.

  Returns: new arrays throughout, so that a step may donate them while the teacher lives on.
  """
  head = getattr(student, "head", student)
  if not isinstance(head, Head):
    raise ValueError(f"student: expected a network with a head, or a head, got {type(student)}")
  if "head" not in teacher_params:
    raise ValueError(f'teacher parameters: expected the key "head", got {sorted(teacher_params)}')
  backbone = {name: value for name, value in teacher_params.items() if name != "head"}
  student_head = head_params_from_teacher(head, teacher_params["head"], key, bias_noise=bias_noise, noise=noise)
  return {**jax.tree.map(jnp.array, backbone), "head": student_head}


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
    ValueError: another head has that name.
  """
  if HEADS.setdefault(kind, head) is not head:
    raise ValueError(f"there is a head {kind!r} already, {HEADS[kind].__name__}; take another name")


def attributes_of(module: nn.Module, hidden: tuple[str, ...]) -> dict[str, Any]:
  """The attributes of a module as a config keeps them, but those in `hidden`."""
  own = {field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.init}
  kept = {name: value for name, value in own.items() if name not in ("parent", "name", *hidden)}
  return kept | ({"dtype": jnp.dtype(kept["dtype"]).name} if kept.get("dtype") is not None else {})


def head_options_of(head: Head) -> tuple[str, dict[str, Any]]:
  """The name of a head in a config, and its options.

  Args:
    head: of a kind that is registered.

  Raises:
    ValueError: it is not.
  """
  names = [name for name, kind in HEADS.items() if kind is type(head)]
  if not names:
    known = sorted(kind.__name__ for kind in HEADS.values())
    raise ValueError(f"expected a head of {known}, got {type(head).__name__}; make another one known by register_head")
  return names[0], attributes_of(head, FROM_NETWORK)
