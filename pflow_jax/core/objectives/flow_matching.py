"""Flow matching: the objective of the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pflow_jax.core.checks import check_finite, checked
from pflow_jax.core.guidance import broadcast_condition
from pflow_jax.core.policies.base import as_float
from pflow_jax.core.schedule import add_noise, over_space, shift_time

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FlowMatching:
  """Settings of flow matching.

  Attributes:
    cond_dropout: rate at which the condition is replaced by the empty one, for classifier-free guidance.
    shift: time shift applied to the drawn times.
    time_mean: of the logit-normal that the times are drawn from; None draws them uniformly.
    time_std: standard deviation of that logit-normal.
  """

  sections: ClassVar[tuple[str, ...]] = ()
  """Sections of a config that it uses beside those of every run."""

  cond_dropout: float = 0.0
  shift: float = 1.0
  time_mean: float | None = None
  time_std: float = 1.0

  def __post_init__(self):
    check_finite(self)
    if not 0 <= self.cond_dropout <= 1:
      raise ValueError(f"cond_dropout: expected a rate in [0, 1], got {self.cond_dropout}")
    if self.shift <= 0 or self.time_std <= 0:
      raise ValueError(f"shift and time_std: expected > 0, got {self.shift} and {self.time_std}")


def sample_time(key: Array, shape: tuple[int, ...], *, mean: float | None, std: float) -> Array:
  """Flow times in (0, 1): logit-normal with `mean` and `std`, or uniform when `mean` is None."""
  if mean is None:
    return jax.random.uniform(key, shape)
  return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def replace_condition(chosen: Array, cond: Any, null_cond: Any) -> Any:
  """Replaces the condition of the chosen examples by the empty one.

  Args:
    chosen: (B,) bool.
    cond: pytree of arrays with a leading batch axis.
    null_cond: pytree of the same structure, broadcast against each leaf.
  """

  def pick(c, n):
    return jnp.where(over_space(chosen, c), broadcast_condition(c, n), c)

  return jax.tree.map(pick, cond, null_cond)


def drop_condition(key: Array, cond: Any, null_cond: Any, rate: float) -> Any:
  """Replaces the condition by the empty one, example by example, with probability `rate`; see `replace_condition`."""
  if rate == 0:
    return cond
  batch = jax.tree.leaves(cond)[0].shape[0]
  return replace_condition(jax.random.bernoulli(key, rate, (batch,)), cond, null_cond)


def flow_matching_loss(
  network: Callable[[Array, Array, Any], Array],
  x0: Array,
  cond: Any,
  key: Array,
  settings: FlowMatching = FlowMatching(),
  *,
  null_cond: Any = None,
) -> tuple[Array, dict[str, Array]]:
  """Regression of the velocity eps - x0 on the straight path x = (1 - t) x0 + t eps.

  Args:
    network: (x, t, cond) -> velocity, like x.
    x0: data, (B, *space, C).
    cond: condition of the examples.
    key: a PRNG key.
    settings: the objective's.
    null_cond: the empty condition, see `drop_condition`.

  Returns:
    loss per example (B,), the mean squared error over a sample, and metrics: the flow times "t" (B,).

  Raises:
    ValueError: for a network that returns anything but an array like x.

  References:
    Flow matching, arXiv:2210.02747; logit-normal times, arXiv:2403.03206.
  """
  s = settings
  network = checked("flow_matching_loss: network(x, t, cond)", network)
  (x0,) = as_float(x0)
  key_time, key_noise, key_drop = jax.random.split(key, 3)
  t = shift_time(sample_time(key_time, x0.shape[:1], mean=s.time_mean, std=s.time_std), s.shift)
  t = t.astype(x0.dtype)
  eps = jax.random.normal(key_noise, x0.shape, x0.dtype)
  v = network(add_noise(x0, eps, t), t, drop_condition(key_drop, cond, null_cond, s.cond_dropout))
  return jnp.mean((v - (eps - x0)) ** 2, axis=tuple(range(1, x0.ndim))), {"t": t}
