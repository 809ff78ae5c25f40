"""π-ID: imitation of the teacher's velocity along the policy's own trajectory.

References:
  pi-Flow, arXiv:2510.14974, Algorithm 1, and the release's generalisation with a teacher ratio and windows.
  ArcFlow, arXiv:2602.09014, trains with the same objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.batches import per_example
from pflow_jax.core.checks import check_finite, checked, checked_student
from pflow_jax.core.policies import Policy
from pflow_jax.core.policies.base import as_float
from pflow_jax.core.rollout import METHODS, RELEASES, average_velocity, rollout
from pflow_jax.core.schedule import (
  add_noise,
  longest_segment,
  over_space,
  sample_segment,
  segment_grid,
  segment_length,
  shift_time,
)

Array = jax.Array
Teacher = Callable[[Array, Array, Any], Array]  # (x, t, cond) -> v
Student = Callable[[Array, Array, Any], Policy]  # (x, t, cond) -> batch of policies

# More would be compiled, or walked, for days.
MAX_STATES = 1000
MAX_SUBSTEPS = 100_000


@dataclasses.dataclass(frozen=True)
class Imitation:
  """Settings of π-ID.

  Attributes:
    nfe: network evaluations the student is trained for.
    final_scale: length of the last segment relative to the others.
    shift: time shift m.
    num_states: M, teacher evaluations a segment.
    window: W, substeps over which the policy's velocity is averaged; 0 matches it at a point.
    dropout: rate at which components are dropped in the detached policy that makes the rollouts.
    ratio_decay: D, optimizer steps over which the share of the segment that the teacher walks decays from 1 to 0; 0
      starts at 0.
    loss_scale: factor of the loss; 3 for ImageNet, 30 for FLUX and Qwen-Image.
    substeps: of the rollouts, in a unit of schedule time, see `rollout`.
    method: of the rollouts, see `rollout`; "lakonlab-0.2" and "piflow-0.1" reproduce the PyTorch releases, ArcFlow's
      with its policy.
    data_free: whether the student's own trajectory from noise takes the place of data, see `imitation_loss_data_free`.
    takes_end: whether the network is told the flow time at which its segment ends, as a flow map is; it can then start
      from a flow map's parameters.
  """

  sections: ClassVar[tuple[str, ...]] = ("teacher", "adapters", "adversarial")
  """Sections of a config that it uses beside those of every run."""

  nfe: int = 1
  final_scale: float = 1.0
  shift: float = 1.0
  num_states: int = 2
  window: float = 0.0
  dropout: float = 0.0
  ratio_decay: int = 0
  loss_scale: float = 3.0
  substeps: int = 128
  method: str = "auto"
  data_free: bool = False
  takes_end: bool = False

  def __post_init__(self):
    check_finite(self)
    segment_length(self.nfe, self.final_scale)  # raises on bad values
    if not 1 <= self.num_states <= MAX_STATES or self.nfe > MAX_STATES:
      raise ValueError(f"num_states and nfe: expected 1 to {MAX_STATES}, got {self.num_states} and {self.nfe}")
    if self.window < 0:
      raise ValueError(f"window: expected at least 0 substeps, got {self.window}")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout: expected a rate in [0, 1), got {self.dropout}")
    if self.method not in ("euler", *RELEASES) and 0 < self.window * self.substeps / 128 < 1.5:
      raise ValueError(
        f"window: {self.window} of 128 substeps are fewer than two of the rollouts' {self.substeps} and would be taken "
        "for a point; set window=0, or substeps=128 and a window of at least 2"
      )
    if self.shift <= 0 or self.loss_scale <= 0:
      raise ValueError(f"shift and loss_scale: expected > 0, got {self.shift} and {self.loss_scale}")
    if not 1 <= self.substeps <= MAX_SUBSTEPS or self.method not in METHODS:
      raise ValueError(
        f"substeps and method: expected 1 to {MAX_SUBSTEPS:,} and one of {METHODS}, got {self.substeps} and "
        f"{self.method!r}"
      )
    if self.ratio_decay < 0:
      raise ValueError(f"ratio_decay: expected at least 0 steps, got {self.ratio_decay}")

  @property
  def max_segment(self) -> float:
    """Longest segment, in schedule time."""
    return longest_segment(self.nfe, self.final_scale)

  @property
  def max_window(self) -> float:
    """Longest window, in schedule time."""
    lengths = [self.max_segment, segment_length(self.nfe, self.final_scale) * self.final_scale]
    return max(float(_window(length, self.window, np)) for length in lengths)

  def teacher_ratio(self, step: Array) -> Array | float:
    """Share rho of a segment that the teacher walks at optimizer step `step`."""
    if self.ratio_decay == 0:
      return 0.0
    return 1.0 - jnp.minimum(step, self.ratio_decay) / self.ratio_decay


class Draws(NamedTuple):
  """The uniform draws of one segment."""

  dropout: Array  # (B, K)
  student: Array  # (B, M)
  teacher: Array  # (B, M - 1)


class SegmentLoss(NamedTuple):
  """π-ID on one segment.

  Attributes:
    loss: of the examples, (B,), the mean of `loss_at_t`.
    t: flow times of the intermediate states, at which the teacher is asked, (B, M).
    loss_at_t: of each state, (B, M).
    destination: where the detached policy arrives, (B, *space, C), or None.
  """

  loss: Array
  t: Array
  loss_at_t: Array
  destination: Array | None


def draw(key: Array, batch: int, num_components: int, num_states: int) -> Draws:
  """Draws for one segment of `batch` examples."""
  keys = jax.random.split(key, 3)
  shapes = [(batch, num_components), (batch, num_states), (batch, num_states - 1)]
  return Draws(*(jax.random.uniform(k, s) for k, s in zip(keys, shapes, strict=True)))


def segment_loss(
  policy: Policy,
  teacher: Teacher,
  x: Array,
  r: Array,
  length: Array,
  cond: Any,
  draws: Draws,
  settings: Imitation,
  *,
  ratio: Array | float = 0.0,
  destination: bool = False,
) -> SegmentLoss:
  """π-ID loss of one segment.

  The detached policy walks from `x`, in turns with the teacher when `ratio` > 0, to M intermediate states. The loss is
  the distance of the policy's velocity, averaged over the window, from the teacher's at each of them.

  Args:
    policy: batch of policies, with gradient.
    teacher: velocity of the teacher, (B, *space, C).
    x: sources of the segments, (B, *space, C).
    r: their schedule times, (B,).
    length: of the segments, (B,).
    cond: condition, passed on.
    draws: uniform random numbers, see `draw`.
    settings: the objective's.
    ratio: share of the segment walked by the teacher, in [0, 1]. A Python 0 compiles the shorter program.
    destination: also return the state at r - length, where the detached policy arrives from the last intermediate
      state.
  """
  s = settings
  teacher = _detached(checked("π-ID: teacher(x, t, cond)", teacher))
  window = _window(length, s.window)
  detached = jax.lax.stop_gradient(policy)
  if s.dropout and policy.num_components:
    detached = per_example(jax.vmap(lambda p, d: p.drop(d)))(detached, draws.dropout < s.dropout)

  @per_example
  @jax.vmap
  def roll(p, x, a, b):
    return rollout(p, x, a, b, shift=s.shift, substeps=s.substeps, method=s.method, max_length=s.max_segment)

  budget = (length - window)[:, None]
  # The student's gaps deliberately do not fill its budget.
  student_gaps = jnp.diff(_sorted(draws.student, r.dtype), axis=1, prepend=0) * (1 - ratio) * budget
  teacher_gaps = jnp.diff(_sorted(draws.teacher, r.dtype), axis=1, prepend=0, append=1) * ratio * budget

  def visit(carry, gaps):
    x, r = carry
    student_gap, teacher_gap = gaps
    r_a = r - student_gap
    r_b = r_a - teacher_gap
    x_a = roll(detached, x, r, r_a)
    t_a, t_b = shift_time(r_a, s.shift), shift_time(r_b, s.shift)
    v = teacher(x_a, t_a, cond)
    return (x_a + v * over_space(t_b - t_a, x), r_b), (x_a, r_a, r_b, t_a, v)

  start = jax.lax.stop_gradient((x, r))
  last, (x_a, r_a, r_b, t_a, target) = jax.lax.scan(visit, start, (student_gaps.T, teacher_gaps.T))

  # Without the teacher's share a prediction spans the window alone, a few substeps.
  student_only = isinstance(ratio, (int, float)) and ratio == 0
  reach = s.max_window if student_only else s.max_segment

  @per_example
  def error(policy, x, r_start, r_end, target):
    """Mean squares (B, M) over the space; the states are the second axis of all but the policy."""

    def predict(p, x, a, b):
      return average_velocity(p, x, a, b, shift=s.shift, substeps=s.substeps, method=s.method, max_length=reach)

    prediction = jax.vmap(jax.vmap(predict, in_axes=(None, 0, 0, 0)))(policy, x, r_start, r_end)
    return jnp.mean((prediction - target) ** 2, axis=tuple(range(2, target.ndim)))

  r_end = jnp.maximum(r_b - window[None], 0.0)
  states = (a.swapaxes(0, 1) for a in jax.lax.stop_gradient((x_a, r_a, r_end, target)))
  end = roll(detached, *last, jnp.maximum(r - length, 0.0)) if destination else None
  loss = s.loss_scale * 0.5 * error(policy, *states)
  return SegmentLoss(jnp.mean(loss, axis=1), t_a.swapaxes(0, 1), loss, end)


def imitation_loss(
  student: Student,
  teacher: Teacher,
  x0: Array,
  cond: Any,
  key: Array,
  step: Array,
  settings: Imitation,
) -> tuple[Array, dict[str, Array]]:
  """π-ID in data mode: one segment of the grid an example, its source a noised data sample.

  Args:
    student: one evaluation of the student, differentiable.
    teacher: velocity of the teacher, guided if it is to be.
    x0: data, (B, *space, C); matters only where a source has t < 1, that is for nfe > 1.
    cond: condition, passed on.
    key: a PRNG key.
    step: optimizer step, for the teacher ratio.
    settings: the objective's.

  Returns:
    loss per example (B,), and metrics: the teacher's ratio, and of the intermediate states their flow times "t" (B, M)
      and the loss at them, "loss_at_t" (B, M).

  Raises:
    ValueError: for a student that returns no batch of policies, or a teacher that returns no array like x.
  """
  student = checked_student("imitation_loss: student(x, t, cond)", student)
  (x0,) = as_float(x0)
  key_source, key_draw = jax.random.split(key)
  uniform, noise = draw_source(key_source, x0)
  r, length = sample_segment(uniform, settings.nfe, settings.final_scale)
  t = shift_time(r, settings.shift)
  x = add_noise(x0, noise, t)
  policy = student(x, t, cond)
  draws = draw(key_draw, x0.shape[0], policy.num_components, settings.num_states)
  ratio = settings.teacher_ratio(step)
  told = segment_loss(policy, teacher, x, r, length, cond, draws, settings, ratio=ratio)
  return told.loss, {"teacher_ratio": jnp.asarray(ratio), "t": told.t, "loss_at_t": told.loss_at_t}


def imitation_loss_data_free(
  student: Student,
  teacher: Teacher,
  noise: Array,
  cond: Any,
  key: Array,
  step: Array,
  settings: Imitation,
) -> tuple[Array, dict[str, Array]]:
  """π-ID without data: the student's own trajectory from noise, all segments in one optimizer step.

  Arguments and result are those of `imitation_loss`; `noise`, the states at t = 1, takes the place of `x0`. Segments
  are weighted by their length; "loss_at_t" has all their states, (B, nfe * M), without the weights.
  """
  student = checked_student("imitation_loss_data_free: student(x, t, cond)", student)
  (noise,) = as_float(noise)
  batch = noise.shape[0]
  ratio = settings.teacher_ratio(step)
  grid = np.asarray(segment_grid(settings.nfe, settings.final_scale))

  def segment(carry, inputs):
    total, x = carry
    i, *span = inputs
    r, length = (jnp.broadcast_to(value, (batch,)) for value in span)
    policy = student(x, shift_time(r, settings.shift), cond)
    draws = draw(jax.random.fold_in(key, i), batch, policy.num_components, settings.num_states)
    told = segment_loss(policy, teacher, x, r, length, cond, draws, settings, ratio=ratio, destination=True)
    return (total + length * told.loss, told.destination), (told.t, told.loss_at_t)

  spans = (jnp.asarray(values, noise.dtype) for values in (grid[:-1], grid[:-1] - grid[1:]))
  start = jnp.zeros((batch,), noise.dtype), noise
  (total, _), states = jax.lax.scan(segment, start, (jnp.arange(settings.nfe), *spans))
  t, loss_at_t = (a.swapaxes(0, 1).reshape(batch, -1) for a in states)  # (nfe, B, M) each
  return total, {"teacher_ratio": jnp.asarray(ratio), "t": t, "loss_at_t": loss_at_t}


def draw_source(key: Array, x0: Array) -> tuple[Array, Array]:
  """Uniform numbers (B,) for the sources' times, and their noise, like x0."""
  key_time, key_noise = jax.random.split(key)
  return jax.random.uniform(key_time, x0.shape[:1]), jax.random.normal(key_noise, x0.shape, x0.dtype)


def _window(length, substeps: float, xp=jnp):
  """Window in schedule time: `substeps` of a segment's max(round(128 length), 1), at most the segment.

  The unit is the releases' substep, which all of them round to the nearest, whatever resolution the rollouts have.
  """
  return xp.minimum(substeps * length / xp.maximum(xp.round(128 * length), 1), length)


def _detached(teacher: Teacher) -> Teacher:
  return lambda x, t, cond: jax.lax.stop_gradient(teacher(x, t, cond))


def _sorted(uniform: Array, dtype) -> Array:
  return jnp.sort(uniform.astype(dtype), axis=1)
