"""Floating-point operations of a traced function, counted where loops still have their lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax.mesh.chips import Chip
from pflow_jax.networks.flash_jvp import products


def count_flops(jaxpr: Any, passes: Mapping[str, int] | None = None) -> int:
  """Operations of the matrix products and convolutions of a jaxpr; a multiply-add counts 2.

  XLA's own cost analysis counts the body of a loop once; here a scan counts its length.

  Args:
    jaxpr: a ClosedJaxpr, such as `jax.jit(f).trace(*args).jaxpr`.
    passes: numbers of bfloat16 operations that one of float32 counts as, by the name of its precision; none is 1.

  Returns:
    operations of the whole (global) computation. A while loop counts one iteration, a cond its largest branch, a Pallas
      kernel once for each step of its grid, elementwise work nothing. With `passes`, flash_jvp's products of precision
      "high" count as such, though its kernels on a TPU take the highest.
  """
  return sum(_equation(eqn, passes or {}) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def compute_seconds(jaxpr: Any, chip: Chip) -> float:
  """Seconds that one chip's units for products take at their peak rates for the operations of a jaxpr."""
  return count_flops(jaxpr, chip.float32_passes) / chip.peak_flops


def _equation(eqn, passes: Mapping[str, int]) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    count = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
    return count * _passes(eqn, params["precision"], passes)
  if name == "conv_general_dilated":
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
    count = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs
    return count * _passes(eqn, params["precision"], passes)
  if name.startswith("flash_jvp"):  # its kernels are there when it is compiled
    q, k = (x.aval.shape for x in eqn.invars[:2])
    count = 2 * products(name, len(eqn.invars)) * math.prod(q) * k[1]
    return count * _passes(eqn, params["options"].precision, passes)
  inner = [count_flops(sub, passes) for sub in _subjaxprs(params)]
  if name == "cond":
    return max(inner, default=0)
  repeats = 1
  if name == "scan":
    repeats = params["length"]
  elif name == "shard_map":
    repeats = params["mesh"].size
  elif name == "pallas_call":
    repeats = math.prod(params["grid_mapping"].grid)
  return repeats * sum(inner)


def _passes(eqn, precision: Any, passes: Mapping[str, int]) -> int:
  """Operations that one operation of a product counts as."""
  if eqn.invars[0].aval.dtype != jnp.float32:
    return 1
  one = precision[0] if isinstance(precision, tuple) else precision
  return passes.get((one or jax.lax.Precision.DEFAULT).name, 1)


def _subjaxprs(params):
  leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
  return [leaf for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
