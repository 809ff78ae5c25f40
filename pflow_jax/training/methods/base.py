"""Base of the methods: an objective bound to a network, with all that depends on the objective's kind."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax import data
from pflow_jax.core.guidance import Velocity
from pflow_jax.core.schedule import segment_grid, shift_time
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.tree import Choice, Settings
from pflow_jax.training.network import Network
from pflow_jax.training.parts import Part
from pflow_jax.training.teachers import Teacher

Array = jax.Array
Params = Any
Objective = TypeVar("Objective")


@dataclasses.dataclass(frozen=True)
class Teachers:
  """Source of a method's teacher.

  Attributes:
    named: whether a teacher was named; a method that can do with the data alone calls `find` only then.
    find: (lowest and highest strength of guidance that is asked for) -> the teacher; ValueError where there is none.
  """

  named: bool
  find: Callable[[tuple[float, float]], Teacher]


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC, Generic[Objective]):
  """An objective bound to a network, its data and its teacher.

  Attributes:
    objective: settings of the loss.
    network: the network that trains.
    dataset: its data.
    teacher: the teacher that it learns from; None for a method that learns from the data alone.
  """

  objective: Objective
  network: Network
  dataset: data.Dataset
  teacher: Teacher | None

  has_policy: ClassVar[bool] = False
  """Whether it trains heads that predict a policy; other methods train those that predict a velocity."""

  network_options: ClassVar[tuple[str, ...]] = ()
  """Options of its network that only it uses, of `training.network.OF_FLOW_MAPS`."""

  @classmethod
  @abc.abstractmethod
  def bind(cls, settings: Settings, network: Network, dataset: data.Dataset, teachers: Teachers) -> Method:
    """Makes the method that settings describe.

    Args:
      settings: of the run.
      network: the network that trains.
      dataset: its data.
      teachers: source of its teacher, if it has one.

    Raises:
      ValueError: the objective, the network, the data and the teacher do not fit together.
    """

  @abc.abstractmethod
  def init(self, key: Array, frozen: Params) -> Params:
    """Makes all parameters of the network at the start.

    Args:
      key: a PRNG key.
      frozen: the teacher's parameters, by part.
    """

  @abc.abstractmethod
  def shapes(self) -> Params:
    """Shapes of the parameters of `init`; no teacher is read for them."""

  @abc.abstractmethod
  def loss(
    self, params: Params, frozen: Params, batch: Mapping[str, Array], key: Array, step: Array
  ) -> tuple[Array, dict[str, Array]]:
    """The loss of every example (B,), and metrics; by "t" among them it is logged by noise level, see `noise_levels`.

    Args:
      params: all parameters of the network.
      frozen: the teacher's parameters, by part.
      batch: "x0" (B, *space, C) where there are data, and "cond".
      key: of this step.
      step: number of the step ().
    """

  @abc.abstractmethod
  def velocity(self, params: Params) -> Velocity:
    """The network as a velocity field (x, t, cond) -> v."""

  @abc.abstractmethod
  def evaluations(self, sampling: SampleSettings) -> tuple[int, ...]:
    """The numbers of network evaluations to sample with, where `sampling.nfe` names none."""

  @abc.abstractmethod
  def sampler(self, sampling: SampleSettings, nfe: int) -> Callable[..., Array]:
    """Draws samples: (params, noise, cond, keys) -> x0, with `nfe` evaluations; to be traced.

    Where there is a policy, the keyword `temperature`, (), takes the place of that of the settings. Where there is a
    `guide`, params are {"strong": those of the network, "weak": the guide's}.
    """

  @abc.abstractmethod
  def trajectory(self, sampling: SampleSettings, nfe: int) -> Callable[..., Array]:
    """Draws samples without stochastic steps: (params, noise, cond) -> their states (steps + 1, B, *space, C).

    Every evaluation has as many of the steps, even in schedule time; `times` has theirs. Arguments as of `sampler`.
    """

  def guide(self, sampling: SampleSettings) -> Part | None:
    """Returns the weaker model that guides samples, or None; see `training.sample.with_guide`.

    Raises:
      ValueError: it does not fit.
    """
    if sampling.weak_workdir:
      raise ValueError(
        "config.sample.weak_workdir: guides a teacher that is sampled itself, and this run is a student; leave it out"
      )
    return None

  def strength(self, sampling: SampleSettings) -> float | None:
    """Returns the strength of guidance that `sampler` draws with; None is none."""
    return sampling.guidance

  def times(self, nfe: int, steps: int) -> np.ndarray:
    """Flow times (steps + 1,) of the states of a trajectory, from 1 to 0.

    Args:
      nfe: network evaluations.
      steps: of the trajectory, a multiple of nfe.
    """
    segments = segment_grid(nfe, getattr(self.objective, "final_scale", 1.0))
    r = np.interp(np.linspace(0, nfe, steps + 1), np.arange(nfe + 1), segments)
    return np.asarray(shift_time(r, self.shift))

  @property
  def can_generate(self) -> bool:
    """Returns whether it has `generate`: whether one evaluation leads to data."""
    return False

  def generate(self, params: Params, x0: Array, cond: Any, key: Array) -> Array:
    """One evaluation from noised data to data (B, *space, C), for an adversary to judge."""
    raise NotImplementedError

  def start(self, params: Params, head: Choice, key: Array) -> Params:
    """Makes the parameters to start from of those that a finished run has trained.

    Args:
      params: of that run.
      head: its output layer.
      key: a PRNG key.
    """
    del head, key
    return params

  @property
  def shift(self) -> float:
    """Time shift of the schedule in which it and its teacher are sampled; the objective's, or 1 where it has none."""
    return getattr(self.objective, "shift", 1.0)

  @property
  def is_fixed(self) -> bool:
    """Returns whether it is made for its own number of evaluations alone."""
    return False

  @property
  def is_student(self) -> bool:
    """Returns whether it is measured beside its teacher."""
    return True


def copied(tree: Params) -> Params:
  """Copies every array, so that a step may donate the copies while the originals live on."""
  return jax.tree.map(jnp.array, tree)
