"""What users hand in: functions that return the wrong thing, settings that are no numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pflow_jax as pf
from pflow_jax.core.checks import check_finite
from pflow_jax.core.objectives.adversarial import Adversarial, discriminator_loss

B, C = 4, 2
X = jnp.ones((B, C), jnp.float32)
KEY = jax.random.key(0)


def student(x, t, cond):
  k = 3
  means, logits = jnp.zeros((B, k, C), x.dtype), jnp.zeros((B, k), x.dtype)
  return jax.vmap(pf.GMFlowPolicy.create)(x, t, means, logits, jnp.zeros((B,), x.dtype))


def imitate(teacher):
  return pf.imitation_loss(student, teacher, X, None, KEY, 0, pf.Imitation(substeps=4))


def imitate_data_free(teacher):
  return pf.imitation_loss_data_free(student, teacher, X, None, KEY, 0, pf.Imitation(substeps=4, nfe=2))


def flow_match(network):
  return pf.flow_matching_loss(network, X, jnp.zeros(B, int), KEY)


def distil(teacher):
  network = lambda x, t, s, cond, guidance: x
  return pf.flow_map_loss(network, lambda x, t, c, g: teacher(x, t, c), X, None, KEY, 0, pf.FlowMap())


def map_network(network):
  return pf.flow_map_loss(
    lambda x, t, s, c, g: network(x, t, c), lambda x, t, c, g: x, X, None, KEY, 0, pf.FlowMap(side="lagrangian")
  )


def sample_map(flow_map):
  return pf.sample_flow_map(lambda x, t, s, c: flow_map(x, t, c), X, None, grid=(1.0, 0.5, 0.0))


def guide(velocity):
  return pf.guided(velocity, 0, scale=2.0)(X, jnp.ones(B), jnp.zeros(B, int))


def guide_by_weaker(weak):
  return pf.autoguided(lambda x, t, cond: x, weak, scale=2.0)(X, jnp.ones(B), None)


def denoise(denoiser):
  return pf.denoiser_velocity(denoiser)(X, jnp.full(B, 0.5), None)


def precondition(network):
  return pf.edm_denoiser(network)(X, jnp.ones(B), None)


TAKES_A_FIELD = {
  "imitation_loss": imitate,
  "imitation_loss_data_free": imitate_data_free,
  "flow_matching_loss": flow_match,
  "flow_map_loss, teacher": distil,
  "flow_map_loss, network": map_network,
  "sample_teacher": functools.partial(lambda teacher: pf.sample_teacher(teacher, X, None, steps=2)),
  "sample_flow_map": sample_map,
  "guided": guide,
  "autoguided": guide_by_weaker,
  "denoiser_velocity": denoise,
  "edm_denoiser": precondition,
}
WRONG = {
  "one channel": (lambda x: x[:, :1], r"got float32\[4, 1\]"),
  "no batch": (lambda x: x[0], r"got float32\[2\]"),
  "a scalar": (lambda x: jnp.float32(1.0), r"got float32\[\]"),
  "a number": (lambda x: 1.0, "got a float"),
  "nothing": (lambda x: None, "got None"),
  "a tuple": (lambda x: (x, {}), r"got a tuple of 2 \(float32\[4, 2\], a dict"),
  "a dict": (lambda x: {"sample": x}, "got a dict with the keys sample"),
  "integers": (lambda x: x.astype(jnp.int32), r"got int32\[4, 2\]"),
  "complex": (lambda x: x.astype(jnp.complex64), r"got complex64\[4, 2\]"),
  "wider": (lambda x: x.astype(jnp.float64), r"got float64\[4, 2\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_field_returns_is_checked(wrong):
  make, message = WRONG[wrong]
  with pytest.raises(ValueError, match=r"flow_matching_loss: network\(x, t, cond\): expected one array .*" + message):
    flow_match(lambda x, t, cond: make(x))


@pytest.mark.parametrize("caller", TAKES_A_FIELD)
def test_every_caller_checks_its_fields(caller):
  take = TAKES_A_FIELD[caller]
  for wrong in ("one channel", "a tuple"):
    make, _ = WRONG[wrong]
    with pytest.raises(ValueError, match=r"\(.*cond.*\): expected one array float(32|64)\[4, 2\], the shape of x"):
      take(lambda x, t, cond, make=make: make(x))


@pytest.mark.parametrize("caller", ["flow_matching_loss", "sample_teacher", "guided"])
def test_a_narrower_float_or_numpy_is_taken(caller):
  take = TAKES_A_FIELD[caller]
  full, narrow = (take(lambda x, t, cond, dtype=dtype: x.astype(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
  assert jax.tree.map(jnp.result_type, full) == jax.tree.map(jnp.result_type, narrow)
  take(lambda x, t, cond: np.ones(x.shape, np.float32))


def test_what_is_no_function_is_named():
  with pytest.raises(ValueError, match=r"sample_teacher: teacher\(x, t, cond\): expected a function, got None"):
    pf.sample_teacher(None, X, None, steps=1)
  with pytest.raises(ValueError, match=r"sample_student: student\(x, t, cond\): expected a function, got a dict"):
    pf.sample_student({}, X, None, nfe=1)


class Broad(pf.Policy):
  """A policy of a user's own whose velocity has one channel."""

  def velocity(self, x, t):
    return x[:1]


jax.tree_util.register_dataclass(Broad, data_fields=[], meta_fields=[])


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    (lambda x: x, r"expected a batch of policies, .* got float(32|64)\[4, 2\]"),
    (lambda x: (student(x, jnp.ones(B), None), {}), "got a tuple of 2"),
    (lambda x: pf.GMFlowPolicy.create(x[0], 1.0, jnp.zeros((3, C)), jnp.zeros(3), 0.0), "a batch of 4"),
    (lambda x: Broad(), r"Broad.velocity\(x, t\): expected float(32|64)\[4, 2\], .*\[4, 1\]"),
  ],
)
def test_what_a_student_returns_is_checked(returned, message):
  wrong = lambda x, t, cond: returned(x)
  settings = pf.Imitation(substeps=4, nfe=2)
  for call in (
    lambda: pf.sample_student(wrong, X, None, nfe=2),
    lambda: pf.imitation_loss(wrong, lambda x, t, cond: x, X, None, KEY, 0, settings),
    lambda: pf.imitation_loss_data_free(wrong, lambda x, t, cond: x, X, None, KEY, 0, settings),
  ):
    with pytest.raises(ValueError, match=r"student\(x, t, cond\): .*" + message):
      call()


def test_a_discriminator_gives_one_logit_an_example():
  for wrong in (lambda x, cond: x, lambda x, cond: x[:, :1], lambda x, cond: jnp.sum(x), lambda x, cond: (x[:, 0],)):
    with pytest.raises(ValueError, match=r"expected logits of shape \(4,\)"):
      discriminator_loss(wrong, X, X, None)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
  ("settings", "name"),
  [
    (pf.FlowMatching, "time_mean"),
    (pf.FlowMatching, "shift"),
    (pf.FlowMap, "time_std"),
    (pf.FlowMap, "shift"),
    (pf.Imitation, "window"),
    (pf.Imitation, "loss_scale"),
    (Adversarial, "weight"),
  ],
)
def test_settings_are_finite(settings, name, value):
  with pytest.raises(ValueError, match=f"{name}: expected a finite number, got {value}"):
    settings(**{name: value})


def test_a_tuple_of_settings_is_finite():
  with pytest.raises(ValueError, match="guidance: expected a finite number"):
    pf.FlowMap(guidance=(1.0, math.inf))
  check_finite(pf.FlowMap(guidance=(1.0, 2.0)))


def sampled(h=0.0, temperature=1.0, shift=1.0, nfe=2):
  keys = jax.random.split(KEY, B)
  noise = jax.random.normal(KEY, (B, C), jnp.float32)
  return pf.sample_student(student, noise, None, keys, nfe=nfe, h=h, temperature=temperature, shift=shift, substeps=4)


@pytest.mark.parametrize("h", [1e-200, 1e19, 1e200, 1.7e308, math.inf])
def test_every_level_of_noise_is_drawn_or_refused(h):
  keys = jax.random.split(KEY, B)
  assert np.isfinite(sampled(h=h)).all()
  assert np.isfinite(pf.sample_teacher(lambda x, t, cond: x, X, None, keys, steps=3, h=h)).all()
  if h > 1e10:  # all noise is renewed
    np.testing.assert_array_equal(sampled(h=h), sampled(h=math.inf))
  for sample in (sampled, lambda h: pf.sample_teacher(lambda x, t, cond: x, X, None, keys, steps=3, h=h)):
    with pytest.raises(ValueError, match="noise level h"):
      sample(h=-h)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e30, math.inf])
def test_every_temperature_is_drawn_or_refused(temperature):
  assert np.isfinite(sampled(temperature=temperature)).all()
  for wrong in (-1.0, -math.inf, math.nan):
    with pytest.raises(ValueError, match="temperature"):
      sampled(temperature=wrong)


@pytest.mark.parametrize("shift", [math.inf, -math.inf, math.nan, 0.0, -1.0, 1e-300, 1e39])
def test_a_shift_without_digits_is_refused(shift):
  for draw in (
    lambda: sampled(shift=shift),
    lambda: pf.sample_teacher(lambda x, t, cond: x, X, None, steps=3, shift=shift),
    lambda: pf.shift_time(0.5, shift),
    lambda: pf.unshift_time(0.5, shift),
  ):
    with pytest.raises(ValueError, match="shift: expected a value in"):
      draw()
  for known in (1e-6, 1e6):
    assert np.isfinite(sampled(shift=known)).all()


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 1e30])
def test_a_strength_of_guidance_without_digits_is_refused(scale):
  for make in (
    lambda: pf.guided(lambda x, t, cond: x, 0, scale=scale),
    lambda: pf.autoguided(student, student, scale=scale),
  ):
    with pytest.raises(ValueError, match="guidance scale"):
      make()
