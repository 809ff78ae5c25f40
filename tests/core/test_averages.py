"""Averages over a training: EDM2's own functions, closed forms, and an average that is made afterwards."""

import numpy as np
import pytest
from scipy.integrate import quad

from pflow_jax.core.averages import MAX_WIDTH, exponent_of, inner_product, reconstruction, width_of
from pflow_jax.settings.optimizer import EmaSettings
from pflow_jax.training.optim import make_profile_decays


def test_formulas_are_those_of_the_release(golden):
  file = golden("phema")
  np.testing.assert_allclose(exponent_of(file["stds"]), file["exps_of"], rtol=1e-12)
  np.testing.assert_allclose(width_of(file["exps"]), file["stds_of"], rtol=1e-12)
  products = inner_product(
    exponent_of(file["sa"])[:, None], file["a"][:, None], exponent_of(file["sb"])[None], file["b"][None]
  )
  np.testing.assert_allclose(products, file["corr"], rtol=1e-9)
  for name, count in (("coefs", 16), ("mid", 10)):
    times, widths = file["in_ofs"][:count], file["in_std"][:count]
    for i, width in enumerate(file["out_std"]):
      got = reconstruction(widths, times, width, times[-1])
      np.testing.assert_allclose(got, file[name][:, i], rtol=0, atol=1e-6 * np.abs(file[name][:, i]).max())
  (decay,) = make_profile_decays(EmaSettings(profiles=(0.05,), snapshot_every=1))
  np.testing.assert_allclose([decay(n - 1) for n in (1, 2, 10, 1000)], file["beta"], rtol=1e-6, atol=1e-12)


def test_widths_and_exponents_are_the_moments_of_their_weights():
  for gamma in (0.5, 7.0, 60.0):
    moment = lambda k, gamma=gamma: quad(lambda x: (gamma + 1) * x ** (gamma + k), 0, 1, epsabs=1e-12)[0]
    width = width_of(gamma)
    assert width == pytest.approx(np.sqrt(moment(2) - moment(1) ** 2), rel=1e-6)
    assert exponent_of(width) == pytest.approx(gamma, rel=1e-9)
  assert width_of(0.0) == pytest.approx(MAX_WIDTH)


@pytest.mark.parametrize(("a", "s", "b", "t"), [(3.0, 2.0, 7.0, 5.0), (7.0, 5.0, 3.0, 2.0), (4.0, 3.0, 4.0, 3.0)])
def test_inner_products_are_integrals(a, s, b, t):
  weight = lambda x, gamma, end: (gamma + 1) / end * (x / end) ** gamma
  want = quad(lambda x: weight(x, a, s) * weight(x, b, t), 0, min(s, t))[0]
  assert inner_product(a, s, b, t) == pytest.approx(want, rel=1e-8)


def tracked(trajectory, widths, every=None):
  """Averages of a scalar's trajectory as a training keeps them: at the end, or at times, (times, widths)."""
  decays = make_profile_decays(EmaSettings(profiles=widths, snapshot_every=1))
  exponents = [float(exponent_of(w)) for w in widths]
  assert float(decays[0](9)) == pytest.approx(0.9 ** (exponents[0] + 1), rel=1e-5)
  now, kept = np.zeros(len(widths)), []
  for k, value in enumerate(trajectory, start=1):
    share = (1 - 1 / k) ** (np.array(exponents) + 1)
    now = share * now + (1 - share) * value
    if every and k % every == 0:
      kept.append(now)
  return np.array(kept) if every else now


def test_a_reconstructed_average_is_the_one_that_was_tracked():
  """A scalar that trains along a known curve: averages of widths between and beside those kept, to 1e-3."""
  steps, every = 4096, 256
  tau = np.arange(1, steps + 1) / steps
  trajectory = 1 - np.exp(-4 * tau) + 0.1 * np.sin(9 * tau)
  kept = tracked(trajectory, (0.05, 0.10), every)
  times, widths = np.repeat(np.arange(every, steps + 1, every), 2), np.tile((0.05, 0.10), len(kept))
  for width in (0.04, 0.05, 0.07, 0.1, 0.13):
    factors = reconstruction(widths, times, width, steps)
    assert factors.sum() == pytest.approx(1)
    want = tracked(trajectory, (width, 0.2))[0]
    assert factors @ kept.ravel() == pytest.approx(want, abs=1e-3)
    assert abs(want - trajectory[-1]) > 2e-3  # it is not just the last value
  half = reconstruction(widths[:16], times[:16], 0.08, times[15])
  assert half @ kept.ravel()[:16] == pytest.approx(tracked(trajectory[: times[15]], (0.08, 0.2))[0], abs=1e-3)


def test_a_kept_average_is_itself():
  times, widths = np.array([10.0, 10.0, 20.0, 20.0]), np.array([0.05, 0.1, 0.05, 0.1])
  np.testing.assert_allclose(reconstruction(widths, times, 0.1, 20.0), [0, 0, 0, 1], atol=1e-9)


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    (([0.05, 0.3], [1, 2], 0.1, 2), r"expected widths above 0 and below 0.2887"),
    (([0.05, 0.1], [1, 2], 0.0, 2), r"expected widths above 0"),
    (([0.05, 0.05], [2, 2], 0.1, 2), "two are the same"),
  ],
)
def test_misfits_are_refused(arguments, match):
  with pytest.raises(ValueError, match=match):
    reconstruction(*arguments)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    (dict(sigma_rel=0.3), "sigma_rel: expected above 0 and below 0.2887"),
    (dict(profiles=(0.05, 0.0), snapshot_every=2), "profiles: expected above 0"),
    (dict(profiles=(0.05, 0.05), snapshot_every=2), "expected different widths"),
    (dict(profiles=(0.05, 0.10)), "the steps between two snapshots"),
    (dict(snapshot_every=5), "the steps between two snapshots"),
    (dict(snapshot_dtype="int8"), "snapshot_dtype: expected 'float32', 'float16' or 'bfloat16', got 'int8'"),
  ],
)
def test_settings_of_the_average_are_checked(fields, match):
  with pytest.raises(ValueError, match=match):
    EmaSettings(**fields)


def test_a_width_takes_the_place_of_gamma():
  assert EmaSettings().exponent == 7.0
  assert EmaSettings(sigma_rel=float(width_of(7.0))).exponent == pytest.approx(7.0)
