"""ArcFlow policy: against the release, its closed form, and the derivative of its exponential integral near 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.policies import ArcPolicy
from pflow_jax.core.policies.arc import phi
from pflow_jax.core.rollout import average_velocity, rollout
from pflow_jax.core.schedule import shift_time
from tests import cases
from tests.golden_layout import assert_close, channels_last


def outputs_of(file, means, logits, gammas, dtype):
  arrays = (channels_last(file[means]), file[logits][:, :, 0], file[gammas][:, :, 0])
  return tuple(jnp.asarray(a, dtype) for a in arrays)


@pytest.mark.parametrize("suffix", ["", "_f32"])
def test_values_and_gradients_match_the_release(golden, suffix):
  file = golden(f"arc_policy{suffix}")
  dtype, rtol = (jnp.float32, 1e-5) if suffix else (jnp.float64, 1e-9)
  x, cotangent = (jnp.asarray(channels_last(file[n]), dtype) for n in ("in_x", "in_cotangent"))
  r_a, r_b, t_s, t_a = (
    jnp.asarray(file[n].reshape(-1), dtype) for n in ("in_raw_a", "in_raw_b", "in_sigma_src", "in_sigma_a")
  )
  outputs, shift = outputs_of(file, "in_means", "in_logweights", "in_loggammas", dtype), float(file["in_shift"])

  def over_batch(f):
    @jax.jit
    def evaluate(*outputs):
      return jax.vmap(lambda x, t_s, *a: f(ArcPolicy.create(x, t_s, *a[:3]), x, *a[3:]))(
        x, t_s, *outputs, t_a, r_a, r_b
      )

    value, pull = jax.vjp(evaluate, *outputs)
    assert value.dtype == dtype
    return value, pull(cotangent)

  # The release replaces arguments of phi below 1e-4 by 1e-4: an error of 5e-5, and no gradient for their log-gammas.
  argument = jnp.abs(outputs[2]) * jnp.abs(shift_time(r_a, shift) - shift_time(r_b, shift))[:, None, None, None]
  clamped = np.asarray(argument) < 1e-4
  for name, f, tolerance in (
    ("v", lambda p, x, t, a, b: p.velocity(x, t), rtol),
    ("x", lambda p, x, t, a, b: rollout(p, x, a, b, shift=shift), 5e-5),
    ("avg", lambda p, x, t, a, b: average_velocity(p, x, a, b, shift=shift), 5e-5),
  ):
    value, grads = over_batch(f)
    out = {"v": "out_velocity", "x": "out_x_end", "avg": "out_avg_u"}[name]
    assert_close(value, channels_last(file[out]), tolerance)
    expected = outputs_of(file, *(f"out_grad{name}_{n}" for n in ("means", "logweights", "loggammas")), dtype)
    for got, want in zip(grads[:2], expected[:2], strict=True):
      assert_close(got, want, tolerance)
    keep = np.ones_like(clamped) if name == "v" else ~clamped
    assert_close(np.where(keep, grads[2], 0.0), np.where(keep, expected[2], 0.0), tolerance)
    if not clamped[2].any():  # a sample that is not clamped is reproduced to rounding
      assert_close(value[2], channels_last(file[out])[2], rtol)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.0), (0.7, 0.4), (0.5, 0.5 - 1e-4)])
def test_integrates_exactly(t, s):
  x, policy = cases.arc(t_s=0.9)
  np.testing.assert_allclose(cases.integrate(policy, x, t, s), cases.converged(policy, x, t, s), rtol=1e-9, atol=1e-11)
  np.testing.assert_array_equal(cases.integrate(policy, x, t, t), x)


def test_velocity_at_the_source_is_the_mixture_of_velocities():
  x, policy = cases.arc(t_s=0.7)
  mean = np.sum(np.exp(policy.logits)[..., None] * np.asarray(policy.velocities), axis=0)
  np.testing.assert_allclose(cases.velocity(policy, x, policy.t_s), mean, rtol=1e-12)


def moments(z):
  """phi and its derivative as the integrals of exp(z u) and u exp(z u) over [0, 1]: no cancellation anywhere."""
  nodes, weights = np.polynomial.legendre.leggauss(40)
  u = (nodes + 1) / 2
  kernel = np.exp(np.multiply.outer(z, u)) * weights / 2
  return kernel.sum(-1), (kernel * u).sum(-1)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-13), (jnp.float32, 3e-6)])
def test_the_exponential_integral_and_its_derivative_hold_near_zero(dtype, rtol):
  z = np.concatenate([s * np.geomspace(1e-12, 20.0, 60) for s in (1, -1)] + [[0.0, 0.1, -0.1, np.nextafter(0.1, 0)]])
  z = np.asarray(z, dtype)
  value, slope = jax.jit(jax.vmap(jax.value_and_grad(phi)))(z)
  expected, expected_slope = moments(np.float64(z))
  assert value.dtype == dtype
  np.testing.assert_allclose(value, expected, rtol=rtol)
  np.testing.assert_allclose(slope, expected_slope, rtol=50 * rtol)


@pytest.mark.parametrize("gamma", [0.0, 1e-6, 1e-3])
def test_gradient_of_small_gammas_is_not_lost(gamma):
  """Where the release's clamp leaves none."""
  x = jnp.zeros((1,))

  def end(gamma):
    policy = ArcPolicy.create(x, 1.0, jnp.ones((2, 1)), jnp.zeros(2), gamma[None])
    return policy.integrate(x, 0.8, 0.3)[0]

  # x = -1/2 (dt + exp(0.2 g) dt phi(g dt)), dt = 0.5
  value, slope = moments(0.5 * gamma)
  expected = -0.5 * np.exp(0.2 * gamma) * 0.5 * (0.2 * value + 0.5 * slope)
  np.testing.assert_allclose(jax.grad(end)(jnp.float64(gamma)), expected, rtol=1e-12)


@pytest.mark.parametrize("space", [(), (5,), (3, 2), (2, 3, 2)])
def test_space_has_any_axes(space):
  x, policy = cases.arc(space=space)
  for got in (cases.velocity(policy, x, 0.4), cases.integrate(policy, x, 0.9, 0.4)):
    assert got.shape == (*space, 2)
    assert jnp.all(jnp.isfinite(got))


def test_derivatives():
  x, policy = cases.arc(t_s=0.8)
  cases.assert_derivative(lambda p, x, t: p.velocity(x, t), policy, x, 0.6)
  cases.assert_derivative(lambda p, x, t, s: p.integrate(x, t, s), policy, x, 0.7, 0.1)


def test_float32_is_accurate():
  for t, s in ((1.0, 0.0), (0.6, 0.6 - 3 / 128)):
    x, policy = cases.arc(space=(64,))
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), policy)
    want = (x - cases.integrate(policy, x, t, s)) / (t - s)
    got = (x - cases.integrate(single, *map(jnp.float32, (x, t, s)))) / (t - s)
    assert jnp.max(jnp.abs(got - want)) < 2e-5 * jnp.max(jnp.abs(want))


def test_low_precision_inputs_are_computed_in_float32():
  x, v = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((2, 3, 2), jnp.bfloat16)
  policy = ArcPolicy.create(x, jnp.bfloat16(0.5), v, v[..., 0], v[:1, :, 0])
  assert {a.dtype for a in jax.tree.leaves(policy)} == {jnp.dtype(jnp.float32)}


def test_bad_arguments_say_what_was_expected():
  x, v = jnp.zeros((3, 2)), jnp.zeros((4, 3, 2))
  good = dict(x_s=x, t_s=0.5, velocities=v, logits=jnp.zeros((4, 3)), log_gammas=jnp.zeros((3, 3)))
  ArcPolicy.create(**good)
  for bad, message in (
    (dict(t_s=-0.1), r"t_s: expected a value in \(0.0, 1.0\], got -0.1"),
    (dict(velocities=x), r"velocities: expected .*got \(3, 2\)"),
    (dict(velocities=jnp.zeros((4, 2, 2))), r"velocities: expected shape \(4, 3, 2\).*got \(4, 2, 2\)"),
    (dict(logits=jnp.zeros((3, 3))), r"logits: expected shape \(4, 3\).*got \(3, 3\)"),
    (dict(log_gammas=jnp.zeros((4, 3))), r"log_gammas: expected shape \(3, 3\) \(\(K - 1.*got \(4, 3\)"),
  ):
    with pytest.raises(ValueError, match=message):
      ArcPolicy.create(**(good | bad))
