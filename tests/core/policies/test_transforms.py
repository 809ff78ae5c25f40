"""Dropout and temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.policies import GMFlowPolicy, auto_temperature, dropout, temperature
from tests import cases
from tests.golden_layout import assert_close


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("suffix", ["", "_f32"])
def test_temperature_matches_the_release(golden, value, suffix):
  file = golden(f"gm_temperature{suffix}")
  dtype, rtol = (jnp.float32, 1e-5) if suffix else (jnp.float64, 1e-9)
  for b in range(3):
    logits, variance = jnp.asarray(file["in_logweights"][b, :, 0], dtype), file["in_gm_vars"][b].reshape(())
    policy = GMFlowPolicy.create(jnp.zeros((4, 4, 2), dtype), 1.0, jnp.zeros((4, 4, 4, 2), dtype), logits, 0.0)
    tempered = temperature(policy, value)
    assert_close(tempered.logits.reshape(4, 4, 4), file[f"out_logweights_T{value}"][b, :, 0], rtol)
    want = file[f"out_gm_vars_T{value}"][b].reshape(())
    np.testing.assert_allclose(tempered.variance * variance, want, rtol=rtol)
    shift = file[f"out_logstds_T{value}"][b] - file["in_logstds"][b]
    np.testing.assert_allclose(np.log(tempered.variance) / 2, shift.reshape(()), rtol=rtol)


def test_temperature_from_one_up_changes_nothing():
  _, policy = cases.gmflow()
  for value in (1.0, 1.7):
    assert temperature(policy, value) is policy


def test_temperature_of_arcflow_sharpens_the_weights_alone():
  _, policy = cases.arc()
  tempered = temperature(policy, 0.5)
  np.testing.assert_allclose(tempered.logits, jax.nn.log_softmax(2 * policy.logits, axis=0), rtol=1e-12)
  np.testing.assert_array_equal(tempered.log_gammas, policy.log_gammas)


def test_auto_temperature():
  assert [round(auto_temperature(n), 3) for n in (1, 2, 4, 11, 50)] == [0.0, 0.1, 0.3, 1.0, 1.0]


@pytest.mark.parametrize("case", [cases.gmflow, cases.arc])
def test_a_dropped_component_does_nothing(case):
  x, policy = case(k=4)
  dropped = policy.drop(jnp.array([False, True, False, True]))
  v = cases.velocity(dropped, x, 0.4)
  # A component with a weight of nearly nothing is as good as gone.
  faint = jnp.where(jnp.array([False, True, False, True])[:, None], -1e4, policy.logits)
  np.testing.assert_allclose(v, cases.velocity(type(policy)(**{**vars(policy), "logits": faint}), x, 0.4), rtol=1e-12)
  assert not jnp.allclose(v, cases.velocity(policy, x, 0.4))


@pytest.mark.parametrize("case", [cases.gmflow, cases.arc])
def test_dropping_all_drops_none(case):
  x, policy = case(k=3)
  np.testing.assert_array_equal(policy.drop(jnp.ones(3, bool)).logits, policy.logits)
  assert jnp.all(jnp.isfinite(cases.velocity(policy.drop(jnp.ones(3, bool)), x, 0.5)))


def test_one_draw_for_each_sample_and_component():
  """The same for all pixels, independent between samples and components, at the rate asked for."""
  _, policy = cases.gmflow(k=8, space=(6,))
  keys = jax.random.split(jax.random.key(0), 4000)
  logits = np.asarray(jax.jit(jax.vmap(lambda key: dropout(policy, key, 0.3).logits))(keys))
  gone = np.isneginf(logits)
  assert np.all(gone == gone[:, :, :1])
  np.testing.assert_array_equal(logits[~gone], np.broadcast_to(policy.logits, logits.shape)[~gone])
  gone = gone[:, :, 0]
  np.testing.assert_allclose(gone.mean(0), 0.3, atol=4 * np.sqrt(0.3 * 0.7 / 4000))
  correlation = np.corrcoef(gone.T) - np.eye(8)
  assert np.max(np.abs(correlation)) < 5 / np.sqrt(4000)
  assert np.isneginf(dropout(policy, keys[0], 0.0).logits).sum() == 0


@pytest.mark.parametrize("rate", [0.9, 1.0])
def test_some_component_always_stays(rate):
  _, policy = cases.gmflow(k=2)
  keys = jax.random.split(jax.random.key(0), 500)
  logits = jax.jit(jax.vmap(lambda key: dropout(policy, key, rate).logits))(keys)
  assert bool(jnp.all(jnp.any(jnp.isfinite(logits), axis=1)))


def test_policies_that_are_no_mixture_are_left_alone():
  _, policy = cases.dx()
  assert dropout(policy, jax.random.key(0), 0.5) is policy
  assert temperature(policy, 0.1) is policy
  assert policy.drop(jnp.zeros(0, bool)) is policy
  assert policy.temper(0.1) is policy


def test_bad_values_are_refused():
  _, policy = cases.gmflow()
  for rate in (-0.1, 1.1, float("nan")):
    with pytest.raises(ValueError, match=f"rate: expected .*got {rate}"):
      dropout(policy, jax.random.key(0), rate)
  for value in (-1.0, float("nan")):
    with pytest.raises(ValueError, match=f"temperature: expected .*got {value}"):
      temperature(policy, value)


def test_a_batch_of_policies_is_refused():
  made = [cases.gmflow(seed)[1] for seed in range(3)]
  batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
  with pytest.raises(ValueError, match=r"one policy, got a batch of shape \(3,\); use jax.vmap"):
    temperature(batch, 0.5)
  with pytest.raises(ValueError, match="one policy"):
    dropout(batch, jax.random.key(0), 0.5)
