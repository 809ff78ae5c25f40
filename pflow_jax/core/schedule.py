"""Schedule time, flow time, and the student's grid of evaluations.

Flow time t is the noise level: 1 is noise, 0 is data. Grids and random draws are uniform in schedule time r in [0, 1].
A shift m connects the two: t = m r / (1 + (m - 1) r) (Esser et al., arXiv:2403.03206, Eq. 23).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.checks import check_range

Array = jax.Array

MIN_SHIFT, MAX_SHIFT = 1e-6, 1e6  # beyond, float32 has no digits left of the times between
MIN_TIME = 1e-4  # training never starts a segment closer to the data than this


def shift_time(r: Any, m: Any) -> Any:
  """Flow time of a schedule time.

  Args:
    r: schedule time in [0, 1], any shape.
    m: shift, a scalar in [1e-6, 1e6]. 1 is the identity; 3.2 is used for FLUX and Qwen-Image.

  Returns:
    flow time in [0, 1], the shape of `r`.

  Raises:
    ValueError: for another shift, where it is known.
  """
  check_range("shift", m, MIN_SHIFT, MAX_SHIFT)
  return m * r / (1 + (m - 1) * r)


def unshift_time(t: Any, m: Any) -> Any:
  """Schedule time of a flow time: the inverse of `shift_time`, with its shapes and errors."""
  check_range("shift", m, MIN_SHIFT, MAX_SHIFT)
  return t / (m + (1 - m) * t)


def over_space(t: Array, x: Array) -> Array:
  """One value an example, (B,), with the axes of `x` (B, *space, C): (B, 1, ..., 1)."""
  return jnp.expand_dims(t, tuple(range(1, x.ndim)))


def add_noise(x0: Array, eps: Array, t: Array) -> Array:
  """State at flow time `t` (B,) on the straight path from `x0` to `eps`, both (B, *space, C): (1 - t) x0 + t eps."""
  t = over_space(t, x0)
  return (1 - t) * x0 + t * eps


def dynamic_shift(tokens: int, *, base: tuple[int, float] = (256, 0.5), top: tuple[int, float] = (4096, 1.15)) -> float:
  """Shift that grows with the sequence length: log m is affine in the number of tokens.

  Args:
    tokens: image tokens of a sample.
    base: a point (tokens, log m) of the line; the default is FLUX.1's.
    top: another point of it.

  Returns:
    the shift m.
  """
  slope = (top[1] - base[1]) / (top[0] - base[0])
  return float(np.exp((tokens - base[0]) * slope + base[1]))


def _check_grid(nfe: int, final_scale: float) -> None:
  if isinstance(nfe, bool) or not isinstance(nfe, (int, np.integer)) or nfe < 1:
    raise ValueError(f"nfe must be an integer of at least 1, got {nfe!r}")
  if not 0 < final_scale <= 1:
    raise ValueError(f"final_scale must lie in (0, 1], got {final_scale!r}")


def segment_length(nfe: int, final_scale: float = 1.0) -> float:
  """Length in schedule time of every segment but the last: 1 / (nfe - 1 + final_scale)."""
  _check_grid(nfe, final_scale)
  return 1.0 / (nfe - 1 + final_scale)


def longest_segment(nfe: int, final_scale: float = 1.0) -> float:
  """Length in schedule time of the longest segment: the first one, which with one evaluation is all there is."""
  return min(segment_length(nfe, final_scale), 1.0)


def segment_grid(nfe: int, final_scale: float = 1.0) -> np.ndarray:
  """Boundaries of the student's segments in schedule time, from noise to data.

  Args:
    nfe: network evaluations, one a segment.
    final_scale: length of the last segment (the one that ends at the data) relative to the others, in (0, 1].

  Returns:
    (nfe + 1,) float64, decreasing from 1 to 0; entry i is the source of segment i.

  References:
    pi-Flow, arXiv:2510.14974; ArcFlow (arXiv:2602.09014) calls final_scale "timestep_ratio".
  """
  length = segment_length(nfe, final_scale)
  return np.append(1.0 - length * np.arange(nfe), 0.0)


def sample_segment(uniform: Array, nfe: int, final_scale: float = 1.0) -> tuple[Array, Array]:
  """Training draw of a segment: an evaluation of the student's grid, one an example.

  Args:
    uniform: draws from U[0, 1), any shape.
    nfe: network evaluations, as in `segment_grid`.
    final_scale: as in `segment_grid`. The last segment is drawn as seldom as it is short.

  Returns:
    source r_s in [1e-4, 1] and the length of the segment, both of the shape of `uniform`.
  """
  length = segment_length(nfe, final_scale)
  r = jnp.maximum(1.0 - uniform, MIN_TIME)
  index = jnp.clip(jnp.ceil(r / length + 1 - final_scale), 1, nfe)
  r_s = jnp.clip((index - 1 + final_scale) * length, MIN_TIME, 1.0)
  return r_s, jnp.where(index == 1, final_scale * length, length).astype(r_s.dtype)
