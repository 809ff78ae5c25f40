"""Base of the policies: data, and a velocity that costs no network evaluation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_range as check_range
from pflow_jax.core.checks import check_shape as check_shape

Array = jax.Array


class Policy:
  """Base of the policies: immutable pytrees of arrays for *one* sample; batch with `jax.vmap`.

  A policy is predicted by one evaluation of the student at (x_s, t_s) and stands in for the network from there on.
  Integrators and objectives use the attributes and methods of this class and nothing else.
  """

  num_components: int = 0
  """Components of the mixture that `drop` can remove; 0 for a policy that is no mixture."""

  has_closed_form: bool = False
  """Whether `integrate` is available."""

  closed_form_in_release: bool = False
  """Whether the policy's PyTorch release integrates it in closed form; the others take Euler steps."""

  def velocity(self, x: Array, t: Array) -> Array:
    """Velocity dx/dt at state `x` (*space, C) and flow time `t` (); returns (*space, C)."""
    raise NotImplementedError

  def integrate(self, x: Array, t: Array, s: Array) -> Array:
    """Exact solution at flow time `s` <= `t` of dx/dt = velocity(x, t) from `x` (*space, C) at `t`."""
    raise ValueError(f"{type(self).__name__} has no closed-form integral; use method='ab2', 'euler' or 'auto'")

  def drop(self, dropped: Array) -> Policy:
    """The policy without the components marked in `dropped` (num_components,) bool."""
    del dropped
    return self

  def temper(self, temperature: float | Array) -> Policy:
    """The policy with a sharper mixture; policies that are no mixture return themselves."""
    del temperature
    return self


class Mixture(Policy):
  """Base of the policies that mix K components per pixel with log-weights `logits` (K, *pixels)."""

  logits: Array
  t_s: Array

  @property
  def num_components(self) -> int:  # type: ignore[override]
    return self.logits.shape[self.t_s.ndim]  # a batch of policies has its batch axes in front

  def drop(self, dropped: Array) -> Mixture:
    keep = ~dropped | jnp.all(dropped)
    keep = keep.reshape(keep.shape + (1,) * (self.logits.ndim - 1))
    return dataclasses.replace(self, logits=jnp.where(keep, self.logits, -jnp.inf))  # type: ignore[type-var]

  def temper(self, temperature: float | Array) -> Mixture:
    logits = jax.nn.log_softmax(self.logits / temperature, axis=0)
    return dataclasses.replace(self, logits=logits)  # type: ignore[type-var]


def as_float(*arrays) -> list[Array]:
  """Arrays in one floating type, float32 at least: bfloat16 has no room for the 1/t^2 of the formulas."""
  dtype = jnp.result_type(jnp.float32, *[jnp.asarray(a) for a in arrays])
  return [jnp.asarray(a, dtype) for a in arrays]


def check_state(x: Array, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless the state `x` has the shape that a policy was made for."""
  check_shape("x", x, shape, "(*space, C) of the policy; batch both with jax.vmap")


def check_source(x_s: Array, t_s: Array) -> None:
  """Checks the source of a policy: a state with a channel axis and one flow time in (0, 1]."""
  if x_s.ndim < 1:
    raise ValueError("x_s: expected (*space, C) with at least the channel axis, got a scalar")
  check_shape("t_s", t_s, (), "one flow time a policy; batch with jax.vmap")
  check_range("t_s", t_s, 0.0, 1.0, open_low=True)
