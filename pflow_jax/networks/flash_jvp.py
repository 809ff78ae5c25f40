"""Attention with a forward derivative, `flash_jvp`, whose memory is linear in the tokens; for TPUs and GPUs.

JAX lets a function have a rule for its forward derivative or one for its reverse derivative, and a kernel needs both:
`jax.jvp` shall compute the output and its tangent in one pass over the keys, and `jax.grad` shall keep the output
alone, whether a jvp was taken beside it or not. So these are primitives with rules of their own:

* `flash_jvp`: output and log-sum-exp, and with tangents the output's tangent. Its jvp takes tangents along. Where
  tangents are unknown while values are known (`jax.grad`, `jax.linearize`, remat), it is the values alone and
* `flash_jvp_linear`: the tangent alone, a linear function of tangents, whose transpose is
* `flash_jvp_backward`: the cotangents.
* `flash_jvp_refused`: the derivative of a tangent. The objectives detach the tangent, and nobody asks for it; who does
  is told. An operation by itself does not know whether its result will be used: so outside of `jax.jit`, which drops
  what is not, a jvp of a jvp is refused even where its caller wants the value alone.

Nothing computes a tangent that is not used: what remat computes again is the output alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from pflow_jax.networks import flash_kernels
from pflow_jax.networks.flash_steps import Options

Array = jax.Array

SECOND = (
  'config.model.attention: "flash_jvp" has no derivative of its forward derivative; put jax.lax.stop_gradient around '
  'the tangent that jax.jvp returns, or set config.model.attention to "xla"'
)
SECOND_AT_ONCE = f"{SECOND}; outside jax.jit also where nothing uses it, which cannot be known there: use jax.jit"


def flash_jvp(q: Array, k: Array, v: Array, mask: Array | None = None, *, gpu_kernel: bool = False) -> Array:
  """Full attention, softmax in float32 (or wider), with jvp and grad, and with grad of what contains a jvp.

  On a CPU it runs in Pallas' interpreter, which is slow. A zero tangent costs as much as any. Products of float32 are
  as precise as `jax.default_matmul_precision` asks, or more: TPUs' kernels know "default" and "highest" alone.

  Args:
    q: queries, (B, T, H, D).
    k: keys, (B, S, H, D).
    v: values, (B, S, H, D).
    mask: True for the keys that are attended to, (B, S) bool, at least one an example; None is all.
    gpu_kernel: on a CPU, interpret the GPU's kernels instead of the TPU's.

  Returns:
    (B, T, H, D) in the dtype of `q`.

  Raises:
    ValueError: for a second forward derivative, or a derivative of the forward one.

  References:
    `networks.flash_steps`.
  """
  options = Options(_precision(), gpu_kernel)
  k, v = k.astype(q.dtype), v.astype(q.dtype)
  return attend_p.bind(q, k, v, *(() if mask is None else (mask,)), options=options)[0]


def _precision() -> jax.lax.Precision:
  """Returns the precision that JAX's products have by default; for an algorithm, which kernels lack, the highest."""
  name = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  try:
    return jax.lax.Precision(name)
  except ValueError:
    return jax.lax.Precision.HIGHEST


def products(name: str, operands: int) -> int:
  """Number of matrix products of T x S x D that a primitive makes for each head.

  Args:
    name: the primitive's.
    operands: how many it has.
  """
  with_tangents = 6 if operands >= 6 else 2
  return {"flash_jvp": with_tangents, "flash_jvp_linear": 6, "flash_jvp_backward": 7}.get(name, 0)


def _split(rest: Sequence[Any], count: int) -> tuple[Sequence[Any], tuple[Any, ...]]:
  """Separates so many operands from the mask behind them, which may be none."""
  return rest[:count], tuple(rest[count:])


def _mask(rest: Sequence[Any]) -> Any:
  return rest[0] if rest else None


# What the primitives do. Their operands are q, k and v, more arrays, and the mask if there is one.


def _attend(q: Array, k: Array, v: Array, *rest: Array, options: Options) -> tuple[Array, ...]:
  """(*tangents) -> O, log-sum-exp, and dO where there are tangents."""
  tangents, mask = _split(rest, 3 if len(rest) >= 3 else 0)
  return flash_kernels.attend(q, k, v, _mask(mask), tangents, options)


def _linear(q: Array, k: Array, v: Array, *rest: Array, options: Options) -> tuple[Array, ...]:
  """(O, log-sum-exp, *tangents) -> dO."""
  (_, _, *tangents), mask = _split(rest, 5)
  return flash_kernels.attend(q, k, v, _mask(mask), tangents, options)[2:]


def _backward(q: Array, k: Array, v: Array, *rest: Array, options: Options) -> tuple[Array, ...]:
  """(O, log-sum-exp, cotangent of O) -> cotangents of q, k and v."""
  (out, lse, cotangent), mask = _split(rest, 3)
  return flash_kernels.backward(q, k, v, _mask(mask), out, lse, cotangent, options)


def _refused(*_: Any, **__: Any) -> Any:
  """(*tangents) -> the tangent of dO, which is nowhere."""
  raise ValueError(SECOND)


def _refused_at_once(*_: Any, **__: Any) -> Any:
  raise ValueError(SECOND_AT_ONCE)


def _shapes_of_attend(q: Any, k: Any, v: Any, *rest: Any) -> list[Any]:
  batch, tokens, heads, _ = q.shape
  lse = jax.core.ShapedArray((batch, heads, tokens), jnp.promote_types(q.dtype, jnp.float32))
  return [_like(q), lse, *([_like(q)] if len(rest) >= 3 else [])]


def _like(a: Any) -> Any:
  return jax.core.ShapedArray(a.shape, a.dtype)


@functools.partial(jax.jit, static_argnames=("primitive", "options"))
def _eager(*operands: Array, primitive: Any, options: Options) -> Any:
  return primitive.bind(*operands, options=options)


def _primitive(name: str, function: Any, shapes: Any) -> Any:
  """Makes a primitive, with its results, its lowering for each platform, and its batching."""
  primitive = Primitive(name)
  primitive.multiple_results = True
  primitive.def_abstract_eval(lambda *operands, options: shapes(*operands))
  primitive.def_impl(_refused_at_once if function is _refused else functools.partial(_eager, primitive=primitive))
  for platform in ("tpu", "cuda", "cpu"):

    def run(*operands, options, platform=platform):
      own = dict(gpu=platform == "cuda" or (platform == "cpu" and options.gpu), interpret=platform == "cpu")
      return function(*operands, options=dataclasses.replace(options, **own))

    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True), platform=platform)

  def batched(operands, axes, **params):
    """Every operand and result has examples on its first axis: those of the new axis are more of them."""
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
    rows = (
      jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
      for a, axis in zip(operands, axes, strict=True)
    )
    results = primitive.bind(*(a.reshape(-1, *a.shape[2:]) for a in rows), **params)
    return [a.reshape(size, -1, *a.shape[1:]) for a in results], [0] * len(results)

  batching.primitive_batchers[primitive] = batched
  return primitive


attend_p = _primitive("flash_jvp", _attend, _shapes_of_attend)
linear_p = _primitive("flash_jvp_linear", _linear, lambda q, *_: [_like(q)])
backward_p = _primitive("flash_jvp_backward", _backward, lambda q, k, v, *_: [_like(q), _like(k), _like(v)])
refused_p = _primitive("flash_jvp_refused", _refused, lambda q, *_: [_like(q)])


# Their derivatives.


def _is_zero(tangent: Any) -> bool:
  return isinstance(tangent, ad.Zero)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, options: Options) -> tuple[list[Any], list[Any]]:
  """Derivative of `attend_p`: along tangents of q, k and v where it has none, else of both its results."""
  qkv, rest, along = primals[:3], primals[3:], tangents[:3]
  if len(rest) < 3:
    out, lse, dout = attend_p.bind(*qkv, *_instantiated(along), *rest, options=options)
    return [out, lse], [dout, _no_tangent(lse)]
  _, mask = _split(rest, 3)
  out, lse, dout = attend_p.bind(*primals, options=options)
  first = _no_tangent(out)
  if not all(map(_is_zero, along)):
    first = linear_p.bind(*qkv, out, lse, *_instantiated(along), *mask, options=options)[0]
  (second,) = refused_p.bind(*_instantiated(along), *_instantiated(tangents[3:6]), options=options)
  return [out, lse, dout], [first, _no_tangent(lse), second]


def _instantiated(tangents: Sequence[Any]) -> list[Any]:
  return [ad.instantiate_zeros(t) for t in tangents]


def _no_tangent(value: Any) -> Any:
  return ad.Zero(jax.typeof(value).to_tangent_aval())


def _transpose_linear(cotangents: Sequence[Any], *operands: Any, options: Options) -> list[Any]:
  (cotangent,) = cotangents
  q, k, v, *rest = operands
  (out, lse, *tangents), mask = _split(rest, 5)
  results: Sequence[Any] = [None] * 3
  if not _is_zero(cotangent):
    found = backward_p.bind(q, k, v, out, lse, cotangent, *mask, options=options)
    results = [a if ad.is_undefined_primal(t) else None for t, a in zip(tangents, found, strict=True)]
  return [None] * 5 + list(results) + [None] * len(mask)


def _transpose_refused(cotangents: Sequence[Any], *operands: Any, options: Options) -> list[Any]:
  return [None] * len(operands) if all(map(_is_zero, cotangents)) else _refused()


ad.primitive_jvps[attend_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose_linear
ad.primitive_transposes[refused_p] = _transpose_refused
for _other in (linear_p, backward_p, refused_p):
  ad.primitive_jvps[_other] = _refused


# What is known of values whose tangents are not, and what of all that is used.


def _has_tangents(operands: Sequence[Any]) -> bool:
  return len(operands) >= 6


def _without_tangents(operands: Sequence[Any]) -> list[Any]:
  return [*operands[:3], *operands[6:]]


def _known(trace: Any, *tracers: Any, options: Options) -> Any:
  """Partial evaluation: the values by themselves where they are known, and then the tangent."""
  values = _without_tangents(tracers)
  unknown = [t for t in tracers if not t.is_known()]
  if not _has_tangents(tracers) or not unknown or any(not t.is_known() for t in values):
    return trace.default_process_primitive(attend_p, tracers, dict(options=options))
  out, lse = attend_p.bind(*(t.pval.get_known() for t in values), options=options)
  q, k, v, *mask = values
  (dout,) = trace.default_process_primitive(linear_p, (q, k, v, out, lse, *tracers[3:6], *mask), dict(options=options))
  return [out, lse, dout]


def _known_of_remat(saveable: Any, unknown: Sequence[bool], there: Sequence[bool], eqn: Any) -> Any:
  """The same under remat; whatever its policy, the backward pass computes again what it needs."""
  missing = [x for x, is_there in zip(eqn.invars, there, strict=True) if not is_there]
  results = len(eqn.outvars)
  if any(_without_tangents(unknown) if _has_tangents(unknown) else unknown):
    return None, eqn, [True] * results, [True] * results, missing
  known = _values_alone(eqn) if any(unknown) else eqn
  return known, eqn, [False, False, *[any(unknown)] * (results - 2)], [True] * results, missing


def _values_alone(eqn: Any) -> Any:
  return eqn.replace(invars=_without_tangents(eqn.invars), outvars=eqn.outvars[:2])


def _used(used: Sequence[bool], *args: Any) -> tuple[list[bool], Any]:
  """Dead code: tangents that only an unused one depends on."""
  eqn = args[-1]  # from JAX 0.12 on behind which operands are live
  operands = len(eqn.invars)
  if not any(used):
    return [False] * operands, None
  if not _has_tangents(eqn.invars) or used[2]:
    return [True] * operands, eqn
  return [i not in (3, 4, 5) for i in range(operands)], _values_alone(eqn)


partial_eval.custom_partial_eval_rules[attend_p] = _known
partial_eval.partial_eval_jaxpr_custom_rules[attend_p] = _known_of_remat
partial_eval.dce_rules[attend_p] = _used
