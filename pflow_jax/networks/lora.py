"""Low-rank adapters (LoRA) on the Dense layers of a network, which needs no code for them.

A table, a sequence of `Adapter`, names the layers; the first row that matches a layer's path decides. The new leaves
"lora_a" and "lora_b" lie beside the layer's "kernel", and `adapted` makes the layer use them:

    params = combine(params, init_adapters(params, table, key))
    with adapted(table):
      out = network.apply({"params": params}, x, t, cond)

References:
  LoRA, arXiv:2106.09685; the released students of pi-Flow (rank = alpha = 256, dropout 0.05).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from pflow_jax.files.nearest import nearest
from pflow_jax.mesh.partition import first_match
from pflow_jax.mesh.sharding import gather
from pflow_jax.networks.layers import accumulation_dtype
from pflow_jax.settings.adapters import Adapter

Params = dict[str, Any]

# Placement of the adapters on a mesh, see `mesh.sharding.Layout`.
SHARDING = ((".*/lora_a", ("fsdp", None)), (".*/lora_b", (None, "fsdp")))


Table = Sequence[Adapter]


def init_adapters(params: Mapping[str, Any], table: Table, key: jax.Array) -> Params:
  """Makes the new leaves alone, nested like `params`; they do not change the network's output at the start.

  A kernel (..., in, out) gets "lora_a" (..., in, rank), normal with standard deviation 1 / rank, and "lora_b"
  (..., rank, out), zeros; float32. Leading axes are those of nn.scan: every depth has its own draw. A layer's draw
  depends on `key` and on the layers of `params`, not on the table's other rows.

  Raises:
    ValueError: a row takes no layer, or a rank is above min(in, out).

  References:
    The release's LoraConfig(init_lora_weights="gaussian"), which in huggingface/peft, tuners/lora/layer.py,
      reset_lora_parameters, is normal_(std=1 / r): the rank divides the deviation, not the variance.
  """
  flat = flatten_dict(params)
  layers = sorted(keys[:-1] for keys, value in flat.items() if keys[-1] == "kernel" and value.ndim >= 2)
  paths = ["/".join(layer) for layer in layers]
  rows = [first_match((adapter.pattern for adapter in table), path) for path in paths]
  for i, adapter in enumerate(table):
    if i not in rows:
      near = nearest(adapter.pattern, paths, 3) or paths
      raise ValueError(
        f"adapter {adapter.pattern!r}: expected a pattern for the whole path of a layer that no earlier row takes, "
        f"got none; near: {near}"
      )
  new = {}
  for i, (layer, path, row) in enumerate(zip(layers, paths, rows, strict=True)):
    if row is None:
      continue
    rank, shape = table[row].rank, flat[(*layer, "kernel")].shape
    if rank > min(shape[-2:]):
      raise ValueError(
        f"adapter {table[row].pattern!r}: expected rank <= min(in, out) of layer {path!r} {shape[-2:]}, got {rank}; "
        "lower it, or train the layer itself"
      )
    draw = jax.random.normal(jax.random.fold_in(key, i), (*shape[:-1], rank), jnp.float32)
    new[(*layer, "lora_a")] = draw / rank
    new[(*layer, "lora_b")] = jnp.zeros((*shape[:-2], rank, shape[-1]), jnp.float32)
  return unflatten_dict(new)


def _adapter_of(table: Table, path: str, rank: int) -> Adapter:
  """Finds the row of a layer that has adapter leaves of `rank`.

  Raises:
    ValueError: the table has none for it.
  """
  row = first_match((adapter.pattern for adapter in table), path)
  if row is None or table[row].rank != rank:
    got = "no row for it" if row is None else f"rank {table[row].rank} in row {table[row].pattern!r}"
    raise ValueError(
      f"layer {path!r} has an adapter of rank {rank}: expected the table it was made with, got {got}; "
      "use that table, or merge_adapters first"
    )
  return table[row]


def adapted(table: Table) -> contextlib.AbstractContextManager[None]:
  """Context in which apply of any network uses the adapters among its parameters.

  A Dense layer with "lora_a" returns x W + b + scale * (drop(x) A) B, in the layer's own compute dtype; A B is never
  formed. Dropout engages where the rng collection "dropout" reaches the layer: training gives apply
  rngs={"dropout": key}, and an nn.scan split_rngs={"dropout": True}.

  Raises:
    ValueError: on apply, for an adapter of another table, or on a layer that is not an nn.Dense.
  """

  def interceptor(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    layer = context.module
    y = call(*args, **kwargs)
    if context.method_name != "__call__" or not layer.has_variable("params", "lora_a"):
      return y
    path = "/".join(layer.path)
    if not isinstance(layer, nn.Dense):
      raise ValueError(f"layer {path!r} has an adapter: expected an nn.Dense, got {type(layer).__name__}")
    a: jax.Array = gather(layer.get_variable("params", "lora_a"), "fsdp", None)
    b: jax.Array = gather(layer.get_variable("params", "lora_b"), None, "fsdp")
    adapter = _adapter_of(table, path, a.shape[-1])
    x, a, b = (jnp.asarray(value, y.dtype) for value in (*args, *kwargs.values(), a, b))
    if adapter.dropout and layer.has_rng("dropout"):
      kept = jax.random.bernoulli(layer.make_rng("dropout"), 1 - adapter.dropout, x.shape)
      x = jnp.where(kept, x / (1 - adapter.dropout), 0)
    low = jnp.matmul(x, a, precision=layer.precision)
    return y + adapter.scale * jnp.matmul(low, b, precision=layer.precision)

  return nn.intercept_methods(interceptor)


def merge_adapters(params: Mapping[str, Any], table: Table) -> Params:
  """Makes the parameters of the plain network: kernels W + scale * A B, without the adapters' leaves.

  The sum is made in float32 (or wider) at the highest precision and kept in the kernel's dtype; all other leaves are
  the same objects.

  Raises:
    ValueError: an adapter is of another table.
  """
  flat = flatten_dict(params)
  merged = {keys: value for keys, value in flat.items() if keys[-1] not in ("lora_a", "lora_b")}
  for (*layer, name), a in flat.items():
    if name == "lora_a":
      kernel, b = flat[(*layer, "kernel")], flat[(*layer, "lora_b")]
      adapter = _adapter_of(table, "/".join(layer), a.shape[-1])
      wide = accumulation_dtype(kernel.dtype)
      update = jnp.matmul(jnp.asarray(a, wide), jnp.asarray(b, wide), precision=jax.lax.Precision.HIGHEST)
      merged[(*layer, "kernel")] = (jnp.asarray(kernel, wide) + adapter.scale * update).astype(kernel.dtype)
  return unflatten_dict(merged)
