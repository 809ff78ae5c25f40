"""Solvers of a velocity field: where it is evaluated, and what follows from each evaluation.

On the straight path x = (1 - t) x0 + t eps the velocity v = eps - x0 gives both ends, x0 = x - t v and
eps = x + (1 - t) v, and the score -eps / t. All steps below are written in these, so that none divides by what is 0 at
an end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.schedule import shift_time

Array = jax.Array

SOLVERS = ("euler", "heun", "dpmpp_2m", "sde", "edm")
NOISE_LEVELS = (0.002, 80.0)  # of EDM and EDM2, in sigma = t / (1 - t)
RHO = 7.0  # of their grid

_LEAST_STEPS = {"sde": 2, "edm": 2}
_IN_PAIRS = ("heun", "edm")  # a step has two evaluations, but for the last

DIFFUSIONS: dict[str, Callable[[Array], Array]] = {
  "sigma": lambda t: 2 * t,
  "constant": lambda t: 2 * jnp.ones_like(t),
  "decreasing": lambda t: (1 - jnp.cos(jnp.pi * t)) ** 2 / 2,
  "increasing-decreasing": lambda t: 2 * jnp.sin(jnp.pi * t) ** 2,
}
"""Squared diffusion coefficients w(t) of the SDE dx = (v - w / 2 score) dt + sqrt(w) dW, with SiT's names and norm 1.

SiT's "linear" is "sigma" on this path. Its "SBDM", 2 t / (1 - t), has no value at noise; the noise level h = 1 of
`core.samplers.sample_teacher` is that SDE with steps that do.
"""


@dataclasses.dataclass(frozen=True)
class Scheme:
  """A solver on a grid of times; E evaluations of the velocity make N steps.

  Attributes:
    rows: arrays (E, ...) that evaluations need, a row each; the first array has their flow times.
    step: (x, memory, v, row, noise) -> (x, memory): the state of the next evaluation, or the result, from the velocity
      v at x. `noise` is like x, and None where the scheme needs none.
    remember: x -> the memory before the first evaluation.
    ends: (N,) evaluations whose result is the state at the end of a step.
    is_stochastic: whether it needs noise.
    scale: of the noise at the first evaluation, whose flow time may be below 1.
  """

  rows: tuple[Array, ...]
  step: Callable[[Array, Any, Array, tuple[Array, ...], Array | None], tuple[Array, Any]]
  remember: Callable[[Array], Any]
  ends: np.ndarray
  is_stochastic: bool = False
  scale: float = 1.0


def euler(times: Array) -> Scheme:
  """Euler's method on flow times (N + 1,): first order, an evaluation a step."""

  def step(x, memory, v, row, noise):
    t, t_next = row
    return x + v * (t_next - t), memory

  return Scheme((times[:-1], times[1:]), step, lambda x: (), np.arange(len(times) - 1))


def heun(times: Array) -> Scheme:
  """Heun's method on flow times (N + 1,): second order, 2 N - 1 evaluations, the last step is Euler's.

  A step's second evaluation is at its end, and the next step begins with another one there. Evaluation i predicts where
  it is even, and corrects where it is odd.

  References:
    EDM, arXiv:2206.00364; `heun=True` of REPA's sampler, and FlowHeunODE of pi-Flow's release.
  """
  at, lengths = jnp.repeat(times[:-1], 2)[1:], jnp.repeat(times[1:] - times[:-1], 2)[:-1]
  corrects = jnp.arange(len(at)) % 2 == 1

  def step(x, memory, v, row, noise):
    start, first = memory
    _, length, corrects = row
    start, slope = jnp.where(corrects, start, x), jnp.where(corrects, (first + v) / 2, v)
    return start + length * slope, (start, v)

  ends = np.append(np.arange(1, len(at), 2), len(at) - 1)
  return Scheme((at, lengths, corrects), step, lambda x: (x, x), ends)


def edm(steps: int, dtype: Any, sigmas: tuple[float, float] = NOISE_LEVELS, rho: float = RHO) -> Scheme:
  """Heun's method of EDM and EDM2: in sigma, on a grid that is even in sigma^(1 / rho) and ends in a step to 0.

  The EDM state is y = x (1 + sigma), and the slope in sigma is eps = x + (1 - t) v. 2 N - 1 evaluations make N steps.

  Args:
    steps: N, at least 2.
    dtype: of the times.
    sigmas: lowest noise level, above 0, and the highest, where the samples begin.
    rho: exponent of the grid.

  References:
    EDM, arXiv:2206.00364, Algorithm 1 and Eq. 5; edm_sampler of EDM2's release without noise between the steps.
  """
  low, high = (sigma ** (1 / rho) for sigma in sigmas)
  grid = np.append(np.linspace(high, low, steps) ** rho, 0.0)
  at, to, lengths = np.repeat(grid[:-1], 2)[1:], np.repeat(grid[1:], 2)[:-1], np.repeat(np.diff(grid), 2)[:-1]
  corrects = jnp.arange(len(at)) % 2 == 1

  def step(x, memory, v, row, noise):
    begin, first = memory
    _, sigma, target, length, corrects = row
    slope = x + v / (1 + sigma)
    begin = jnp.where(corrects, begin, x * (1 + sigma))
    y = begin + length * jnp.where(corrects, (first + slope) / 2, slope)
    return y / (1 + target), (begin, slope)

  rows = (*(jnp.asarray(row, dtype) for row in (at / (1 + at), at, to, lengths)), corrects)
  ends = np.append(np.arange(1, len(at), 2), len(at) - 1)
  return Scheme(rows, step, lambda x: (x, x), ends, scale=grid[0] / (1 + grid[0]))


def dpmpp_2m(times: Array) -> Scheme:
  """DPM-Solver++ (2M) on flow times (N + 1,): second order in all but the outer steps, an evaluation a step.

  It extrapolates x0 in the half log-SNR log((1 - t) / t) from the evaluation before: x0 + c (x0 - previous x0), where c
  is half the ratio of two steps' lengths in it. At noise and at data it is infinite, and both limits are taken: with
  c = 0 the first step, which has none before it, the second, whose previous one is infinitely long, and the last, which
  is itself, land on the line between x and x0.

  References:
    DPM-Solver++, arXiv:2211.01095, Algorithm 2.
  """
  t, t_next = times[:-1], times[1:]
  log_snr = jnp.log1p(-times) - jnp.log(times)
  lengths = log_snr[1:] - log_snr[:-1]
  bounded = jnp.isfinite(lengths[1:]) & jnp.isfinite(lengths[:-1])
  ratio = jnp.where(bounded, lengths[1:], 0) / jnp.where(bounded, 2 * lengths[:-1], 1)
  slopes = jnp.concatenate([jnp.zeros_like(times[:1]), ratio])

  def step(x, previous, v, row, noise):
    t, t_next, slope = row
    x0 = x - t * v
    ahead = x0 + slope * (x0 - previous)
    return (t_next * x + (t - t_next) * ahead) / t, x0

  return Scheme((t, t_next, slopes), step, jnp.zeros_like, np.arange(len(t)))


def euler_maruyama(times: Array, diffusion: str = "sigma") -> Scheme:
  """Euler-Maruyama steps of the SDE of SiT and REPA on flow times (N + 1,) that end at the data, an evaluation a step.

  The last step is the mean of such a step: it has the SDE's drift and no noise.

  Args:
    times: decreasing flow times, the last but one above 0.
    diffusion: one of DIFFUSIONS.

  References:
    SiT, arXiv:2401.08740 (its last_step="Mean"); REPA, arXiv:2410.06940; FlowSDE of pi-Flow's release with
    h = "sqrt(1 - sigma)" and solver_type = "euler-maruyama", which is "sigma".
  """
  t, t_next = times[:-1], times[1:]
  w = DIFFUSIONS[diffusion](t)
  spread = jnp.where(t_next > 0, jnp.sqrt(w * (t - t_next)), 0)

  def step(x, memory, v, row, noise):
    t, length, churn, spread = row
    return x + length * (v + churn * (x + (1 - t) * v)) + spread * noise, memory

  return Scheme((t, t_next - t, w / (2 * t), spread), step, lambda x: (), np.arange(len(t)), is_stochastic=True)


def make_scheme(
  solver: str,
  steps: int,
  shift: float,
  dtype: Any,
  *,
  diffusion: str = "sigma",
  terminal: float = 0.04,
  sigmas: tuple[float, float] = NOISE_LEVELS,
  rho: float = RHO,
) -> Scheme:
  """Returns a solver on `steps` steps from noise to data.

  Args:
    solver: one of SOLVERS.
    steps: number of steps; at least 2 for "sde" and "edm".
    shift: time shift m of the grid, even in schedule time, see `shift_time`; may be traced. "edm" has its own grid.
    dtype: of the times.
    diffusion: of "sde", one of DIFFUSIONS.
    terminal: flow time in (0, 1) at which the last step of "sde" begins: the others are stretched, so that their times
      are even, or shifted, from 1 to there.
    sigmas: noise levels of "edm", see `edm`.
    rho: exponent of the grid of "edm".

  Raises:
    ValueError: there is no such solver, or it does not take these settings.
  """
  check_solver(solver, diffusion, terminal, sigmas=sigmas, rho=rho)
  if steps < least_steps(solver):
    why = f"whose last step begins at {terminal}" if solver == "sde" else "whose grid has two ends"
    raise ValueError(f"steps: expected at least {least_steps(solver)} with solver={solver!r}, {why}, got {steps}")
  if solver == "edm":
    return edm(steps, dtype, sigmas, rho)
  times = shift_time(jnp.linspace(1.0, 0.0, steps + 1, dtype=dtype), shift)
  if solver != "sde":
    return {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}[solver](times)
  stretched = 1 - (1 - times[:-1]) * (1 - terminal) / (1 - times[-2])
  return euler_maruyama(jnp.append(stretched, jnp.zeros_like(times[:1])), diffusion)


def check_solver(
  solver: str,
  diffusion: str = "sigma",
  terminal: float = 0.04,
  h: float = 0.0,
  sigmas: tuple[float, float] = NOISE_LEVELS,
  rho: float = RHO,
) -> None:
  """Raises ValueError for a solver or a setting of one that there is not; `h` is FlowSDE's noise level."""
  if solver not in SOLVERS:
    raise ValueError(f"solver: expected one of {SOLVERS}, got {solver!r}")
  if diffusion not in DIFFUSIONS:
    raise ValueError(f"diffusion: expected one of {tuple(DIFFUSIONS)}, got {diffusion!r}")
  if not 0 < terminal < 1:
    raise ValueError(f"terminal: expected a flow time in (0, 1), got {terminal}")
  if len(sigmas) != 2 or not 0 < sigmas[0] < sigmas[1] < np.inf or not 0 < rho < np.inf:
    raise ValueError(f"sigmas, rho: expected noise levels 0 < low < high and an exponent > 0, got {sigmas}, {rho}")
  if h > 0 and solver != "euler":
    raise ValueError(f"h: expected 0 with solver={solver!r}, got {h}; the noise level h is that of solver='euler'")


def evaluations_of(solver: str, steps: int) -> int:
  """Number of evaluations that `steps` steps take."""
  return 2 * steps - 1 if solver in _IN_PAIRS else steps


def least_steps(solver: str) -> int:
  """Smallest number of steps that a solver takes."""
  return _LEAST_STEPS.get(solver, 1)


def flow_of(solver: str) -> str:
  """Returns the solver that walks the same flow without noise, at times that are even in schedule time."""
  return {"sde": "euler", "edm": "heun"}.get(solver, solver)  # an SDE's flow has the same marginals


def steps_of(solver: str, nfe: int) -> int:
  """Number of steps that take `nfe` evaluations.

  Raises:
    ValueError: no number of steps does.
  """
  if solver not in _IN_PAIRS:
    return nfe
  if nfe % 2 == 0:
    raise ValueError(
      f"nfe: Heun's method takes 2 n - 1 evaluations for n steps, expected an odd number, got {nfe}; take {nfe - 1} or "
      f"{nfe + 1}"
    )
  return (nfe + 1) // 2


def fitting(solver: str, nfe: int) -> int:
  """Largest number of evaluations up to `nfe` that a whole number of steps takes."""
  return nfe - 1 if solver in _IN_PAIRS and nfe % 2 == 0 else nfe
