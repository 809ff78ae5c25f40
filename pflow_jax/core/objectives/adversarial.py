"""Adversarial finetuning: relativistic pairing with zero-centred gradient penalties.

The generator's total is its distillation loss + weight * adaptive weight * `generator_loss`.

References:
  Align Your Flow, arXiv:2506.14603; R3GAN, arXiv:2501.05441, Eq. 2 and 3; VQGAN, arXiv:2012.09841, Eq. 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_finite, described
from pflow_jax.core.policies.base import as_float

Array = jax.Array
Discriminator = Callable[[Array, Any], Array]  # (x, cond) -> logits (B,), high for data


@dataclasses.dataclass(frozen=True)
class Adversarial:
  """Settings of adversarial finetuning.

  Attributes:
    weight: of the adversarial loss, a factor of the adaptive weight.
    r1: weight of the gradient penalty at data, see `discriminator_loss`.
    r2: weight of the gradient penalty at samples.
    learning_rate: of the discriminator's Adam. The rate is StyleGAN2's, for its equalised layers, whose weights have
      unit variance.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    width: the discriminator's channels at full resolution, see `pflow_jax.networks.discriminator`.
    max_width: their upper bound.
  """

  weight: float = 0.1
  r1: float = 0.1
  r2: float = 0.1
  learning_rate: float = 2e-3
  b1: float = 0.0
  b2: float = 0.99
  width: int = 64
  max_width: int = 512

  def __post_init__(self):
    check_finite(self)
    if min(self.weight, self.r1, self.r2) < 0:
      raise ValueError(f"weight, r1 and r2: expected at least 0, got {self.weight}, {self.r1} and {self.r2}")
    if self.learning_rate <= 0:
      raise ValueError(f"learning_rate: expected > 0, got {self.learning_rate}")
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
      raise ValueError(f"b1 and b2: expected decay rates in [0, 1), got {self.b1} and {self.b2}")
    if not 1 <= self.width <= self.max_width:
      raise ValueError(f"width: expected 1 to max_width {self.max_width} channels, got {self.width}")


def generator_loss(real_logits: Array, fake_logits: Array) -> Array:
  """Relativistic pairing for the generator: softplus(real - fake), per example (B,)."""
  return jax.nn.softplus(real_logits - fake_logits)


def discriminator_loss(
  discriminator: Discriminator,
  real: Array,
  fake: Array,
  cond: Any,
  *,
  r1: float = 0.1,
  r2: float = 0.1,
) -> tuple[Array, dict[str, Array]]:
  """Relativistic pairing for the discriminator, with zero-centred gradient penalties.

  softplus(D(fake) - D(real)) + r1 / 2 |grad D(real)|^2 + r2 / 2 |grad D(fake)|^2. The factor 1/2 and the sum, not mean,
  over a sample are R3GAN's, paper and code; its gamma is r1 and r2.

  The penalised gradient is that of the batch's summed logits. With a minibatch statistic it includes the effect of a
  pixel on every logit of its group, as in StyleGAN2's and R3GAN's code; without one it is the example's own.

  Args:
    discriminator: (x, cond) -> logits (B,), high for data.
    real: data, (B, *space, C). No gradient goes into them.
    fake: generated samples, (B, *space, C), each paired with one of `real`. No gradient goes into them.
    cond: condition of both.
    r1: weight of the penalty at data.
    r2: weight of the penalty at samples.

  Returns:
    loss per example (B,), and metrics (B,): the margin D(real) - D(fake), and the squared gradient norms.
  """
  real, fake = jax.lax.stop_gradient(as_float(real, fake))
  real_logits, real_norm = _logits_and_slope(discriminator, real, cond)
  fake_logits, fake_norm = _logits_and_slope(discriminator, fake, cond)
  margin = real_logits - fake_logits
  loss = jax.nn.softplus(-margin) + r1 / 2 * real_norm + r2 / 2 * fake_norm
  return loss, {"margin": margin, "r1": real_norm, "r2": fake_norm}


def adaptive_weight(gradient: Any, adversarial_gradient: Any, *, max_weight: float = 1e4) -> Array:
  """|gradient| / (|adversarial gradient| + 1e-4), at most `max_weight`, without gradient: VQGAN's lambda.

  Args:
    gradient: pytree, of the distillation loss with respect to the generator's last layer.
    adversarial_gradient: the same of the adversarial loss.
    max_weight: upper bound of the result.

  Returns:
    scalar; always finite, 0 where a gradient is not.
  """
  ratio = _norm(gradient) / (_norm(adversarial_gradient) + 1e-4)
  return jax.lax.stop_gradient(jnp.where(jnp.isfinite(ratio), jnp.minimum(ratio, max_weight), 0.0))


def _logits_and_slope(discriminator: Discriminator, x: Array, cond: Any) -> tuple[Array, Array]:
  """Logits (B,), and the squared norm (B,) of their gradient."""

  def total(x: Array) -> tuple[Array, Array]:
    logits = discriminator(x, cond)
    if getattr(logits, "shape", None) != x.shape[:1]:
      raise ValueError(
        f"discriminator_loss: discriminator(x, cond): expected logits of shape {x.shape[:1]}, one an example, got "
        f"{described(logits)}"
      )
    return jnp.sum(logits), logits

  gradient, logits = jax.grad(total, has_aux=True)(x)
  return logits, jnp.sum(jnp.square(gradient), axis=tuple(range(1, x.ndim)))


def _norm(tree: Any) -> Array:
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in as_float(*jax.tree.leaves(tree))))
