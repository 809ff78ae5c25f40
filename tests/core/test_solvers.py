"""Solvers of a velocity field against the authors' samplers, closed forms, and the marginals that an SDE must keep."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core import samplers, solvers
from pflow_jax.core.guidance import guided
from pflow_jax.core.samplers import sample_teacher
from tests.golden_layout import channels_last


def mixture_velocity(x, t, mean, std):
  """The velocity of x0 = +-mean + std eps, an equal mixture in every number."""
  var = (1 - t) ** 2 * std**2 + t**2
  slope = (t - (1 - t) * std**2) / var
  up, down = x - (1 - t) * mean, x + (1 - t) * mean
  share = jax.nn.sigmoid((down**2 - up**2) / (2 * var))
  return share * (slope * up - mean) + (1 - share) * (slope * down + mean)


def toy(x, t, label):
  """The teacher of the golden file, whose class 1000 is the empty one."""
  over = lambda a: a[:, None, None, None]
  null, label = over(label == 1000), over(label)
  return mixture_velocity(x, over(t), jnp.where(null, 0.2, 0.5 + 0.25 * label), jnp.where(null, 0.8, 0.3))


GUIDED = functools.partial(guided, toy, np.int64(1000), scale=1.8)
SDE, WHOLE = dict(solver="sde", steps=10), dict(interval=(0.0, 0.7))
CASES = {
  "repa_sde": (SDE, None),
  "repa_sde_guided": (SDE, WHOLE),
  "lakonlab_sde_guided": (SDE, WHOLE),
  "lakonlab_sde_shifted_guided": (SDE | dict(shift=3.2), WHOLE),
  **{f"sit_{name}": (SDE | dict(diffusion=name), None) for name in solvers.DIFFUSIONS},
  "repa_euler": (dict(steps=10), None),
  "repa_euler_guided": (dict(steps=10), WHOLE),
  "repa_heun": (dict(solver="heun", steps=6), None),
  "lakonlab_heun_guided": (dict(solver="heun", steps=6, shift=3.2), dict(interval=(0.2, 0.7))),
  **{f"diffusers_dpmpp_2m_{n}": (dict(solver="dpmpp_2m", steps=n), None) for n in (1, 2, 3, 8, 20)},
  "diffusers_dpmpp_2m_8_shifted": (dict(solver="dpmpp_2m", steps=8, shift=3.2), None),
}


# π-Flow's schedulers have times, and diffusers' states, in float32.
RUNS = [(name, "float32") for name in CASES] + [(name, "float64") for name in CASES if name[:4] in ("repa", "sit_")]


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_samples_are_those_of_the_authors_samplers(golden, name, dtype, monkeypatch):
  """Their code was given the noise of the file, as ours is here."""
  file, (how, guidance) = golden("solvers"), CASES[name]
  drawn = channels_last(file["rng_noise"]).astype(dtype)
  monkeypatch.setattr(samplers, "_fresh_noise", lambda keys, i, x: drawn[i])
  teacher = toy if guidance is None else GUIDED(**guidance)
  x, keys = channels_last(file["in_x"]).astype(dtype), jax.random.split(jax.random.key(0), 3)
  samples = sample_teacher(teacher, x, jnp.asarray(file["in_label"]), keys, **how)
  assert samples.dtype == dtype
  atol = 1e-12 if dtype == "float64" else 1e-5
  np.testing.assert_allclose(samples, channels_last(file[f"out_{name}"]), rtol=0, atol=atol)


def gaussian(mean, std):
  """The velocity of x0 ~ N(mean, std^2), and the mean and the variance of the state at a flow time."""

  def velocity(x, t, cond=None):
    t = jnp.reshape(t, (-1, *[1] * (x.ndim - 1)))
    variance = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

  return velocity, lambda t: ((1 - t) * mean, (1 - t) ** 2 * std**2 + t**2)


def mixture_quantile(x, mean, std):
  """The exact end of the flow of `mixture_velocity` from x at noise: it keeps the order of the numbers."""
  normal = lambda a: 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
  low, high = np.full_like(x, -20.0), np.full_like(x, 20.0)
  for _ in range(80):
    middle = (low + high) / 2
    below = (normal((middle - mean) / std) + normal((middle + mean) / std)) / 2 < normal(x)
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return low


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_orders_of_convergence_to_the_closed_form(solver, expected, data):
  """Near noise even steps of t are long in the log-SNR, so that DPM-Solver++ converges by N^-2 log N."""
  x = np.linspace(-2.0, 2.0, 9)[:, None]
  if data == "gaussian":
    velocity, exact = gaussian(0.3, 0.5)[0], 0.3 + 0.5 * x
  else:
    velocity = lambda x, t, cond: mixture_velocity(x, t[:, None], 0.6, 0.4)
    exact = mixture_quantile(x, 0.6, 0.4)
  counts = np.array([64, 128, 256, 512])
  draw = lambda steps, solver: sample_teacher(velocity, jnp.asarray(x), None, steps=int(steps), solver=solver)
  error = lambda steps, solver: float(np.sqrt(np.mean((draw(steps, solver) - exact) ** 2)))
  errors = np.array([error(steps, solver) for steps in counts]) / (np.log(counts) if solver == "dpmpp_2m" else 1)
  order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
  assert order == pytest.approx(expected, abs=0.1), errors
  if expected == 2:  # it is worth its evaluations
    assert error(solvers.steps_of(solver, 31), solver) < error(128, "euler")


def moments_of(scheme, velocity):
  """Exact mean and variance after each evaluation of a scheme, from N(0, 1), of an affine velocity."""
  mean, variance, found = 0.0, 1.0, []
  for row in zip(*scheme.rows, strict=True):
    at = lambda x, noise, row=row: float(
      scheme.step(jnp.full((1,), x), (), velocity(jnp.full((1,), x), row[0]), row, jnp.full((1,), noise))[0][0]
    )
    start = at(0.0, 0.0)
    factor, spread = at(1.0, 0.0) - start, at(0.0, 1.0) - start
    mean, variance = factor * mean + start, factor**2 * variance + spread**2
    found.append((mean, variance))
  return found


@pytest.mark.parametrize("diffusion", solvers.DIFFUSIONS)
def test_the_sde_keeps_the_marginal(diffusion):
  """At `terminal` the moments are those of the flow, up to an error that halves with the steps."""
  velocity, marginal = gaussian(0.7, 0.5)
  errors = []
  for steps in (100, 200):
    scheme = solvers.make_scheme("sde", steps, 1.0, jnp.float64, diffusion=diffusion)
    assert float(scheme.rows[0][-1]) == pytest.approx(0.04)
    mean, variance = moments_of(scheme, velocity)[-2]
    wanted = marginal(0.04)
    assert mean == pytest.approx(wanted[0], abs=1e-12), "it moves in a straight line"
    errors.append(abs(variance / wanted[1] - 1))
  assert errors[1] < 0.05
  assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("steps", [4, 20, 250])
def test_samples_of_the_sde_have_the_moments_of_its_steps(steps):
  """5 standard errors of 20,000 samples, at the end and at `terminal`."""
  count, velocity = 20_000, gaussian(0.7, 0.5)[0]
  noise, keys = jax.random.normal(jax.random.key(1), (count, 1)), jax.random.split(jax.random.key(2), count)
  run = jax.jit(lambda x, k: sample_teacher(velocity, x, None, k, steps=steps, solver="sde", trajectory=True)[-2:])
  expected = moments_of(solvers.make_scheme("sde", steps, 1.0, jnp.float64), velocity)[-2:]
  for x, (mean, variance) in zip(run(noise, keys), expected, strict=True):
    assert float(jnp.mean(x)) == pytest.approx(mean, abs=5 * np.sqrt(variance / count))
    assert float(jnp.var(x)) == pytest.approx(variance, rel=5 * np.sqrt(2 / count))


def test_a_sample_of_the_sde_does_not_depend_on_its_batch():
  velocity = gaussian(0.7, 0.5)[0]
  noise, keys = jax.random.normal(jax.random.key(1), (6, 2, 3)), jax.random.split(jax.random.key(2), 6)
  draw = lambda rows: sample_teacher(velocity, noise[rows], None, keys[rows], steps=5, solver="sde")
  whole, alone = draw(np.arange(6)), draw(np.array([4]))
  np.testing.assert_allclose(whole[4:5], alone, rtol=1e-12)
  np.testing.assert_allclose(whole[::-1], draw(np.arange(6)[::-1]), rtol=1e-12)
  assert np.abs(sample_teacher(velocity, noise, None, keys[::-1], steps=5, solver="sde") - whole).max() > 0.1


TIMES = {
  "euler": [1, 0.75, 0.5, 0.25],
  "heun": [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25],
  "dpmpp_2m": [1, 0.75, 0.5, 0.25],
  "sde": [1, 0.68, 0.36, 0.04],
  # Noise levels whose 7th roots are even, as flow times: 80, 80^(2/7) .002^(1/7) and so on, to .002.
  "edm": [
    s / (1 + s) for s in (((80 ** (1 / 7) * (3 - i) + 0.002 ** (1 / 7) * i) / 3) ** 7 for i in (0, 1, 1, 2, 2, 3, 3))
  ],
}


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_evaluations_are_those_that_are_counted(solver):
  times, velocity = [], gaussian(0.0, 0.5)[0]

  def teacher(x, t, cond):
    times.append(float(t[0]))
    return velocity(x, t)

  noise, keys = jnp.ones((2, 1)), jax.random.split(jax.random.key(0), 2)
  with jax.disable_jit():
    sample_teacher(teacher, noise, None, keys, steps=4, solver=solver)
  np.testing.assert_allclose(times, TIMES[solver], atol=1e-12)
  assert solvers.evaluations_of(solver, 4) == len(times)
  assert solvers.steps_of(solver, len(times)) == 4
  path = sample_teacher(velocity, noise, None, keys, steps=4, solver=solver, trajectory=True)
  assert path.shape == (5, 2, 1)
  np.testing.assert_allclose(path[-1], sample_teacher(velocity, noise, None, keys, steps=4, solver=solver), rtol=1e-12)
  if solver in ("heun", "dpmpp_2m"):  # states at the ends of steps, not those that Heun's method predicts
    spread = np.sqrt(gaussian(0.0, 0.5)[1](np.linspace(1, 0, 5))[1])
    np.testing.assert_allclose(path[:-1, 0, 0], spread[:-1], atol=0.06)


def test_edms_steps_converge_to_the_closed_form():
  """A normal number keeps its quantile: x0 = m + s (y - m) / sqrt(80^2 + s^2) from y = 80 eps, in any state space."""
  mean, std, eps = 0.3, 0.5, np.linspace(-2.0, 2.0, 9)[:, None]
  exact = mean + std * (80 * eps - mean) / np.sqrt(80**2 + std**2)
  counts = np.array([16, 32, 64, 128])

  def error(steps):
    options = dict(steps=int(steps), solver="edm", sigmas=(1e-4, 80.0))
    return float(np.abs(sample_teacher(gaussian(mean, std)[0], jnp.asarray(eps), None, **options) - exact).max())

  errors = [error(steps) for steps in counts]
  assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(2, abs=0.25), errors
  assert errors[-1] < 2e-3


def test_heuns_number_of_evaluations_is_odd():
  assert [solvers.fitting("heun", n) for n in (1, 2, 3, 4, 128)] == [1, 1, 3, 3, 127]
  assert [solvers.fitting(name, 128) for name in ("euler", "dpmpp_2m", "sde")] == [128] * 3
  with pytest.raises(ValueError, match=r"2 n - 1 evaluations .* odd number, got 4; take 3 or 5"):
    solvers.steps_of("heun", 4)


def test_what_does_not_fit_is_refused():
  x, keys = jnp.ones((2, 1)), jax.random.split(jax.random.key(0), 2)
  sample = lambda **options: sample_teacher(gaussian(0.0, 0.5)[0], x, None, **options)
  for options, message in (
    (dict(steps=2, solver="rk4"), "solver: expected one of .*'sde'.*, got 'rk4'"),
    (dict(steps=2, solver="sde"), "need `keys`"),
    (dict(steps=1, solver="sde", keys=keys), "at least 2 with solver='sde'"),
    (dict(steps=2, solver="sde", keys=keys, diffusion="SBDM"), "diffusion: expected one of .*'sigma'"),
    (dict(steps=2, solver="sde", keys=keys, terminal=0.0), r"terminal: expected a flow time in \(0, 1\), got 0"),
    (dict(steps=1, solver="edm"), "at least 2 with solver='edm'"),
    (dict(steps=2, solver="edm", sigmas=(1.0, 0.5)), r"noise levels 0 < low < high .* got \(1.0, 0.5\)"),
    (dict(steps=2, solver="heun", h=0.5, keys=keys), "h: expected 0 with solver='heun', got 0.5"),
  ):
    with pytest.raises(ValueError, match=message):
      sample(**options)


def test_the_shift_may_be_traced():
  velocity, x = gaussian(0.3, 0.5)[0], jnp.linspace(-1.0, 1.0, 4)[:, None]
  keys = jax.random.split(jax.random.key(0), 4)
  for solver in solvers.SOLVERS:
    run = lambda shift, solver=solver: sample_teacher(velocity, x, None, keys, steps=6, solver=solver, shift=shift)
    np.testing.assert_allclose(jax.jit(run)(3.2), run(3.2), rtol=1e-6)
