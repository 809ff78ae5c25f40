"""Dropout and temperature: functions from a policy to a policy. No-ops on policies that are no mixture."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.core.policies.base import Array, Policy, check_range

P = TypeVar("P", bound=Policy)

MIN_TEMPERATURE = 1e-6


def dropout(policy: P, key: Array, rate: float) -> P:
  """Drops whole components of the mixture, each with probability `rate`, the same for all pixels.

  Args:
    policy: one policy (unbatched).
    key: a PRNG key.
    rate: probability in [0, 1). If all components would go, none does.

  References:
    pi-Flow, arXiv:2510.14974, Sec. 3.4: applied to the detached policy that makes the rollouts, in training only.
  """
  check_range("rate", rate, 0.0, 1.0)
  _check_one(policy)
  if policy.num_components == 0:
    return policy
  return policy.drop(jax.random.uniform(key, (policy.num_components,)) < rate)  # type: ignore[return-value]


def temperature(policy: P, value: float | Array) -> P:
  """Sharpens the mixture at sampling time: logits / T, and for GMFlow variance * T.

  Args:
    policy: one policy (unbatched).
    value: T, of at least 0; T >= 1 leaves the policy as it is. May be traced: another T then compiles nothing anew.
  """
  _check_one(policy)
  if isinstance(value, jax.core.Tracer):
    return policy.temper(jnp.clip(value, MIN_TEMPERATURE, 1.0))  # type: ignore[return-value]
  value = float(value)
  if not value >= 0:
    raise ValueError(f"temperature: expected a number of at least 0, got {value}")
  if value >= 1 or policy.num_components == 0:
    return policy
  return policy.temper(max(value, MIN_TEMPERATURE))  # type: ignore[return-value]


def _check_one(policy: Policy) -> None:
  if policy.num_components and policy.t_s.ndim:  # type: ignore[attr-defined]
    raise ValueError(f"expected one policy, got a batch of shape {policy.t_s.shape}; use jax.vmap")  # type: ignore[attr-defined]


def auto_temperature(nfe: int) -> float:
  """The release's default temperature for `nfe` evaluations: clip(0.1 (nfe - 1), 0, 1)."""
  return float(np.clip(0.1 * (nfe - 1), 0.0, 1.0))
