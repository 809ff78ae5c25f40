"""π-ID against the PyTorch release, and its invariants."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.objectives import imitation
from pflow_jax.core.objectives.imitation import Draws, Imitation, segment_loss
from pflow_jax.core.rollout import RELEASES
from pflow_jax.training.flops import count_flops
from tests.golden_layout import channels_last, released, toy_gradients, toy_params, toy_student, toy_teacher

NFE4 = dict(nfe=4, final_scale=0.5, shift=3.2, loss_scale=30.0)
DATA_FREE = dict(num_states=4, window=3, dropout=0.1, ratio_decay=2000)
SEGMENT_POLICIES = {
  "GM": {},
  "DXgrid": dict(segment=1 / 3.5, shift=3.2),
  "DXpolynomial": dict(segment=1.0, shift=3.2),
}


def assert_close(actual, expected, rtol=1e-9):
  for name in expected:
    scale = max(float(np.max(np.abs(expected[name]))), 1e-12)
    np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, atol=rtol * scale, err_msg=name)


def draws_of(file, components, suffix=""):
  batch = file[f"rng_student{suffix}"].shape[0]
  drop = file.get(f"rng_dropout{suffix}", np.ones((batch, components)))
  return Draws(
    jnp.asarray(drop).reshape(batch, components),
    jnp.asarray(file[f"rng_student{suffix}"]),
    jnp.asarray(file[f"rng_teacher{suffix}"]),
  )


def segment_case(file, kind, settings, ratio, components, **policy):
  """Value, gradient and destination of one golden segment."""
  x, r = channels_last(file["in_x_src"]), jnp.asarray(file["in_raw_src"])
  length, draws = jnp.asarray(file["in_segment"]), draws_of(file, components)

  def loss(params):
    t = settings.shift * r / (1 + (settings.shift - 1) * r)
    policy_ = toy_student(params, kind, **policy)(x, t)
    told = segment_loss(policy_, toy_teacher, x, r, length, None, draws, settings, ratio=ratio, destination=True)
    return jnp.mean(told.loss), told.destination

  return jax.value_and_grad(loss, has_aux=True)(toy_params(file))


ALL_SEGMENTS = list(itertools.product(SEGMENT_POLICIES, (0.0, 0.4, 1.0), (0, 3)))
SEGMENTS = [("piflow-0.1", *case) for case in ALL_SEGMENTS]
SEGMENTS += [("lakonlab-0.2", *case) for case in ALL_SEGMENTS if case[0] == "GM" or case[1:] == (0.4, 3)]


@pytest.mark.parametrize(("release", "kind", "ratio", "window"), SEGMENTS)
def test_segment_matches_the_release(golden, release, kind, ratio, window):
  file = released(golden, f"piid_segment_{kind}_ratio{ratio}_win{window}", release)
  dropout = 0.25 if kind == "GM" else 0.0
  settings = Imitation(**NFE4, num_states=3, window=window, dropout=dropout, method=release)
  components = 4 if kind == "GM" else 0
  (loss, end), grads = segment_case(file, kind, settings, ratio, components, **SEGMENT_POLICIES[kind])
  np.testing.assert_allclose(loss, file["out_loss"], rtol=1e-9)
  np.testing.assert_allclose(end, channels_last(file["out_x_dst"]), rtol=1e-9, atol=1e-9)
  assert_close(grads, toy_gradients(file))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_arc_segment_matches_the_release(golden, ratio):
  file = golden(f"arc_segment_ratio{ratio}")
  settings = Imitation(nfe=2, shift=3.2, num_states=4, window=3, dropout=0.1, loss_scale=30.0)
  (loss, end), grads = segment_case(file, "Arc", settings, ratio, 5)
  # The release clamps small arguments of its exponential integral.
  np.testing.assert_allclose(loss, file["out_loss"], rtol=5e-5)
  np.testing.assert_allclose(end, channels_last(file["out_x_dst"]), rtol=5e-5, atol=5e-5)
  assert_close(grads, toy_gradients(file), rtol=5e-5)


@pytest.mark.parametrize("release", RELEASES)
def test_data_loss_matches_the_release(golden, monkeypatch, release):
  file = released(golden, "forward_train_data_GM_2nfe", release)
  settings = Imitation(nfe=2, num_states=2, dropout=0.05, loss_scale=3.0, method=release)
  x0 = channels_last(file["in_x0"])
  source = (jnp.asarray(file["rng_t"]), channels_last(file["rng_noise"]))
  monkeypatch.setattr(imitation, "draw_source", lambda *_: source)
  monkeypatch.setattr(imitation, "draw", lambda *_: draws_of(file, 4))

  def loss(params):
    student = toy_student(params, "GM")
    key = jax.random.key(0)
    return jnp.mean(imitation.imitation_loss(student, toy_teacher, x0, None, key, jnp.array(0), settings)[0])

  value, grads = jax.value_and_grad(loss)(toy_params(file))
  # The release keeps its schedule times in float32 here: parity ends at that precision.
  np.testing.assert_allclose(value, file["out_loss"], rtol=1e-7)
  assert_close(grads, toy_gradients(file), rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "kind", "release", "settings", "rtol"),
  [
    # The release keeps its schedule times in float32 here: parity ends at that precision.
    ("forward_train_datafree_GM_4nfe", "GM", "piflow-0.1", NFE4, 1e-5),
    ("forward_train_datafree_GM_4nfe", "GM", "lakonlab-0.2", NFE4, 1e-5),
    # ArcFlow's, which has one version. It clamps small arguments of its exponential integral.
    ("arc_forward_train_datafree_2nfe", "Arc", "piflow-0.1", dict(nfe=2, shift=3.2, loss_scale=30.0), 5e-5),
  ],
)
def test_data_free_loss_matches_the_release(golden, monkeypatch, name, kind, release, settings, rtol):
  file, settings = released(golden, name, release), Imitation(**settings, **DATA_FREE, method=release)
  components, segments = file["in_param_lw"].shape[1], range(settings.nfe)
  draws = [draws_of(file, components, f"_{i}") for i in segments]
  keys = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(0), i)))(jnp.arange(settings.nfe))

  def draw(key, *_):
    """Those of the segment whose key this is: the segments are one scan."""
    segment = jnp.argmax(jnp.all(jax.random.key_data(key)[None] == keys, axis=1))
    return jax.tree.map(lambda *of_segments: jnp.stack(of_segments)[segment], *draws)

  monkeypatch.setattr(imitation, "draw", draw)

  def loss(params):
    per_example, aux = imitation.imitation_loss_data_free(
      toy_student(params, kind),
      toy_teacher,
      channels_last(file["rng_x_T"]),
      None,
      jax.random.key(0),
      jnp.array(500),
      settings,
    )
    return jnp.mean(per_example), aux

  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(toy_params(file))
  np.testing.assert_allclose(aux["teacher_ratio"], 0.75)
  np.testing.assert_allclose(value, file["out_loss"], rtol=rtol / 10)
  assert_close(grads, toy_gradients(file), rtol=rtol)


def test_the_default_method_costs_less_than_euler(golden):
  """Operations, and with them evaluations of the policy, of a step without data: 4 segments, a window of 3 substeps."""
  params, noise = toy_params(golden("forward_train_datafree_GM_4nfe")), jnp.zeros((2, 4, 4, 2))

  def count(method, ratio_decay):
    settings = Imitation(**NFE4, **DATA_FREE | dict(ratio_decay=ratio_decay), method=method)

    def loss(params):
      args = toy_student(params, "GM"), toy_teacher, noise, None, jax.random.key(0), jnp.array(500), settings
      return jnp.sum(imitation.imitation_loss_data_free(*args)[0])

    return count_flops(jax.make_jaxpr(jax.grad(loss))(params))

  for ratio_decay in (0, 2000):
    assert count("auto", ratio_decay) < 0.5 * count("euler", ratio_decay)


def test_loss_vanishes_where_the_policy_is_the_teacher():
  """Teacher with a constant x0: a DX policy of one state is that teacher exactly, on any trajectory."""
  settings = Imitation(nfe=2, num_states=3, window=2)
  target = jnp.linspace(-1.0, 1.0, 5)[:, None] * jnp.ones((1, 2))

  def teacher(x, t, cond):
    return (x - target) / t[:, None]

  def student(offset):
    def fn(x, t, cond):
      from pflow_jax.core.policies import DXPolicy

      d = (x - target - offset) / t[:, None]
      return jax.vmap(lambda x, t, d: DXPolicy.create(x, t, d[None], segment=0.5))(x, t, d)

    return fn

  args = (teacher, target, None, jax.random.key(1), jnp.array(0), settings)
  right, _ = imitation.imitation_loss(student(0.0), *args)
  wrong, _ = imitation.imitation_loss(student(0.1), *args)
  assert right.shape == (5,)
  np.testing.assert_allclose(right, 0.0, atol=1e-20)
  assert jnp.all(wrong > 1e-3)


def test_no_gradient_reaches_the_teacher(golden):
  file = golden("piid_segment_GM_ratio0.4_win3")
  params = toy_params(file)
  settings = Imitation(**NFE4, num_states=3)
  x, r = channels_last(file["in_x_src"]), jnp.asarray(file["in_raw_src"])

  def loss(scale):
    policy = jax.lax.stop_gradient(toy_student(params, "GM")(x, r))
    teacher = lambda x, t, cond: scale * toy_teacher(x, t)
    draws = imitation.draw(jax.random.key(0), 2, 4, 3)
    return segment_loss(policy, teacher, x, r, jnp.asarray(file["in_segment"]), None, draws, settings).loss.sum()

  assert jax.grad(loss)(1.0) == 0.0
  assert loss(1.0) != loss(1.1)


def test_settings_refuse_bad_values():
  for bad in (
    dict(nfe=0),
    dict(final_scale=0.0),
    dict(num_states=0),
    dict(window=-1),
    dict(dropout=1.0),
    dict(ratio_decay=-1),
    dict(window=3, substeps=32),
    dict(shift=0.0),
    dict(substeps=0),
    dict(method="rk4"),
  ):
    with pytest.raises(ValueError, match=next(iter(bad))):
      Imitation(**bad)


def test_ratio_decays_linearly():
  settings = dataclasses.replace(Imitation(), ratio_decay=100)
  ratios = [float(settings.teacher_ratio(jnp.array(i))) for i in (0, 25, 100, 500)]
  np.testing.assert_allclose(ratios, [1.0, 0.75, 0.0, 0.0], atol=1e-7)
