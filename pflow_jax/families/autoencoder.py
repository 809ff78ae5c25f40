"""The autoencoder of a latent model, read from the folder of its pipeline: latents to pictures, and back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from pflow_jax.data.dataset import Dataset, Scaling
from pflow_jax.data.pixels import read_pixels, to_unit
from pflow_jax.families.edm2 import latents as edm2_latents
from pflow_jax.families.names import TorchNames
from pflow_jax.families.registry import FAMILIES
from pflow_jax.families.taesd import files as tiny_files
from pflow_jax.families.taesd import names as tiny_names
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.foreign import check_memory, is_there, read_json, shown
from pflow_jax.files.progress import SHOWN, progress
from pflow_jax.networks.heads import attributes_of
from pflow_jax.torch_io.check import check_tensors
from pflow_jax.torch_io.fields import check_sizes, read_fields
from pflow_jax.torch_io.places import Tensors
from pflow_jax.torch_io.shards import ModelFolder, Planned
from pflow_jax.torch_io.table import flat_shapes, to_flax, to_torch, torch_shapes_of
from pflow_jax.torch_io.tensors import open_tensors

SD_SCALE = 0.18215  # of the latents of Stable Diffusion's autoencoders, sd-vae-ft-ema and sd-vae-ft-mse


def classes() -> dict[str, TorchNames]:
  """Returns the names of the autoencoders of all families, by their classes in config.json."""
  known = [family.autoencoder for family in FAMILIES.values() if family.autoencoder is not None]
  return {name: names for names in known for name in names.class_names}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Codec:
  """An autoencoder with its parameters; by default one picture at a time, so that its memory is bounded.

  Attributes:
    module: Flax module with the methods `encode` and `decode`, and the attributes `down_factor`, `latent_channels` and
      `dtype`; one whose latents are distributions is a `networks.vae.Autoencoder`.
    params: its parameters.
    folder: that it was read from, absolute; "" for none.
  """

  module: Any
  params: Any
  folder: str = ""

  def __repr__(self) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    name, channels = type(self.module).__name__, getattr(self.module, "latent_channels", "?")
    return f"Codec({name}, {self.factor} x {self.factor} pixels to {channels} numbers, {size:,} parameters)"

  @property
  def factor(self) -> int:
    """Pixels of a picture for one pixel of its latents, along each axis."""
    return self.module.down_factor

  @property
  def has_variance(self) -> bool:
    """Returns whether its latents are distributions, which can be drawn from."""
    return getattr(self.module, "has_variance", False)

  @property
  def normalisation(self) -> Scaling:
    """Shift and scale of its latents; none of an autoencoder that imitates those of another, already scaled."""
    if not self.has_variance:
      return Scaling()
    channels, (shift, scale) = self.module.latent_channels, self.module.normalisation()
    wide = lambda x: tuple(np.broadcast_to(np.asarray(x, np.float64).reshape(-1), channels).tolist())
    return Scaling(wide(shift), wide(scale))

  def decode(self, z: np.ndarray, batch_size: int = 1) -> np.ndarray:
    """Decodes latents to pictures (B, H, W, 3), about [-1, 1], float32.

    Args:
      z: latents (B, h, w, C), as the network makes them.
      batch_size: latents at a time, of which memory and speed depend.
    """
    return self._in_batches("decoding", self._decode, z, batch_size)

  def encode(self, x: np.ndarray, batch_size: int = 1) -> np.ndarray:
    """Encodes pictures to latents (B, h, w, C), of about unit variance; to their mean, not to a draw.

    Args:
      x: pictures (B, H, W, 3) in [-1, 1].
      batch_size: pictures at a time, of which memory and speed depend.
    """
    return self._in_batches("encoding", self._encode, x, batch_size)

  def _in_batches(self, word: str, run: Callable[..., Any], values: np.ndarray, batch_size: int) -> np.ndarray:
    """Runs one method on batches of one length, so that it compiles once; what takes long reports its progress."""
    count, size = len(values), max(min(batch_size, len(values)), 1)
    parts = []
    with progress(count, 0, word, unit="pictures", delay=SHOWN) as report:
      for start in range(0, count, size):
        rows = np.arange(start, start + size) % count  # the last batch wraps and is cut
        parts.append(np.asarray(run(self.params, values[rows])))
        report.update(min(start + size, count))
    return np.concatenate(parts)[:count]

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

  def digest(self) -> str:
    """Returns a hash of its parameters and attributes, those of computation left out."""
    state = hashlib.sha256(f"{type(self.module).__name__} {self.normalisation}".encode())
    for path, leaf in sorted(flatten_dict(self.params, sep="/").items()):
      state.update(path.encode() + np.asarray(leaf).tobytes())
    return state.hexdigest()[:16]

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
  """Reads the autoencoder of a pipeline, or a tiny one.

  Args:
    folder: of the pipeline, as published, or its folder "vae"; of a tiny autoencoder, as diffusers or its authors
      publish it: "taesd/taef2" names taesd/taef2_encoder.pth and taesd/taef2_decoder.pth.
    dtype: to compute in. Parameters are float32.

  Raises:
    ValueError: there is none, its class is not known, or its tensors do not fit its config.
  """
  path = pathlib.Path(os.path.expanduser(folder))
  path = path / "vae" if is_there(path / "vae") else path
  if is_there(path / "config.json"):
    names, attributes, tensors = _open_published(path)
  elif parts := tiny_files.find(path):
    names, (attributes, tensors) = tiny_names.NAMES, tiny_files.open_parts(parts)
  else:
    raise ValueError(
      f"{folder}: expected an autoencoder of diffusers, config.json here or in the folder vae, or a tiny one, "
      "*_encoder.pth and *_decoder.pth"
    )
  module: Any = names.module(**attributes, dtype=jnp.dtype(dtype))
  rows, factor = names.rows(attributes), module.down_factor
  image = jax.ShapeDtypeStruct((1, factor, factor, 3), jnp.float32)
  by_path = flat_shapes(jax.eval_shape(module.init, jax.random.key(0), image)["params"])
  expected = {name: shape for row in rows for name, shape in torch_shapes_of(row, by_path[row.flax]).items()}
  check_tensors(expected, tensors.shapes, str(path))
  params = to_flax(rows, {name: tensors.read(name).astype(np.float32) for name in expected})
  return Codec(module, jax.device_put(params), os.path.abspath(os.path.expanduser(folder)))


def codec_of(dataset: Dataset) -> Codec | None:
  """Returns the autoencoder whose latents a data set has; None of pixels, and where none is known.

  Args:
    dataset: with `autoencoder`.

  Raises:
    ValueError: it cannot be read, or makes latents of other channels or of another scale.
  """
  if not dataset.autoencoder:
    return None
  codec = _kept(dataset.autoencoder, edm2_latents.are_edm2s(dataset.scaling))
  if dataset.shape[-1] != codec.module.latent_channels:
    raise ValueError(
      f"{dataset.autoencoder} makes latents of {codec.module.latent_channels} channels, {dataset.name} has "
      f"{dataset.shape[-1]}; give the one of its model in config.sample.autoencoder"
    )
  if problem := other_scale(codec.normalisation, dataset.scaling):
    raise ValueError(
      f"{dataset.autoencoder} makes latents of another scale than {dataset.name} has: {problem}; give the one of its "
      "model in config.sample.autoencoder"
    )
  return codec


def other_scale(own: Scaling, data: Scaling | None) -> str:
  """Returns the differences of an autoencoder's scale from that of data, in words; "" where one is not known.

  Args:
    own: shift and scale of the autoencoder, or those that a teacher knows, of which one number is for all channels.
    data: those of the data.
  """
  if data is None or not own.scale or not data.scale:
    return ""
  pairs = {"shift": (own.shift, data.shift), "scale": (own.scale, data.scale)}
  fits = lambda a, b: len(a) in (1, len(b)) and np.allclose(a, b, rtol=1e-3)
  differing = [name for name, pair in pairs.items() if not fits(*pair)]
  return "; ".join(f"{name} {shown(pairs[name][0])}, the data's {shown(pairs[name][1])}" for name in differing)


@functools.lru_cache(maxsize=2)
def _kept(folder: str, of_edm2: bool) -> Codec:
  codec = load_autoencoder(folder)
  if not of_edm2:
    return codec
  try:
    return dataclasses.replace(codec, module=edm2_latents.autoencoder_of(codec.module))
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error


def _open_published(path: pathlib.Path) -> tuple[TorchNames, dict[str, Any], Tensors]:
  """Opens an autoencoder of diffusers: its names, the attributes of its module, and its tensors by today's names."""
  file = path / "config.json"
  config, known = read_json(file), classes()
  name = config.get("_class_name")
  if not isinstance(name, str) or name not in known:
    raise ValueError(f"{file}: expected an autoencoder of {sorted(known)}, got {shown(name)}")
  names = known[name]
  schema, attributes = names.schema(name), names.model_from_config(config)
  tensors = open_tensors(path)
  tensors = tensors.renamed({names.current_name(name): name for name in tensors.shapes})
  check_sizes(read_fields(config, schema), schema, tensors)
  return names, attributes, tensors


def _jitted(module: Any, method: str) -> Any:
  return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
  state = hashlib.sha256()
  for name, tensor in tensors.items():
    state.update(name.encode() + tensor.tobytes())
  return state.hexdigest()
