"""Optimizer against a NumPy Adam, skipped updates, clip after warm-up, EMA against the release."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pflow_jax.settings.optimizer import EmaSettings, OptimizerSettings
from pflow_jax.training import optim
from pflow_jax.training.optim import skipped, update_ema

PARAMS = {"w": np.array([1.0, -2.0, 3.0], np.float32), "b": np.array([[0.5]], np.float32)}


def make_optimizer(total_steps=None, **settings):
  return optim.make_optimizer(OptimizerSettings(**settings), total_steps)


def make_schedule(total_steps=None, **settings):
  return optim.make_schedule(OptimizerSettings(**settings), total_steps)


def make_ema_decay(**settings):
  return optim.make_ema_decay(EmaSettings(**settings))


def gradients(seed):
  rng = np.random.default_rng(seed)
  return {k: rng.normal(size=v.shape).astype(np.float32) for k, v in PARAMS.items()}


@functools.cache
def compiled_step(optimizer):
  @jax.jit
  def step(params, state, grad):
    updates, state = optimizer.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  return step


def run(optimizer, grads, params=PARAMS, state=None):
  """Applies the updates one by one under jit; returns the last parameters and state."""
  params = jax.tree.map(jnp.asarray, params)
  state = optimizer.init(params) if state is None else state
  for grad in grads:
    params, state = compiled_step(optimizer)(params, state, grad)
  return params, state


def test_matches_adamw_written_out():
  lr, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.01
  optimizer = make_optimizer(learning_rate=lr, warmup_steps=3, b1=b1, b2=b2, eps=eps, weight_decay=decay)
  grads = [gradients(i) for i in range(6)]
  got, _ = run(optimizer, grads)
  for name, value in PARAMS.items():
    x, m, v = value.astype(np.float64), 0.0, 0.0
    for i, grad in enumerate(grads):
      g = grad[name].astype(np.float64)
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
      direction = (m / (1 - b1 ** (i + 1))) / (np.sqrt(v / (1 - b2 ** (i + 1))) + eps)
      x = x - lr * min((i + 1) / 3, 1) * (direction + decay * x)
    assert got[name].dtype == jnp.float32
    np.testing.assert_allclose(got[name], x, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_bad_gradients_change_nothing_and_training_goes_on(bad):
  """1e30 is finite, but its square is not."""
  optimizer = make_optimizer(learning_rate=0.1, warmup_steps=4)
  broken = gradients(9)
  broken["w"][1] = bad
  before = run(optimizer, [gradients(0), gradients(1)])
  during = run(optimizer, [broken] * 7, *before)
  assert tuple(map(int, skipped(during[1]))) == (7, 7)
  jax.tree.map(np.testing.assert_array_equal, during[0], before[0])
  for name in ("mu", "nu"):
    jax.tree.map(
      np.testing.assert_array_equal,
      optax.tree_utils.tree_get(during[1], name),
      optax.tree_utils.tree_get(before[1], name),
    )
  after = run(optimizer, [gradients(2), broken, gradients(3)], *during)
  assert tuple(map(int, skipped(after[1]))) == (0, 8)
  expected, _ = run(optimizer, [gradients(i) for i in range(4)])
  jax.tree.map(np.testing.assert_array_equal, after[0], expected)  # the schedule did not advance


def test_never_gives_in_however_many_in_a_row():
  optimizer = make_optimizer(learning_rate=0.1)
  params, state = run(optimizer, [gradients(0)])
  most = jnp.asarray(2**31 - 1, jnp.int32)
  state = optax.tree_utils.tree_set(state, notfinite_count=most, total_notfinite=most)
  broken = jax.tree.map(lambda g: g * np.float32(np.nan), gradients(1))
  after, state = run(optimizer, [broken, broken], params, state)
  jax.tree.map(np.testing.assert_array_equal, after, params)
  assert int(skipped(state)[0]) == 2**31 - 1
  after, state = run(optimizer, [gradients(2)], params, state)
  assert int(skipped(state)[0]) == 0
  assert not np.array_equal(after["w"], params["w"])


def test_skipped_needs_counters():
  with pytest.raises(ValueError, match="make_optimizer"):
    skipped(optax.adam(0.1).init(PARAMS))


def test_clip_starts_after_the_warmup():
  """With b1 = 0 the first moment is the gradient that reached Adam."""
  optimizer = make_optimizer(learning_rate=0.1, warmup_steps=2, b1=0.0, clip_norm=0.5)
  grad, params, state, norms = gradients(1), PARAMS, None, []
  for _ in range(4):
    params, state = run(optimizer, [grad], params, state)
    norms.append(float(optax.global_norm(optax.tree_utils.tree_get(state, "mu"))))
  full = float(optax.global_norm(grad))
  assert full > 1
  np.testing.assert_allclose(norms, [full, full, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("start", "clipped"), [(400, [0, 0, 1, 1]), (None, [0, 0, 0, 0]), (0, [1, 1, 1, 1])])
def test_clip_starts_at_a_step_of_its_own(start, clipped):
  """Steps 398 to 401 of a warm-up of 1,000, counted from 0."""
  optimizer = make_optimizer(learning_rate=0.1, warmup_steps=1000, b1=0.0, clip_norm=0.5, clip_start=start)
  grad, full = gradients(1), float(optax.global_norm(gradients(1)))
  state = optimizer.init(jax.tree.map(jnp.asarray, PARAMS))
  state = optax.tree_utils.tree_set(state, step=jnp.asarray(398, jnp.int32))
  params, norms = PARAMS, []
  for _ in range(4):
    params, state = run(optimizer, [grad], params, state)
    norms.append(float(optax.global_norm(optax.tree_utils.tree_get(state, "mu"))))
  np.testing.assert_allclose(norms, [0.5 if one else full for one in clipped], rtol=1e-6)


def test_the_first_moment_may_be_kept_in_bfloat16():
  grads = [gradients(i) for i in range(5)]
  (whole, _), (half, state) = (run(make_optimizer(learning_rate=0.1, mu_dtype=d), grads) for d in (None, "bfloat16"))
  assert {x.dtype for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))} == {np.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))} == {np.dtype(np.float32)}
  for name, value in PARAMS.items():
    assert half[name].dtype == jnp.float32
    assert not np.array_equal(half[name], whole[name])
    np.testing.assert_allclose(half[name] - value, whole[name] - value, rtol=2e-2, atol=2e-3)


def test_small_gradients_are_not_clipped():
  grads = [gradients(i) for i in range(3)]
  clipped, _ = run(make_optimizer(learning_rate=0.1, clip_norm=100.0), grads)
  plain, _ = run(make_optimizer(learning_rate=0.1), grads)
  jax.tree.map(np.testing.assert_array_equal, clipped, plain)


def test_rates_scale_the_whole_update():
  settings = dict(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=1.0)
  plain, scaled = make_optimizer(**settings), make_optimizer(**settings, rates=(("w", 0.1), (".*", 1.0)))
  before = run(plain, [gradients(0)] * 2)
  state = scaled.init(PARAMS)
  _, state = run(scaled, [gradients(0)] * 2, PARAMS, state)
  one, _ = run(plain, [gradients(1)], *before)
  other, state = run(scaled, [gradients(1)], before[0], state)
  np.testing.assert_array_equal(other["b"], one["b"])
  step = one["w"] - before[0]["w"]
  assert np.all(np.abs(step) > 1e-3)
  np.testing.assert_allclose(other["w"] - before[0]["w"], 0.1 * step, rtol=1e-4)
  broken = jax.tree.map(lambda g: g * np.float32(np.nan), gradients(1))
  after, state = run(scaled, [broken], other, state)
  jax.tree.map(np.testing.assert_array_equal, after, other)
  assert tuple(map(int, skipped(state))) == (1, 1)


def test_rates_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"no row matches \['b'\]"):
    run(make_optimizer(learning_rate=0.1, rates=(("w", 0.1),)), [gradients(0)])
  for factor in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match="factor > 0 for 'w', got .*; to freeze .* partition.split"):
      make_optimizer(learning_rate=0.1, rates=(("w", factor), (".*", 1.0)))


def test_schedules():
  constant = make_schedule(learning_rate=2.0, warmup_steps=4)
  got = jax.jit(jax.vmap(constant))(jnp.arange(6))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rtol=1e-6)
  cosine = make_schedule(learning_rate=2.0, warmup_steps=2, schedule="cosine", total_steps=10)
  steps = np.arange(11)
  expected = np.where(steps < 2, steps + 1, 1 + np.cos(np.pi * (steps - 2) / 8))
  np.testing.assert_allclose([cosine(s) for s in steps], expected, atol=1e-6)
  assert float(make_schedule(learning_rate=0.3)(0)) == pytest.approx(0.3)


def test_a_warm_up_may_start_at_a_share_of_the_rate():
  """mmcv's warmup="linear" with warmup_iters 400 and warmup_ratio 0.001: rate (1 - (1 - i / 400) (1 - 0.001))."""
  schedule = make_schedule(learning_rate=5e-5, warmup_steps=400, warmup_factor=0.001)
  steps = np.array([0, 1, 200, 399, 400, 401, 10_000])
  expected = 5e-5 * np.array([0.001, 0.0034975, 0.5005, 0.9975025, 1, 1, 1])
  np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(steps), expected, rtol=1e-6)
  cosine = make_schedule(learning_rate=2.0, warmup_steps=2, warmup_factor=0.5, schedule="cosine", total_steps=10)
  np.testing.assert_allclose([cosine(s) for s in (0, 1, 2, 10)], [1.0, 1.5, 2.0, 0.0], atol=1e-6)
  assert float(make_schedule(learning_rate=0.3, warmup_factor=0.5)(0)) == pytest.approx(0.3), "no warm-up, no factor"


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rate": 1.0, "warmup_factor": 0.0}, r"share in \(0, 1\], .* got 0.0"),
    ({"learning_rate": 1.0, "warmup_factor": 1.5}, r"share in \(0, 1\], .* got 1.5"),
    ({"learning_rate": 1.0, "mu_dtype": "float16"}, "mu_dtype: expected 'float32' or 'bfloat16', got 'float16'"),
    ({"learning_rate": 1.0, "clip_start": -1}, "clip_start must be >= 0"),
    ({"learning_rate": 1.0, "warmup_steps": -1}, "warmup_steps"),
    ({"learning_rate": 1.0, "schedule": "linear"}, "'constant' or 'cosine'"),
    ({"learning_rate": 1.0, "schedule": "cosine"}, "total_steps"),
    (
      {"learning_rate": 1.0, "schedule": "cosine", "warmup_steps": 5, "total_steps": 5},
      "5 is no part of a cosine",
    ),
    ({"learning_rate": 1.0, "clip_norm": 0.0}, "clip_norm"),
  ],
)
def test_refuses_bad_settings(settings, match):
  with pytest.raises(ValueError, match=match):
    make_optimizer(**settings)


def test_karras_decay_matches_the_release(golden):
  data = golden("ema_karras")
  decay = jax.jit(make_ema_decay(start=int(data["in_start_iter"]), gamma=float(data["in_gamma"])))
  got = np.array([decay(i) for i in data["in_iter"]])
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, data["out_momentum"], rtol=1e-6)


def test_the_average_is_a_copy_up_to_its_start():
  """Steps 399, 400 and 401 of a run whose average starts at 400."""
  decay = make_ema_decay(start=400, gamma=7.0)
  params = [{"w": jnp.float32([value, 1e8])} for value in (1.0, 3.0, 7.0)]
  ema = {"w": jnp.float32([-5.0, 0.0])}
  for step, new, expected in zip((399, 400, 401), params, (1.0, 3.0, 7.0 - 4.0 / 2**8), strict=True):
    ema = update_ema(ema, new, decay(step))
    np.testing.assert_array_equal(ema["w"], np.float32([expected, 1e8]))


def test_constant_decay_and_unknown_kind():
  got = [float(make_ema_decay(kind="constant", start=3, decay=0.5)(i)) for i in range(6)]
  assert got == [0, 0, 0, 0, 0.5, 0.5]
  with pytest.raises(ValueError, match="'karras' or 'constant'"):
    make_ema_decay(kind="power")
  for bad in (dict(start=-1), dict(gamma=0.0), dict(decay=1.5)):
    with pytest.raises(ValueError, match="expected start"):
      make_ema_decay(**bad)


def test_update_ema():
  ema = {"w": jnp.float32([1.0, 1e8]), "b": jnp.zeros((2, 2), jnp.float32)}
  params = {"w": jnp.bfloat16([3.0, 1.0]), "b": jnp.ones((2, 2), jnp.float64)}
  got = jax.jit(update_ema)(ema, params, 0.75)
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
  np.testing.assert_allclose(got["w"], [1.5, 0.75e8 + 0.25], rtol=1e-7)
  np.testing.assert_array_equal(got["b"], np.full((2, 2), 0.25, np.float32))
  copied = update_ema(ema, params, make_ema_decay()(0))
  np.testing.assert_array_equal(copied["w"], [3.0, 1.0])  # exact beside 1e8
