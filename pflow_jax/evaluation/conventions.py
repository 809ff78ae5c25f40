"""Conventions that a flow or diffusion model may follow: what its numbers mean as a flow velocity.

On x = (1 - t) x0 + t eps the flow velocity is eps - x0. Models of other conventions have its sign or their time turned,
count time to 1000, predict noise or data, or know data of another scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Array = np.ndarray

TIMES: dict[str, Callable[[Array], Array]] = {
  "t": lambda t: t,
  "1 - t": lambda t: 1 - t,
  "1000 * t": lambda t: 1000 * t,
  "1000 * (1 - t)": lambda t: 1000 * (1 - t),
}


@dataclasses.dataclass(frozen=True)
class Reading:
  """A convention that a function may follow, and the flow velocity that its numbers then mean.

  Attributes:
    kind: of the problem.
    text: what the function is.
    fix: code for it.
    asked: (x, t) -> the state and the time that the function is given.
    meant: (its value, x, t) -> the flow velocity.
  """

  kind: str
  text: str
  fix: str
  asked: Callable[[Array, Array], tuple[Array, Array]]
  meant: Callable[[Array, Array, Array], Array]


def noised(x0: Array, eps: Array, t: Array) -> Array:
  """Returns the states of examples x0 (n, *space, C) at flow times t (n,)."""
  t = over(t, x0)
  return (1 - t) * x0 + t * eps


def over(t: Array, x: Array) -> Array:
  """Returns t (n,) with the axes of x."""
  return np.asarray(t, np.float32).reshape(-1, *[1] * (x.ndim - 1))


def gaussian(x0: Array, x: Array, t: Array) -> Array:
  """Velocity of data that are normal with the mean of x0 and one variance."""
  mean, time = x0.mean(0, keepdims=True), over(t, x)
  variance = np.mean((x0 - mean) ** 2)
  gain = (1 - time) * variance / ((1 - time) ** 2 * variance + time**2)
  return (x - (mean + gain * (x - (1 - time) * mean))) / time


def readings(x0: Array) -> Iterator[Reading]:
  """Yields the conventions that are known, for data x0 (n, *space, C)."""
  space = ", ".join(["-1", *["1"] * (x0.ndim - 1)])
  shaped = f"s = t.reshape({space})"
  meanings: dict[str, tuple[str, str, str, Callable[[Array, Array, Array], Array]]] = {
    "": ("a velocity eps - x0", "{}", "", lambda out, x, t: out),
    "sign": ("a velocity x0 - eps, of the other sign", "-{}", "", lambda out, x, t: -out),
    "noise": (
      "a prediction of the noise",
      "({} - x) / jnp.maximum(1 - s, 1e-3)",
      shaped,
      lambda out, x, t: (out - x) / (1 - over(t, x)),
    ),
    "data": (
      "a prediction of x0",
      "(x - {}) / jnp.maximum(s, 1e-3)",
      shaped,
      lambda out, x, t: (x - out) / over(t, x),
    ),
  }
  for time, change in TIMES.items():
    kinds = ["time scale"] * ("1000" in time) + ["time direction"] * ("1 -" in time)
    for name, (text, code, before, meant) in meanings.items():
      every = kinds + [{"noise": "prediction", "data": "prediction"}.get(name, name)] * bool(name)
      if every:
        fix = code_of(code.format(f"velocity(x, {time}, cond)"), before)
        asked = lambda x, t, change=change: (x, change(t))
        told = "; ".join([f"it is {text}"] * bool(name) + [f"its time is {time}"] * bool(kinds))
        yield Reading(" and ".join(every), told, fix, asked, meant)
  yield Reading(
    "prediction",
    "it is a denoiser of EDM, of x0 + sigma eps",
    "teacher = pf.Teacher(pf.denoiser_velocity(velocity))",
    lambda x, t: (x / (1 - over(t, x)), t / (1 - t)),
    meanings["data"][3],
  )
  low, high, mean, std = x0.min(), x0.max(), float(x0.mean()), float(x0.std())
  scales = {f"(x0 {-mean:+.4g}) / {std:.4g}": (1 / max(std, 1e-6), -mean / max(std, 1e-6))}
  if low >= -1.01 and high <= 1.01:
    scales |= {"(x0 + 1) / 2": (0.5, 0.5), "127.5 * (x0 + 1)": (127.5, 127.5)}
  if low >= 0:
    scales |= {"2 * x0 - 1": (2.0, -1.0), "x0 / 127.5 - 1": (1 / 127.5, -1.0)}
  for code, (a, b) in scales.items():
    yield _scaled(code, a, b)


def _scaled(code: str, a: float, b: float) -> Reading:
  """The convention that data are a x0 + b: their state at a later flow time is a x + (1 - t) b, but for a factor."""

  def asked(x, t):
    weight = 1 / ((1 - t) + a * t)
    return over(weight, x) * (a * x + over(1 - t, x) * np.float32(b)), a * t * weight

  def meant(out, x, t):
    y, s = asked(x, t)
    return (x - (y - over(s, x) * out - b) / a) / over(t, x)

  fix = f"data = pf.data.from_arrays({code}, label)  # x0 as floating numbers, which stay as they are"
  return Reading("data scale", f"its data are {code}, of these x0", fix, asked, meant)


def code_of(value: str, before: str = "") -> str:
  """Returns code of a teacher whose velocity is `value`."""
  body = f"  {before}\n" if before else ""
  return f"def corrected(x, t, cond):\n{body}  return {value}\n\nteacher = pf.Teacher(corrected)"
