"""Weights of Inception from the files of StyleGAN, pytorch-fid and torch-fidelity."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pflow_jax.families.inception.names import NAMES, Names
from pflow_jax.families.inception.network import kernel_shapes
from pflow_jax.files.foreign import shown
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.tensors import Tensors, open_tensors

_EPSILON = 1e-3  # that is added to a variance
_KNOWN = "inception-2015-12-05.pt of StyleGAN, or pt_inception-2015-12-05-6726825d.pth of pytorch-fid"


def load_inception(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the parameters of `Inception` from a file, whose kind is recognised by its tensors.

  A batch norm becomes part of its convolution, in float64. So files of one network give the same parameters to the bit,
  whatever their kind.

  Args:
    path: of inception-2015-12-05.pt, StyleGAN's program, of which the tensors alone are read, or a state dict of the
      same names; or of pytorch-fid's or torch-fidelity's state dict.

  Returns:
    nested parameters, NumPy, float32.

  Raises:
    ValueError: the file is another, is damaged, or holds numbers that are not finite.
  """
  file = pathlib.Path(os.path.expanduser(path))
  if file.suffix == ".pkl":
    raise ValueError(f"{path}: expected {_KNOWN}; a .pkl of StyleGAN3 runs code when it is loaded")
  tensors = open_tensors(file)
  names = _recognised(file, tensors)
  expected = names.shapes()
  needed = {name: shape for name, shape in tensors.shapes.items() if not re.fullmatch(names.unused, name)}
  check_tensors(expected, needed, str(file), f"that Inception of {names.origin} has")
  odd = [name for name in expected if not np.issubdtype(tensors.places[name].dtype, np.floating)]
  if odd:
    raise ValueError(f"{file}: expected floating-point numbers, got {tensors.places[odd[0]].dtype} in {odd[0]}")
  flat = {"output/kernel": tensors.read(names.output).T}
  for name in kernel_shapes()[0]:
    flat[f"{name}/kernel"], flat[f"{name}/bias"] = _folded(tensors, names, names.stem(name))
  params = {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}
  bad = [name for name, value in params.items() if not np.isfinite(value).all()]
  if bad:
    raise ValueError(
      f"{file}: expected finite weights and variances of at least 0, not so in {shown(bad)}; bring it anew"
    )
  return unflatten_dict(params, sep="/")


def digest_of(params: dict[str, Any]) -> str:
  """Returns eight letters that tell parameters from others."""
  state = hashlib.sha256()
  for name, leaf in sorted(flatten_dict(params, sep="/").items()):
    state.update(f"{name} {leaf.shape} {leaf.dtype}".encode() + np.ascontiguousarray(leaf).tobytes())
  return state.hexdigest()[:8]


def _recognised(file: pathlib.Path, tensors: Tensors) -> Names:
  """Returns the names of the kind of file that has most of them."""
  paths = kernel_shapes()[0]
  common = {names.origin: sum(names.stem(path) + names.kernel in tensors.places for path in paths) for names in NAMES}
  best = max(NAMES, key=lambda names: common[names.origin])
  if not common[best.origin]:
    raise ValueError(f"{file}: expected {_KNOWN}, got tensors such as {shown(sorted(tensors.places)[:3], 300)}")
  return best


def _folded(tensors: Tensors, names: Names, stem: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns kernel (H, W, I, O) and bias (O,) of a convolution with its batch norm in it, float64."""

  def read(end: str) -> np.ndarray:
    return tensors.read(stem + end).astype(np.float64)

  with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
    factor = 1 / np.sqrt(read(names.variance) + _EPSILON)
    if names.scale is not None:
      factor = factor * read(names.scale)
    kernel = read(names.kernel).transpose(2, 3, 1, 0) * factor[None, None, None, :]
    return kernel, read(names.offset) - read(names.mean) * factor
