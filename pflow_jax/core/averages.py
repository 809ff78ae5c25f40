"""Averages of parameters over a training, weighted by a power of time, and others made of them afterwards.

An average of exponent gamma at time t weighs the parameters of time tau in [0, t] by p(tau) = (gamma + 1) / t
(tau / t)^gamma. Its width is the standard deviation of p over t, sigma_rel. Averages of different widths and times span
a space in which any other is approximated.

References:
  EDM2, arXiv:2312.02696, Sec. 3 and App. C.
"""

from __future__ import annotations

import numpy as np

MAX_WIDTH = 12**-0.5  # of exponent 0, the mean of all
Values = float | np.ndarray


def exponent_of(sigma_rel: Values) -> np.ndarray:
  """Exponent gamma > 0 of averages of these widths: the largest root of a cubic (Eq. 126).

  Args:
    sigma_rel: in (0, MAX_WIDTH), any shape.

  Raises:
    ValueError: a width is outside.
  """
  width = np.asarray(sigma_rel, np.float64)
  if not np.all((width > 0) & (width < MAX_WIDTH)):
    raise ValueError(f"sigma_rel: expected widths above 0 and below {MAX_WIDTH:.4f}, got {sigma_rel}")
  roots = [np.roots([1.0, 7.0, 16.0 - w**-2, 12.0 - w**-2]).real.max() for w in width.ravel()]
  return np.reshape(roots, width.shape)


def width_of(exponent: Values) -> np.ndarray:
  """Width sigma_rel of averages of these exponents (Eq. 123), any shape."""
  gamma = np.asarray(exponent, np.float64)
  return np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def inner_product(exponent: Values, time: Values, other: Values, other_time: Values) -> np.ndarray:
  """Integral of the product of two averages' weights over time (Eq. 151); arguments are broadcast.

  Args:
    exponent: of one.
    time: at which it ends, > 0.
    other: exponent of the other.
    other_time: at which that ends, > 0.
  """
  a, b, s, t = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (exponent, other, time, other_time)))
  last, longer = np.maximum(s, t), np.where(s < t, b, a)  # the longer one is met up to the end of the shorter
  return (a + 1) * (b + 1) / (a + b + 1) * (np.minimum(s, t) / last) ** longer / last


def reconstruction(sigma_rels: Values, times: Values, sigma_rel: float, time: float) -> np.ndarray:
  """Factors of averages that make up another: least squares over the weights in time, and a sum of 1 (Algorithm 3).

  Args:
    sigma_rels: widths of the averages at hand, (N,).
    times: when each was taken, (N,), > 0.
    sigma_rel: width of the one to be made.
    time: its time.

  Returns:
    (N,) float64. They alternate in sign, and are large for a width far from those at hand.

  Raises:
    ValueError: a width is outside of (0, MAX_WIDTH), or two averages are the same.
  """
  widths, at = np.broadcast_arrays(np.asarray(sigma_rels, np.float64), np.asarray(times, np.float64))
  if len(set(zip(widths.tolist(), at.tolist(), strict=True))) < len(at):
    raise ValueError("expected averages of different widths or times, two are the same")
  gamma, wanted = exponent_of(widths), exponent_of(sigma_rel)
  gram = inner_product(gamma[:, None], at[:, None], gamma[None], at[None])
  factors = np.linalg.solve(gram, inner_product(gamma, at, wanted, time))
  return factors / factors.sum()
