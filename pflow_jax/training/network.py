"""Networks of a run: what the sections `model`, `policy` and `adapters` of a config make."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax import data
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.files.foreign import check_arguments
from pflow_jax.mesh.partition import combine, match, split, without
from pflow_jax.networks import discriminator, edm2, heads, layers, lora, mmdit
from pflow_jax.networks.denoiser import denoiser_velocity, edm_denoiser
from pflow_jax.networks.dit import DiT
from pflow_jax.networks.edm2 import EDM2UNet, normalize_weights
from pflow_jax.networks.layers import accumulation_dtype
from pflow_jax.networks.lora import Adapter, adapted, init_adapters, merge_adapters
from pflow_jax.networks.mlp import MLP
from pflow_jax.settings.sections import call, choose

Array = jax.Array
Params = Any

MODULES: dict[str, type[nn.Module]] = {
  "dit": DiT,
  "edm2": EDM2UNet,
  "flux": Flux,
  "mlp": MLP,
  "qwen_image": QwenImage,
}
HEADS: dict[str, type[heads.Head]] = {
  "velocity": heads.VelocityHead,
  "gmflow": heads.GMFlowHead,
  "dx": heads.DXHead,
  "arc": heads.ArcHead,
}

# Where the parameters of all of them lie on a mesh, see `sharding.Layout`; the first row that matches decides.
SHARDING = (
  *discriminator.SHARDING,
  *heads.SHARDING,
  *lora.SHARDING,
  *edm2.SHARDING,
  *mmdit.SHARDING,
  *layers.SHARDING,
)

VELOCITIES = ("velocity", "denoiser")  # policies of a teacher and of a flow map
# Settings of a network that are above 0, and what is more than any network has: some are walked one by one.
SIZES = {
  **dict.fromkeys(("depth", "single_depth", "num_blocks", "scan_unroll"), 1000),
  **dict.fromkeys(("patch_size", "mlp_ratio", "num_components", "num_coefficients"), 10_000),
  **dict.fromkeys(("width", "num_heads", "head_dim", "model_channels", "channels_per_head"), 1_000_000),
  **dict.fromkeys(("logstd_inner_dim", "text_width", "pooled_width", "time_scale"), 1_000_000),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
  """The section `adapters` of a config: low-rank adapters on a frozen teacher; without rows everything trains.

  Attributes:
    table: rows (pattern, rank, alpha, dropout) or shorter, see `models.lora.Adapter`.
    train: patterns of the teacher's parameters that train in full beside the adapters and the output layers ("head"),
      which always do.
  """

  table: tuple[tuple[Any, ...], ...] = ()
  train: tuple[str, ...] = ("final_norm/.*",)

  def __post_init__(self):
    if not all(isinstance(row, Sequence) and not isinstance(row, str) and 2 <= len(row) <= 4 for row in self.table):
      raise ValueError(
        f"table: expected rows (pattern, rank, alpha, dropout), the last two optional, got {self.table!r}; quote "
        "patterns within quotes on the shell"
      )

  @property
  def rows(self) -> tuple[Adapter, ...]:
    return tuple(Adapter(*row) for row in self.table)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """The policy "denoiser": a network in EDM's preconditioning, whose velocity is that of its denoised image.

  What a teacher of EDM or EDM2 is; a flow map of it is one too. Attributes: see `models.denoiser`.
  """

  sigma_data: float = 0.5
  max_sigma: float = 80.0
  min_sigma: float = 0.002


@dataclasses.dataclass(frozen=True)
class Network:
  """A module, and which of its parameters train: all, or adapters and a few layers on a frozen rest.

  Attributes:
    denoiser: what turns the module's output in a velocity, if that is not what it returns.
  """

  module: nn.Module
  adapters: AdapterSettings = AdapterSettings()
  denoiser: Denoiser | None = None

  def __call__(self, params: Params, x: Array, t: Array, cond: Any, *, key: Array | None = None, **named: Any) -> Any:
    """Output at state x (B, *space, C) and flow time t (B,); `key` switches the adapters' dropout on."""
    rngs = None if key is None else {"dropout": key}

    def apply(x, t, cond):
      with adapted(self.adapters.rows) if self.adapters.table else contextlib.nullcontext():
        return self.module.apply({"params": params}, x, t, cond, rngs=rngs, **named)

    if self.denoiser is None:
      return apply(x, t, cond)
    # The modules take flow time, whose logit is log sigma.
    denoise = edm_denoiser(
      lambda x, c_noise, cond: apply(x, jax.nn.sigmoid(4 * c_noise), cond), self.denoiser.sigma_data
    )
    return denoiser_velocity(denoise, self.denoiser.max_sigma, self.denoiser.min_sigma)(x, t, cond)

  def init(self, key: Array, dataset: data.Dataset, **named: Any) -> Params:
    """Random parameters of the module, for the data's shapes; `named` as for a call of a batch of 1."""
    x, ones = jnp.zeros((1, *dataset.shape), jnp.float32), jnp.ones((1,))
    cond = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dataset.cond_shapes(1))
    return self.module.init(key, x, ones, cond, **named)["params"]

  def shapes(self, dataset: data.Dataset) -> Params:
    """Shapes of what `init` makes."""
    return jax.eval_shape(lambda key: self.init(key, dataset), jax.random.key(0))

  @property
  def float32(self) -> Network | None:
    """The same network that computes in float32; None if it does already."""
    if jnp.dtype(self.module.dtype) == jnp.float32:  # type: ignore[attr-defined]
      return None
    return dataclasses.replace(self, module=self.module.clone(dtype=jnp.float32))

  @property
  def project(self) -> Callable[[Params], Params] | None:
    """What brings parameters back where the module wants them after an update, if it wants that."""
    return normalize_weights if isinstance(self.module, EDM2UNet) else None

  def trained(self, params: Params, base: Params, key: Array) -> Params:
    """What trains of a network that starts with `params`, in float32 or wider; `base` as in `complete`."""
    if not self.adapters.table:
      return _widened(params)
    return _widened(combine(without(params, self._frozen(base)), init_adapters(params, self.adapters.rows, key)))

  def complete(self, trained: Params, base: Params) -> Params:
    """All parameters: those that train, and of `base`, the teacher's, those that do not. The leaves are not copied."""
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
  """Parameters in float32 or wider; those that are so already are the same objects."""
  wide = lambda leaf: accumulation_dtype(leaf.dtype)
  return jax.tree.map(lambda leaf: leaf if leaf.dtype == wide(leaf) else leaf.astype(wide(leaf)), params)


def make_network(
  model: Mapping[str, Any],
  policy: Mapping[str, Any],
  dataset: data.Dataset,
  adapters: AdapterSettings = AdapterSettings(),
) -> Network:
  """The network that `config.model`, `config.policy` and `config.adapters` describe."""
  denoiser = None
  if policy.get("kind") == "denoiser":
    denoiser = call(Denoiser, "policy", {key: value for key, value in policy.items() if key != "kind"})
    policy = {"kind": "velocity"}
  return Network(make_module(model, policy, dataset), adapters, denoiser)


def make_module(model: Mapping[str, Any], policy: Mapping[str, Any], dataset: data.Dataset) -> nn.Module:
  """The module that `config.model` and `config.policy` describe, for the data's channels and classes."""
  module, model_values = choose(MODULES, "model", model)
  head, head_values = choose(HEADS, "policy", policy)
  for section, owner, values in (("model", module, model_values), ("policy", head, head_values)):
    set_values = {key: value for key, value in values.items() if value is not None}
    for key, value in check_arguments(owner, set_values, where=f"config.{section}").items():
      if key in SIZES and not (0 if key == "num_blocks" else 1) <= value <= SIZES[key]:
        raise ValueError(f"config.{section}.{key}: expected > 0 and at most {SIZES[key]:,}, got {value}")
  if model_values.get("dtype", "float32") not in DTYPES:
    raise ValueError(f"config.model.dtype: expected one of {DTYPES}, got {model_values['dtype']!r}")
  channels, cond = dataset.shape[-1], dataset.cond_shapes(1)
  has_text = isinstance(cond, Mapping)
  if has_text != (module in (Flux, QwenImage)) and module is not DiT:
    raise ValueError(
      f"config.model.kind: {model['kind']!r} is conditioned on {'classes' if has_text else 'texts'}, the data set "
      f"{dataset.name} has {'texts' if has_text else 'none'}"
    )
  size: dict[str, Any] = dict(channels=channels) | (
    {} if module in (Flux, QwenImage) else dict(num_classes=dataset.num_classes)
  )
  if module is DiT and has_text:
    if "pooled" not in cond:
      raise ValueError(
        f"config.model.kind: 'dit' is conditioned on one vector a text, {dataset.name} has {sorted(cond)}; write it "
        "with `pflow cache --model minilm`"
      )
    size["pooled_width"] = cond["pooled"].shape[-1]
  if module is EDM2UNet:
    if head is not heads.VelocityHead:
      raise ValueError(
        "config.policy.kind: the network 'edm2' has an output layer of its own, expected 'velocity', got "
        f"{policy['kind']!r}"
      )
    return call(module, "model", model_values, **size)
  head_module = call(
    head,
    "policy",
    head_values,
    channels=channels,
    patch_size=model_values.get("patch_size") or module_defaults(model).get("patch_size", 1),
    layout="flux" if module in (Flux, QwenImage) else "dit",
    use_bias=True,
  )
  return call(module, "model", model_values, head=head_module, **size)


def module_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of the section `model` that its module has defaults for, and these."""
  kind = model.get("kind")
  fields = dataclasses.fields(MODULES[kind]) if isinstance(kind, str) and kind in MODULES else ()  # type: ignore[arg-type]
  return {
    field.name: field.default
    for field in fields
    if field.default is not dataclasses.MISSING and field.name not in ("parent", "name", "channels", "dtype", "head")
  }


def velocity_of(network: Network, params: Params) -> Callable[[Array, Array, Any], Array]:
  """A network with a velocity head as a velocity field (x, t, cond) -> v."""
  return lambda x, t, cond: network(params, x, t, cond)
