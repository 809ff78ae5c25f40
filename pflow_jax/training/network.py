"""The network of a run, made from the sections `model`, `head` and `adapters` of its settings."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax import data
from pflow_jax.families.registry import network_kind
from pflow_jax.files.foreign import check_arguments, shown
from pflow_jax.mesh.partition import combine, match, split, without
from pflow_jax.networks.heads import HEADS, Head
from pflow_jax.networks.layers import accumulation_dtype
from pflow_jax.networks.lora import adapted, init_adapters, merge_adapters
from pflow_jax.settings.adapters import AdapterSettings
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Choice

Array = jax.Array
Params = Any

# Settings of a network that have to be above 0, with bounds beyond any network's: some set the length of a loop.
SIZES = {
  **dict.fromkeys(("depth", "single_depth", "num_blocks", "scan_unroll"), 1000),
  **dict.fromkeys(("patch_size", "mlp_ratio", "num_components", "num_coefficients"), 10_000),
  **dict.fromkeys(("width", "num_heads", "head_dim", "model_channels", "channels_per_head"), 1_000_000),
  **dict.fromkeys(("logstd_inner_dim", "text_width", "pooled_width", "time_scale"), 1_000_000),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
COMPUTED = ("remat", "attention", "scan_unroll", "residual_dtype")
"""Options that change a network's computation and leave the network the same."""
OF_FLOW_MAPS = ("late_blocks", "velocity_depth")
"""Options of a network that only a flow map has: the rest of it is its teacher's."""


@dataclasses.dataclass(frozen=True)
class Network:
  """A module and the choice of its parameters that train: all, or adapters and a few layers on a frozen rest.

  Attributes:
    module: called as module(x, t, cond, ...).
    head: its output layer; for a module that makes its own output, the description of that output.
    adapters: low-rank adapters on the frozen rest; without rows everything trains.
    project: projection to apply to the parameters after each update, or None.
  """

  module: nn.Module
  head: Head
  adapters: AdapterSettings = AdapterSettings()
  project: Callable[[Params], Params] | None = None

  def __call__(self, params: Params, x: Array, t: Array, cond: Any, *, key: Array | None = None, **named: Any) -> Any:
    """Output at state x (B, *space, C) and flow time t (B,); `key` switches the adapters' dropout on."""
    rngs = None if key is None else {"dropout": key}

    def apply(x, t, cond):
      with adapted(self.adapters.rows) if self.adapters.table else contextlib.nullcontext():
        return self.module.apply({"params": params}, x, t, cond, rngs=rngs, **named)

    return self.head.field(apply)(x, t, cond)

  def init(self, key: Array, dataset: data.Dataset, **named: Any) -> Params:
    """Makes random parameters of the module, for the data's shapes; `named` as for a call of a batch of 1."""
    x, ones = jnp.zeros((1, *dataset.shape), jnp.float32), jnp.ones((1,))
    cond = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dataset.cond_shapes(1))
    # Attention has no parameters, and a kernel takes a mesh's whole batches.
    module = self.module.clone(attention="xla") if hasattr(self.module, "attention") else self.module
    return module.init(key, x, ones, cond, **named)["params"]

  def shapes(self, dataset: data.Dataset, **named: Any) -> Params:
    """Shapes of the parameters of `init`."""
    return jax.eval_shape(lambda key: self.init(key, dataset, **named), jax.random.key(0))

  @property
  def strength(self) -> float | None:
    """Returns the strength of guidance that a guidance-distilled module is asked for by default, None for any other."""
    return getattr(self.module, "guidance", None)

  @property
  def float32(self) -> Network | None:
    """Returns the same network with float32 as its compute dtype; None if it has that already, or a wider one."""
    dtype = self.module.dtype  # type: ignore[attr-defined]
    if accumulation_dtype(dtype) == dtype:
      return None
    return dataclasses.replace(self, module=self.module.clone(dtype=jnp.float32))

  def trained(self, params: Params, base: Params, key: Array) -> Params:
    """Parameters that train in a network that starts with `params`, in float32 or wider; `base` as in `complete`."""
    if not self.adapters.table:
      return _widened(params)
    return _widened(combine(without(params, self._frozen(base)), init_adapters(params, self.adapters.rows, key)))

  def complete(self, trained: Params, base: Params) -> Params:
    """All parameters: those that train, and the others from `base`, the teacher's. The leaves are not copied."""
    if not self.adapters.table:
      return trained
    return combine(self._frozen(base), trained)

  def merged(self, params: Params) -> Params:
    """All parameters of the plain module, the adapters added to its kernels."""
    return merge_adapters(params, self.adapters.rows) if self.adapters.table else params

  def _frozen(self, base: Params) -> Params:
    # The head of a policy has other layers than its teacher's, some of the same name.
    body = {name: value for name, value in base.items() if name != "head"}
    table = [(pattern, True) for pattern in self.adapters.train] + [(".*", False)]
    return split(body, match(table, body))[1]


def _widened(params: Params) -> Params:
  """Casts parameters to float32 where they are narrower; the others stay the same objects."""
  wide = lambda leaf: accumulation_dtype(leaf.dtype)
  return jax.tree.map(lambda leaf: leaf if leaf.dtype == wide(leaf) else leaf.astype(wide(leaf)), params)


def make_network(
  model: Choice, head: Choice, dataset: data.Dataset, adapters: AdapterSettings = AdapterSettings()
) -> Network:
  """Makes the network of the sections `model`, `head` and `adapters`, for the data's channels and conditions.

  Args:
    model: kind of the module, and its attributes.
    head: kind of the output layer, and its attributes.
    dataset: its data.
    adapters: choice of the parameters that train; by default all.

  Raises:
    ValueError: an unknown name, an option that does not fit, or data that the network cannot take.
  """
  kind, owner = network_kind(model.kind), head_class(head)
  for section, made, choice in (("model", kind.module, model), ("head", owner, head)):
    given = {key: value for key, value in choice.options.items() if value is not None}
    for key, value in check_arguments(made, given, where=f"config.{section}").items():
      if key in SIZES and not (0 if key == "num_blocks" else 1) <= value <= SIZES[key]:
        raise ValueError(f"config.{section}.{key}: expected > 0 and at most {SIZES[key]:,}, got {value}")
  for key in ("dtype", "residual_dtype"):
    if model.get(key, "float32") not in DTYPES:
      raise ValueError(f"config.model.{key}: expected one of {DTYPES}, got {model.get(key)!r}")
  if not kind.has_head and owner.has_policy:
    raise ValueError(
      f"config.head.kind: the network {model.kind!r} has an output layer of its own, which makes a velocity, expected "
      f"{[name for name, other in HEADS.items() if not other.has_policy]}, got {head.kind!r}"
    )
  size = kind.of_data(model.kind, dataset.name, dataset.shape[-1], dataset.num_classes, dataset.cond_shapes(1))
  patch = model.get("patch_size", kind.defaults.get("patch_size", 1))
  sizes = {"channels": size["channels"], "patch_size": patch, "layout": kind.layout, "use_bias": True}
  output = call(owner, "head", head.options, **sizes)
  own = {"head": output} if kind.has_head else {}
  return Network(call(kind.module, "model", model.options, **own, **size), output, adapters, kind.project)


def own_strength(model: Choice) -> float | None:
  """Returns the same as `Network.strength`, of the section `model` of a config."""
  return {**network_kind(model.kind).defaults, **model.options}.get("guidance")


def head_class(head: Choice) -> type[Head]:
  """Returns the class of a head.

  Raises:
    ValueError: there is no head of that name.
  """
  if not isinstance(head.kind, str) or head.kind not in HEADS:
    raise ValueError(f"config.head.kind: expected one of {sorted(HEADS)}, got {shown(head.kind)}")
  return HEADS[head.kind]


def velocity_of(network: Network, params: Params, guidance: Any = None) -> Callable[[Array, Array, Any], Array]:
  """Returns a network with a velocity head as a velocity field (x, t, cond) -> v.

  Args:
    network: the network.
    params: its parameters.
    guidance: strength that is its input, a number or one an example (B,); None is that of `Network.strength`.
  """

  def field(x: Array, t: Array, cond: Any) -> Array:
    named = {} if guidance is None else {"guidance": jnp.broadcast_to(guidance, t.shape).astype(t.dtype)}
    return network(params, x, t, cond, **named)

  return field
