"""Samplers of an evaluation: a teacher at several numbers of steps, students at several numbers of evaluations."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pflow_jax.core.guidance import Velocity
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.mesh.sharding import Layout, to_host
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.methods import Method
from pflow_jax.training.sample import evaluations, make_sampler


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A sampler, one row of the table.

  Attributes:
    name: in the table.
    nfe: network evaluations.
    run: (noise, conditions, keys) -> samples.
    path: (noise, conditions) -> states (steps + 1, B, *space, C), from noise to data.
    is_student: whether it is a student's.
  """

  name: str
  nfe: int
  run: Callable[..., Any]
  path: Callable[..., np.ndarray]
  is_student: bool = False


def teacher_samplers(
  experiment: Experiment, layout: Layout, folder: str | os.PathLike, all_steps: Sequence[int], frozen: Any
) -> list[Sampler]:
  """Samplers of the teacher, with parameters `frozen`, by numbers of Euler steps; a teacher's run samples itself."""
  if experiment.teacher is not None:
    return velocity_samplers(experiment.method, experiment.teacher.velocity, frozen, all_steps)
  params = experiment.load(folder, layout=layout)
  return velocity_samplers(experiment.method, experiment.method.velocity, params, all_steps)


def velocity_samplers(
  method: Method, velocity: Callable[[Any], Velocity], params: Any, all_steps: Sequence[int]
) -> list[Sampler]:
  """Samplers of a velocity field of these parameters by numbers of Euler steps, even in the method's schedule."""
  shift = method.shift

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


def student_samplers(method: Method, sampling: SampleSettings, params: Any, suffix: str = "") -> list[Sampler]:
  """Samplers of a student, by its numbers of evaluations.

  Args:
    method: the student's.
    sampling: settings of its samples.
    params: all parameters of its network.
    suffix: ends its name, to distinguish it from other students.
  """

  def make(nfe):
    run = functools.partial(make_sampler(method, sampling, nfe), params)
    walk = jax.jit(method.trajectory(sampling, nfe))
    path = lambda noise, labels: to_host(walk(params, noise, labels))
    return Sampler(f"student, {nfe} NFE{suffix}", nfe, run, path, is_student=True)

  return [make(nfe) for nfe in evaluations(method, sampling)]


def teacher_name(steps: int) -> str:
  """Name of a teacher's sampler in the table."""
  return f"teacher, {steps} step{'s' * (steps != 1)}"
