"""Who draws in an evaluation: a teacher at several numbers of steps, students at several numbers of evaluations."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pflow_jax.core.guidance import Velocity
from pflow_jax.core.objectives.flow_map import FlowMap
from pflow_jax.core.objectives.imitation import Imitation
from pflow_jax.core.rollout import rollout
from pflow_jax.core.samplers import sample_flow_map, sample_teacher
from pflow_jax.core.schedule import segment_grid, shift_time
from pflow_jax.mesh.sharding import Layout, to_host
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.sample import SampleSettings, evaluations, flow_map_grid, make_sampler


@dataclasses.dataclass(frozen=True)
class Sampler:
  """One row of the table: who draws with how many network evaluations."""

  name: str
  nfe: int
  run: Callable[..., Any]  # (noise, conditions, keys) -> samples
  path: Callable[..., np.ndarray]  # (noise, conditions) -> states (steps + 1, B, *space, C), from noise to data
  is_student: bool = False


def teacher_samplers(
  experiment: Experiment, layout: Layout, folder: str | os.PathLike, all_steps: Sequence[int], frozen: Any
) -> list[Sampler]:
  """The teacher, whose parameters are `frozen`, at these numbers of Euler steps; or the run itself, a teacher's."""
  velocity: Callable[[Any], Velocity]
  if experiment.teacher is not None:
    params, velocity = frozen, experiment.teacher.velocity
  else:
    params, velocity = experiment.load(folder, layout=layout), experiment.velocity
  shift = experiment.objective.shift

  def make(steps):
    @functools.partial(jax.jit, static_argnames="trajectory")
    def walk(params, noise, labels, trajectory=False):
      return sample_teacher(velocity(params), noise, labels, steps=steps, shift=shift, trajectory=trajectory)

    return Sampler(
      teacher_name(steps),
      steps,
      lambda x, c, k: walk(params, x, c),
      lambda x, c: to_host(walk(params, x, c, trajectory=True)),
    )

  return [make(steps) for steps in all_steps]


def student_samplers(
  experiment: Experiment,
  layout: Layout,
  sampling: SampleSettings,
  folder: str | os.PathLike,
  suffix: str = "",
  frozen: Any = None,
) -> list[Sampler]:
  """The student of a run at its numbers of evaluations.

  Args:
    suffix: tells it from other students.   frozen: its teacher's parameters, if they are on the devices already.
  """
  params = experiment.load(folder, layout=layout, frozen=frozen)

  def make(nfe):
    run = functools.partial(make_sampler(experiment, sampling, nfe), params)
    path = functools.partial(trajectory, experiment, sampling, params, nfe)
    return Sampler(f"student, {nfe} NFE{suffix}", nfe, run, path, is_student=True)

  return [make(nfe) for nfe in evaluations(experiment, sampling)]


def trajectory(
  experiment: Experiment, sampling: SampleSettings, params: Any, nfe: int, noise: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """States (steps + 1, B, *space, C) along the student's policies or jumps, without stochastic steps."""
  imitation = experiment.objective
  if isinstance(imitation, FlowMap):
    grid = flow_map_grid(imitation, nfe)

    @jax.jit
    def walk(params, noise, labels):
      jump = experiment.flow_map(params, sampling.guidance)
      return sample_flow_map(jump, noise, labels, grid=grid, trajectory=True)

    return to_host(walk(params, noise, labels))
  assert isinstance(imitation, Imitation)
  shift = imitation.shift
  student = jax.jit(lambda params, x, t, c: experiment.student(params)(x, t, c))

  @jax.jit
  def roll(policy, x, r_start, r_end):
    one = lambda p, x: rollout(p, x, r_start, r_end, shift=shift, substeps=sampling.substeps, method=sampling.method)
    return jax.vmap(one)(policy, x)

  states = [noise]
  for r_start, r_end in itertools.pairwise(segment_grid(nfe, imitation.final_scale)):
    source = states[-1]
    t = np.full(len(noise), shift_time(r_start, shift), np.float32)
    policy = student(params, source, t, labels)
    points = np.linspace(r_start, r_end, max(32 // nfe, 2) + 1, dtype=np.float32)
    states += [to_host(roll(policy, source, points[0], r)) for r in points[1:]]
  return np.stack(states)


def teacher_name(steps: int) -> str:
  return f"teacher, {steps} step{'s' * (steps != 1)}"
