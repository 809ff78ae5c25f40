"""DX policy: against the PyTorch release, and its exact integral against a converged solver."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.policies import DXPolicy
from pflow_jax.core.schedule import shift_time
from tests import cases
from tests.golden_layout import assert_close, channels_last

SEGMENT = 1 / 3.5


@pytest.mark.parametrize("suffix", ["", "_f32"])
@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("basis", ["grid", "polynomial"])
def test_velocity_and_gradients_match_the_release(golden, basis, n, shift, suffix):
  file = golden(f"dx_{basis}_n{n}_shift{shift}{suffix}")
  dtype, rtol = (jnp.float32, 1e-5) if suffix else (jnp.float64, 1e-9)
  names = ("in_x_src", "in_x_t", "in_cotangent", "in_do")
  x_s, x, cotangent, d = (jnp.asarray(channels_last(file[name]), dtype) for name in names)
  t_s, frac = jnp.asarray(file["in_sigma_src"], dtype), jnp.asarray(file["in_frac"], dtype)
  # The release converts every coefficient of the polynomial to a denoised state.
  options = dict(segment=file["in_segment_size"], shift=shift, basis=basis, compat=True, eps=float(file["in_eps"]))

  @jax.jit
  @jax.vmap  # over the points
  def evaluate(t):
    def of(d):
      policy = jax.vmap(lambda x_s, t_s, d: DXPolicy.create(x_s, t_s, d, **options))(x_s, t_s, d)
      return jax.vmap(lambda p, x, t: p.velocity(x, t))(policy, x, t), policy

    v, pull, policy = jax.vjp(of, d, has_aux=True)
    return v, pull(cotangent)[0], policy.r_s, policy.r_d

  v, grads, r_s, r_d = evaluate(frac[:, None] * t_s[None])
  assert v.dtype == dtype
  np.testing.assert_allclose(r_s[0], file["out_raw_t_src"].reshape(-1), rtol=rtol)
  np.testing.assert_allclose(r_d[0], file["out_raw_t_dst"].reshape(-1), rtol=rtol, atol=rtol)
  for i in range(len(frac)):
    assert_close(v[i], channels_last(file[f"out_u_{i}"]), rtol)
    assert_close(grads[i], channels_last(file[f"out_grad_do_{i}"]), rtol)


def solve_in_pieces(policy, x, t, s):
  """`converged`, stopping at the kinks of the piecewise linear x0."""
  nodes = np.linspace(float(policy.r_d), float(policy.r_s), policy.states.shape[0])
  kinks = [float(shift_time(r, policy.shift)) for r in nodes[::-1]]
  times = [t, *(k for k in kinks if s < k < t), s]
  for start, stop in itertools.pairwise(times):
    x = cases.converged(policy, x, start, stop)
  return x


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize(
  ("r", "r_end"),
  [
    (0.7, 0.69),  # within one cell of ten
    (0.7, 0.65),
    (0.66, 0.45),  # across cells
    (0.7, 0.7 - SEGMENT),  # from node to node: the whole segment
    (0.5, 0.1),  # out of the segment, where x0 is constant
    (0.3, 0.01),  # beyond it
  ],
)
def test_grid_integrates_exactly(n, shift, r, r_end):
  t_s, t, s = (float(shift_time(a, shift)) for a in (0.7, r, r_end))
  x, policy = cases.dx(n=n, t_s=t_s, segment=SEGMENT, shift=shift)
  exact = solve_in_pieces(policy, x, t, s)
  np.testing.assert_allclose(cases.integrate(policy, x, t, s), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_polynomial_integrates_exactly(n, shift, compat):
  x, policy = cases.dx(n=n, t_s=0.9, shift=shift, basis="polynomial", compat=compat)
  for t, s in ((0.9, 0.05), (0.6, 0.59)):
    exact = cases.converged(policy, x, t, s)
    np.testing.assert_allclose(cases.integrate(policy, x, t, s), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [dict(n=1), dict(n=2), dict(n=10), dict(n=4, basis="polynomial")], ids=str)
def test_ends_at_the_state_of_the_data(options):
  """At t = 0 nothing is left of x but its denoised state there, and the approach to it is continuous."""
  x, policy = cases.dx(t_s=0.9, shift=3.2, **options)
  end = cases.integrate(policy, x, 0.5, 0.0)
  np.testing.assert_allclose(end, policy.posterior_mean(0.0), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(end, cases.integrate(policy, x, 0.5, 1e-7), atol=2e-5)
  np.testing.assert_array_equal(cases.integrate(policy, x, 0.5, 0.5), x)
  np.testing.assert_array_equal(cases.integrate(policy, x, 0.0, 0.0), x)


def test_grid_runs_from_the_destination_to_the_source():
  x, policy = cases.dx(n=3, t_s=0.8, segment=0.5)
  d0, dn = policy.states[0], policy.states[-1]
  np.testing.assert_allclose(policy.posterior_mean(0.3), d0, rtol=1e-9)
  np.testing.assert_allclose(policy.posterior_mean(0.1), d0, rtol=1e-12)
  np.testing.assert_allclose(policy.posterior_mean(0.8), dn, rtol=1e-9)
  np.testing.assert_allclose(policy.posterior_mean(0.3 + 0.125), (d0 + policy.states[1]) / 2, rtol=1e-9)
  np.testing.assert_allclose(x - 0.8 * policy.velocity(x, 0.8), dn, rtol=1e-9)


def test_the_clean_polynomial_leaves_x_out_of_the_higher_powers():
  x = jnp.full((3, 2), 10.0)
  policies = [DXPolicy.create(x, 0.5, jnp.zeros((4, 3, 2)), basis="polynomial", compat=c) for c in (False, True)]
  np.testing.assert_array_equal(policies[0].posterior_mean(0.25), x)
  np.testing.assert_allclose(policies[1].posterior_mean(0.25), x * (1 + 0.25 + 0.25**2 + 0.25**3))


@pytest.mark.parametrize("space", [(), (5,), (3, 2), (2, 3, 2)])
def test_space_has_any_axes(space):
  for options in (dict(n=3), dict(n=3, basis="polynomial")):
    x, policy = cases.dx(space=space, **options)
    flat, flat_policy = x.reshape(-1, 2), jax.tree.map(lambda a: a.reshape(3, -1, 2) if a.ndim else a, policy)
    for got, want in (
      (cases.velocity(policy, x, 0.4), cases.velocity(flat_policy, flat, 0.4)),
      (cases.integrate(policy, x, 0.9, 0.4), cases.integrate(flat_policy, flat, 0.9, 0.4)),
    ):
      assert got.shape == (*space, 2)
      np.testing.assert_allclose(got.reshape(-1, 2), want, rtol=1e-12)


@pytest.mark.parametrize("options", [dict(n=1), dict(n=4), dict(n=4, basis="polynomial")], ids=str)
def test_derivatives(options):
  x, policy = cases.dx(t_s=0.8, shift=3.2, segment=0.5, **options)
  cases.assert_derivative(lambda p, x, t: p.velocity(x, t), policy, x, 0.6)
  cases.assert_derivative(lambda p, x, t, s: p.integrate(x, t, s), policy, x, 0.7, 0.4)


@pytest.mark.parametrize("options", [dict(n=1), dict(n=2), dict(n=10), dict(n=10, basis="polynomial")], ids=str)
def test_float32_is_accurate(options):
  """Also as an average velocity over a short window, and with finite gradients at both ends of the segment."""
  x, policy = cases.dx(t_s=0.9, segment=SEGMENT, space=(64,), **options)

  def average(policy, x, t, s):
    return (x - cases.integrate(policy, x, t, s)) / (t - s)

  for t, s in ((0.9, 0.0), (0.9, 0.3), (0.8, 0.8 - 3 / 128), (0.03, 0.01)):
    want = average(policy, x, t, s)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (policy, x, jnp.array(t), jnp.array(s)))
    got, pull = jax.vjp(average, *single)
    assert got.dtype == jnp.float32
    assert np.max(np.abs(got - want)) < 3e-5 * np.max(np.abs(want)), (t, s)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(pull(jnp.ones_like(got)))), (t, s)


def test_low_precision_inputs_are_computed_in_float32():
  x, d = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((4, 3, 2), jnp.bfloat16)
  policy = DXPolicy.create(x, jnp.bfloat16(0.5), d)
  assert {a.dtype for a in jax.tree.leaves(policy)} == {jnp.dtype(jnp.float32)}
  assert policy.velocity(x, jnp.float32(0.25)).dtype == jnp.float32


def test_bad_arguments_say_what_was_expected():
  good = dict(x_s=jnp.zeros((3, 2)), t_s=0.5, coefficients=jnp.zeros((4, 3, 2)))
  DXPolicy.create(**good)
  for bad, message in (
    (dict(t_s=0.0), r"t_s: expected a value in \(0.0, 1.0\], got 0.0"),
    (dict(basis="spline"), "basis: expected one of .*grid.*got 'spline'"),
    (dict(coefficients=jnp.zeros((3, 2))), r"coefficients: expected .*got \(3, 2\)"),
    (dict(coefficients=jnp.zeros((0, 3, 2))), r"N >= 1, got \(0, 3, 2\)"),
    (dict(coefficients=jnp.zeros((4, 2, 2))), r"coefficients: expected shape \(4, 3, 2\).*got \(4, 2, 2\)"),
    (dict(segment=0.0), r"segment: expected a value in \(0.0, 1.0\], got 0.0"),
    (dict(segment=2.0), "segment: .*got 2.0"),
    (dict(shift=-1.0), "shift: .*got -1.0"),
  ):
    with pytest.raises(ValueError, match=message):
      DXPolicy.create(**(good | bad))
