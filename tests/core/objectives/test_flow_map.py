"""Flow maps where the answer is known: Gaussian data, in float64."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

from pflow_jax.core.objectives import flow_map
from pflow_jax.core.objectives.flow_map import FlowMap, flow_map_loss, residual, sample_interval
from pflow_jax.core.schedule import unshift_time

C = 0.4  # standard deviation of the data


def spread(t):
  """Standard deviation of the state at t, for data N(0, C^2)."""
  return jnp.sqrt(t**2 + (1 - t) ** 2 * C**2)


def exact_velocity(x, t):
  return x * ((t - (1 - t) * C**2) / spread(t) ** 2)[:, None]


def exact_average(x, t, s, cond=None, guidance=None):
  """F of the exact flow map x S(s) / S(t); its limit, the velocity, where s = t."""
  apart = jnp.abs(t - s) > 1e-9
  jump = x * (spread(s) / spread(t))[:, None]
  return jnp.where(apart[:, None], (x - jump) / jnp.where(apart, t - s, 1.0)[:, None], exact_velocity(x, t))


def wrong_average(x, t, s, cond=None, guidance=None):
  return exact_average(x, t, s) + 0.1 * jnp.sin(3 * t + s)[:, None]


@pytest.fixture
def states():
  keys = jax.random.split(jax.random.key(0), 3)
  t = jnp.linspace(0.05, 1.0, 64)
  s = t * jax.random.uniform(keys[0], (64,)) * 0.98
  return spread(t)[:, None] * jax.random.normal(keys[1], (64, 3)), t, s


@pytest.mark.parametrize("side", flow_map.SIDES)
def test_the_exact_map_leaves_no_residual_and_a_wrong_one_does(side, states):
  x, t, s = states
  for network, low, high in ((exact_average, 0.0, 1e-13), (wrong_average, 1e-2, 1.0)):
    _, g, _ = residual(network, exact_velocity, x, t, s, None, None, side=side, warmup=1.0)
    assert low <= float(jnp.abs(g).max()) < high


def test_one_jump_of_the_exact_map_is_many(states):
  x, t, s = states
  middle = (t + s) / 2

  def jump(x, t, s):
    return x + (s - t)[:, None] * exact_average(x, t, s)

  np.testing.assert_allclose(jump(jump(x, t, middle), middle, s), jump(x, t, s), rtol=1e-12)


def linear(params, x, t, s, cond=None, guidance=None):
  features = jnp.concatenate([x, x * t[:, None], x * s[:, None], jnp.sin(t + 2 * s)[:, None]], axis=1)
  return features @ params


def loss_gradient(settings, step=0, params=None, x0=None, **options):
  params = jnp.linspace(-0.5, 0.5, 30).reshape(10, 3) if params is None else params
  x0 = C * jax.random.normal(jax.random.key(5), (16, 3)) if x0 is None else x0

  def loss(params):
    network = lambda *args: linear(params, *args)
    teacher = lambda x, t, cond, guidance: exact_velocity(x, t)
    out, aux = flow_map_loss(network, teacher, x0, None, jax.random.key(7), step, settings, **options)
    return jnp.mean(out), aux

  return jax.grad(loss, has_aux=True)(params)


def drawn(settings, batch=16, dim=3):
  """The states and times that flow_map_loss draws in `loss_gradient`."""
  key_time, key_noise, *_ = jax.random.split(jax.random.key(7), 4)
  x0 = C * jax.random.normal(jax.random.key(5), (batch, dim))
  t, s = sample_interval(key_time, batch, settings)
  eps = jax.random.normal(key_noise, x0.shape, x0.dtype)
  return (1 - t)[:, None] * x0 + t[:, None] * eps, t, s, eps - x0


@pytest.mark.parametrize("side", flow_map.SIDES)
def test_gradient_is_that_of_the_paper(side):
  """grad = E[ 2 dF/dtheta . (F - v +- r (t - s) dF) ], the derivative written out by hand for a linear network."""
  settings = FlowMap(side=side, normalisation="none", warmup_steps=100)
  got, _ = loss_gradient(settings, step=40)
  params = jnp.linspace(-0.5, 0.5, 30).reshape(10, 3)
  x, t, s, _ = drawn(settings)
  F = linear(params, x, t, s)
  wave = jnp.cos(t + 2 * s)[:, None]
  zeros = jnp.zeros_like(x)
  if side == "eulerian":
    v = exact_velocity(x, t)
    dF = jnp.concatenate([v, v * t[:, None] + x, v * s[:, None], wave], axis=1) @ params
    g = F - v + 0.4 * (t - s)[:, None] * dF
  else:
    v = exact_velocity(x + (s - t)[:, None] * F, s)
    dF = jnp.concatenate([zeros, zeros, x, 2 * wave], axis=1) @ params
    g = F - v - 0.4 * (t - s)[:, None] * dF
  features = jnp.concatenate([x, x * t[:, None], x * s[:, None], jnp.sin(t + 2 * s)[:, None]], axis=1)
  np.testing.assert_allclose(got, 2 * features.T @ g / g.size, rtol=1e-10, atol=1e-14)


def test_without_the_derivative_it_is_regression_on_the_teacher():
  settings = FlowMap(normalisation="none", warmup_steps=100)
  got, _ = loss_gradient(settings, step=0)
  x, t, s, _ = drawn(settings)
  params = jnp.linspace(-0.5, 0.5, 30).reshape(10, 3)
  expected = jax.grad(lambda p: jnp.mean((linear(p, x, t, s) - exact_velocity(x, t)) ** 2))(params)
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-14)


def test_intervals_of_length_zero_are_flow_matching():
  settings = flow_map.mean_flow(anchor=1.0, normalisation="none")
  got, _ = loss_gradient(settings)
  x, t, s, v = drawn(settings)
  np.testing.assert_array_equal(t, s)
  params = jnp.linspace(-0.5, 0.5, 30).reshape(10, 3)
  expected = jax.grad(lambda p: jnp.mean((linear(p, x, t, t) - v) ** 2))(params)
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-14)


def test_mean_flow_has_its_published_gradient():
  """Sum of squares over sg(sum + 0.01), mean over examples; arXiv:2505.13447 and its release."""
  settings = flow_map.mean_flow()
  got, _ = loss_gradient(settings)
  params = jnp.linspace(-0.5, 0.5, 30).reshape(10, 3)
  x, t, s, v = drawn(settings)

  def published(params):
    u, du = jax.jvp(lambda x, t: linear(params, x, t, s), (x, t), (v, jnp.ones_like(t)))
    error = jnp.sum((u - jax.lax.stop_gradient(v - (t - s)[:, None] * du)) ** 2, axis=1)
    return jnp.mean(error / jax.lax.stop_gradient(error + 0.01))

  np.testing.assert_allclose(got, jax.grad(published)(params), rtol=1e-10, atol=1e-14)


def test_mean_flow_guides_its_own_target():
  settings = flow_map.mean_flow(omega=2.0, normalisation="none", anchor=1.0, cond_dropout=0.0)
  labels = jnp.arange(16) % 3
  params = jnp.linspace(-0.5, 0.5, 30).reshape(10, 3)

  def network(params, x, t, s, cond, guidance=None):
    return linear(params, x, t, s) + 0.3 * cond[:, None]

  def gradient(settings):
    def loss(params):
      x0 = C * jax.random.normal(jax.random.key(5), (16, 3))
      net = lambda *args: network(params, *args)
      return jnp.mean(flow_map_loss(net, None, x0, labels, jax.random.key(7), 0, settings, null_cond=3)[0])

    return jax.grad(loss)(params)

  x, t, _, v = drawn(settings)
  own = lambda c: network(params, x, t, t, c)
  target = 2.0 * v - 1.5 * own(jnp.full(16, 3)) + 0.5 * own(labels)
  expected = jax.grad(lambda p: jnp.mean((network(p, x, t, t, labels) - target) ** 2))(params)
  np.testing.assert_allclose(gradient(settings), expected, rtol=1e-10, atol=1e-14)
  # All labels dropped: no guidance, and the network sees the empty condition.
  dropped = dataclasses.replace(settings, cond_dropout=1.0)
  expected = jax.grad(lambda p: jnp.mean((network(p, x, t, t, jnp.full(16, 3)) - v) ** 2))(params)
  np.testing.assert_allclose(gradient(dropped), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["rms", "l2"])
def test_normalised_residuals_have_bounded_size(name):
  g = jnp.array([[3.0, 4.0], [0.03, 0.04]])
  norm = jnp.sqrt(jnp.sum(g**2, axis=1) / (2 if name == "rms" else 1))[:, None]
  np.testing.assert_allclose(flow_map.normalise(g, FlowMap(normalisation=name)), g / (norm + 0.1), rtol=1e-12)
  settings = FlowMap(normalisation=name, norm_power=0.5, norm_offset=1e-3)
  np.testing.assert_allclose(flow_map.normalise(g, settings), g / (norm + 1e-3) ** 0.5, rtol=1e-12)


def test_full_warm_up_leaves_the_bias_that_its_docstring_tells():
  """The minimum of the loss on N(0, c^2) is F = a x with F - v + w (t - s) dF/dt = 0, an equation for a along t."""
  c = 0.5
  rate = lambda t: (t - (1 - t) * c**2) / (t**2 + (1 - t) ** 2 * c**2)

  def average(t, s, w):
    change = lambda u, a: (rate(s + u) - a) / (w * u) - a * rate(s + u)
    return solve_ivp(change, (1e-6, t - s), [rate(s)], method="LSODA", rtol=1e-9, atol=1e-11).y[0, -1]

  def bias(steps, w):
    grid = np.linspace(1, 0, steps + 1)
    return abs(math.prod(1 + (s - t) * average(t, s, w) for t, s in itertools.pairwise(grid)) - c)

  told = re.search(r"([\d.]+),\s+([\d.]+) and ([\d.]+) off with 1, 2 and 4 steps", FlowMap.__doc__)
  assert [float(number) for number in told.groups()] == pytest.approx([bias(n, 0.99) for n in (1, 2, 4)], abs=6e-5)
  assert max(bias(n, 1.0) for n in (1, 2, 4)) < 1e-5


def test_examples_that_are_not_finite_are_left_out():
  settings = FlowMap(normalisation="rms")
  teacher_rows = jnp.arange(16) % 4 == 0

  def gradient(break_it):
    def loss(params):
      def teacher(x, t, cond, guidance):
        v = exact_velocity(x, t)
        return jnp.where(teacher_rows[:, None] & break_it, jnp.nan, v)

      x0 = C * jax.random.normal(jax.random.key(5), (16, 3))
      out, aux = flow_map_loss(lambda *a: linear(params, *a), teacher, x0, None, jax.random.key(7), 5000, settings)
      return jnp.sum(jnp.where(teacher_rows, 0.0, out)) if not break_it else jnp.sum(out), aux

    return jax.grad(loss, has_aux=True)(jnp.linspace(-0.5, 0.5, 30).reshape(10, 3))

  (broken, aux), (whole, _) = gradient(True), gradient(False)
  assert float(jnp.mean(aux["masked"])) == 0.25
  np.testing.assert_allclose(broken, whole, rtol=1e-12)
  assert all(bool(jnp.all(jnp.isfinite(v))) for v in aux.values())


def test_lower_precision_takes_its_derivative_from_the_precise_network(states):
  x, t, s = states
  rough = lambda *args: exact_average(*args).astype(jnp.bfloat16).astype(x.dtype)
  F, g, _ = residual(rough, exact_velocity, x, t, s, None, None, side="eulerian", warmup=1.0, precise=exact_average)
  np.testing.assert_array_equal(F, rough(x, t, s))
  assert float(jnp.abs(g).max()) < 1e-13


def test_intervals_are_drawn_as_described():
  count, key = 20_000, jax.random.key(3)

  def draw(**settings):
    t, s = sample_interval(key, count, FlowMap(**settings))
    assert float(jnp.min(s)) >= 0
    assert float(jnp.max(t)) <= 1
    assert bool(jnp.all(s <= t))
    return np.asarray(t), np.asarray(s)

  t, s = draw(time_mean=-0.8, time_std=1.0)
  assert np.median(t - s) == pytest.approx(1 / (1 + np.exp(0.8)), abs=0.01)
  assert np.mean(s / (1 - (t - s))) == pytest.approx(0.5, abs=0.01)  # its place is uniform
  t, s = draw(times="pair", time_mean=-0.4)
  assert np.median(np.concatenate([t, s])) == pytest.approx(1 / (1 + np.exp(0.4)), abs=0.01)
  t, s = draw(to_data=0.3, anchor=0.5)
  assert np.mean(s == t) == pytest.approx(0.5, abs=0.015)
  assert np.mean(s == 0) == pytest.approx(0.15, abs=0.015)


def logit_normal(mean, std):
  return stats.norm(mean, std), lambda t: np.log(t) - np.log1p(-t)


LENGTH, SCM, PAIR = logit_normal(-0.8, 1.0), logit_normal(-1.0, 1.4), logit_normal(-0.4, 1.0)


@pytest.mark.parametrize(
  ("preset", "lengths", "to_data", "anchor"),
  [
    (flow_map.ayf_emd(), LENGTH, 0.0, 0.0),
    (flow_map.ayf_lmd(), LENGTH, 0.0, 0.0),
    (flow_map.consistency(), SCM, 1.0, 0.0),
    (flow_map.consistency(time_mean=-0.8, time_std=1.0), LENGTH, 1.0, 0.0),
    (flow_map.ayf_emd(to_data=0.3, anchor=0.5), LENGTH, 0.3, 0.5),  # of configs/digits.py
    (flow_map.consistency(shift=2.0), SCM, 1.0, 0.0),
    (flow_map.mean_flow(), None, 0.0, 0.75),
    (flow_map.mean_flow(to_data=0.5), None, 0.5, 0.75),
  ],
)
def test_every_preset_draws_the_distribution_it_names(preset, lengths, to_data, anchor):
  """Kolmogorov-Smirnov tests of both times and of the length, against closed forms or draws of NumPy's."""
  count = 20_000
  t, s = (np.asarray(a, np.float64) for a in sample_interval(jax.random.key(5), count, preset))
  assert ((s >= 0) & (s <= t) & (t <= 1)).all()
  anchored, moved = (s == t), (s == 0) & (t > 0)
  assert anchored.mean() == pytest.approx(anchor, abs=0.015)
  assert moved.mean() == pytest.approx((1 - anchor) * to_data, abs=0.015)
  t, s = unshift_time(t, preset.shift), unshift_time(s, preset.shift)
  rng = np.random.default_rng(0)
  if lengths is None:  # a sorted pair
    normal, _ = PAIR
    pair = np.sort(1 / (1 + np.exp(-normal.rvs((count, 2), rng))), axis=1)
    late, early = pair[:, 1], pair[:, 0]
    assert stats.kstest((t - s)[~anchored], late - early).pvalue > 1e-3
  else:
    normal, logit = lengths
    assert stats.kstest(logit((t - s)[~anchored]), normal.cdf).pvalue > 1e-3
    length = 1 / (1 + np.exp(-normal.rvs(count, random_state=rng)))
    early = rng.uniform(size=count) * (1 - length)
    late = early + length
  if moved.any():  # such an interval keeps its length, and ends at the data
    assert stats.kstest(t[moved], late - early).pvalue > 1e-3
  free = ~anchored & ~moved
  if free.any():
    assert stats.kstest(s[free], early).pvalue > 1e-3
    assert stats.kstest(t[free], late).pvalue > 1e-3


def test_mean_flow_drops_labels_of_flow_matching_alone_and_does_not_guide_them():
  seen = {}

  def network(x, t, s, cond, guidance):
    if s is not t and "cond" not in seen:
      seen.update(cond=cond, apart=s != t)
    return x * 0.5 + cond[:, None] * 0.01

  count = 4_000
  x0 = jax.random.normal(jax.random.key(0), (count, 2))
  flow_map_loss(network, None, x0, jnp.ones(count, int), jax.random.key(1), 0, flow_map.mean_flow(), null_cond=7)
  dropped = np.asarray(seen["cond"]) == 7
  assert dropped.mean() == pytest.approx(0.1, abs=0.015)
  assert not (dropped & np.asarray(seen["apart"])).any()


def test_mean_flow_guides_in_its_interval_alone():
  network = lambda x, t, s, cond, guidance: jnp.where((cond == 7)[:, None], 3.0, 5.0) * jnp.ones_like(x)
  t = jnp.array([0.1, 0.2, 0.5, 0.8, 0.9])
  v, cond = jnp.ones((5, 2)), jnp.zeros(5, int)
  settings = flow_map.mean_flow(omega=2.0, kappa=0.25, interval=(0.2, 0.8))
  target = flow_map._self_guided(network, v, v, t, cond, 7, settings)
  inside = 2.0 * 1 + (1 - 2.0 - 0.25) * 3.0 + 0.25 * 5.0
  np.testing.assert_allclose(target[:, 0], [1, inside, inside, inside, 1])


def test_mean_flow_has_the_settings_of_its_release():
  """Read from configs/default.py of the official JAX release, commit d70cb55, 2026-03-13."""
  preset = flow_map.mean_flow()
  assert (preset.time_mean, preset.time_std, preset.anchor) == (-0.4, 1.0, 0.75)
  assert (preset.omega, preset.kappa, preset.cond_dropout, preset.interval) == (1.0, 0.5, 0.1, (0.0, 1.0))
  assert (preset.normalisation, preset.norm_power, preset.norm_offset) == ("adaptive", 1.0, 0.01)
  assert (preset.warmup(0), preset.target) == (1.0, "data")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_adaptive_weight_is_the_releases(power):
  """Their loss is sum(e^2) / sg((sum(e^2) + c)^p); c = 0.01."""
  settings = flow_map.mean_flow(norm_power=power)
  g = jnp.array([[3.0, 4.0], [0.03, 0.04]])
  squares = jnp.sum(g**2, axis=1)
  ours, _ = flow_map.regression(jnp.zeros_like(g), g, g, settings)
  np.testing.assert_allclose(ours, squares / (squares + 0.01) ** power, rtol=1e-12)


def test_strengths_of_guidance_reach_teacher_and_student():
  seen = {}
  settings = FlowMap(guidance=(1.0, 3.0))

  def network(x, t, s, cond, guidance):
    seen["student"] = guidance
    return x

  def teacher(x, t, cond, guidance):
    seen["teacher"] = guidance
    return x

  flow_map_loss(network, teacher, jnp.ones((500, 3)), None, jax.random.key(0), 0, settings)
  np.testing.assert_array_equal(seen["student"], seen["teacher"])
  assert 1.0 <= float(seen["student"].min()) < 1.05
  assert 2.95 < float(seen["student"].max()) <= 3.0
  flow_map_loss(network, teacher, jnp.ones((5, 3)), None, jax.random.key(0), 0, FlowMap())
  assert seen == {"student": None, "teacher": None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(side="left"), "side: expected one of"),
    (dict(anchor=1.5), "anchor"),
    (dict(time_std=0.0), "time_std"),
    (dict(guidance=(3.0, 1.0)), "low, high"),
    (dict(target="data", side="lagrangian"), "eulerian"),
    (dict(target="data", guidance=(1.0, 2.0)), "guidance"),
    (dict(kappa=0.5), "target='teacher'"),
  ],
)
def test_settings_out_of_range_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    FlowMap(**changes)
  with pytest.raises(ValueError, match="needs a teacher"):
    flow_map_loss(exact_average, None, jnp.ones((2, 3)), None, jax.random.key(0), 0, FlowMap())
