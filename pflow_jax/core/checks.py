"""Checks of a user's functions and settings: wrong shapes and types, numbers that are not finite.

The functions are checked while they are traced, so a compiled program pays nothing. Left alone, JAX would broadcast a
velocity (B, 1) over a state (B, 2) without a word.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def described(value: Any) -> str:
  """Says in words what a function returned: "float32[8, 2]", "a tuple of 2", "None"."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"{value.dtype}{list(value.shape)}"
  if isinstance(value, (tuple, list)):
    return f"a {type(value).__name__} of {len(value)} ({', '.join(map(described, value[:3]))})"
  if isinstance(value, Mapping):
    return f"a dict with the keys {', '.join(sorted(map(str, value)))}"
  return "None" if value is None else f"a {type(value).__name__}"


def check_returned(what: str, value: Any, like: Array) -> Array:
  """Returns the array that a function returned, in the dtype of `like`.

  Args:
    what: the function with its arguments, for the message.
    value: must be one floating array of the shape of `like`, in its dtype or a narrower one.

  Raises:
    ValueError: the value does not fit; the message says what was expected and what was got.
  """
  fits = hasattr(value, "dtype") and tuple(value.shape) == like.shape and jnp.issubdtype(value.dtype, jnp.floating)
  if not fits or jnp.promote_types(value.dtype, like.dtype) != like.dtype:
    raise ValueError(
      f"{what}: expected one array {described(like)}, the shape of x and its dtype or a narrower one, got "
      f"{described(value)}"
    )
  return jnp.asarray(value, like.dtype)


def checked(what: str, function: Callable[..., Array]) -> Callable[..., Array]:
  """Returns `function` of (x, ...) with its value checked against x, see `check_returned`.

  Args:
    what: its caller and its role, such as "imitation_loss: teacher(x, t, cond)".
    function: returns an array like x.

  Raises:
    ValueError: it is no function.
  """
  check_callable(what, function)

  @functools.wraps(function)
  def run(x: Array, *args: Any) -> Array:
    return check_returned(what, function(x, *args), x)

  return run


def checked_student(what: str, student: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `student` of (x, t, cond) with its batch of policies checked.

  A batch of policies is a pytree whose arrays have the batch axis of x in front, and a policy's velocity at a state is
  an array like that state. The returned function raises ValueError for anything else.

  Raises:
    ValueError: `student` is no function.
  """
  check_callable(what, student)

  @functools.wraps(student)
  def run(x: Array, t: Array, cond: Any) -> Any:
    policy = student(x, t, cond)
    if not callable(getattr(policy, "velocity", None)):
      raise ValueError(
        f"{what}: expected a batch of policies, such as jax.vmap(GMFlowPolicy.create) makes, got {described(policy)}"
      )
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(policy)}
    if sizes - {x.shape[:1]}:
      raise ValueError(
        f"{what}: expected policies for a batch of {x.shape[0]}, every array with that leading axis, got leading axes "
        f"{sorted(sizes)}; create them with jax.vmap"
      )
    v = jax.eval_shape(jax.vmap(lambda p, x, t: p.velocity(x, t)), policy, x, t)
    check_like(f"{what}: {type(policy).__name__}.velocity(x, t)", v, x)
    return policy

  return run


def check_like(what: str, value: Any, like: Array) -> None:
  """Raises ValueError unless `value`, an array or its description, has the shape of `like`."""
  if getattr(value, "shape", None) != like.shape:
    raise ValueError(f"{what}: expected {described(like)}, the shape of x, got {described(value)}")


def check_callable(what: str, function: Any) -> None:
  """Raises ValueError unless `function` can be called."""
  if not callable(function):
    raise ValueError(f"{what}: expected a function, got {described(function)}")


def check_shape(name: str, array: Array, expected: tuple[int, ...], why: str) -> None:
  """Raises ValueError unless `array` has the shape `expected`."""
  if tuple(array.shape) != tuple(expected):
    raise ValueError(f"{name}: expected shape {tuple(expected)} ({why}), got {tuple(array.shape)}")


def check_range(name: str, value, low: float, high: float, *, open_low: bool = False) -> None:
  """Raises ValueError when a *known* `value` lies outside [low, high]; traced values pass."""
  if isinstance(value, jax.core.Tracer):
    return
  value = np.asarray(value)  # NumPy: under jit, jnp would trace the comparison
  below = value <= low if open_low else value < low
  if np.any(below | (value > high) | np.isnan(value)):
    bracket = "(" if open_low else "["
    raise ValueError(f"{name}: expected a value in {bracket}{low}, {high}], got {value}")


def check_names(settings: Any, **allowed: tuple[str, ...]) -> None:
  """Raises ValueError for the first of these settings that is none of the names that are allowed for it."""
  for name, names in allowed.items():
    if getattr(settings, name) not in names:
      raise ValueError(f"{name}: expected one of {names}, got {getattr(settings, name)!r}")


def check_finite(settings: Any) -> None:
  """Raises ValueError for the first number of a dataclass, or of a tuple in it, that is infinite or NaN."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    for number in value if isinstance(value, tuple) else (value,):
      if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{field.name}: expected a finite number, got {value}")
