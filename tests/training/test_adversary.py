"""The adversarial stage: what its gradient is, what it trains, and that a run without it is untouched."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from pflow_jax.checkpoints.checkpoint import load_params
from pflow_jax.core.objectives.adversarial import Adversarial
from pflow_jax.training.adversary import Adversary
from pflow_jax.training.experiment import build
from pflow_jax.training.step import abstract_batch, make_step
from pflow_jax.training.train import train
from tests.programs import quick
from tests.training.test_network import leaves_of
from tests.training.test_teachers import write_teacher

pytestmark = pytest.mark.usefixtures("float32")

BOARD_MODEL = dict(kind="mlp", width=8, depth=1, time_scale=1.0)


def board(weight=0.1, **train):
  """MeanFlow, without a teacher, on points: the smallest run that an adversary can join."""
  config = quick("checkerboard", "mean_flow", **train)
  config.optimizer.schedule = "constant"
  config.adversarial.update(weight=weight, width=4)
  return config


class LinearJudge(nn.Module):
  """Logit w . x."""

  @nn.compact
  def __call__(self, x, cond):
    return x @ self.param("w", nn.initializers.ones, (2,))


def toy(**settings):
  """A generator that moves the data by its parameters, and a linear judge."""
  settings = Adversarial(**(dict(weight=0.3, r1=0.0, r2=0.0) | settings))
  generate = lambda params, frozen, x0, cond, key: x0 + (params["head"] + params["body"])[None]
  return Adversary(settings, LinearJudge(), optax.apply_if_finite(optax.sgd(0.5), 9), generate, (2,))


def toy_step(adversary, params, grads, w=(3.0, -4.0), x0=None):
  opponent = dataclasses.replace(adversary.init(jax.random.key(0)), params={"w": jnp.array(w)})
  x0 = jnp.zeros((4, 2)) if x0 is None else x0
  batch = {"x0": x0, "cond": jnp.zeros(4, jnp.int32)}
  return adversary.step(opponent, params, {}, grads, batch, jax.random.key(1))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_gradient_is_the_distillations_and_the_weighted_adversarial_one():
  """softplus(D(real) - D(fake)) falls with w . shift: by hand -sigmoid(-w . shift) w for both parameters."""
  w, head, body = np.array([3.0, -4.0]), np.array([0.1, 0.2]), np.array([-0.3, 0.1])
  grads = {"head": jnp.array([6.0, 8.0]), "body": jnp.array([1.0, 0.0])}
  got, opponent, metrics = toy_step(toy(), {"head": jnp.array(head), "body": jnp.array(body)}, grads)
  margin = w @ (head + body)
  slope = -sigmoid(-margin) * w
  adaptive = 10.0 / (np.linalg.norm(slope) + 1e-4)  # |(6, 8)| over the adversarial gradient of the last layer
  np.testing.assert_allclose(metrics["adaptive_weight"], adaptive, rtol=1e-5)
  for name in ("head", "body"):
    np.testing.assert_allclose(got[name], np.asarray(grads[name]) + 0.3 * adaptive * slope, rtol=1e-5)
  np.testing.assert_allclose(metrics["generator_loss"], np.log1p(np.exp(-margin)), rtol=1e-5)
  # The judge is judged on the same samples: softplus(D(fake) - D(real)), one step of size 0.5 from w.
  np.testing.assert_allclose(opponent.params["w"], w - 0.5 * sigmoid(margin) * (head + body), rtol=1e-5)
  np.testing.assert_allclose(metrics["discriminator_loss"], np.log1p(np.exp(margin)), rtol=1e-5)
  np.testing.assert_allclose(metrics["discriminator_margin"], -margin, rtol=1e-5)


def test_balance_is_struck_at_the_last_layer_whatever_its_name():
  params = {"out_conv": jnp.array([0.1, 0.2]), "body": jnp.zeros(2)}
  generate = lambda params, frozen, x0, cond, key: x0 + (params["out_conv"] + 100 * params["body"])[None]
  adversary = dataclasses.replace(toy(), generate=generate)
  grads = {"out_conv": jnp.array([6.0, 8.0]), "body": jnp.full(2, 1e6)}
  _, _, metrics = toy_step(adversary, params, grads)
  slope = 5 * sigmoid(-(3 * 0.1 - 4 * 0.2))
  np.testing.assert_allclose(metrics["adaptive_weight"], 10 / (slope + 1e-4), rtol=1e-5)


def test_penalties_reach_the_judge():
  """r1 / 2 |w|^2 + r2 / 2 |w|^2 pulls a linear judge to zero."""
  zero = {"head": jnp.zeros(2), "body": jnp.zeros(2)}
  for settings, pull in ((dict(r1=0.4), 0.4), (dict(r2=0.2), 0.2)):
    _, opponent, metrics = toy_step(toy(**settings), zero, zero)
    np.testing.assert_allclose(opponent.params["w"], (1 - 0.5 * pull) * np.array([3.0, -4.0]), rtol=1e-5)
    np.testing.assert_allclose(metrics["discriminator_r1"], 25.0, rtol=1e-5)


def test_a_batch_that_is_not_finite_leaves_the_opponent_as_it_was():
  """The student skips such an update; a judge that took it would be lost, and with it the run."""
  config = board()
  experiment = build(config)
  adversary = make_step(experiment).adversary
  params = {"head": jnp.zeros(2), "body": jnp.zeros(2)}
  toy_one = dataclasses.replace(adversary, module=LinearJudge(), generate=toy().generate)
  _, opponent, _ = toy_step(toy_one, params, params, x0=jnp.full((4, 2), jnp.nan))
  np.testing.assert_array_equal(opponent.params["w"], [3.0, -4.0])


def test_an_adversarial_gradient_that_is_not_finite_leaves_the_distillations():
  adversary = dataclasses.replace(toy(), generate=lambda params, frozen, x0, cond, key: x0 + params["head"] / 0.0)
  grads = {"head": jnp.array([6.0, 8.0]), "body": jnp.array([1.0, 0.0])}
  got, _, metrics = toy_step(adversary, {"head": jnp.zeros(2), "body": jnp.zeros(2)}, grads)
  assert metrics["adaptive_weight"] == 0
  jax.tree.map(np.testing.assert_array_equal, got, grads)
  assert metrics["discriminator_skipped"] == 1


class PerfectNetwork:
  """Average velocity that leads from x back to the data it was made from; remembers what it was asked."""

  project = None

  def __init__(self, x0):
    self.x0 = x0

  def complete(self, trained, base):
    return {"trained": trained, "base": base}

  def __call__(self, params, x, t, cond, **named):
    self.asked = dict(params=params, x=x, t=t, cond=cond, **named)
    return (x - self.x0) / t[:, None]


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.5, 2.5)])
def test_samples_are_one_jump_to_the_data_from_noised_examples(guidance):
  x0, label = jax.random.normal(jax.random.key(0), (20_000, 2)), jnp.zeros(20_000, jnp.int32)
  network = PerfectNetwork(x0)
  experiment = build(board())
  objective = dataclasses.replace(experiment.method.objective, target="teacher", guidance=guidance)
  method = dataclasses.replace(experiment.method, network=network, objective=objective)
  made = dataclasses.replace(experiment, method=method)
  generate = make_step(made).adversary.generate
  samples = generate("trained", {"strong": "base"}, x0, label, jax.random.key(1))
  np.testing.assert_allclose(samples, x0, atol=1e-5)
  asked = network.asked
  assert asked["params"] == {"trained": "trained", "base": "base"}
  assert asked["cond"] is label
  assert asked["key"] is not None, "adapters drop out as in the distillation"
  assert not np.any(asked["s"])
  t = np.asarray(asked["t"])
  np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.01)
  wide = t[:, None]
  eps = ((np.asarray(asked["x"]) - (1 - wide) * x0) / wide)[t > 0.1]
  assert abs(eps.mean()) < 0.02
  assert abs(eps.std() - 1) < 0.02
  if guidance == (1.0, 1.0):
    assert "guidance" not in asked
  else:
    low, high = np.quantile(asked["guidance"], [0, 1])
    assert 1.5 <= low < 1.51
    assert 2.49 < high <= 2.5
    assert abs(np.corrcoef(asked["guidance"], t)[0, 1]) < 0.03, "drawn apart from the times"


def test_weight_zero_is_the_plain_objective():
  """To the letter of what is compiled."""
  texts = []
  for weight in (0.0, None, 0.1):
    config = board(weight=weight or 0.0)
    if weight is None:
      with config.unlocked():
        del config["adversarial"]
    experiment = build(config)
    step = make_step(experiment)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda key, e=experiment, s=step: s.init(key, e.init(key, {})), key)
    assert (step.adversary is None) == (not jax.tree.leaves(state.opponent)) == (not weight)
    texts.append(jax.jit(step).lower(state, {}, abstract_batch(experiment, 8), key).as_text())
  zero, plain, adversarial = texts
  assert zero == plain
  assert zero != adversarial


def test_both_train_and_a_resumed_run_ends_in_the_same_bits(tmp_path):
  write_teacher(tmp_path / "teacher", BOARD_MODEL, name="checkerboard")

  def run(folder, steps):
    config = quick("checkerboard", "ayf_emd_adversarial", tmp_path / "teacher", steps=steps)
    config.model = BOARD_MODEL
    config.optimizer.schedule = "constant"
    config.objective.warmup_steps = 0  # else a student that starts as its teacher has nothing to learn yet
    config.adversarial.width = 4
    return train(config, tmp_path / folder)

  whole, half, parts = run("whole", 3), run("parts", 2), run("parts", 3)
  assert (int(half.step), int(parts.step)) == (2, 3)
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  saved = load_params(tmp_path / "whole" / "checkpoints", which="opponent")
  jax.tree.map(np.testing.assert_array_equal, saved["params"], whole.opponent.params)
  for part in ("params", "ema", "opponent"):
    pair = (leaves_of(getattr(state, part)) for state in (half, whole))
    before, after = ({path: leaf for path, leaf in tree.items() if path.endswith("kernel")} for tree in pair)
    assert len(before) >= 4
    still = [path for path in before if np.array_equal(before[path], after[path])]
    assert not still, part
  row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
  assert row["adaptive_weight"] > 0
  assert {"generator_loss", "discriminator_loss", "discriminator_margin", "discriminator_r1"} < set(row)


def refused(config, match):
  with pytest.raises(ValueError, match=match):
    make_step(build(config))


def test_runs_that_have_no_use_for_it_are_refused(teacher_run):
  for variant, teacher in (("gmflow_2nfe", teacher_run), ("teacher", None)):
    config = quick("digits", variant, teacher)
    config.adversarial = dict(weight=0.1)
    refused(
      config, rf"config\.adversarial: .*one evaluation, .*got '{config.objective.kind}'; set adversarial\.weight=0"
    )
    config.adversarial.weight = 0.0
    assert make_step(build(config)).adversary is None
  refused(board(accumulation=2), r"config\.train\.accumulation: .*expected 1, got 2")
  assert make_step(build(board(weight=0.0, accumulation=2))).accumulation == 2
  config = board()
  with config.adversarial.unlocked():
    config.adversarial.wieght = 1.0
  refused(config, r"config\.adversarial has no key 'wieght'; did you mean 'weight'")
  refused(board(weight=-0.1), "at least 0, got -0.1")
