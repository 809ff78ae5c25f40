"""The state of training, which a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
  """Pytree of everything that trains; change it with dataclasses.replace."""

  step: Array  # () int32, number of steps taken
  params: PyTree
  ema: PyTree  # like params, float32
  opt_state: PyTree
  opponent: PyTree = None  # the network that judges or follows the samples: its parameters and optimizer's state

  profiles: ClassVar[PyTree] = None

  def __repr__(self) -> str:
    step = f", step {self.step}" if jax.core.is_concrete(self.step) else ""
    rival = ", and an opponent" if self.opponent is not None else ""
    return f"TrainState({count_parameters(self.params):,} parameters that train{rival}{step})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ProfiledState(TrainState):
  """The state of a run with more averages, a class of its own: a checkpoint has an entry for every field, even None."""

  profiles: PyTree = None  # type: ignore[misc]  # a tuple of trees like ema, of which others are made afterwards


def count_parameters(params: PyTree) -> int:
  """Counts the numbers in arrays, or in their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params) if hasattr(leaf, "size"))


def create_state(
  params: PyTree, optimizer: optax.GradientTransformation, opponent: PyTree = None, profiles: int = 0
) -> TrainState:
  """State at step 0, its average and `profiles` more of them float32 copies of `params`.

  Real copies, so that a jitted step may donate the state. Works under jit and jax.eval_shape.
  """
  copy = lambda: jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
  own: dict[str, Any] = {"profiles": tuple(copy() for _ in range(profiles))} if profiles else {}
  return (ProfiledState if profiles else TrainState)(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=copy(),
    opt_state=optimizer.init(params),
    opponent=opponent,
    **own,
  )
