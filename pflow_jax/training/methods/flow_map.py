"""Flow maps: a student that jumps between any two times."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp

from pflow_jax import data
from pflow_jax.core.guidance import Velocity
from pflow_jax.core.objectives.flow_map import FlowMap, flow_map_loss
from pflow_jax.core.samplers import sample_flow_map
from pflow_jax.core.schedule import add_noise, over_space, segment_grid, shift_time
from pflow_jax.mesh.partition import combine, without
from pflow_jax.networks.attention import IMPLEMENTATIONS, supports_jvp
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training.methods.base import Method, Teachers, copied
from pflow_jax.training.network import Network

Array = jax.Array

logger = logging.getLogger(__name__)


class Jumping(Protocol):
  """Settings of an average velocity's objective, as far as its method needs them.

  Attributes:
    target: the velocity that it learns, "teacher" or "data".
    guidance: (low, high) strengths of guidance that the network is conditioned on; (1, 1) if it is not.
    guided: whether it is.
    shift: time shift of the sampler's grid.
    derivative_dtype: what its derivative is computed in, see `core.objectives.flow_map.FlowMap`.
  """

  @property
  def target(self) -> str: ...
  @property
  def guidance(self) -> tuple[float, float]: ...
  @property
  def guided(self) -> bool: ...
  @property
  def shift(self) -> float: ...
  @property
  def derivative_dtype(self) -> str: ...


Objective = TypeVar("Objective", bound=Jumping)


class JumpMethod(Method[Objective]):
  """An average velocity F(x, t, s), sampled by jumps down a grid of times; its objective is that of a subclass."""

  network_options = ("late_blocks",)

  data_free: ClassVar[bool] = False
  """Whether it learns without data."""

  @property
  def can_generate(self) -> bool:
    return True

  @classmethod
  def bind(cls, settings: Settings, network: Network, dataset: data.Dataset, teachers: Teachers):
    objective = settings.objective
    _check_jvp(network)
    _warn_of_scale(float(getattr(network.module, "time_scale", 1.0)))
    if not cls.data_free and not dataset.has_x0:
      raise ValueError(
        f"config.objective.kind: {settings.kind!r} starts from data, and {dataset.name} has none; write prompts with "
        "`pflow cache --images`"
      )
    if objective.target == "data" and not teachers.named:
      if settings.adapters.table:
        raise ValueError("config.adapters: they sit on a teacher's weights; set config.teacher.workdir")
      return cls(objective, network, dataset, None)
    method = cls(objective, network, dataset, teachers.find(tuple(objective.guidance)))
    low, high = objective.guidance
    if objective.guided and not low <= method.teachers_strength <= high:
      section = "teacher" if network.strength is None else "model"
      raise ValueError(
        f"config.{section}.guidance: expected a strength in config.objective.guidance, [{low}, {high}], which this "
        f"student is trained for and compared at, got {method.teachers_strength}"
      )
    return method

  @property
  def teachers_strength(self) -> float:
    """Strength of the teacher's guidance: that which its network takes, or that of `TeacherSettings`."""
    if self.network.strength is not None:
      return self.network.strength
    return self.teacher.settings.guidance if self.teacher else self.objective.guidance[0]

  def init(self, key, frozen):
    params = self._random(key)
    if self.teacher is None or not self.teacher.has_network:
      return params
    # It starts as its teacher's velocity: its own parts, for s and the guidance, start neutral.
    teacher = copied(frozen["strong"])
    return combine(without(params, teacher), teacher)

  def shapes(self):
    return jax.eval_shape(self._random, jax.random.key(0))

  def _random(self, key):
    ones = jnp.ones((1,))
    return self.network.init(key, self.dataset, s=ones, **self._inputs(1.0, ones))

  def _inputs(self, strength: float, t: Array, interval: tuple[float, float] = (0.0, 1.0)) -> dict[str, Array]:
    """Named inputs of the network beside s, for times t (B,) at one strength of guidance."""
    del interval
    return {"guidance": jnp.full(t.shape, strength, t.dtype)} if self.objective.guided else {}

  def strength(self, sampling: SampleSettings = SampleSettings()) -> float:
    """Returns the strength of guidance that it is sampled with, by default the teacher's."""
    if sampling.guidance is not None:
      return sampling.guidance
    return self.teachers_strength if self.objective.guided else self.objective.guidance[0]

  def jump(self, params, strength: float | None = None, interval: tuple[float, float] = (0.0, 1.0)):
    """Returns (x, t, s, cond) -> average velocity, at one strength of guidance.

    Args:
      params: of the network.
      strength: by default the teacher's.
      interval: flow times between which it counts, for a network that was trained for several.

    Raises:
      ValueError: the network was not trained for that strength.
    """
    low, high = self.objective.guidance
    strength = self.strength() if strength is None else strength
    if not low <= strength <= high:
      raise ValueError(
        f"config.sample.guidance (where that is not set, the teacher's): expected a strength in [{low}, {high}], which "
        f"this flow map was trained for, got {strength}"
      )

    def jump(x, t, s, cond):
      return self.network(params, x, t, cond, s=s, **self._inputs(strength, t, interval))

    return jump

  def precise(self, make: Callable[[Network, Any], Any], params: Any) -> Any:
    """Makes the function that an objective takes its derivative of, where that is not the one of its value.

    Args:
      make: (network, params) -> what the objective takes for its network.
      params: all parameters of the network.

    Returns:
      `make` of the network in float32; None where value and derivative are of one evaluation.
    """
    network = self.network.float32 if self.objective.derivative_dtype == "float32" else None
    return make(network, jax.lax.stop_gradient(params)) if network else None

  def velocity(self, params) -> Velocity:
    """A jump of length 0."""
    jump = self.jump(params)
    return lambda x, t, cond: jump(x, t, t, cond)

  def evaluations(self, sampling: SampleSettings) -> tuple[int, ...]:
    return (1, 2, 4, 8)

  def sampler(self, sampling: SampleSettings, nfe: int):
    def run(params, noise, cond, keys):
      jump = self.jump(params, self.strength(sampling), sampling.interval)
      return sample_flow_map(jump, noise, cond, keys, grid=self._grid(nfe), gamma=sampling.gamma)

    return run

  def trajectory(self, sampling: SampleSettings, nfe: int):
    def run(params, noise, cond):
      jump = self.jump(params, self.strength(sampling), sampling.interval)
      return sample_flow_map(jump, noise, cond, grid=self._grid(nfe), trajectory=True)

    return run

  def generate(self, params, x0, cond, key):
    """One jump to the data, from states at uniform times."""
    key_time, key_noise, key_dropout, key_guidance = jax.random.split(key, 4)
    t = jax.random.uniform(key_time, x0.shape[:1])
    x = add_noise(x0, jax.random.normal(key_noise, x0.shape), t)
    inputs = self._inputs(1.0, t)
    if self.objective.guided:
      inputs["guidance"] = jax.random.uniform(key_guidance, t.shape, t.dtype, *self.objective.guidance)
    average = self.network(params, x, t, cond, s=jnp.zeros_like(t), key=key_dropout, **inputs)
    return x - over_space(t, x) * average

  def _grid(self, nfe: int) -> list[float]:
    """Flow times that it jumps between with `nfe` evaluations."""
    return [float(shift_time(r, self.objective.shift)) for r in segment_grid(nfe)]


class FlowMapMethod(JumpMethod[FlowMap]):
  """Align Your Flow, MeanFlow and consistency models."""

  def loss(self, params, frozen, batch, key, step):
    teacher = self.teacher
    key_loss, key_dropout = jax.random.split(key)  # both evaluations of a step share their dropout

    def jump(network, params):
      def average_velocity(x, t, s, cond, strength):
        return network(params, x, t, cond, s=s, guidance=strength, key=key_dropout)

      return average_velocity

    def velocity(x, t, cond, strength):
      assert teacher is not None
      return teacher.velocity(frozen, strength)(x, t, cond)

    return flow_map_loss(
      jump(self.network, params),
      velocity if teacher else None,
      batch["x0"],
      batch["cond"],
      key_loss,
      step,
      self.objective,
      null_cond=self.dataset.null_cond,
      precise=self.precise(jump, params),
    )


@functools.cache  # a run is built several times by a program
def _warn_of_scale(scale: float) -> None:
  if scale > 1:
    logger.warning(
      "config.model.time_scale: a flow map is trained on its derivative in t, and the factor %g scales that; "
      "train its teacher with time_scale=1.0",
      scale,
    )


def _check_jvp(network: Network) -> None:
  implementation = getattr(network.module, "attention", None)
  if implementation is not None and not supports_jvp(implementation):
    able = [name for name, has_jvp in IMPLEMENTATIONS.items() if has_jvp]
    raise ValueError(
      f"config.model.attention: {implementation!r} has no forward derivative, which flow maps need; set "
      f"config.model.attention to one of {able}"
    )
