"""An autoencoder's encoder on all devices of a process, a batch of pictures at a time."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from pflow_jax.core.batches import AXES
from pflow_jax.data.latents import VALUES
from pflow_jax.families.autoencoder import Codec
from pflow_jax.files.foreign import shown
from pflow_jax.mesh.sharding import Layout

Store = Literal["draw", "mean", "moments"]
"""Numbers that are kept of a picture's latent: one draw, its mean, or mean and standard deviation."""

PER_DEVICE = 16  # pictures at a time, unless told otherwise
_WHOLE = ((".*", ()),)  # an autoencoder is small beside the pictures in it


class Encoder:
  """Encodes pictures to the values that `data.latents` stores.

  What is drawn of a picture depends on the seed and on the picture's own number alone: neither on its batch nor on its
  device. Processes work each on its own pictures, so the mesh has the devices of this one.

  Args:
    codec: the autoencoder.
    shape: (H, W, C) of pictures.
    store: what is kept.
    mirror: whether the same of the mirror image is kept too.
    batch_size: pictures at a time, rounded up to the number of devices; by default PER_DEVICE for each.
    seed: of the draws.

  Raises:
    ValueError: the pictures do not fit the autoencoder, it has no moments, or there is no such `store`.
  """

  def __init__(
    self,
    codec: Codec,
    shape: tuple[int, ...],
    *,
    store: Store = "draw",
    mirror: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
  ):
    factor, module = codec.factor, codec.module
    if len(shape) != 3 or shape[-1] != 3:
      raise ValueError(f"expected a set of pictures (H, W, 3), got {shape}")
    if shape[0] % factor or shape[1] % factor:
      raise ValueError(f"expected sides that are multiples of {factor}, got {shape[0]} x {shape[1]}; scale them")
    if store not in get_args(Store):
      raise ValueError(f"store: expected one of {get_args(Store)}, got {shown(store)}")
    if store == "moments" and not codec.has_variance:
      raise ValueError(f"moments: {type(module).__name__} has no variance; leave out --moments")
    devices = np.array(jax.local_devices())
    grid = devices.reshape([-1 if axis == "data" else 1 for axis in AXES])
    self._layout = Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), _WHOLE)
    self.batch_size = -(-(batch_size or PER_DEVICE * devices.size) // devices.size) * devices.size
    self.shape = (shape[0] // factor, shape[1] // factor, module.latent_channels)
    self.stored = (1 + mirror, 1 + (store == "moments"), *self.shape)
    # Encoding needs none of the decoder's parameters.
    needed = {name: values for name, values in dict(codec.params).items() if name not in ("decoder", "post_quant_conv")}
    self._params = self._layout.place(needed if codec.has_variance else codec.params)
    self._run = jax.jit(lambda *given: _stored(codec, store, mirror, seed, *given))
    # Products of float32 as those of the releases, TF32; a TPU's default would be bfloat16.
    exact = jnp.dtype(module.dtype) == jnp.float32
    self._precision = (lambda: jax.default_matmul_precision("high")) if exact else contextlib.nullcontext

  def __call__(self, pictures: np.ndarray, numbers: np.ndarray) -> jax.Array:
    """Begins to encode a batch; the result is there when it is read.

    Args:
      pictures: (n, H, W, 3), n at most `batch_size`; uint8, or in [-1, 1].
      numbers: of the pictures, (n,) uint64, which their draws depend on.

    Returns:
      (batch_size, *stored), float16, of which the first n are the pictures'.
    """
    rows = np.arange(self.batch_size) % len(pictures)
    words = np.stack([numbers >> np.uint64(32), numbers & np.uint64(2**32 - 1)], axis=-1).astype(np.uint32)
    with self._layout.context(), self._precision():
      return self._run(self._params, self._layout.spread(pictures[rows]), self._layout.spread(words[rows]))


def _stored(codec: Codec, store: Store, mirror: bool, seed: int, params: Any, pictures: Any, words: Any) -> jax.Array:
  """Stored values of a batch, (n, views, parts, *shape)."""
  x = pictures.astype(jnp.float32) / 127.5 - 1 if pictures.dtype == jnp.uint8 else pictures
  views = []
  for view in range(1 + mirror):
    x = x[:, :, ::-1] if view else x
    if not codec.has_variance or store == "mean":
      values = codec.module.apply({"params": params}, x, method="encode")[:, None]
    else:
      mean, logvar = codec.module.apply({"params": params}, x, method="moments")
      std = jnp.exp(logvar / 2)
      if store == "moments":
        values = jnp.stack([mean, std], axis=1)
      else:
        own, latent = codec.normalisation, mean + std * _noise(seed, words, view, mean.shape[1:])
        shift, scale = (jnp.array(of, jnp.float32).reshape(1, 1, 1, -1) for of in (own.shift, own.scale))
        values = ((latent - shift) * scale)[:, None]
    views.append(values)
  return jnp.stack(views, axis=1).astype(VALUES)


def _noise(seed: int, words: jax.Array, view: int, shape: tuple[int, ...]) -> jax.Array:
  """Normal numbers (n, *shape) of pictures, of which `words` (n, 2) uint32 are the numbers."""
  base = jax.random.key(seed, impl="threefry2x32")  # whatever the configuration says: another run must draw the same

  def one(word: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, word[0]), word[1]), view)
    return jax.random.normal(key, shape, jnp.float32)

  return jax.vmap(one)(words)
