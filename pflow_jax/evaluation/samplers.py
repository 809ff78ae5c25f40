"""Samplers of an evaluation: a teacher at several numbers of steps, students at several numbers of evaluations."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pflow_jax.core.guidance import Velocity
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.core.solvers import evaluations_of, fitting, flow_of, least_steps, steps_of
from pflow_jax.mesh.sharding import Layout, to_host
from pflow_jax.settings.sample import EvaluateSettings, SampleSettings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.methods import Method
from pflow_jax.training.sample import evaluations, make_sampler, with_guide


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A sampler, one row of the table.

  Attributes:
    name: in the table.
    nfe: network evaluations.
    run: (noise, conditions, keys) -> samples.
    path: (noise, conditions) -> states (steps + 1, B, *space, C), from noise to data.
    is_student: whether it is a student's.
    solver: of a teacher.
  """

  name: str
  nfe: int
  run: Callable[..., Any]
  path: Callable[..., np.ndarray]
  is_student: bool = False
  solver: str = "euler"


def teacher_samplers(
  experiment: Experiment, layout: Layout, folder: str | os.PathLike, settings: EvaluateSettings, frozen: Any
) -> list[Sampler]:
  """Samplers of the teacher, with parameters `frozen`, see `velocity_samplers`; a teacher's run samples itself.

  That run is measured as its own section `sample` says too, where that asks for more than Euler steps.
  """
  method = experiment.method
  if experiment.teacher is not None:
    return velocity_samplers(method, experiment.teacher.velocity, frozen, settings)
  params = experiment.load(folder, layout=layout)
  found = velocity_samplers(method, method.velocity, params, settings)
  sampling = experiment.settings.sample
  return found + own_samplers(method, sampling, with_guide(method, sampling, params, layout))


def velocity_samplers(
  method: Method, velocity: Callable[[Any], Velocity], params: Any, settings: EvaluateSettings
) -> list[Sampler]:
  """Samplers of a velocity field of these parameters, by steps even in the method's schedule.

  Args:
    method: gives the schedule.
    velocity: params -> the field.
    params: its parameters.
    settings: numbers of Euler steps, and other solvers.
  """
  shift = method.shift

  def make(name: str, solver: str, nfe: int) -> Sampler:
    @functools.partial(jax.jit, static_argnames=("solver", "trajectory"))
    def walk(params, noise, labels, keys=None, solver=solver, trajectory=False):
      steps, field = steps_of(solver, nfe), velocity(params)
      return sample_teacher(field, noise, labels, keys, steps=steps, shift=shift, solver=solver, trajectory=trajectory)

    path = lambda x, c: to_host(walk(params, x, c, solver=flow_of(solver), trajectory=True))
    return Sampler(name, nfe, functools.partial(walk, params), path, solver=solver)

  found = [make(teacher_name(steps), "euler", steps) for steps in settings.teacher_steps]
  for solver in settings.solvers:
    least = evaluations_of(solver, least_steps(solver))
    counts = {fitting(solver, nfe) for nfe in settings.teacher_steps if nfe >= least}
    found += [make(f"teacher, {solver}, {nfe} NFE", solver, nfe) for nfe in sorted(counts)]
  return found


def own_samplers(method: Method, sampling: SampleSettings, params: Any) -> list[Sampler]:
  """Samplers of a teacher as its own section `sample` says; none where that says Euler steps without guidance.

  Args:
    method: the teacher's.
    sampling: that section.
    params: all parameters of its network, see `training.sample.with_guide`.
  """
  told = [sampling.solver] if sampling.solver != "euler" else []
  told += [f"noise level {sampling.h:g}"] if sampling.h > 0 else []
  if sampling.guidance not in (None, 1):
    low, high = sampling.interval
    told.append(f"{'auto' * bool(sampling.weak_workdir)}guidance {sampling.guidance:g}")
    told[-1] += f" in [{low:g}, {high:g}]" if (low, high) != (0, 1) else ""
  if not told:
    return []
  found = student_samplers(method, sampling, params)
  about = ", ".join(told)
  return [
    dataclasses.replace(one, name=f"teacher, {about}, {one.nfe} NFE", is_student=False, solver=sampling.solver)
    for one in found
  ]


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
