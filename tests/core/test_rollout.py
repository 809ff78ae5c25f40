"""Rollouts: against the PyTorch release, their order of convergence, and their behaviour at the edges."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.policies import DXPolicy, Policy
from pflow_jax.core.rollout import METHODS, RELEASES, average_velocity, rollout
from pflow_jax.core.schedule import segment_grid, shift_time
from pflow_jax.training.flops import count_flops
from tests import cases
from tests.golden_layout import assert_close, channels_last, released, toy_params, toy_student

ALL = {"gmflow": cases.gmflow, "gmflow1": functools.partial(cases.gmflow, k=1), "dx": cases.dx, "arc": cases.arc}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("kind", ["GM", "DX"])
def test_releases_are_matched_by_their_names(golden, kind, shift, release):
  """Whole and partial stretches of different lengths in one batch, one of no length, one that ends at the data."""
  file = released(golden, f"rollout_{kind}_shift{shift}", release)
  x, r_start, r_end = (
    channels_last(file["in_x_src"]),
    jnp.asarray(file["in_raw_start"]),
    jnp.asarray(file["in_raw_end"]),
  )
  options = dict(segment=1 / 3.5, shift=3.2) if kind == "DX" else {}

  @jax.jit
  def evaluate(params):
    policy = toy_student(params, "GM" if kind == "GM" else "DXgrid", **options)(x, shift_time(r_start, shift))
    roll = functools.partial(rollout, shift=shift, method=release)
    average = functools.partial(average_velocity, shift=shift, method=release)
    return jax.vmap(average)(policy, x, r_start, r_end), jax.vmap(roll)(policy, x, r_start, r_end)

  params = toy_params(file)
  v, pull, end = jax.vjp(evaluate, params, has_aux=True)
  assert_close(end, channels_last(file["out_x_end"]), 1e-9)
  assert_close(v, channels_last(file["out_avg_u"]), 1e-9)
  (grads,) = pull(channels_last(file["in_cotangent"]))
  assert_close(grads["means"], channels_last(file["out_gradavg_means"])[0], 1e-9)
  assert_close(grads["lw"], file["out_gradavg_lw"][0, :, 0], 1e-9)
  assert_close(grads["ls"], file["out_gradavg_ls"].reshape(()), 1e-9)


def test_one_precision_throughout():
  """Times and shifts of another type do not leak into the state."""
  x, policy = cases.gmflow(dtype=jnp.float32)
  times = np.float64(1.0), np.float64(0.4)
  for method in ("euler", "auto"):
    roll = jax.jit(lambda x, m=method: rollout(policy, x, *times, shift=np.float64(3.2), substeps=4, method=m))
    low = x.astype(jnp.bfloat16)
    assert roll(x).dtype == roll(low).dtype == jnp.float32
    np.testing.assert_array_equal(roll(low), roll(low.astype(jnp.float32)))


def test_the_reference_is_converged():
  """The reference of the tests below, thousands of small steps, against another method by other people."""
  for std in (0.1, 0.3):
    x, policy = cases.gmflow(space=(8,), std=std)
    end = jax.jit(functools.partial(rollout, method="auto", substeps=6000))(policy, x, 1.0, 0.02)
    np.testing.assert_allclose(end, cases.converged(policy, x, 1.0, 0.02), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("method", "order", "shift", "counts"),
  [
    ("euler", 1, 3.2, (128, 256, 512)),
    ("ab2", 2, 3.2, (128, 256, 512)),
    ("auto", 3, 3.2, (192, 384, 768)),
    ("auto", 3, 1.0, (192, 384, 768)),
  ],
)
def test_order_of_convergence(method, order, shift, counts):
  x, policy = cases.gmflow(space=(16,), std=0.3)
  r_end = 0.1
  exact = cases.converged(policy, x, 1.0, shift_time(r_end, shift))
  errors = []
  for n in counts:
    end = jax.jit(functools.partial(rollout, method=method, substeps=n))(policy, x, 1.0, r_end, shift=shift)
    errors.append(float(jnp.sqrt(jnp.mean((end - exact) ** 2))))
  slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
  assert abs(slope - order) < 0.2, (slope, errors)


@functools.partial(jax.jit, static_argnames=("method", "substeps", "max_length"))
def roll_batch(policy, x, r_start, r_end, shift, **options):
  return jax.vmap(lambda p, x: rollout(p, x, r_start, r_end, shift=shift, **options))(policy, x)


@pytest.mark.parametrize("nfe", [1, 2, 4, 16])
def test_auto_is_no_less_accurate_than_euler(nfe):
  """On random mixtures, sharp and broad, over the first and the last segment of the student's grid."""
  grid, ratios = segment_grid(nfe), []
  for i in sorted({0, nfe - 1}):
    for shift in (1.0, 3.2):
      t_s = float(shift_time(grid[i], shift))
      stds = np.repeat([0.05, 0.1, 0.3], 8)
      made = [cases.gmflow(seed, space=(16,), t_s=t_s, std=std) for seed, std in enumerate(stds)]
      x, policy = jax.tree.map(lambda *a: jnp.stack(a), *made)
      length = float(grid[i] - grid[i + 1])
      run = functools.partial(roll_batch, policy, x, grid[i], grid[i + 1], shift, max_length=length)
      exact = run(method="auto", substeps=1536)
      auto, euler = (
        np.sqrt(np.mean((run(method=m, substeps=128) - exact) ** 2, axis=(1, 2))).reshape(3, 8)
        for m in ("auto", "euler")
      )
      assert np.all(np.mean(auto**2, 1) <= np.mean(euler**2, 1)), (i, shift)
      assert np.median(auto / euler) < 0.75, (i, shift)
      ratios.append(auto / euler)
  # A pixel may lie between two components so narrowly that either method's error decides which of them it goes to.
  assert np.mean(np.array(ratios) <= 1) >= 0.95


@pytest.mark.parametrize("substeps", [2, 3, 6, 12])
def test_auto_is_no_less_accurate_than_euler_over_windows(substeps):
  """At the source of an early and a late segment, and at the end of the last of four, on the policy's own way."""
  length, ratios = substeps / 128, []

  @functools.partial(jax.jit, static_argnames=("method", "substeps"))
  def average(policy, x, r, shift, **options):
    one = functools.partial(average_velocity, shift=shift, max_length=length, **options)
    return jax.vmap(lambda p, x: one(p, x, r, r - length))(policy, x)

  for (source, r), shift in itertools.product(((1.0, 1.0), (0.4, 0.4), (0.25, length)), (1.0, 3.2)):
    t_s, stds = float(shift_time(source, shift)), np.repeat([0.05, 0.1, 0.3], 8)
    made = [cases.gmflow(seed, space=(16,), t_s=t_s, std=std) for seed, std in enumerate(stds)]
    x, policy = jax.tree.map(lambda *a: jnp.stack(a), *made)
    x = roll_batch(policy, x, source, r, shift, method="auto", substeps=512, max_length=0.25)
    exact = average(policy, x, r, shift, method="auto", substeps=128 * 128 // substeps)
    auto, euler = (
      np.sqrt(np.mean((average(policy, x, r, shift, method=m, substeps=128) - exact) ** 2, axis=(1, 2)))
      for m in ("auto", "euler")
    )
    ratios.append(auto / euler)
  assert np.median(ratios) < 0.2
  assert np.mean(np.array(ratios) <= 1) >= 0.95


def test_auto_costs_no_more_than_euler_over_any_stretch():
  """Operations, and with them evaluations of the policy, of an average velocity and its gradient."""
  x, policy = cases.gmflow()
  ratios = []
  for substeps in (3, 3.05, 4, 5, 6, 8, 12, 20, 32, 128):
    length = substeps / 128

    def average(policy, method, length=length):
      return jnp.sum(average_velocity(policy, x, 1.0, 1.0 - length, method=method, max_length=length))

    counts = {
      m: count_flops(jax.make_jaxpr(jax.grad(functools.partial(average, method=m)))(policy)) for m in METHODS[:2]
    }
    ratios.append(counts["auto"] / counts["euler"])
  assert max(ratios) <= 1
  assert ratios[-1] < 0.4


@pytest.mark.parametrize(
  ("kind", "method"),
  [("gmflow", "auto"), ("gmflow", "ab2"), ("gmflow", "euler"), ("gmflow1", "exact"), ("dx", "exact"), ("arc", "exact")],
)
def test_derivatives(kind, method):
  x, policy = ALL[kind](t_s=0.9)

  def end_and_average(policy, x):
    # The placing of multistep points is no part of their derivative: times are left out.
    return jnp.stack(
      [f(policy, x, 0.8, 0.1, shift=2.0, substeps=8, method=method) for f in (rollout, average_velocity)]
    )

  cases.assert_derivative(end_and_average, policy, x)


@pytest.mark.parametrize("method", ["auto", "ab2", "euler"])
def test_derivative_by_the_times(method):
  """dx/dr at the end is the velocity there, whatever the method: exact in the limit of many steps."""
  x, policy = cases.gmflow(space=(16,), t_s=0.9)
  roll = jax.jit(functools.partial(rollout, method=method, substeps=400, max_length=0.5))
  end, by_end = jax.jvp(lambda r: roll(policy, x, 0.9, r), (0.4,), (1.0,))
  np.testing.assert_allclose(by_end, policy.velocity(end, 0.4), rtol=2e-2, atol=2e-2)
  at_data = jax.jit(jax.grad(lambda r: jnp.sum(roll(policy, x, 0.5, r))))(0.0)
  assert jnp.isfinite(at_data)


@pytest.mark.parametrize(
  ("kind", "method"),
  [("gmflow", "auto"), ("gmflow", "euler"), ("gmflow1", "auto"), ("dx", "auto"), ("dx", "ab2"), ("arc", "auto")],
)
def test_ends_at_the_data_and_stays_where_it_is(kind, method):
  x, policy = ALL[kind](dtype=jnp.float32)

  @jax.jit
  def evaluate(policy, x, r_start, r_end):
    def of(policy, x):
      return sum(jnp.sum(f(policy, x, r_start, r_end, shift=3.2, substeps=16, method=method) ** 2)
                 for f in (rollout, average_velocity))  # fmt: skip

    end = rollout(policy, x, r_start, r_end, shift=3.2, substeps=16, method=method)
    return end, jax.grad(of, argnums=(0, 1))(policy, x)

  for r_start, r_end in ((1.0, 0.0), (1.0, 1.0), (0.3, 0.3), (1e-4, 0.0), (0.0, 0.0)):
    end, grads = evaluate(policy, x, r_start, r_end)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves((end, grads))), (r_start, r_end)
    if r_start == r_end:
      np.testing.assert_allclose(end, x, rtol=1e-6, atol=1e-6)


def test_float32_is_accurate_over_short_windows():
  """The error of an average velocity over 3 of 128 substeps, where x(a) - x(b) is small."""
  for std in (0.05, 0.3):
    x, policy = cases.gmflow(space=(64,), std=std)
    single_policy, single_x = jax.tree.map(lambda a: a.astype(jnp.float32), (policy, x))
    # With the default bound "auto" takes all its steps, 43, for the window, each with its rounding.
    for max_length, bound in ((1.0, 4e-4), (3 / 128, 5e-5)):
      f = jax.jit(functools.partial(average_velocity, max_length=max_length, shift=3.2))
      for r in (1.0, 0.5, 3 / 128):
        want, got = f(policy, x, r, r - 3 / 128), f(single_policy, single_x, r, r - 3 / 128)
        error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        assert error < bound, (std, max_length, r, error)


@pytest.mark.parametrize("method", ["auto", "ab2", "euler"])
def test_vmapped_stretches_are_those_taken_one_by_one(method):
  made = [cases.gmflow(seed) for seed in range(3)]
  x, policy = jax.tree.map(lambda *a: jnp.stack(a), *made)
  r_start, r_end = jnp.array([1.0, 0.7, 0.4]), jnp.array([0.5, 0.68, 0.0])
  roll = jax.jit(functools.partial(rollout, substeps=24, shift=2.0, method=method))
  together = jax.vmap(roll)(policy, x, r_start, r_end)
  for i, (x_i, policy_i) in enumerate(made):
    np.testing.assert_allclose(together[i], roll(policy_i, x_i, r_start[i], r_end[i]), rtol=1e-10)


def test_max_length_bounds_the_loop_and_not_the_result():
  x, policy = cases.gmflow()
  roll = functools.partial(rollout, policy, x, 0.9, 0.65, method="euler")
  np.testing.assert_allclose(roll(max_length=0.25), roll(), rtol=1e-12)
  text = jax.make_jaxpr(functools.partial(rollout, method="auto", max_length=0.25))(policy, x, 0.9, 0.65)
  assert "length=10" in str(text)  # ceil(128 / 4 / 3), of which the first stands before the loop
  # A longer stretch is covered all the same, in longer steps.
  np.testing.assert_allclose(roll(max_length=0.05, method="auto"), roll(method="auto"), atol=0.05)


def test_short_stretches_average_to_the_velocity_at_their_start():
  x, policy = cases.gmflow()
  start = policy.velocity(x, 0.5)
  average = functools.partial(average_velocity, policy, x, 0.5)
  np.testing.assert_array_equal(average(0.5 - 1.4 / 128), start)
  np.testing.assert_array_equal(average(0.2, max_length=0), start)
  assert not jnp.allclose(average(0.5 - 1.6 / 128), start, rtol=1e-4)
  end = rollout(policy, x, 0.5, 0.2)
  np.testing.assert_allclose(average(0.2), (x - end) / 0.3, rtol=1e-10)


def test_steps_are_checkpointed():
  """The backward pass keeps states, not the (K, pixels) arrays of every substep."""
  x, policy = cases.gmflow(k=32, space=(64,))
  for method in ("euler", "auto"):
    roll = functools.partial(rollout, x=x, r_start=1.0, r_end=0.0, method=method)
    assert "remat" in str(jax.make_jaxpr(roll)(policy))
    sizes = []
    for substeps in (32, 128):
      grad = jax.jit(jax.grad(lambda p, n=substeps, roll=roll: jnp.sum(roll(p, substeps=n))))
      sizes.append(grad.lower(policy).compile().memory_analysis().temp_size_in_bytes)
    states = 96 * 3 * x.nbytes
    assert sizes[1] - sizes[0] < 2 * states < 96 * policy.logits.nbytes, (method, sizes)


def test_numbers_do_not_recompile():
  traces = []

  @functools.partial(jax.jit, static_argnames="basis")
  def run(x, d, t_s, segment, dx_shift, r_start, r_end, shift, basis):
    traces.append(basis)
    policy = DXPolicy.create(x, t_s, d, segment=segment, shift=dx_shift, basis=basis)
    return rollout(policy, x, r_start, r_end, shift=shift)

  x, d = jnp.ones((3, 2)), jnp.ones((4, 3, 2))
  for numbers in ((1.0, 0.5, 1.0, 1.0, 0.5, 1.0), (0.5, 1.0, 3.2, 0.4, 0.0, 3.2)):
    run(x, d, *numbers, basis="grid")
  assert traces == ["grid"]


def test_names_of_releases_are_euler_or_a_closed_form_as_the_releases_are():
  """ "euler", which runs of before have in their config.json, stays what it was: "piflow-0.1" but for ArcFlow."""
  for kind, make in ALL.items():
    x, policy = make()
    # 18.3 substeps, of which the releases make 18 and 19.
    ends = {m: rollout(policy, x, 0.5, 0.5 - 18.3 / 128, method=m) for m in ("euler", *RELEASES)}
    same = {m: bool(jnp.all(ends["euler"] == end)) for m, end in ends.items()}
    assert same == {"euler": True, "piflow-0.1": kind != "arc", "lakonlab-0.2": False}, kind
    if kind == "arc":
      exact = rollout(policy, x, 0.5, 0.5 - 18.3 / 128, method="exact")
      assert all(bool(jnp.all(ends[release] == exact)) for release in RELEASES)


def test_the_loop_has_room_for_one_substep_more_where_rounding_asks_for_it():
  """0.6 - 0.35 is a hair more than 0.25 in float32: 33 substeps where there are to be 32."""
  x, policy = cases.gmflow(dtype=jnp.float32)
  times = np.float32(0.6), np.float32(0.35)
  assert np.ceil((times[0] - times[1]) * np.float32(128)) == 33
  roll = functools.partial(rollout, policy, x, *times, method="lakonlab-0.2")
  np.testing.assert_allclose(roll(max_length=0.25), roll(), rtol=1e-6)
  assert jnp.max(jnp.abs(roll() - roll(method="piflow-0.1"))) > 1e-5


def test_auto_is_exact_where_it_can_be():
  for kind, make in ALL.items():
    x, policy = make()
    roll = functools.partial(rollout, policy, x, 1.0, 0.2)
    if kind == "gmflow":
      with pytest.raises(ValueError, match="K = 8 has no closed-form"):
        roll(method="exact")
    else:
      np.testing.assert_array_equal(roll(), roll(method="exact"))
      np.testing.assert_allclose(roll(), roll(method="ab2", substeps=512), atol=2e-3)


def test_bad_arguments_say_what_was_expected():
  x, policy = cases.gmflow()
  for f in (rollout, average_velocity):
    for bad, message in (
      (dict(method="rk4"), r"method: expected one of \('auto', 'euler', 'ab2', 'exact', 'pi.*, 'lak.*'\), got 'rk4'"),
      (dict(substeps=0), "substeps: expected an integer of at least 1, got 0"),
      (dict(substeps=8.0), "substeps: .*got 8.0"),
      (dict(substeps=True), "substeps: .*got True"),
      (dict(max_length=1.5), r"max_length: expected a number in \[0, 1\], got 1.5"),
      (dict(r_start=1.1), r"r_start: expected a value in \[0.0, 1.0\], got 1.1"),
      (dict(r_end=-0.1), r"r_end: .*got -0.1"),
      (dict(r_end=0.9), r"r_end \(at most r_start\): expected a value in \[0.0, 0.8\], got 0.9"),
      (dict(r_start=jnp.ones(2)), r"r_start: expected a scalar, got shape \(2,\); use jax.vmap"),
    ):
      with pytest.raises(ValueError, match=message):
        f(policy, x, **({"r_start": 0.8, "r_end": 0.2} | bad))


def test_a_policy_of_ones_own_needs_velocity_alone():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Decay(Policy):
    rate: jax.Array

    def velocity(self, x, t):
      return self.rate * x

  x = jnp.ones((2, 3))
  end = rollout(Decay(jnp.float64(0.7)), x, 1.0, 0.0, substeps=512)
  np.testing.assert_allclose(end, x * np.exp(-0.7), rtol=1e-5)
  with pytest.raises(ValueError, match="Decay has no closed-form integral"):
    rollout(Decay(jnp.float64(0.7)), x, 1.0, 0.0, method="exact")
