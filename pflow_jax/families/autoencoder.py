"""The autoencoder of a latent model, read from the folder of its pipeline: latents to pictures, and back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.data.pixels import read_pixels, to_unit
from pflow_jax.families.names import TorchNames
from pflow_jax.families.registry import FAMILIES
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.foreign import check_memory, is_there, read_json, real_folder, shown
from pflow_jax.networks.heads import attributes_of
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.fields import check_sizes, read_fields
from pflow_jax.torch_io.shards import ModelFolder, Planned
from pflow_jax.torch_io.table import flat_shapes, to_flax, to_torch, torch_shapes_of
from pflow_jax.torch_io.tensors import open_tensors


def classes() -> dict[str, TorchNames]:
  """Returns the names of the autoencoders of all families, by their classes in config.json."""
  known = [family.autoencoder for family in FAMILIES.values() if family.autoencoder is not None]
  return {name: names for names in known for name in names.class_names}


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """An autoencoder with its parameters; one picture at a time, so that its memory does not grow with their number.

  Attributes:
    module: Flax module with the methods `encode` and `decode`, and the attributes `down_factor`, `latent_channels` and
      `dtype`.
    params: its parameters.
  """

  module: Any
  params: Any

  @property
  def factor(self) -> int:
    """Pixels of a picture for one pixel of its latents, along each axis."""
    return self.module.down_factor

  def decode(self, z: np.ndarray) -> np.ndarray:
    """Decodes latents to pictures (B, H, W, 3), about [-1, 1], float32.

    Args:
      z: latents (B, h, w, C), as the network makes them.
    """
    return np.concatenate([np.asarray(self._decode(self.params, one[None])) for one in z])

  def encode(self, x: np.ndarray) -> np.ndarray:
    """Encodes pictures to latents (B, h, w, C), of about unit variance; to their mean, not to a draw.

    Args:
      x: pictures (B, H, W, 3) in [-1, 1].
    """
    return np.concatenate([np.asarray(self._encode(self.params, one[None])) for one in x])

  def save(self, folder: str | os.PathLike) -> pathlib.Path:
    """Writes it as diffusers does, to the folder "vae" of a pipeline; `load_autoencoder` reads it.

    Args:
      folder: of the pipeline, which may be new.

    Returns:
      The folder "vae".

    Raises:
      ValueError: no family has such an autoencoder, or there is another one.
    """
    found = [names for names in classes().values() if names.module is type(self.module)]
    if not found:
      known = sorted({names.module.__name__ for names in classes().values()})
      raise ValueError(f"expected an autoencoder of {known}, got {type(self.module).__name__}; register its family")
    attributes = attributes_of(self.module, ())
    tensors = to_torch(found[0].rows(attributes), self.params)
    planned = [Planned(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    path = pathlib.Path(checked_folder(folder)) / "vae"
    target = ModelFolder(path, found[0].config_from_model(attributes), planned, _digest(tensors))
    if not target.is_complete():
      target.write(tensors.__getitem__)
    return path

  @functools.cached_property
  def _decode(self) -> Any:
    return _jitted(self.module, "decode")

  @functools.cached_property
  def _encode(self) -> Any:
    return _jitted(self.module, "encode")

  def read(self, paths: Sequence[str | os.PathLike], size: tuple[int, int]) -> np.ndarray:
    """Reads picture files as latents, (n, h, w, C).

    Args:
      paths: of the files.
      size: (H, W) that a picture is scaled to, after it was cut to its shape around the middle.

    Raises:
      ValueError: a file is no picture, or the machine cannot hold the size.
    """
    check_memory(f"pictures of {shown(size)} pixels", 20 * size[0] * size[1], "ask for fewer")
    return np.concatenate([self.encode(to_unit(read_pixels(path, size, 3))[None]) for path in paths])


def load_autoencoder(folder: str | os.PathLike, dtype: Any = jnp.float32) -> Codec:
  """Reads the autoencoder of a pipeline.

  Args:
    folder: of the pipeline, as published, or its folder "vae".
    dtype: to compute in. Parameters are float32.

  Raises:
    ValueError: there is none, its class is not known, or its tensors do not fit its config.
  """
  path = real_folder(folder)
  path = path / "vae" if is_there(path / "vae") else path
  file = path / "config.json"
  if not is_there(file):
    raise ValueError(f"{folder}: expected an autoencoder of diffusers, config.json here or in the folder vae")
  config = read_json(file)
  name = config.get("_class_name")
  known = classes()
  if not isinstance(name, str) or name not in known:
    raise ValueError(f"{file}: expected an autoencoder of {sorted(known)}, got {shown(name)}")
  names = known[name]
  schema, attributes = names.schema(name), names.model_from_config(config)
  module: Any = names.module(**attributes, dtype=jnp.dtype(dtype))
  rows = names.rows(attributes)
  tensors = open_tensors(path)
  tensors = tensors.renamed({names.current_name(name): name for name in tensors.shapes})
  check_sizes(read_fields(config, schema), schema, tensors)
  factor = module.down_factor
  shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, factor, factor, 3), jnp.float32))
  by_path = flat_shapes(shapes["params"])
  expected = {name: shape for row in rows for name, shape in torch_shapes_of(row, by_path[row.flax]).items()}
  check_tensors(expected, tensors.shapes, str(path))
  params = to_flax(rows, {name: tensors.read(name).astype(np.float32) for name in expected})
  return Codec(module, jax.device_put(params))


def _jitted(module: Any, method: str) -> Any:
  return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
  state = hashlib.sha256()
  for name, tensor in tensors.items():
    state.update(name.encode() + tensor.tobytes())
  return state.hexdigest()
