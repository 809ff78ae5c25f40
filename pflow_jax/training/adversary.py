"""The adversarial stage of a student that samples in one pass: a discriminator that trains in the same step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from pflow_jax.core.objectives.adversarial import Adversarial, adaptive_weight, discriminator_loss, generator_loss
from pflow_jax.networks.discriminator import make_discriminator
from pflow_jax.settings.optimizer import OptimizerSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.optim import make_optimizer, skipped

Array = jax.Array
LAST_LAYERS = ("head", "out_conv")  # the adaptive weight balances their gradients; a network has one of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opponent:
  """State of the discriminator: its parameters and its optimizer's state."""

  params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Adversary:
  """Adversarial loss on samples of one evaluation, and the discriminator's own step.

  Attributes:
    settings: of the adversarial loss.
    module: discriminator, apply(params, x, cond) -> logits (B,).
    optimizer: of the discriminator.
    generate: (params, frozen, x0, cond, key) -> samples like x0.
    shape: of an example.
  """

  settings: Adversarial
  module: nn.Module
  optimizer: optax.GradientTransformation
  generate: Callable[..., Array]
  shape: tuple[int, ...]

  def init(self, key: Array, frozen: Any = None) -> Opponent:
    """Makes random parameters of the discriminator and its optimizer's state."""
    del frozen
    params = self.module.init(key, jnp.zeros((1, *self.shape), jnp.float32), jnp.zeros((1,), jnp.int32))["params"]
    return Opponent(params, self.optimizer.init(params))

  def step(
    self, opponent: Opponent, params: Any, frozen: Any, grads: Any, batch: dict[str, Array], key: Array
  ) -> tuple[Any, Opponent, dict[str, Array]]:
    """Adds the generator's adversarial gradient to `grads`, and trains the discriminator on the same samples."""
    s, real, cond = self.settings, batch["x0"], batch["cond"]

    def judge(judge_params: Any) -> Callable[[Array, Any], Any]:
      return lambda x, cond: self.module.apply({"params": judge_params}, x, cond)

    def fool(params):
      fake = self.generate(params, frozen, real, cond, key)
      logits = judge(opponent.params)
      return jnp.mean(generator_loss(logits(real, cond), logits(fake, cond))), fake

    def discriminate(judge_params):
      loss, aux = discriminator_loss(judge(judge_params), real, fake, cond, r1=s.r1, r2=s.r2)
      return jnp.mean(loss), jax.tree.map(jnp.mean, aux)

    (fooling, fake), adversarial = jax.value_and_grad(fool, has_aux=True)(params)
    last = next(name for name in LAST_LAYERS if name in grads)
    adaptive = adaptive_weight(grads[last], adversarial[last])
    # A weight of 0 stands for a gradient that is not finite; 0 times that would not be 0.
    grads = jax.tree.map(lambda g, a: jnp.where(adaptive > 0, g + s.weight * adaptive * a, g), grads, adversarial)
    (judging, aux), gradient = jax.value_and_grad(discriminate, has_aux=True)(opponent.params)
    updates, opt_state = self.optimizer.update(gradient, opponent.opt_state, opponent.params)
    opponent = Opponent(optax.apply_updates(opponent.params, updates), opt_state)
    metrics = {"generator_loss": fooling, "discriminator_loss": judging, "adaptive_weight": adaptive}
    metrics["discriminator_skipped"] = skipped(opt_state)[1]
    return grads, opponent, metrics | {f"discriminator_{name}": value for name, value in aux.items()}


def make_adversary(experiment: Experiment) -> Adversary | None:
  """The adversary that the section `adversarial` describes; None without one, or with weight 0.

  Raises:
    ValueError: the run's method makes no samples in one evaluation, or there are no data to compare them with.
  """
  settings, method, dataset = experiment.settings.adversarial, experiment.method, experiment.dataset
  if settings is None or settings.weight == 0:
    return None
  if not method.can_generate:
    raise ValueError(
      "config.adversarial: expected a student that samples in one evaluation, a flow map or a policy with "
      f"objective.nfe=1, got {experiment.settings.kind!r}; set adversarial.weight=0"
    )
  if not dataset.has_x0:
    raise ValueError(f"config.adversarial: samples are compared with data, and {dataset.name} has none")
  module = make_discriminator(dataset.shape, dataset.num_classes, width=settings.width, max_width=settings.max_width)

  def generate(params, frozen, x0, cond, key):
    return method.generate(experiment.complete(params, frozen), x0, cond, key)

  optimizer = make_optimizer(OptimizerSettings(settings.learning_rate, b1=settings.b1, b2=settings.b2))
  return Adversary(settings, module, optimizer, generate, dataset.shape)
