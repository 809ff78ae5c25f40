"""Improved and decoupled MeanFlow beside their releases, and FreeFlow where the answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pflow_jax.core.objectives import decoupled_mean_flow, free_flow, improved_mean_flow
from pflow_jax.core.objectives.decoupled_mean_flow import DecoupledMeanFlow
from pflow_jax.core.objectives.flow_map import regression
from pflow_jax.core.objectives.free_flow import FreeFlow
from pflow_jax.core.objectives.improved_mean_flow import ImprovedMeanFlow
from tests.core.objectives.test_flow_map import C, exact_average, exact_velocity, spread

CLASSES = 4


def features(t, h, w, low, high):
  return jnp.stack([jnp.sin(3 * t), h, jnp.log(w), low, high, h * h], axis=1)


def toy(weights, x, t, s, cond, w=None, interval=None):
  """The toy network that the releases' losses were run on: both of its outputs."""
  ones, h = jnp.ones_like(t), t - s
  low, high = (0 * t, 0 * t) if interval is None else interval.T
  shift = weights["table"][cond] + features(t, h, ones if w is None else w, low, high) @ weights["time"]
  shift = shift[:, None, None]
  return jnp.tanh(x @ weights["wu"] + shift), jnp.tanh(x @ weights["wv"] - shift)


@pytest.fixture
def rivals(golden):
  numbers = golden("rivals")
  weights = {name[2:]: jnp.asarray(value) for name, value in numbers.items() if name.startswith("w_")}
  return weights, numbers


def close(got, numbers, prefix):
  for name, value in got.items():
    if f"{prefix}{name}" in numbers:
      np.testing.assert_allclose(value, numbers[f"{prefix}{name}"], rtol=2e-5, atol=2e-6, err_msg=name)


def test_improved_mean_flow_is_the_releases(rivals):
  """Loss and gradients on equal weights and draws, with dropped labels and strengths beyond their interval."""
  weights, numbers = rivals
  own = {name[4:]: jnp.asarray(value) for name, value in numbers.items() if name.startswith("imf_")}
  interval = jnp.stack([own["lo"], own["hi"]], axis=1)
  outside = (own["t"] < own["lo"]) | (own["t"] > own["hi"])
  assert own["dropped"].any()
  assert {True, False} == set(np.asarray(outside).tolist())
  settings = ImprovedMeanFlow()._draws

  def loss(weights):
    u, v, g, g_v, dF = improved_mean_flow.residuals(
      lambda x, t, s, cond, w, interval: toy(weights, x, t, s, cond, w, interval),
      own["x"],
      own["t"],
      own["s"],
      own["v"],
      jnp.asarray(numbers["label"]),
      own["w"],
      interval,
      dropped=own["dropped"],
      null_cond=CLASSES,
    )
    return jnp.mean(regression(u, g, dF, settings)[0] + regression(v, g_v, 0 * g_v, settings)[0])

  value, gradient = jax.value_and_grad(loss)(weights)
  np.testing.assert_allclose(value, numbers["imf_loss"], rtol=1e-5)
  close(gradient, numbers, "imf_grad_")


def test_decoupled_mean_flow_is_the_releases(rivals):
  weights, numbers = rivals
  own = {name[4:]: jnp.asarray(value) for name, value in numbers.items() if name.startswith("dmf_")}
  settings = DecoupledMeanFlow()
  cond = jnp.where(own["dropped"], CLASSES, jnp.asarray(numbers["label"]))
  assert ((own["mf_t"] > 0.7) & ~own["dropped"]).any(), "a time beyond the interval"

  def loss(trained):
    def network(x, t, s, cond, guidance):
      # The toy of that release has neither strength nor interval.
      return toy(trained["weights"], x, t, s, cond)[0]

    def scale(t, s):
      a, b, c = trained["lv"]
      return a + b * t + c * s

    terms = []
    for name, s in (("fm", own["fm_t"]), ("mf", own["s"])):
      x, t, v = (own[f"{name}_{part}"] for part in ("x", "t", "v"))
      v = decoupled_mean_flow.guided_target(network, v, x, t, cond, CLASSES, own["dropped"], settings)
      jump = name == "mf"
      terms.append(decoupled_mean_flow.error(network, scale, x, t, s, v, cond, offset=settings.offset, jump=jump)[0])
    each = sum(terms) / 2
    return jnp.mean(each), each

  trained = {"weights": weights, "lv": own["lv"]}
  (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
  np.testing.assert_allclose(each, numbers["dmf_loss"], rtol=1e-5)
  close(gradient["weights"], numbers, "dmf_grad_")
  np.testing.assert_allclose(gradient["lv"], numbers["dmf_grad_lv"], rtol=2e-5)


def test_what_is_drawn_has_the_distributions_of_the_paper():
  count = 20_000
  keys = jax.random.split(jax.random.key(0), 5)
  for power in (1.0, 2.0):
    settings = ImprovedMeanFlow(guidance=(1.0, 8.0), guidance_power=power)
    w = np.asarray(improved_mean_flow.sample_strength(keys[0], count, settings))
    # The distribution function of the density w^-power on [1, 8].
    cdf = (lambda w: np.log(w) / np.log(8)) if power == 1 else (lambda w: (1 - 1 / w) / (1 - 1 / 8))
    assert stats.kstest(w, cdf).pvalue > 1e-3
  anchored = jnp.arange(count) % 2 == 0
  times = np.asarray(improved_mean_flow.sample_guided_times(keys[1], anchored))
  assert (times[::2] == [0, 1]).all()
  assert stats.kstest(times[1::2, 0], stats.uniform(0, 0.5).cdf).pvalue > 1e-3
  assert stats.kstest(times[1::2, 1], stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3
  time, t, s = (np.asarray(a) for a in decoupled_mean_flow.sample_times(keys[2], count, DecoupledMeanFlow()))
  logit = lambda t: np.log(t) - np.log1p(-t)
  assert stats.kstest(logit(time), stats.norm(0, 1).cdf).pvalue > 1e-3
  first, second = stats.norm(0.4, 1).cdf, stats.norm(-1.2, 1).cdf
  assert stats.kstest(logit(t), lambda a: first(a) * second(a)).pvalue > 1e-3
  assert stats.kstest(logit(s), lambda a: 1 - (1 - first(a)) * (1 - second(a))).pvalue > 1e-3


def states(count=64, dim=3):
  keys = jax.random.split(jax.random.key(0), 2)
  t = jnp.linspace(0.05, 1.0, count)
  return (
    spread(t)[:, None] * jax.random.normal(keys[0], (count, dim)),
    t,
    0.98 * t * jax.random.uniform(keys[1], (count,)),
  )


def test_the_exact_map_leaves_no_residual_of_improved_mean_flow():
  """With the exact velocity as the second output, whose tangent then is the flow's."""
  x, t, s = states()
  for wrong, low, high in ((0.0, 0.0, 1e-12), (0.1, 1e-2, 1.0)):
    network = lambda x, t, s, cond, w, i, wrong=wrong: (
      exact_average(x, t, s) + wrong * t[:, None],
      exact_velocity(x, t),
    )
    dropped = jnp.zeros(len(t), bool)
    got = improved_mean_flow.residuals(
      network, x, t, s, exact_velocity(x, t), jnp.zeros(len(t), int), None, None, dropped=dropped
    )
    assert low <= float(jnp.abs(got[2]).max()) < high


def test_its_tangent_is_the_networks_own_velocity():
  """Whatever the data say: with eps - x0 in its place, as in MeanFlow, du/dt would be another."""
  x, t, s = states()
  slope = jnp.arange(3.0)
  network = lambda x, t, s, cond, w, i: ((x * slope[None]).sum(axis=1, keepdims=True) * jnp.ones((1, 3)), 2 * x)
  dropped = jnp.zeros(len(t), bool)
  *_, dF = improved_mean_flow.residuals(network, x, t, s, 7 * x, jnp.zeros(len(t), int), None, None, dropped=dropped)
  np.testing.assert_allclose(dF, 2 * (x * slope[None]).sum(axis=1, keepdims=True) * jnp.ones((1, 3)), rtol=1e-10)


def test_free_flow_predicts_nothing_more_for_the_exact_map():
  noise = jax.random.normal(jax.random.key(0), (256, 3))
  teacher = lambda x, t, cond, guidance: exact_velocity(x, t)
  settings = FreeFlow(warmup_steps=0)
  for wrong, low, high in ((0.0, 0.0, 1e-12), (0.2, 1e-2, 2.0)):
    network = lambda x, t, s, cond, w, wrong=wrong: exact_average(x, t, s) + wrong * jnp.sin(3 * s)[:, None]
    _, metrics = free_flow.prediction_loss(network, teacher, noise, None, jax.random.key(1), 0, settings)
    assert low <= float(metrics["residual"].max()) < high
    assert not metrics["masked"].any()


def test_its_correction_moves_samples_to_the_teachers():
  """Samples too narrow, N(0, 0.2^2) for N(0, C^2), are widened; the exact ones stay."""

  def field(c):
    return lambda x, t: x * ((t - (1 - t) * c**2) / (t**2 + (1 - t) ** 2 * c**2))[:, None]

  noise = jax.random.normal(jax.random.key(0), (4096, 1))

  def slope(c):
    """Gradient in the factor of x = factor z, whose own field is that of N(0, c^2)."""

    def loss(factor):
      samples = lambda: ((1 - factor) * noise, factor * noise)
      each, metrics, _ = free_flow.correction_loss(samples, field(c), field(C), jax.random.key(1), FreeFlow())
      return jnp.mean(each), metrics["correction"]

    gradient, correction = jax.grad(loss, has_aux=True)(c)
    return float(gradient), float(jnp.abs(correction).max())

  assert slope(0.2)[0] < -0.05
  assert slope(0.6)[0] > 0.05
  assert slope(C) == (0.0, 0.0)


def test_the_samples_own_field_is_learned_by_flow_matching():
  """At its minimum the loss of a linear field is that of the exact one."""
  c, key = 0.3, jax.random.key(2)
  x0 = c * jax.random.normal(jax.random.key(1), (20_000, 1))
  exact = lambda x, t: x * ((t - (1 - t) * c**2) / (t**2 + (1 - t) ** 2 * c**2))[:, None]
  losses = [
    float(jnp.mean(free_flow.own_velocity_loss(lambda x, t, f=f: f * exact(x, t), x0, key, FreeFlow())))
    for f in (0.9, 1, 1.1)
  ]
  assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize(
  ("make", "changes", "message"),
  [
    (ImprovedMeanFlow, dict(guidance=(0.5, 2.0)), "1 <= low <= high"),
    (ImprovedMeanFlow, dict(guidance=(1.0, 1.0)), "expected 0 with guidance"),
    (ImprovedMeanFlow, dict(anchor=0.05), "at most anchor"),
    (DecoupledMeanFlow, dict(target="network"), "target"),
    (DecoupledMeanFlow, dict(pair_stds=(1.0, 0.0)), "pair_stds"),
    (DecoupledMeanFlow, dict(interval=(0.7, 0.0)), "interval"),
    (DecoupledMeanFlow, dict(target="teacher"), "expected 0 with target='teacher'"),
    (FreeFlow, dict(learning_rate=0.0), "learning_rate"),
    (FreeFlow, dict(correction=-1.0), "correction"),
  ],
)
def test_settings_that_do_not_fit_are_refused(make, changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(make(), **changes)


def test_an_example_of_decoupled_mean_flow_that_is_not_finite_does_not_count():
  """Its derivative is not: that of the root of 0."""
  x0, bad = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8) == 2

  def loss(w):
    network = lambda x, t, s, cond, guidance: w * x + jnp.sqrt(jnp.where(cond == 1, 0.0, 1.0) * t)[:, None]
    settings = DecoupledMeanFlow(omega=0.0, cond_dropout=0.0)
    scale = lambda t, s: jnp.zeros_like(t)
    each, metrics = decoupled_mean_flow.decoupled_mean_flow_loss(
      network, scale, None, x0, bad.astype(int), jax.random.key(1), settings
    )
    return jnp.sum(each), metrics["masked"]

  gradient, masked = jax.grad(loss, has_aux=True)(0.5)
  assert np.isfinite(gradient)
  np.testing.assert_array_equal(masked, bad)
