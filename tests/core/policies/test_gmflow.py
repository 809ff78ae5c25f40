"""GMFlow policy: against the PyTorch release, its closed form for one component, and its behaviour at the edges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.policies import GMFlowPolicy, temperature
from tests import cases
from tests.golden_layout import assert_close, channels_last, gm_outputs

PRECISION = [("", jnp.float64, 1e-9), ("_f32", jnp.float32, 1e-5)]


def cast(tree, dtype):
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def assert_matches(evaluate, inputs, expected, *, suffix, atol):
  """Compares what `evaluate` makes of a file's inputs with its outputs: to 1e-9 in float64.

  In float32 to 1e-5 of what the same inputs give in float64, and of the file but for what the file itself is off by:
  near the data the release's velocity is a difference of nearly equal numbers, divided by t.
  """
  exact = evaluate(*cast(inputs, jnp.float64))
  if not suffix:
    for actual, want, slack in zip(exact, expected, atol, strict=True):
      assert_close(actual, want, 1e-9, slack)
    return
  for actual, want, true, slack in zip(evaluate(*cast(inputs, jnp.float32)), expected, exact, atol, strict=True):
    assert actual.dtype == jnp.float32
    assert_close(actual, true, 1e-5, slack)
    assert_close(actual, want, 1e-5, slack + np.max(np.abs(want - true)))


@jax.jit
def velocity_and_gradients(x_s, t_s, outputs, x, t, cotangent):
  def of(*outputs):
    policy = jax.vmap(GMFlowPolicy.create)(x_s, t_s, *outputs)
    return jax.vmap(lambda p, x, t: p.velocity(x, t))(policy, x, t)

  v, pull = jax.vjp(of, *outputs)
  return v, *pull(cotangent)


@pytest.mark.parametrize("point", range(5))
@pytest.mark.parametrize("suffix", ["", "_f32"])
def test_velocity_and_gradients_match_the_release(golden, point, suffix):
  file = golden(f"gm_policy{suffix}")
  x_s, x, cotangent = (channels_last(file[f"in_{n}"]) for n in ("x_src", "x_src" if point == 0 else "x_t", "cotangent"))
  # The clamp at t = 0, here so that float64 sees float32's.
  t = np.maximum(file["in_frac"][point] * file["in_sigma_src"], file["in_means"].dtype.type(1e-6))

  def outputs(i):
    return gm_outputs(file, f"out_grad_means_{i}", f"out_grad_logweights_{i}", f"out_grad_logstds_{i}")

  # The gradients nearly vanish at t = 0: in the release they are the rounding of larger numbers (with 60 digits one
  # gets ours), so there they are judged by the size of those at another point.
  rounding = (1e-6 if suffix else 1e-8) if file["in_frac"][point] == 0 else 1e-15
  atol = (0.0, *(rounding * np.max(np.abs(g)) for g in outputs(2)))
  inputs = (x_s, file["in_sigma_src"], gm_outputs(file), x, t, cotangent)
  assert_matches(
    velocity_and_gradients, inputs, (channels_last(file[f"out_u_{point}"]), *outputs(point)), suffix=suffix, atol=atol
  )


@pytest.mark.parametrize("suffix", ["", "_f32"])
def test_dropout_and_temperature_match_the_release(golden, suffix):
  file = golden(f"gm_policy{suffix}")
  x_s, x = (channels_last(file[n]) for n in ("in_x_src", "in_x_t"))

  @jax.jit
  def evaluate(x_s, t_s, outputs, x):
    def one(x_s, t_s, dropped, x, *outputs):
      policy = GMFlowPolicy.create(x_s, t_s, *outputs)
      changed = (policy.drop(dropped), temperature(policy, 0.3), temperature(policy, 0.7), temperature(policy, 1.0))
      return [p.velocity(x, 0.3 * t_s) for p in changed]

    dropped = jnp.asarray(file["in_dropout_mask"]).reshape(3, 4)
    return jax.vmap(one)(x_s, t_s, dropped, x, *outputs)

  names = ("dropout", "temp0.3", "temp0.7", "temp1.0")
  inputs, expected = (
    (x_s, file["in_sigma_src"], gm_outputs(file), x),
    [channels_last(file[f"out_u_{n}"]) for n in names],
  )
  assert_matches(evaluate, inputs, expected, suffix=suffix, atol=(0.0,) * 4)


@jax.jit
def posterior_mean_and_gradients(x_s, x, cotangent, means, logits, t_s, t, variance):
  def one(x_s, t_s, t, means, logits, variance, x):
    # `create` takes velocities: for t_s = 1 those are x_s - means. The file's source and variance are put in place.
    policy = GMFlowPolicy.create(x_s, 1.0, x_s[None] - means, logits[..., 0], 0.0, eps=1e-6)
    return dataclasses.replace(policy, t_s=t_s, variance=variance).posterior_mean(x, t)

  x0, pull = jax.vjp(lambda *a: jax.vmap(one)(x_s, t_s, t, *a), means, logits, variance, x)
  return x0, *pull(cotangent)


@pytest.mark.parametrize("where", ["mid", "near0", "same"])
@pytest.mark.parametrize("suffix", ["", "_f32"])
def test_posterior_mean_matches_the_release(golden, where, suffix):
  file = golden(f"gm_posterior_mean_{where}{suffix}")
  names = ("in_x_src", "in_x_t", "in_cotangent", "in_means_x0", "in_logweights")
  times = (file[n].reshape(-1) for n in ("in_sigma_src", "in_sigma_t", "in_gm_vars"))

  assert file["in_eps"] == 1e-6
  expected = [channels_last(file[n]) for n in ("out_x0", "out_grad_means", "out_grad_logweights")]
  expected += [file["out_grad_gm_vars"].reshape(-1), channels_last(file["out_grad_x_t"])]
  # Towards t = 0 the derivative by the variance is the difference of much larger terms.
  atol = (0.0, 0.0, 0.0, 2e-5 if suffix else 0.0, 0.0)
  assert_matches(
    posterior_mean_and_gradients, (*(channels_last(file[n]) for n in names), *times), expected, suffix=suffix, atol=atol
  )


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.5), (0.9, 1e-3), (0.6, 0.59), (0.02, 0.01)])
@pytest.mark.parametrize("std", [0.01, 0.3, 1.0, 3.0])
def test_one_component_integrates_exactly(t, s, std):
  x, policy = cases.gmflow(k=1, std=std)
  assert policy.has_closed_form
  np.testing.assert_allclose(cases.integrate(policy, x, t, s), cases.converged(policy, x, t, s), rtol=1e-9, atol=1e-9)


def test_one_component_integrates_to_the_data_and_from_a_later_source():
  x, policy = cases.gmflow(k=1, t_s=0.4, std=0.3)
  np.testing.assert_allclose(cases.integrate(policy, x, 0.4, 0.0), cases.converged(policy, x, 0.4, 1e-5), atol=2e-5)
  np.testing.assert_allclose(cases.integrate(policy, x, 0.4, 0.1), cases.converged(policy, x, 0.4, 0.1), rtol=1e-9)
  np.testing.assert_array_equal(cases.integrate(policy, x, 0.3, 0.3), x)
  # variance = 1 / rho_s^2, where the usual form of the solution divides by zero
  critical = dataclasses.replace(policy, variance=jnp.float64((0.4 / 0.6) ** 2))
  np.testing.assert_allclose(cases.integrate(critical, x, 0.3, 0.1), cases.converged(critical, x, 0.3, 0.1), rtol=1e-9)


def test_a_mixture_has_no_closed_form():
  x, policy = cases.gmflow(k=3)
  assert not policy.has_closed_form
  with pytest.raises(ValueError, match="K = 3 has no closed-form.*only K = 1.*ab2"):
    policy.integrate(x, 1.0, 0.5)


def test_velocity_at_the_source_is_the_mixture_of_velocities():
  x, policy = cases.gmflow(t_s=0.7)
  weights, means = np.exp(policy.logits), np.stack(policy.means)
  mean = np.sum(weights * means, axis=1).T
  np.testing.assert_allclose(cases.velocity(policy, x, policy.t_s), (x - mean) / 0.7, rtol=1e-12)


@pytest.mark.parametrize("space", [(), (5,), (3, 2), (2, 3, 2)])
def test_space_has_any_axes(space):
  x, policy = cases.gmflow(space=space, c=3)
  _, one = cases.gmflow(space=space, c=3, k=1)
  for v in (cases.velocity(policy, x, 0.4), policy.posterior_mean(x, 0.4), cases.integrate(one, x, 0.9, 0.1)):
    assert v.shape == (*space, 3)
  for wrong in (x[None], jnp.concatenate([x, x], axis=-1)):
    with pytest.raises(ValueError, match=r"x: expected shape .* got"):
      policy.velocity(wrong, 0.4)


def test_swapped_axes_are_refused():
  """As many pixels in another order would pair them wrongly."""
  x, policy = cases.gmflow(space=(3, 2), c=3)
  for function in (policy.velocity, policy.posterior_mean):
    with pytest.raises(ValueError, match=r"expected shape \(3, 2, 3\).* got \(2, 3, 3\)"):
      function(x.swapaxes(0, 1), 0.4)


def test_pixels_are_independent_and_channels_are_not():
  x, policy = cases.gmflow(space=(2, 2), c=3)
  jacobian = np.asarray(jax.jacobian(cases.velocity, argnums=1)(policy, x, 0.4)).reshape(4, 3, 4, 3)
  for i, j in np.ndindex(4, 4):
    assert np.all((jacobian[i, :, j] != 0) == (i == j))


def test_derivatives():
  x, policy = cases.gmflow(t_s=0.8)
  cases.assert_derivative(lambda p, x, t: p.velocity(x, t), policy, x, 0.3)
  cases.assert_derivative(lambda p, x, t: p.posterior_mean(x, t), policy, x, 0.3)
  x, one = cases.gmflow(k=1, t_s=0.8)
  cases.assert_derivative(lambda p, x, t, s: p.integrate(x, t, s), one, x, 0.6, 0.1)


def test_float32_is_accurate_down_to_the_data():
  for std in (0.03, 0.3):
    x, policy = cases.gmflow(std=std, space=(64,))
    # Along the trajectory: elsewhere rounding may choose another component.
    for t in (0.9, 0.5, 0.1, 1e-2, 1e-4, 0.0):
      on_path = x * t + (1 - t) * policy.posterior_mean(x, 0.5)
      exact = cases.velocity(policy, on_path, t)
      single = cases.velocity(cast(policy, jnp.float32), *cast((on_path, t), jnp.float32))
      assert single.dtype == jnp.float32
      error = jnp.sqrt(jnp.mean((single - exact) ** 2) / jnp.mean(exact**2))
      assert error < 2e-5, (std, t, error)


def test_float32_is_finite_at_extremes():
  """Sharp and broad components, times down to 0, dropped components: values and gradients hold no NaN or infinity."""

  @jax.jit
  def value_and_gradients(outputs, x, t, t_s, dropped):
    def of(means, logits, log_std):
      policy = GMFlowPolicy.create(x, t_s, means, logits, log_std).drop(dropped)
      return jnp.sum(policy.velocity(x, t) ** 2)

    return jax.value_and_grad(of, argnums=(0, 1, 2))(*outputs)

  rng = np.random.default_rng(0)
  for log_std in np.linspace(-6.0, 2.0, 5):
    for t_s in (1.0, 0.5, 1e-4):
      for t in (t_s, 0.1 * t_s, 1e-3 * t_s, 0.0):
        outputs = cast((rng.normal(size=(8, 6, 2)) * 3, rng.normal(size=(8, 6)) * 10, log_std), jnp.float32)
        x, dropped = rng.normal(size=(6, 2)) * 2, jnp.arange(8) < 3
        out = value_and_gradients(outputs, *cast((x, t, t_s), jnp.float32), dropped)
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(out)), (log_std, t_s, t)


def test_low_precision_inputs_are_computed_in_float32():
  x, policy = cases.gmflow()
  low = cast((x, policy.t_s, jnp.ones((4, 3, 2)), jnp.ones((4, 3)), 0.0), jnp.bfloat16)
  policy = GMFlowPolicy.create(*low)
  assert {a.dtype for a in jax.tree.leaves(policy)} == {jnp.dtype(jnp.float32)}
  assert policy.velocity(low[0], jnp.float32(0.5)).dtype == jnp.float32


def test_bad_arguments_say_what_was_expected():
  x, means, logits = jnp.zeros((3, 2)), jnp.zeros((4, 3, 2)), jnp.zeros((4, 3))
  good = dict(x_s=x, t_s=0.5, means=means, logits=logits, log_std=0.0)
  GMFlowPolicy.create(**good)
  for bad, message in (
    (dict(x_s=jnp.float32(0)), "x_s: expected .*got a scalar"),
    (dict(t_s=0.0), r"t_s: expected a value in \(0.0, 1.0\], got 0.0"),
    (dict(t_s=1.5), r"t_s: .*got 1.5"),
    (dict(t_s=jnp.nan), r"t_s: .*got nan"),
    (dict(t_s=jnp.ones(2)), r"t_s: expected shape \(\).*got \(2,\)"),
    (dict(means=x), r"means: expected .*got \(3, 2\)"),
    (dict(means=jnp.zeros((4, 2, 2))), r"means: expected shape \(4, 3, 2\).*got \(4, 2, 2\)"),
    (dict(logits=jnp.zeros((3, 3))), r"logits: expected shape \(4, 3\).*got \(3, 3\)"),
    (dict(log_std=jnp.zeros(3)), r"log_std: expected shape \(\).*got \(3,\)"),
  ):
    with pytest.raises(ValueError, match=message):
      GMFlowPolicy.create(**(good | bad))
