"""Flow matching: a teacher, trained on data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from pflow_jax import data
from pflow_jax.core.guidance import Velocity, autoguided, guided
from pflow_jax.core.objectives.flow_matching import FlowMatching, flow_matching_loss
from pflow_jax.core.samplers import sample_teacher
from pflow_jax.core.solvers import fitting, flow_of, steps_of
from pflow_jax.families.registry import knows_empty
from pflow_jax.settings.sample import REFERENCE_STEPS, SampleSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training.methods.base import Method, Teachers
from pflow_jax.training.network import Network, velocity_of
from pflow_jax.training.parts import Part, find_guide

CONVERTED_DROPOUT = 0.1  # stands for the unknown share of a converted model's examples with the empty condition


@dataclasses.dataclass(frozen=True)
class FlowMatchingMethod(Method[FlowMatching]):
  """A velocity field that learns from data, sampled by the steps of a solver.

  Attributes:
    find: (workdir, step) -> the weaker model there that guides samples; ValueError where there is none.
  """

  find: Callable[[str, int | None], Part] | None = None

  @classmethod
  def bind(cls, settings: Settings, network: Network, dataset: data.Dataset, teachers: Teachers):
    if settings.adapters.table:
      raise ValueError("config.adapters: a teacher trains in full, expected no rows")
    objective = settings.objective
    if settings.converted and knows_empty(settings.model.kind):
      objective = dataclasses.replace(objective, cond_dropout=objective.cond_dropout or CONVERTED_DROPOUT)
    return cls(objective, network, dataset, None, functools.cache(functools.partial(find_guide, settings, dataset)))

  def init(self, key, frozen):
    del frozen
    return self.network.init(key, self.dataset)

  def shapes(self):
    return self.network.shapes(self.dataset)

  def loss(self, params, frozen, batch, key, step):
    del frozen, step
    velocity = velocity_of(self.network, params)
    null = self.dataset.null_cond
    return flow_matching_loss(velocity, batch["x0"], batch["cond"], key, self.objective, null_cond=null)

  def velocity(self, params) -> Velocity:
    return velocity_of(self.network, params)

  def evaluations(self, sampling: SampleSettings) -> tuple[int, ...]:
    return (fitting(sampling.solver, REFERENCE_STEPS),)

  def sampler(self, sampling: SampleSettings, nfe: int):
    field, steps = self._field(sampling), steps_of(sampling.solver, nfe)

    def run(params, noise, cond, keys):
      return sample_teacher(
        field(params),
        noise,
        cond,
        keys,
        steps=steps,
        shift=self.objective.shift,
        h=sampling.h,
        solver=sampling.solver,
        diffusion=sampling.diffusion,
        terminal=sampling.terminal,
        sigmas=sampling.sigmas,
        rho=sampling.rho,
      )

    return run

  def trajectory(self, sampling: SampleSettings, nfe: int):
    solver = flow_of(sampling.solver)
    field, steps = self._field(sampling), steps_of(solver, nfe)

    def run(params, noise, cond):
      shift = self.objective.shift
      return sample_teacher(field(params), noise, cond, steps=steps, shift=shift, solver=solver, trajectory=True)

    return run

  def guide(self, sampling: SampleSettings) -> Part | None:
    if not sampling.weak_workdir:
      return None
    assert self.find is not None
    return self.find(sampling.weak_workdir, sampling.weak_step)

  def _field(self, sampling: SampleSettings) -> Callable[[Any], Velocity]:
    """Returns params -> the velocity field that is sampled, guided where that is asked for."""
    strength = sampling.guidance
    if strength is None or strength == 1:
      return self.velocity
    options: dict[str, Any] = dict(scale=strength, interval=sampling.interval)
    if (weak := self.guide(sampling)) is not None:
      return lambda params: autoguided(self.velocity(params["strong"]), weak.field(params["weak"]), **options)
    self._check_guidance(strength)
    return lambda params: guided(self.velocity(params), self.dataset.null_cond, **options)

  @property
  def is_student(self) -> bool:
    return False

  def _check_guidance(self, strength: float) -> None:
    """Raises ValueError where there is no empty condition to guide away from."""
    if not self.objective.cond_dropout:
      raise ValueError(
        f"config.sample.guidance: {strength} needs a model that was trained with the empty condition too "
        "(objective.cond_dropout above 0), or a weaker one that guides it (config.sample.weak_workdir)"
      )
    if self.dataset.null_cond is None:
      raise ValueError(
        f"config.sample.guidance: {strength} needs the empty prompt's embedding, which {self.dataset.name} lacks; "
        "write it again with `pflow cache`"
      )
