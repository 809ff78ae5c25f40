"""Start of a student's head from its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pflow_jax.networks.heads.base import Head, Params
from pflow_jax.networks.layers import check_layout


def _teacher_layer(head: Head, teacher: Mapping[str, Any]) -> Params:
  """Returns the teacher's output layer, copied and checked against the student's head."""
  check_layout(head.layout)
  if set(teacher) != {"proj_out"}:
    raise ValueError(f'teacher head: expected a velocity head with the one layer "proj_out", got {sorted(teacher)}')
  layer = {name: jnp.array(value, jnp.float32) for name, value in teacher["proj_out"].items()}
  rows = layer["kernel"].shape[1]
  sub_pixels, rest = divmod(rows, head.channels)
  if rest or sub_pixels not in [head.patch_size**axes for axes in range(4)]:
    raise ValueError(
      f"teacher output layer: expected channels * patch_size^n rows with channels {head.channels} "
      f"and patch_size {head.patch_size}, got {rows}; give the student's head the teacher's"
    )
  if "bias" in layer and not head.use_bias:
    raise ValueError("teacher output layer: expected no bias for use_bias=False, got one")
  if head.use_bias:
    layer.setdefault("bias", jnp.zeros(rows, jnp.float32))
  return layer


def head_params_from_teacher(
  head: Head,
  teacher_head_params: Mapping[str, Any],
  key: jax.Array,
  *,
  bias_noise: float = 0.05,
  noise: jax.Array | None = None,
) -> Params:
  """Returns parameters of a student's head that starts as its teacher's velocity.

  Args:
    head: a head of this module, with the channels, patch_size and layout of the teacher's.
    teacher_head_params: {"proj_out": {"kernel": (D, p^n C), "bias": (p^n C,)}}, float32.
    key: for the noise and for the first layer of the log-std MLP.
    bias_noise: standard deviation of what is added to the biases of mixture components (GMFlow, ArcFlow), one value per
      (component, channel), shared by the sub-pixels. At 0 the student's first prediction is exactly the teacher's
      velocity.
    noise: standard normal values (K, C) to use instead of drawing them.

  Returns:
    The head's parameters, new arrays.

  Raises:
    ValueError: the teacher's layer does not fit the head.

  References:
    The released initialisation of pi-Flow and ArcFlow.
  """
  layer = _teacher_layer(head, teacher_head_params)
  shape = (head.maps, head.channels)
  noise_key, other_key = jax.random.split(key)
  if noise is None:
    noise = jax.random.normal(noise_key, shape, jnp.float32)
  if jnp.shape(noise) != shape:
    raise ValueError(f"noise: expected shape (maps, channels) = {shape}, got {jnp.shape(noise)}")
  offset = bias_noise * jnp.asarray(noise, jnp.float32)
  return head.params_from_teacher(layer, other_key, offset)


def student_params_from_teacher(
  teacher_params: Mapping[str, Any],
  student: nn.Module,
  key: jax.Array,
  *,
  bias_noise: float = 0.05,
  noise: jax.Array | None = None,
) -> Params:
  """Returns parameters of a student network: the teacher's backbone, and a head that starts from its own.

  Args:
    teacher_params: of the same backbone with a `VelocityHead`, under "head".
    student: the student's network, or its head.
    key: see `head_params_from_teacher`.
    bias_noise: see there.
    noise: see there.

  Returns:
    New arrays throughout, so that a step may donate them while the teacher lives on.
  """
  head = getattr(student, "head", student)
  if not isinstance(head, Head):
    raise ValueError(f"student: expected a network with a head, or a head, got {type(student)}")
  if "head" not in teacher_params:
    raise ValueError(f'teacher parameters: expected the key "head", got {sorted(teacher_params)}')
  backbone = {name: value for name, value in teacher_params.items() if name != "head"}
  student_head = head_params_from_teacher(head, teacher_params["head"], key, bias_noise=bias_noise, noise=noise)
  return {**jax.tree.map(jnp.array, backbone), "head": student_head}
