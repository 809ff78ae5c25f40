"""Flow matching where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.objectives.flow_matching import FlowMatching, drop_condition, flow_matching_loss, sample_time


def test_loss_of_the_exact_velocity_is_zero():
  """Data at a single point c: the velocity field is (x - c) / t, and the regression has no noise left."""
  c = jnp.array([0.3, -0.7])
  x0 = jnp.tile(c, (64, 1))
  exact = lambda x, t, cond: (x - c[None]) / t[:, None]
  loss, _ = flow_matching_loss(exact, x0, jnp.zeros(64, int), jax.random.key(0))
  wrong, _ = flow_matching_loss(lambda *a: exact(*a) + 0.1, x0, jnp.zeros(64, int), jax.random.key(0))
  assert loss.shape == (64,)
  np.testing.assert_allclose(loss, 0.0, atol=1e-20)
  np.testing.assert_allclose(wrong, 0.01, rtol=1e-9)


@pytest.mark.parametrize(("mean", "expected"), [(None, 0.5), (0.0, 0.5), (1.0, 0.6975)])
def test_times_follow_their_distribution(mean, expected):
  t = sample_time(jax.random.key(0), (200_000,), mean=mean, std=1.0)
  assert jnp.all((t >= 0) & (t <= 1))
  np.testing.assert_allclose(jnp.mean(t), expected, atol=3e-3)


def test_condition_dropout_drops_whole_examples_at_its_rate():
  cond = {"label": jnp.arange(10_000), "text": jnp.ones((10_000, 3))}
  null = {"label": -1, "text": jnp.zeros(3)}
  out = drop_condition(jax.random.key(0), cond, null, 0.1)
  dropped = out["label"] == -1
  np.testing.assert_allclose(jnp.mean(dropped), 0.1, atol=0.01)
  np.testing.assert_array_equal(out["text"].sum(1), jnp.where(dropped, 0.0, 3.0))
  assert drop_condition(jax.random.key(0), cond, null, 0.0) is cond


def test_settings_refuse_bad_values():
  for bad in (dict(cond_dropout=1.5), dict(shift=0.0), dict(time_std=0.0)):
    with pytest.raises(ValueError, match=next(iter(bad))):
      FlowMatching(**bad)
