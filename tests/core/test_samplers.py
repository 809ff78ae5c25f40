"""Samplers against the PyTorch release."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core import samplers as sampler
from pflow_jax.core.objectives.imitation import Imitation
from pflow_jax.core.policies import ArcPolicy, DXPolicy, GMFlowPolicy, auto_temperature
from pflow_jax.core.rollout import RELEASES
from pflow_jax.core.samplers import sample_flow_map
from pflow_jax.core.schedule import longest_segment, segment_grid, shift_time
from tests.golden_layout import assert_close, channels_last, released, toy_params, toy_student, toy_teacher
from tests.programs import CONFIGS, load_module

LEVELS = {"0.0": 0.0, "0.5": 0.5, "1.0": 1.0, "inf": float("inf")}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("nfe", [1, 2, 4])
@pytest.mark.parametrize("level", list(LEVELS))
def test_flow_map_sde_targets_match_the_release(golden, level, nfe, scale):
  file, name = golden(f"schedulers_h{level}"), f"n{nfe}_f{scale}"
  t = shift_time(jnp.asarray(segment_grid(nfe, scale)), file["in_shift"])
  np.testing.assert_allclose(t, file[f"out_sigmas_{name}"], rtol=1e-6, atol=1e-7)
  t_dst, m = sampler.flow_map_sde_target(t[:-1], t[1:], LEVELS[level])
  np.testing.assert_allclose(1000 * t_dst, file[f"out_tdst_{name}"], rtol=2e-6, atol=1e-5)
  # At t = 0 nothing is kept or renewed, and the release writes a zero where h = 0 has a one.
  np.testing.assert_allclose(m[:-1], file[f"out_m_{name}"][:-1], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("level", list(LEVELS))
def test_stochastic_steps_match_the_release(golden, level):
  file, h = golden(f"schedulers_h{level}"), LEVELS[level]
  x, noise, v = (jnp.asarray(file[f"in_{k}"]) for k in ("x", "noise", "u"))
  t = shift_time(jnp.asarray(segment_grid(4, 0.5), jnp.float32), 3.2)
  sde_times = jnp.asarray(file["out_sde_sigmas"])
  for i in range(4):
    _, m = sampler.flow_map_sde_target(t[i], t[i + 1], h)
    stepped = sampler.flow_map_sde_renoise(x, noise, t[i + 1], m)
    np.testing.assert_allclose(stepped, file[f"out_step_{i}"], rtol=1e-5, atol=1e-6)
    now, after = sde_times[i], sde_times[i + 1]
    stepped = sampler.flow_sde_step(x, v, noise, now, after, h)
    np.testing.assert_allclose(stepped, file[f"out_sde_u_step_{i}"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["GM_temp1.0", "GM_temp0.3", "DXgrid_temp1.0", "DXpolynomial_temp1.0"])
def test_samples_match_the_release(golden, name, release):
  file, kind = released(golden, f"sample_{name}", release), name.split("_")[0]
  options = {"GM": {}, "DXgrid": dict(segment=1 / 3.5, shift=3.2), "DXpolynomial": dict(shift=3.2)}
  student = toy_student(toy_params(file), kind, eps=1e-4, **options[kind])
  sampling = dict(nfe=4, final_scale=0.5, shift=3.2, temperature=float(name[-3:]), method=release)
  samples = sampler.sample_student(student, channels_last(file["in_noise"]), None, **sampling)
  assert_close(samples, channels_last(file["out_x0"]), rtol=1e-5)


def test_a_hair_more_than_64_substeps_is_65_as_in_the_release(golden):
  """2 evaluations at shift 3.2: in float32 the second segment is longer than 0.5."""
  file = golden("sample_GM_temp1.0") | golden("lakonlab-0.2/sample_GM_2nfe")
  student, noise = toy_student(toy_params(file), "GM", eps=1e-4), channels_last(file["in_noise"])
  draw = lambda method: sampler.sample_student(student, noise, None, nfe=2, shift=3.2, method=method)
  assert_close(draw("lakonlab-0.2"), channels_last(file["out_x0"]), rtol=1e-5)
  assert jnp.max(jnp.abs(draw("piflow-0.1") - channels_last(file["out_x0"]))) > 1e-4  # of 64 and 64


def test_segments_have_the_substeps_of_the_release(golden):
  file = golden("lakonlab-0.2/substeps")
  grids = zip(*(file[f"in_{name}"].tolist() for name in ("nfe", "final_scale", "shift", "h")), strict=True)
  for grid, counts in zip(grids, file["out_substeps"], strict=True):
    *_, r, r_dst = sampler._stops(*grid, np.float32)
    np.testing.assert_array_equal(np.ceil((r - r_dst) * 128), counts[: grid[0]], err_msg=str(grid))


def test_arc_samples_match_the_release(golden):
  file = golden("arc_sample_2nfe")
  student = toy_student(toy_params(file), "Arc")
  for method in ("auto", *RELEASES):  # π-Flow's versions do not matter: ArcFlow's own release has a closed form
    samples = sampler.sample_student(student, channels_last(file["in_noise"]), None, nfe=2, shift=3.2, method=method)
    assert_close(samples, channels_last(file["out_x0"]), rtol=1e-5)


def test_noise_that_is_renewed_keeps_the_marginal():
  """Data at 0: the state at t has standard deviation t, also after a stochastic step."""
  noise = jax.random.normal(jax.random.key(0), (100_000,))
  for h in (0.3, 1.0, float("inf")):
    t, s = jnp.array(0.9), jnp.array(0.6)
    t_dst, m = sampler.flow_map_sde_target(t, s, h)
    x = t_dst * jax.random.normal(jax.random.key(1), noise.shape)
    np.testing.assert_allclose(jnp.std(sampler.flow_map_sde_renoise(x, noise, s, m)), 0.6, rtol=1e-2)
    x = t * jax.random.normal(jax.random.key(1), noise.shape)
    stepped = sampler.flow_sde_step(x, x / t, noise, t, s, h)
    np.testing.assert_allclose(jnp.std(stepped), 0.6, rtol=1e-2)


def test_teacher_sampler_converges_at_first_order_and_returns_its_path():
  x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 2, 1, 2)
  run = lambda n: sampler.sample_teacher(toy_teacher, x, None, steps=n, shift=3.2)
  best = run(4096)
  errors = [float(jnp.max(jnp.abs(run(n) - best))) for n in (32, 64, 128)]
  slope = np.polyfit(np.log([32, 64, 128]), np.log(errors), 1)[0]
  np.testing.assert_allclose(slope, -1.0, atol=0.1)
  path = sampler.sample_teacher(toy_teacher, x, None, steps=32, shift=3.2, trajectory=True)
  assert path.shape == (33, *x.shape)
  np.testing.assert_array_equal(path[0], x)
  np.testing.assert_array_equal(path[-1], run(32))


def test_stochastic_sampling_runs_and_needs_a_key(golden):
  file = golden("sample_GM_temp1.0")
  student = toy_student(toy_params(file), "GM")
  noise = channels_last(file["in_noise"])
  sample = lambda h, key: sampler.sample_student(student, noise, None, key, nfe=3, h=h)
  keys = lambda seed: jax.random.split(jax.random.key(seed), len(noise))
  a, b = sample(0.5, keys(0)), sample(0.5, keys(1))
  assert jnp.all(jnp.isfinite(a))
  assert not jnp.allclose(a, b)
  alone = sampler.sample_student(student, noise[1:], None, keys(0)[1:], nfe=3, h=0.5)
  np.testing.assert_allclose(alone, a[1:], rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="keys"):
    sample(0.5, None)
  with pytest.raises(ValueError, match="at least 0"):
    sample(-1.0, keys(0))
  with pytest.raises(ValueError, match="keys"):
    sampler.sample_teacher(toy_teacher, noise, None, steps=2, h=1.0)


NUMBERS = (1, 2, 3, 4, 5, 8, 16)


def recipes():
  """(final_scale, shift) of every policy student in configs/."""
  found = set()
  for path in CONFIGS:
    module = load_module(path)
    for objective in (module.get_config(variant).objective for variant in module.VARIANTS):
      if objective.kind.startswith("imitation"):
        found.add((float(objective.final_scale), float(objective.shift)))
  return sorted(found)


@pytest.mark.parametrize("nfe", NUMBERS)
def test_every_recipe_has_the_releases_grid_for_any_number_of_evaluations(nfe):
  """The grid of the release's FlowMapSDEScheduler.set_timesteps, of which the one trained for is one."""
  assert {scale for scale, _ in recipes()} == {0.5, 1.0}
  for scale, shift in recipes():
    grid, lengths = segment_grid(nfe, scale), -np.diff(segment_grid(nfe, scale))
    np.testing.assert_allclose(lengths.sum(), 1.0)
    np.testing.assert_allclose(lengths[:-1], lengths[0])
    np.testing.assert_allclose(lengths[-1], (scale if nfe > 1 else 1.0) * lengths[0])
    assert lengths.max() - 1e-12 <= longest_segment(nfe, scale) <= 1
    released = np.linspace(1.0, scale / (nfe - 1 + scale), nfe, dtype=np.float32)
    released = np.append(shift * released / (1 + (shift - 1) * released), 0)
    np.testing.assert_allclose(shift_time(grid, shift), released, rtol=1e-6, atol=5e-7)


def to_a_point(point, kind):
  """A student of each kind whose policy leads everything to `point`, the exact flow of data that are one point."""

  def one(x, t):
    v = (x - point) / t
    outputs = jnp.stack([v, v]), jnp.zeros((2, *x.shape[:-1]))
    if kind == "gmflow":
      return GMFlowPolicy.create(x, t, *outputs, jnp.asarray(-12.0, x.dtype))
    if kind == "arc":
      return ArcPolicy.create(x, t, *outputs, jnp.zeros((1, *x.shape[:-1])))
    states = jnp.stack([v, v if kind == "grid" else jnp.zeros_like(v)])
    return DXPolicy.create(x, t, states, basis=kind, segment=Imitation(nfe=4, final_scale=0.5).max_segment, shift=3.2)

  return lambda x, t, cond: jax.vmap(one)(x, t)


@pytest.mark.parametrize("nfe", [1, 5])
@pytest.mark.parametrize("kind", ["gmflow", "grid", "polynomial", "arc"])
def test_a_student_trained_for_four_evaluations_arrives_with_another_number(kind, nfe):
  """Of FLUX.1's and Qwen-Image's recipes, whose last segment is half as long."""
  noise = jax.random.normal(jax.random.key(0), (2, 2, 1, 3))
  point = jnp.asarray([0.5, -1.0, 2.0])[None, None]
  draw = functools.partial(sampler.sample_student, nfe=nfe, final_scale=0.5, shift=3.2, temperature=0.3)
  x = jax.jit(lambda x: draw(to_a_point(point, kind), x, None))(noise)
  np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=1e-3)


def test_a_student_is_trained_for_one_evaluation_with_any_last_segment():
  settings = Imitation(nfe=1, final_scale=0.5, window=3.0)
  assert (settings.max_segment, settings.max_window) == (1.0, Imitation(nfe=1, window=3.0).max_window)


def test_evaluations_are_a_loop():
  """The network is traced once, not once an evaluation."""
  traced = []

  def student(x, t, cond):
    traced.append(t)
    return to_a_point(0.0, "arc")(x, t, cond)

  noise, keys = jax.ShapeDtypeStruct((2, 2, 1, 3), jnp.float32), jax.random.split(jax.random.key(0), 2)
  draw = functools.partial(sampler.sample_student, student, cond=None, nfe=50, h=0.5, temperature=0.5)
  jax.make_jaxpr(lambda x: draw(x, keys=keys))(noise)
  assert len(traced) <= 2


def test_the_shift_may_be_an_argument_of_a_compiled_function(golden):
  file = golden("sample_GM_temp1.0")
  student, noise = toy_student(toy_params(file), "GM", eps=1e-4), channels_last(file["in_noise"]).astype(np.float64)
  draw = lambda shift: sampler.sample_student(student, noise, None, nfe=2, shift=shift)
  assert_close(jax.jit(draw)(3.2), draw(3.2), rtol=1e-6)


def test_the_temperature_may_be_an_argument_of_a_compiled_function(golden):
  file = golden("sample_GM_temp1.0")
  student, noise = toy_student(toy_params(file), "GM", eps=1e-4), channels_last(file["in_noise"]).astype(np.float64)
  draw = lambda temperature: sampler.sample_student(student, noise, None, nfe=2, substeps=8, temperature=temperature)
  traced = jax.jit(draw)
  for temperature in (0.0, 0.3, 1.0, 7.0):
    assert_close(traced(temperature), draw(temperature), rtol=1e-6)
  assert np.abs(traced(0.3) - traced(1.0)).max() > 1e-2
  assert traced._cache_size() == 1


def test_auto_temperature():
  np.testing.assert_allclose([auto_temperature(n) for n in (1, 2, 4, 20)], [0.0, 0.1, 0.3, 1.0])


def test_bfloat16_is_computed_in_float32(golden):
  """Times near 1 would collapse in bfloat16, and the samples with them."""
  file = golden("sample_GM_temp1.0")
  noise = channels_last(file["in_noise"]).astype(jnp.bfloat16)
  student = toy_student(toy_params(file), "GM")
  samples = sampler.sample_student(student, noise, None, nfe=2, shift=3.2)
  np.testing.assert_array_equal(
    samples, sampler.sample_student(student, noise.astype(jnp.float32), None, nfe=2, shift=3.2)
  )
  single = sampler.sample_teacher(toy_teacher, noise, None, steps=128)
  assert single.dtype == jnp.float32
  np.testing.assert_array_equal(single, sampler.sample_teacher(toy_teacher, noise.astype(jnp.float32), None, steps=128))


def gaussian_map(x, t, s, cond=None):
  """F of the exact flow map of data N(0, 0.4^2)."""
  spread = lambda t: jnp.sqrt(t**2 + (1 - t) ** 2 * 0.4**2)
  return x * ((1 - spread(s) / spread(t)) / (t - s))[:, None]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_flow_map_reaches_the_same_data_in_any_number_of_steps(steps):
  noise = jax.random.normal(jax.random.key(0), (6, 3))
  x = sample_flow_map(gaussian_map, noise, None, grid=np.linspace(1, 0, steps + 1).tolist())
  np.testing.assert_allclose(x, 0.4 * noise, rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
def test_gamma_sampling_keeps_the_marginal_of_every_level(gamma):
  """Noise is renewed without changing the variance t^2 + (1 - t)^2 c^2."""
  count, grid = 40_000, [1.0, 0.7, 0.2, 0.0]
  noise, keys = jax.random.normal(jax.random.key(1), (count, 1)), jax.random.split(jax.random.key(2), count)
  states = sample_flow_map(gaussian_map, noise, None, keys, grid=grid, gamma=gamma, trajectory=True)
  for t, x in zip(grid, states, strict=True):
    expected = t**2 + (1 - t) ** 2 * 0.4**2
    assert float(jnp.var(x)) == pytest.approx(expected, rel=5 * np.sqrt(2 / count))
  # How much is renewed: at gamma 1 all of what the first jump left.
  kept = np.corrcoef(states[0][:, 0], states[1][:, 0])[0, 1]
  data_share = 0.3 * 0.4 / np.sqrt(0.7**2 + 0.3**2 * 0.4**2)
  assert kept < 0.999
  if gamma == 1:
    assert kept == pytest.approx(data_share, abs=0.02)


def test_flow_map_sampling_refuses_what_does_not_fit():
  noise = jnp.ones((2, 3))
  for grid in ([1.0], [0.0, 1.0], [1.2, 0.0], [1.0, 1.0, 0.0]):
    with pytest.raises(ValueError, match="grid"):
      sample_flow_map(gaussian_map, noise, None, grid=grid)
  with pytest.raises(ValueError, match="gamma"):
    sample_flow_map(gaussian_map, noise, None, grid=[1.0, 0.0], gamma=1.5)
  with pytest.raises(ValueError, match="keys"):
    sample_flow_map(gaussian_map, noise, None, grid=[1.0, 0.5, 0.0], gamma=0.5)
