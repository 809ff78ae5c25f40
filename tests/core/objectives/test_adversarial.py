"""Adversarial losses where the answer is known, second derivatives, and a generator that moves to the data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pflow_jax.core.objectives.adversarial import Adversarial, adaptive_weight, discriminator_loss, generator_loss
from pflow_jax.networks.discriminator import make_discriminator

W = jnp.array([[0.5, -1.0], [2.0, 0.3]])


def points(seed=0):
  real, fake = jax.random.normal(jax.random.key(seed), (2, 5, 2))
  return real, fake, jnp.array([0, 1, 0, 1, 1])


def linear(x, cond):
  return jnp.sum(W[cond] * x, axis=1)


def softplus(x):
  return np.logaddexp(0, x)


def test_losses_of_a_linear_discriminator():
  """Its gradient is the class's weight vector, whatever the point."""
  real, fake, cond = points()
  margin = np.sum(W[cond] * (real - fake), axis=1)
  norm = np.sum(W[cond] ** 2, axis=1)
  loss, metrics = discriminator_loss(linear, real, fake, cond, r1=0.3, r2=0.5)
  np.testing.assert_allclose(loss, softplus(-margin) + 0.4 * norm, rtol=1e-12)
  np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-12)
  np.testing.assert_allclose(metrics["r1"], norm, rtol=1e-12)
  np.testing.assert_allclose(metrics["r2"], norm, rtol=1e-12)
  np.testing.assert_allclose(generator_loss(linear(real, cond), linear(fake, cond)), softplus(margin), rtol=1e-12)


def test_each_penalty_is_taken_at_its_own_examples():
  """D = |x|^2 / 2 has the gradient x; images sum over all their axes."""
  real, fake = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  power = lambda x, cond: jnp.sum(x**2, axis=(1, 2, 3)) / 2
  a, b = (np.sum(np.asarray(x) ** 2, axis=(1, 2, 3)) for x in (real, fake))
  loss, _ = discriminator_loss(power, real, fake, None, r1=0.3, r2=0.5)
  np.testing.assert_allclose(loss, softplus((b - a) / 2) + 0.15 * a + 0.25 * b, rtol=1e-12)


def test_tied_examples_are_penalised_for_the_whole_batch():
  """Every logit is the mean of all: an example moves each by W / 5, the sum of five by W."""
  real, fake, cond = points()
  tied = lambda x, cond: jnp.full(5, jnp.mean(linear(x, cond)))
  _, metrics = discriminator_loss(tied, real, fake, cond)
  np.testing.assert_allclose(metrics["r1"], np.sum(W[cond] ** 2, axis=1), rtol=1e-12)


def test_no_gradient_into_the_examples():
  real, fake, cond = points()
  curved = lambda x, cond: jnp.sum(jnp.sin(x), axis=1)
  gradients = jax.grad(lambda *x: jnp.sum(discriminator_loss(curved, *x, cond)[0]), argnums=(0, 1))(real, fake)
  np.testing.assert_array_equal(gradients, np.zeros((2, 5, 2)))


@pytest.mark.parametrize("shape", [(8, 8, 1), (2,)])
def test_gradient_of_the_penalised_loss_matches_finite_differences(shape):
  """Derivatives of derivatives through every layer, under jit, in float64."""
  module = make_discriminator(shape, 2, width=3, dtype="float64")
  real, fake = jax.random.normal(jax.random.key(1), (2, 4, *shape))
  cond = jnp.array([0, 1, 2, 0])
  shapes = jax.eval_shape(module.init, jax.random.key(0), real, cond)["params"]
  rng = np.random.default_rng(0)
  params, tangent = (jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), shapes) for _ in range(2))

  def loss(params):
    discriminator = lambda x, cond: module.apply({"params": params}, x, cond)
    return jnp.sum(discriminator_loss(discriminator, real, fake, cond, r1=3.0, r2=5.0)[0])

  @jax.jit
  def slope(params):
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), jax.grad(loss)(params), tangent)
    return sum(jax.tree.leaves(products))

  step = jax.jit(lambda h: loss(jax.tree.map(lambda p, t: p + h * t, params, tangent)))
  np.testing.assert_allclose(slope(params), (step(1e-6) - step(-1e-6)) / 2e-6, rtol=1e-6)


def test_generator_moves_to_the_data():
  """200 steps on a Gaussian: the generator finds its mean and its width."""
  settings = Adversarial(learning_rate=1e-2, r1=1.0, r2=1.0, width=16)
  module = make_discriminator((2,), 0, width=settings.width, max_width=settings.max_width)
  cond = jnp.zeros(128, jnp.int32)
  mean, std = jnp.array([1.0, -0.5], jnp.float32), jnp.array([0.4, 0.8], jnp.float32)
  adam, g_adam = (optax.adam(rate, b1=settings.b1, b2=settings.b2) for rate in (settings.learning_rate, 3e-2))
  g = {"mean": jnp.array([-1.0, 1.0], jnp.float32), "std": jnp.ones(2, jnp.float32)}
  d = module.init(jax.random.key(0), jnp.zeros((128, 2), jnp.float32), cond)["params"]

  def step(carry, key):
    g, d, g_state, d_state = carry
    noise = jax.random.normal(key, (2, 128, 2), jnp.float32)
    real = mean[None] + std[None] * noise[0]
    sample = lambda g: g["mean"][None] + g["std"][None] * noise[1]
    logits = lambda d, x: module.apply({"params": d}, x, cond)

    def d_loss(d):
      score = lambda x, cond: logits(d, x)
      return jnp.mean(discriminator_loss(score, real, sample(g), cond, r1=settings.r1, r2=settings.r2)[0])

    updates, d_state = adam.update(jax.grad(d_loss)(d), d_state)
    d = optax.apply_updates(d, updates)
    g_loss = lambda g: jnp.mean(generator_loss(logits(d, real), logits(d, sample(g))))
    updates, g_state = g_adam.update(jax.grad(g_loss)(g), g_state)
    return (optax.apply_updates(g, updates), d, g_state, d_state), g

  start = (g, d, g_adam.init(g), adam.init(d))
  keys = jax.random.split(jax.random.key(1), 200)
  _, path = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(start)
  last = jax.tree.map(lambda x: jnp.mean(x[-20:], axis=0), path)
  assert jnp.linalg.norm(last["mean"] - mean) < 0.15
  assert jnp.linalg.norm(last["std"] - std) < 0.15


def test_adaptive_weight_is_the_ratio_of_global_norms():
  gradient = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.array([8.0, 0.0])}  # norm 10
  adversarial = {"kernel": jnp.zeros((2, 2)), "bias": jnp.array([0.0, -2.0])}
  np.testing.assert_allclose(adaptive_weight(gradient, adversarial), 10 / 2.0001, rtol=1e-12)
  np.testing.assert_allclose(adaptive_weight(gradient, adversarial, max_weight=3.0), 3.0, rtol=1e-12)
  slopes = jax.jit(jax.grad(adaptive_weight, argnums=(0, 1)))(gradient, adversarial)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
  ("gradient", "adversarial", "expected"),
  [(0, 1, 0), (1, 0, 1e4), (0, 0, 0), (np.nan, 1, 0), (1, np.nan, 0), (np.inf, 1, 0), (1, np.inf, 0), (1e30, 1, 0)],
)
def test_adaptive_weight_is_finite(gradient, adversarial, expected):
  got = adaptive_weight(*(jnp.array([value], jnp.float32) for value in (gradient, adversarial)))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (dict(weight=-0.1), "weight, r1 and r2: expected at least 0"),
    (dict(r2=-1.0), "weight, r1 and r2: expected at least 0"),
    (dict(learning_rate=0.0), "learning_rate: expected > 0"),
    (dict(b1=1.0), "b1 and b2: expected decay rates"),
    (dict(b2=-0.1), "b1 and b2: expected decay rates"),
    (dict(width=0), "width: expected 1 to max_width 512"),
    (dict(width=64, max_width=32), "width: expected 1 to max_width 32"),
  ],
)
def test_settings_refuse_bad_values(bad, message):
  with pytest.raises(ValueError, match=message):
    Adversarial(**bad)
