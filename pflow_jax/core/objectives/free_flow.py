"""FreeFlow: a flow map learned from its teacher and from noise alone, which predicts and corrects.

The student is a map from noise, f(z, 1, s) = z - (1 - s) F(z, 1, s), for every s in [0, 1). Predict: the velocity of
its own path, d f(z, 1, s) / ds, is to be the teacher's where the path is. Correct: its samples, noised, have a velocity
field of their own, which a second network learns; where that differs from the teacher's, the samples move.

The paper's code is not public. Chosen here, since what is public does not tell: the times of both terms, their
normalisation, which is Align Your Flow's for both, and the weight of the correction. A corrected sample counts once for
its noise level, without a weight in time.

References:
  Flow Map Distillation Without Data, arXiv:2511.19428; the correction is that of score distillation, arXiv:2305.16213
  and arXiv:2311.18828.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_finite, check_names, checked
from pflow_jax.core.objectives.flow_map import (
  DERIVATIVE_DTYPES,
  FlowMap,
  Network,
  Teacher,
  regression,
  residual,
)
from pflow_jax.core.objectives.flow_matching import sample_time
from pflow_jax.core.schedule import add_noise, shift_time

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FreeFlow:
  """Settings of FreeFlow.

  Attributes:
    time_mean: of the logit-normal of the times s at which the path's velocity is compared.
    time_std: of that logit-normal.
    shift: time shift applied to all drawn times.
    warmup_steps: optimizer steps until the derivative in s counts in full.
    norm_offset: keeps a small residual finite, in g / (rms(g) + norm_offset), in both terms.
    correction: weight of the correction beside the prediction; 0 leaves it out, and its network.
    correction_mean: of the logit-normal of the noise levels of the correction, and of its network's training.
    correction_std: of that logit-normal.
    learning_rate: of the network that learns the samples' velocity.
    derivative_dtype: see `core.objectives.flow_map.FlowMap`.
  """

  sections: ClassVar[tuple[str, ...]] = ("teacher",)
  """Sections of a config that it uses beside those of every run."""

  time_mean: float = 0.0
  time_std: float = 1.0
  shift: float = 1.0
  warmup_steps: int = 1000
  norm_offset: float = 0.1
  correction: float = 1.0
  correction_mean: float = 0.0
  correction_std: float = 1.0
  learning_rate: float = 1e-4
  derivative_dtype: str = "float32"

  target: ClassVar[str] = "teacher"
  """Source of the velocity that it learns."""

  guidance: ClassVar[tuple[float, float]] = (1.0, 1.0)
  """Strengths of guidance that the network is conditioned on: none."""

  guided: ClassVar[bool] = False
  """Whether the network is conditioned on a strength."""

  def __post_init__(self):
    check_finite(self)
    check_names(self, derivative_dtype=DERIVATIVE_DTYPES)
    if min(self.time_std, self.correction_std, self.shift, self.norm_offset, self.learning_rate) <= 0:
      raise ValueError(
        "time_std, correction_std, shift, norm_offset and learning_rate: expected > 0, got "
        f"{self.time_std}, {self.correction_std}, {self.shift}, {self.norm_offset} and {self.learning_rate}"
      )
    if min(self.correction, self.warmup_steps) < 0:
      raise ValueError(
        f"correction and warmup_steps: expected at least 0, got {self.correction} and {self.warmup_steps}"
      )

  @property
  def normalised(self) -> FlowMap:
    """Returns the settings of a flow map that is normalised in the same way."""
    return FlowMap(side="lagrangian", norm_offset=self.norm_offset, warmup_steps=self.warmup_steps, max_warmup=1.0)


def prediction_loss(
  network: Network,
  teacher: Teacher,
  noise: Array,
  cond: Any,
  key: Array,
  step: Array,
  settings: FreeFlow,
  *,
  precise: Network | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The Lagrangian objective of a flow map with jumps from t = 1 alone.

  Args:
    network: average velocity, see `core.objectives.flow_map.Network`; must have a forward derivative.
    teacher: velocity, see `core.objectives.flow_map.Teacher`.
    noise: states at t = 1, (B, *space, C).
    cond: condition of the examples.
    key: a PRNG key.
    step: optimizer step, for the warm-up.
    settings: the objective's.
    precise: see `core.objectives.flow_map.residual`.

  Returns:
    loss per example (B,), and metrics per example: rms of the residual and of the derivative, share left out, and the
      flow time "t" = s at which the teacher was asked.

  Raises:
    ValueError: for a network or teacher that returns anything but an array like the noise.
  """
  network = checked("prediction_loss: network(x, t, s, cond, guidance)", network)
  field = checked("prediction_loss: teacher(x, t, cond, guidance)", teacher)
  batch = noise.shape[:1]
  s = shift_time(sample_time(key, batch, mean=settings.time_mean, std=settings.time_std), settings.shift)
  s, one = s.astype(noise.dtype), jnp.ones(batch, noise.dtype)
  F, g, dF = residual(
    network,
    lambda x, t: field(x, t, cond, None),
    noise,
    one,
    s,
    cond,
    None,
    side="lagrangian",
    warmup=settings.normalised.warmup(step),
    precise=precise,
  )
  loss, metrics = regression(F, g, dF, settings.normalised)
  return loss, metrics | {"t": s}


def correction_loss(
  samples: Callable[[], tuple[Array, Array]],
  own: Callable[[Array, Array], Array],
  teacher: Callable[[Array, Array], Array],
  key: Array,
  settings: FreeFlow,
) -> tuple[Array, dict[str, Array], Array]:
  """Moves samples from where their own velocity field points to where the teacher's does.

  At x_t = (1 - t) x + t eps the teacher's estimate of the clean sample exceeds that of the samples' own field by
  t (v_own - v_teacher). The sample x = z - F moves by minus F, so that v_own - v_teacher is the gradient of F.

  Args:
    samples: returns the average velocity F(z, 1, 0), with its gradient, and the samples z - F; (B, *space, C) each.
    own: (x, t) -> velocity of the samples' own field.
    teacher: (x, t) -> velocity of the teacher.
    key: a PRNG key.
    settings: the objective's.

  Returns:
    loss per example (B,), metrics per example, and the samples without a gradient.
  """
  F, x0 = samples()
  x0 = jax.lax.stop_gradient(x0)
  x, t, _ = noised(x0, key, settings)
  g = jax.lax.stop_gradient(own(x, t) - teacher(x, t))
  loss, metrics = regression(F, g, jnp.zeros_like(g), settings.normalised)
  return loss, {"correction": metrics["residual"]}, x0


def own_velocity_loss(own: Callable[[Array, Array], Array], x0: Array, key: Array, settings: FreeFlow) -> Array:
  """Flow matching of the samples' own field on samples x0 (B, *space, C): the mean squares, (B,)."""
  x, t, eps = noised(x0, key, settings)
  return jnp.mean((own(x, t) - (eps - x0)) ** 2, axis=tuple(range(1, x0.ndim)))


def noised(x0: Array, key: Array, settings: FreeFlow) -> tuple[Array, Array, Array]:
  """Noises samples x0 to drawn levels: the states, their times (B,), and the noise."""
  key_time, key_noise = jax.random.split(key)
  t = sample_time(key_time, x0.shape[:1], mean=settings.correction_mean, std=settings.correction_std)
  t = shift_time(t, settings.shift).astype(x0.dtype)
  eps = jax.random.normal(key_noise, x0.shape, x0.dtype)
  return add_noise(x0, eps, t), t, eps


def jump_from_noise(network: Network, noise: Array, cond: Any) -> tuple[Array, Array]:
  """Returns the average velocity F(z, 1, 0), and the samples z - F, of noise (B, *space, C)."""
  one = jnp.ones(noise.shape[:1], noise.dtype)
  F = network(noise, one, jnp.zeros_like(one), cond, None)
  return F, noise - F
