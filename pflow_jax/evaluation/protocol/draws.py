"""Noise and classes of samples, each from the seed and the sample's number alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pflow_jax.evaluation.protocol.settings import OF_A_CLASS, Protocol


def draws(shape: tuple[int, ...], seed: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
  """Returns a jitted function of numbers of samples (n,) to their noise (n, *shape), and keys for stochastic steps."""

  def one(number: jax.Array) -> tuple[jax.Array, jax.Array]:
    noise, steps, _ = _keys(seed, number)
    return jax.random.normal(noise, shape), steps

  return jax.jit(jax.vmap(one))


def drawn_labels(protocol: Protocol, num_classes: int) -> np.ndarray:
  """Returns the classes of all samples (num_samples,), int32, and then of the pairs, OF_A_CLASS after another."""
  classes = max(num_classes, 1)
  numbers = np.arange(protocol.num_samples, dtype=np.int32)
  if protocol.labels == "balanced":
    own = np.random.default_rng(protocol.seed).permutation(numbers % classes)
  else:
    draw = lambda number: jax.random.randint(_keys(protocol.seed, number)[2], (), 0, classes)
    own = np.asarray(jax.jit(jax.vmap(draw))(numbers))
  kinds = -(-protocol.num_paired // OF_A_CLASS)
  # Classes that lie apart: neighbours on ImageNet are alike.
  paired = np.repeat(np.arange(kinds) * classes // max(kinds, 1) % classes, OF_A_CLASS)[: protocol.num_paired]
  return np.concatenate([own, paired]).astype(np.int32)


def _keys(seed: int, number: jax.Array) -> jax.Array:
  """Keys of a sample, (3,): of its noise, of stochastic steps, and of its class."""
  # Named, because the default is a setting of JAX, and another generator draws other numbers for another batch.
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.random.split(jax.random.fold_in(key, number), 3)


def from_numbers(run: Callable[..., Any], draw: Callable[..., Any]) -> Callable[..., Any]:
  """Returns (numbers, classes) -> samples, of a sampler and a function as `draws` returns it."""

  def samples(numbers, classes):
    noise, keys = draw(numbers)
    return run(noise, classes, keys)

  return samples
