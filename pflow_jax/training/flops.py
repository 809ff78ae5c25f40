"""Floating-point operations of a traced function, counted where loops still have their lengths."""

from __future__ import annotations

import math
from typing import Any

import jax

from pflow_jax.networks.flash_jvp import products


def count_flops(jaxpr: Any) -> int:
  """Operations of the matrix products and convolutions of a jaxpr; a multiply-add counts 2.

  XLA's own cost analysis counts the body of a loop once; here a scan counts its length.

  Args:
    jaxpr: a ClosedJaxpr, such as `jax.jit(f).trace(*args).jaxpr`.

  Returns:
    operations of the whole (global) computation. A while loop counts one iteration, a cond its largest branch, a Pallas
      kernel once for each step of its grid, elementwise work nothing.
  """
  return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
  if name == "conv_general_dilated":
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs
  if name.startswith("flash_jvp"):  # its kernels are there when it is compiled
    q, k = (x.aval.shape for x in eqn.invars[:2])
    return 2 * products(name, len(eqn.invars)) * math.prod(q) * k[1]
  inner = [count_flops(sub) for sub in _subjaxprs(params)]
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


def _subjaxprs(params):
  leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
  return [leaf for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
