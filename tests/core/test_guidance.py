"""Guidance against the PyTorch release, and its interval."""

import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.guidance import autoguided, guidance_bias, guided
from tests.golden_layout import assert_close, channels_last


def test_bias_matches_the_release(golden):
  file = golden("guidance")
  pos, neg, axis = (channels_last(file[f"in_{n}"]) for n in ("pos", "neg", "axis"))
  scale = jnp.asarray(file["in_scale"]).reshape(-1)
  bias = lambda o, axis=axis: guidance_bias(pos, neg, scale, orthogonal=o, axis=axis)
  assert_close(bias(0.0, None), channels_last(file["out_bias_orth0"]), 1e-9)
  assert_close(bias(1.0), channels_last(file["out_bias_orth1"]), 1e-9)
  assert_close(bias(0.5), channels_last(file["out_bias_orth05"]), 1e-9)
  assert_close(bias(1.0, pos), channels_last(file["out_bias_orth1_self"]), 1e-9)


def velocity(x, t, cond):
  """A linear field that tells conditions apart."""
  return 2.0 * x + (t * cond["shift"]).reshape(-1, 1, 1)


X = jnp.linspace(-1.0, 1.0, 4 * 3 * 2).reshape(4, 3, 2)
T = jnp.array([0.1, 0.3, 0.6, 0.9])
COND = {"shift": jnp.arange(1.0, 5.0)}
NULL = {"shift": 0.0}


def test_guidance_acts_in_its_interval_only():
  v = guided(velocity, NULL, scale=3.0, interval=(0.3, 0.6))(X, T, COND)
  plain, null = velocity(X, T, COND), velocity(X, T, {"shift": jnp.zeros(4)})
  np.testing.assert_array_equal(v[jnp.array([0, 3])], plain[jnp.array([0, 3])])
  np.testing.assert_allclose(v[1:3], (null + 3.0 * (plain - null))[1:3], rtol=1e-12)


def test_the_orthogonal_part_spares_the_denoised_image():
  """With all of the projection removed, what guidance adds is orthogonal to x0 = x - t v of the condition."""
  field = guided(velocity, NULL, scale=3.0, orthogonal=1.0)
  plain = velocity(X, T, COND)
  bias, x0 = field(X, T, COND) - plain, X - T[:, None, None] * plain
  assert jnp.max(jnp.abs(bias)) > 0.1
  np.testing.assert_allclose(jnp.sum(bias * x0, (1, 2)), 0.0, atol=1e-12)


def test_both_branches_are_one_call_and_no_guidance_is_none():
  calls = []

  def counted(x, t, cond):
    calls.append(x.shape)
    return velocity(x, t, cond)

  guided(counted, NULL, scale=2.0)(X, T, COND)
  assert calls == [X.shape]  # under vmap over the branches
  assert guided(counted, NULL, scale=1.0) is counted


def test_labels_keep_their_type():
  def by_label(x, t, cond):
    assert cond.dtype == jnp.int32
    return x * cond.reshape(-1, 1, 1)

  v = guided(by_label, 10, scale=2.0)(X, T, jnp.arange(4, dtype=jnp.int32))
  np.testing.assert_allclose(v, X * (2 * jnp.arange(4) - 10.0).reshape(-1, 1, 1), rtol=1e-12)


def test_bad_values_are_refused():
  for interval in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)):
    with pytest.raises(ValueError, match="guidance interval: expected .*got"):
      guided(velocity, NULL, scale=2.0, interval=interval)
  with pytest.raises(ValueError, match="axis"):
    guidance_bias(X, X, jnp.ones(4), orthogonal=1.0)


def test_strength_may_differ_between_examples():
  scale = jnp.array([1.0, 2.0, 3.0, 1.5])
  v = guided(velocity, NULL, scale=scale)(X, T, COND)
  for i, w in enumerate(scale):
    np.testing.assert_allclose(v[i], guided(velocity, NULL, scale=float(w))(X, T, COND)[i], rtol=1e-12)


def test_autoguidance_leads_away_from_the_weak_model():
  weak = lambda x, t, cond: 0.5 * velocity(x, t, cond) + 1.0
  scale = jnp.array([1.0, 2.0, 3.0, 1.5])
  v = autoguided(velocity, weak, scale=scale, interval=(0.2, 1.0))(X, T, COND)
  w = jnp.where(T >= 0.2, scale, 1.0)[:, None, None]
  np.testing.assert_allclose(v, w * velocity(X, T, COND) + (1 - w) * weak(X, T, COND), rtol=1e-12)
  assert autoguided(velocity, weak) is velocity
