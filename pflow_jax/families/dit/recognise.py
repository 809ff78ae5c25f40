"""Looks at files of published DiTs: sizes are told by shapes, conventions by contents or by a file's name.

The same tensors are given time from data to noise or the other way round, as a fraction or in thousands, and make a
velocity of either sign. Nothing of that is taken without being said, and what cannot be found is asked for.

References:
  The code of SiT (github.com/willisma/SiT, 947f95b), REPA (github.com/sihyun-yu/REPA, 67f7145), DiT
  (github.com/facebookresearch/DiT, ed81ce2) and π-Flow (github.com/Lakonik/LakonLab, 84566d5).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from pflow_jax.families.names import Source
from pflow_jax.files.foreign import parse_json, shown
from pflow_jax.networks.dit import DIT_SIZES
from pflow_jax.networks.layers import position_table
from pflow_jax.torch_io.pickled import ARGUMENTS

Shape = tuple[int, ...]

CONVENTIONS: dict[str, dict[str, Any]] = {
  "repa": {"num_timesteps": 1, "flip_model_timesteps": False},
  "sit": {"num_timesteps": 1, "flip_model_timesteps": True},
  "flowdit": {"num_timesteps": 1000, "flip_model_timesteps": False},
}
"""Fields of config.json by whose teacher it is."""

TIMES = ("num_timesteps", "flip_model_timesteps")
"""Fields of config.json by which the network is given the time."""

NOISE = "noise"
"""Stands for a DiT that predicts noise, in place of a convention."""

# Files without their ending, and folders, of the releases. Of noise there are DiT's own.
_PUBLISHED = {
  **dict.fromkeys(("repa_imagenet", "gmrepa_k32_imagenet_piid_1step", "gmrepa_k32_imagenet_piid_2step"), "repa"),
  **dict.fromkeys(("flowdit_imagenet", "gmdit_k32_imagenet_piid_1step"), "flowdit"),
  **dict.fromkeys(("sit_imagenet", "SiT-XL-2-256", "SiT-XL-2-256x256"), "sit"),
  **dict.fromkeys(("DiT-XL-2-256x256", "DiT-XL-2-512x512"), NOISE),
}
_TOLERANCE = 1e-5  # of sines and cosines that somebody computed in float32


def described(fields: Mapping[str, Any], own_sign: bool) -> str:
  """Returns a convention in words.

  Args:
    fields: of config.json.
    own_sign: whether a network whose time runs from noise to data makes x0 - eps, as SiT's own.
  """
  scale, flip = f"{fields['num_timesteps']:g}", fields["flip_model_timesteps"]
  ends = f"from noise, 0, to data, {scale}" if flip else f"from data, 0, to noise, {scale}"
  return f"time {ends}, velocity {'x0 - eps' if own_sign and flip else 'eps - x0'}"


def ask(source: Source, own_sign: bool) -> NoReturn:
  """Raises ValueError, which asks for a convention; the arguments are those of `described`."""
  choices = [f"{name} ({described(fields, own_sign)})" for name, fields in CONVENTIONS.items()]
  raise ValueError(
    f"{source.file}: its tensors do not tell how the network is given the time; give --convention: "
    f"{', '.join(choices[:-1])} or {choices[-1]}; a DiT that predicts noise is none of these, and no teacher"
  )


def refuse_noise(source: Source, why: str) -> NoReturn:
  """Raises ValueError for a network that predicts noise.

  Args:
    source: its files.
    why: what tells.
  """
  raise ValueError(
    f"{source.file}: predicts the noise of 1000 discrete steps (DDPM), {why}, and not a velocity, so it is no teacher; "
    "take SiT's or REPA's, or give --convention flowdit if it was trained as a flow after all"
  )


def published(source: Source) -> tuple[str, str] | None:
  """Returns the convention that the name of a published file tells, or NOISE, and what tells it."""
  name = source.published
  return (_PUBLISHED[name], f"by its name, {name}") if name in _PUBLISHED else None


def trained(source: Source) -> tuple[str, str] | None:
  """Returns the convention that the arguments of the training in a checkpoint tell, or NOISE, and what tells it.

  Args:
    source: the checkpoint, of the training scripts of SiT, REPA or DiT.

  Raises:
    ValueError: it was trained for something else than a velocity on the straight path.
  """
  if ARGUMENTS not in source.tensors.metadata:
    return None
  args = parse_json(source.tensors.metadata[ARGUMENTS], where=f"{source.file}, its args")
  if "path_type" not in args:
    return (NOISE, "by the arguments of its training") if str(args.get("model")).startswith("DiT") else None
  path, prediction = (str(args.get(name)).lower() for name in ("path_type", "prediction"))
  if path != "linear" or prediction not in ("v", "velocity"):
    raise ValueError(
      f"{source.file}: its args say path_type = {shown(args['path_type'])} and prediction = "
      f"{shown(args.get('prediction'))}; expected a velocity on the linear path, which a teacher here predicts"
    )
  return ("repa" if "enc_type" in args else "sit"), "by the arguments of its training"


def shape_of(source: Source, name: str, rank: int) -> Shape:
  """Returns the shape of a tensor, without axes of length 0.

  Args:
    source: files of the model.
    name: of the tensor.
    rank: its axes.

  Raises:
    ValueError: it is missing, or has another number of axes.
  """
  shape = source.tensors.shapes.get(name)
  if shape is None or len(shape) != rank or 0 in shape:
    got = "none of that name" if shape is None else f"the shape {shape}"
    raise ValueError(
      f"{source.file}: expected the tensors of a DiT, {name} with {rank} axes among them, got {got}; it is damaged, or "
      "another network"
    )
  return shape


def sizes(source: Source, patch: str, classes: str, block: str, positions: str) -> dict[str, Any]:
  """Returns the fields of config.json that the shapes of tensors tell, but for the outputs.

  Args:
    source: files of the model.
    patch: name of the convolution that makes tokens.
    classes: name of the table of classes, the last of which is none.
    block: what the names of blocks begin with.
    positions: name of the table of positions, which may be missing.

  Raises:
    ValueError: a tensor is missing, or the size is no published one, which alone tells the number of heads.
  """
  width, channels, side, _ = shape_of(source, patch, 4)
  numbers = (name.removeprefix(block).partition(".")[0] for name in source.tensors.places if name.startswith(block))
  depth = 1 + max((int(number) for number in numbers if re.fullmatch(r"\d{1,4}", number)), default=0)
  heads = source.config.get("num_attention_heads") or _heads(width, depth)
  if not isinstance(heads, int) or heads < 1 or width % heads:
    raise ValueError(
      f"{source.file}: tensors do not tell the heads of the attention, and width {width} with depth {depth} is no "
      f'published size; put {{"num_attention_heads": ...}}, a divisor of the width, in a config.json beside it'
    )
  fields = {
    "num_attention_heads": heads,
    "attention_head_dim": width // heads,
    "in_channels": channels,
    "num_layers": depth,
    "patch_size": side,
    "num_embeds_ada_norm": shape_of(source, classes, 2)[0] - 1,
  }
  if positions in source.tensors.places:
    fields["sample_size"] = math.isqrt(shape_of(source, positions, 3)[1]) * side
  return fields


def outputs(source: Source, layer: str, config: Mapping[str, Any], channels: int = 1) -> int:
  """Returns the channels that an output layer makes, or of how many channels it makes maps.

  Args:
    source: files of the model.
    layer: name of its weight.
    config: with "patch_size".
    channels: of a map.

  Raises:
    ValueError: it is missing, or has other rows.
  """
  rows, of_map = shape_of(source, layer, 2)[0], channels * config["patch_size"] ** 2
  if rows % of_map:
    raise ValueError(f"{source.file}: {layer}: expected a multiple of {of_map} rows, got {rows}")
  return rows // of_map


def _heads(width: int, depth: int) -> int | None:
  sizes = [size["num_heads"] for size in DIT_SIZES.values() if (size["width"], size["depth"]) == (width, depth)]
  return sizes[0] if sizes else None


def without_positions(source: Source, name: str) -> Source:
  """Returns a source without the table of positions, which our network computes.

  Args:
    source: files of the model.
    name: of the table, which may be missing.

  Raises:
    ValueError: it is another table than that of sines and cosines.
  """
  if name not in source.tensors.places:
    return source
  one, count, width = shape_of(source, name, 3)
  side = math.isqrt(count)
  fits = one == 1 and side**2 == count and width % 4 == 0
  if fits:
    # The table is the encoding of the column beside that of the row: each is compared as it is, which takes no memory.
    table = source.tensors.read(name)
    axis = position_table((1, side), width)[:, : width // 2].astype(np.float32)
    grid = table.astype(np.float32).reshape(side, side, 2, width // 2)
    rounding = 4 * float(ml_dtypes.finfo(table.dtype).eps) if _is_float(table.dtype) else 0.0
    errors = [np.abs(grid[:, :, 0] - axis[None]).max(), np.abs(grid[:, :, 1] - axis[:, None]).max()]
    fits = all(error <= _TOLERANCE + rounding for error in errors)
  if not fits:
    raise ValueError(
      f"{source.file}: {name} is not the fixed table of sines and cosines of a square grid of DiT, SiT and REPA, "
      "and the network here has no other"
    )
  return dataclasses.replace(source, tensors=source.tensors.without([name]))


def learned_nothing(source: Source, layer: str, channels: int) -> bool:
  """Returns whether the channels of an output layer beyond the first are all zeros, as where no loss ever saw them.

  Args:
    source: files of the model.
    layer: name of the output layer.
    channels: C; there are 2 C.

  Raises:
    ValueError: it is missing.
  """
  names = f"{layer}.weight", f"{layer}.bias"
  rows = {shape_of(source, name, rank)[0] for name, rank in zip(names, (2, 1), strict=True)}
  if len(rows) != 1 or rows.pop() % (2 * channels):
    return False
  layers = (source.tensors.read(name) for name in names)
  return not any(x.reshape(-1, 2, channels, *x.shape[1:])[:, 1].any() for x in layers)


def _is_float(dtype: np.dtype) -> bool:
  return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))
