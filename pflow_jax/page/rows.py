"""Models that the page shows, a row each: a teacher or a student as samplers of their numbers of evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pflow_jax import data
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.core.schedule import shift_time
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sample import REFERENCE_STEPS
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.sample import with_guide

Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """A model of the page.

  Attributes:
    name: shown beside its samples.
    settings: of its run.
    dataset: shapes and names of its data.
    params: its parameters.
    layout: of them.
    nfe: network evaluations to begin with.
    branches: evaluations of the network in a step: 2 where it is guided.
    sampler: (data, nfe) -> a program (params, noise, cond, keys, temperature) -> samples.
    walk: (data, nfe) -> a program (params, noise, cond, temperature) -> states, from noise to data.
    times: (nfe, steps) -> flow times (steps + 1,) of the states.
    is_teacher: whether it takes a step an evaluation.
    has_policy: whether it has a temperature.
  """

  name: str
  settings: Settings
  dataset: data.Dataset
  params: Any
  layout: Layout
  nfe: int
  branches: int
  sampler: Callable[[data.Dataset, int], Program]
  walk: Callable[[data.Dataset, int], Program]
  times: Callable[[int, int], np.ndarray]
  is_teacher: bool = False
  has_policy: bool = False


def row_of(name: str, experiment: Experiment, params: Any, layout: Layout) -> Row:
  """Makes the row of a run, a teacher's or a student's.

  Args:
    name: of the run.
    experiment: the run.
    params: all parameters of its network.
    layout: of them.
  """
  method, sampling = experiment.method, experiment.settings.sample
  params = with_guide(method, sampling, params, layout)
  on = lambda dataset: dataclasses.replace(method, dataset=dataset)

  def sampler(dataset: data.Dataset, nfe: int) -> Program:
    run = on(dataset).sampler(sampling, nfe)
    return run if method.has_policy else lambda params, noise, cond, keys, temperature: run(params, noise, cond, keys)

  def walk(dataset: data.Dataset, nfe: int) -> Program:
    run = on(dataset).trajectory(sampling, nfe)
    return run if method.has_policy else lambda params, noise, cond, temperature: run(params, noise, cond)

  own = (*sampling.nfe, *method.evaluations(sampling))[0]
  guided = not method.is_student and sampling.guidance not in (None, 1)
  return Row(
    name=name,
    settings=experiment.settings,
    dataset=experiment.dataset,
    params=params,
    layout=layout,
    nfe=own,
    branches=1 + guided,
    sampler=sampler,
    walk=walk,
    times=method.times,
    is_teacher=not method.is_student,
    has_policy=method.has_policy,
  )


def row_of_teacher(name: str, experiment: Experiment, params: Any, layout: Layout) -> Row:
  """Makes the row of a student's teacher, guided as the student learnt from it.

  Args:
    name: of the teacher.
    experiment: the student's run.
    params: the teacher's parameters, by part.
    layout: of them.
  """
  teacher, method = experiment.teacher, experiment.method
  assert teacher is not None

  def program(dataset: data.Dataset, nfe: int, trajectory: bool) -> Program:
    on = teacher.on(dataset, teacher.settings)

    def run(params, noise, cond, *others):
      return sample_teacher(on.velocity(params), noise, cond, steps=nfe, shift=method.shift, trajectory=trajectory)

    return run

  return Row(
    name=name,
    settings=experiment.settings,
    dataset=experiment.dataset,
    params=params,
    layout=layout,
    nfe=REFERENCE_STEPS,
    branches=1 + (teacher.settings.guidance != 1),
    sampler=lambda dataset, nfe: program(dataset, nfe, False),
    walk=lambda dataset, nfe: program(dataset, nfe, True),
    times=lambda nfe, steps: shift_time(np.linspace(1.0, 0.0, steps + 1), method.shift),
    is_teacher=True,
  )
