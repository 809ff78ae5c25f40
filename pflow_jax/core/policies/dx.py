"""DX policy: the clean sample as a curve in schedule time, given by a few denoised states."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pflow_jax.core.policies.base import Array, Policy, as_float, check_range, check_shape, check_source, check_state
from pflow_jax.core.schedule import shift_time, unshift_time

BASES = ("grid", "polynomial")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DXPolicy(Policy):
  """Posterior mean that depends on time alone: x0(r) = sum_i weight_i(r) X_i.

  The basis "grid" is piecewise linear between N denoised states on an even grid over the segment; "polynomial" has
  powers of the schedule time elapsed since the source. Velocity and integral are linear in the X_i, so both are one
  weighted sum. `DXPolicy.create` makes one.

  References:
    pi-Flow, arXiv:2510.14974, Sec. 3.2. The exact integral is this project's; the release takes Euler substeps.
  """

  states: Array  # (N, *space, C), data space
  r_s: Array  # (), source in schedule time
  r_d: Array  # (), destination in schedule time
  shift: Array  # ()
  basis: str = dataclasses.field(default="grid", metadata={"static": True})
  eps: float = dataclasses.field(default=1e-4, metadata={"static": True})

  @classmethod
  def create(
    cls,
    x_s: ArrayLike,
    t_s: ArrayLike,
    coefficients: ArrayLike,
    *,
    segment: ArrayLike = 1.0,
    shift: ArrayLike = 1.0,
    basis: str = "grid",
    compat: bool = False,
    eps: float = 1e-4,
  ) -> DXPolicy:
    """Policy from a network's output in velocity space.

    Args:
      x_s: state where the network was evaluated, (*space, C).
      t_s: flow time of `x_s`, (), in (0, 1].
      coefficients: (N, *space, C). grid: velocities d_i towards the states X_i = x_s - t_s d_i; index 0 is the
        destination's end of the segment, N - 1 the source's. polynomial: d_0 likewise, and -t_s d_i the coefficient of
        the i-th power.
      segment: length of the segment in schedule time, as in training, in (0, 1].
      shift: time shift m, as in training.
      basis: "grid" or "polynomial".
      compat: read polynomials as the PyTorch release does, which converts every coefficient with x_s - t_s d_i. Neither
        reading is the other with other weights, as x_s changes with the sample: a student keeps the one it has learnt.
      eps: lower bound of flow times and of the segment's length.

    Raises:
      ValueError: for shapes that do not fit, an unknown basis, or values out of range.
    """
    if basis not in BASES:
      raise ValueError(f"basis: expected one of {BASES}, got {basis!r}")
    x_s, t_s, coefficients = as_float(x_s, t_s, coefficients)
    segment, shift = (jnp.asarray(a, x_s.dtype) for a in (segment, shift))
    check_source(x_s, t_s)
    if coefficients.ndim != x_s.ndim + 1 or coefficients.shape[0] < 1:
      raise ValueError(
        f"coefficients: expected (N, *space, C) = (N, {', '.join(map(str, x_s.shape))}), N >= 1, "
        f"got {coefficients.shape}"
      )
    n = coefficients.shape[0]
    check_shape("coefficients", coefficients, (n, *x_s.shape), "(N, *space, C), x_s (*space, C)")
    check_shape("segment", segment, (), "one length a policy")
    check_shape("shift", shift, (), "one shift a policy")
    check_range("segment", segment, 0.0, 1.0, open_low=True)
    check_range("shift", shift, 0.0, float("inf"), open_low=True)
    states = -t_s * coefficients
    if basis == "grid" or compat:
      states = states + jnp.broadcast_to(x_s, states.shape)
    else:
      states = states.at[0].add(x_s)
    r_s = unshift_time(t_s, shift)
    return cls(
      states=states,
      r_s=r_s,
      r_d=jnp.maximum(r_s - segment, 0.0),
      shift=shift,
      basis=basis,
      eps=eps,
    )

  @property
  def has_closed_form(self) -> bool:  # type: ignore[override]
    return True

  @property
  def _length(self) -> Array:
    return jnp.maximum(self.r_s - self.r_d, self.eps)

  def _weights(self, r: Array) -> Array:
    """Weights (N,) of the states in the posterior mean at schedule time `r` ()."""
    n = self.states.shape[0]
    if self.basis == "polynomial":
      return _powers(self.r_s - r, n)
    if n == 1:
      return jnp.ones((1,), self.states.dtype)
    q = jnp.clip((r - self.r_d) / self._length, 0.0, 1.0) * (n - 1)
    # The lower neighbour is capped so that both exist at q = N - 1.
    low = jnp.minimum(jnp.floor(q), n - 2)
    nodes = jnp.arange(n, dtype=self.states.dtype)
    return jnp.where(nodes == low, 1 - (q - low), 0) + jnp.where(nodes == low + 1, q - low, 0)

  def posterior_mean(self, t: Array) -> Array:
    """The denoised state at flow time `t` (), in [0, t_s]; returns (*space, C)."""
    return self._weighted(self._weights(unshift_time(t, self.shift)))

  def _weighted(self, weights: Array) -> Array:
    return jnp.tensordot(weights, self.states, axes=1, precision="highest")

  def velocity(self, x: Array, t: Array) -> Array:
    check_state(x, self.states.shape[1:])
    return (x - self.posterior_mean(t)) / jnp.maximum(t, self.eps)

  def integrate(self, x: Array, t: Array, s: Array) -> Array:
    """Exact solution at `s` from `x` at `t`.

    In y = x / t and lambda = 1 / t the equation reads dy/dlambda = x0, so x(s) = (s / t) x + s * integral of x0
    dlambda, a weighted sum of the states. dlambda = -dr / (m r^2), and s * (...) stays finite at s = 0.
    """
    check_state(x, self.states.shape[1:])
    from_t = jnp.where(t > s, t, 1.0)  # a stretch without length is left alone below
    integral = self._integral_powers if self.basis == "polynomial" else self._integral_grid
    x_s = (s / from_t) * x + self._weighted(integral(from_t, s))
    return jnp.where(t > s, x_s, x)

  def _integral_grid(self, t: Array, s: Array) -> Array:
    """Weights (N,): s times the integral of each hat function over lambda, from `t` to `s`."""
    n, m = self.states.shape[0], self.shift
    if n == 1:
      return (1 - s / t)[None]
    h = self._length / (n - 1)
    nodes = self.r_d + h * jnp.arange(n, dtype=self.states.dtype)
    # Cells between the nodes, and one beyond either end, where x0 is constant; each cut to [r(s), r(t)].
    r_top, r_bottom = unshift_time(t, m), unshift_time(s, m)
    edges = jnp.clip(jnp.pad(nodes, 1, constant_values=(-jnp.inf, jnp.inf)), r_bottom, r_top)
    low, high = edges[:-1], edges[1:]
    t_low, t_high = shift_time(low, m), shift_time(high, m)
    safe_low = jnp.where(low > 0, low, 1.0)
    # s * dlambda over the cell; s / t is 1 in the cell that ends at s, also when s is 0.
    s_over_low, s_over_high = (jnp.where(u > s, s / jnp.where(u > 0, u, 1.0), 1.0) for u in (t_low, t_high))
    span = s_over_low - s_over_high
    # s * integral of (r - high) dlambda, with z = high / low - 1
    z = jnp.where(low > 0, (high - low) / safe_low, 0.0)
    tail = jnp.where(low > 0, s * (jnp.log1p(z) - z) / m, -s_over_low * high * (m + (1 - m) * t_low) / m)
    inner = slice(1, n)
    # Inside cell j the hat of node j + 1 is u = (r - node_j) / h, that of node j is 1 - u.
    right = ((high[inner] - nodes[:-1]) / h) * span[inner] + tail[inner] / h
    left = span[inner] - right
    weights = jnp.pad(left, (0, 1)) + jnp.pad(right, (1, 0))
    return weights.at[0].add(span[0]).at[-1].add(span[-1])

  def _integral_powers(self, t: Array, s: Array) -> Array:
    """Weights (N,): s times the integral of (r_s - r)^i over lambda, from `t` to `s`.

    With d = r_s - r: I_i = (1/m) int d^i / r^2 dr and K_i = (1/m) int d^i / r dr obey I_i = r_s I_{i-1} - K_{i-1} and
    K_i = r_s K_{i-1} - (1/m) int d^{i-1} dr, both times s here.
    """
    m = self.shift
    r_top, r_bottom = unshift_time(t, m), unshift_time(s, m)
    d_top, d_bottom = self.r_s - r_top, self.r_s - r_bottom
    first = 1 - s / t
    ratio = jnp.where(r_bottom > 0, r_top / jnp.where(r_bottom > 0, r_bottom, 1.0), 1.0)
    second = s * jnp.log(ratio) / m
    weights = [first]
    power_top, power_bottom = d_top, d_bottom  # d^i
    for i in range(1, self.states.shape[0]):
      weights.append(self.r_s * weights[-1] - second)
      second = self.r_s * second - s * (power_bottom - power_top) / (i * m)
      power_top, power_bottom = power_top * d_top, power_bottom * d_bottom
    return jnp.stack(weights)


def _powers(d: Array, n: int) -> Array:
  """(1, d, d^2, ..., d^(n-1)) by products: jnp.power has no derivative at 0^0."""
  powers = [jnp.ones_like(d)]
  for _ in range(n - 1):
    powers.append(powers[-1] * d)
  return jnp.stack(powers)
