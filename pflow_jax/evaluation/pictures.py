"""Samples as pictures: pixels as they are, latents decoded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.data import Dataset
from pflow_jax.evaluation.figures import visible
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.mesh.sharding import Layout
from pflow_jax.training.sample import in_batches

FAR, MOST_FAR = 2.0, 0.02  # share of numbers beyond FAR from which samples are no pixels; of latents it is 0.05
DECODED_A_DEVICE = 4  # pictures at a time: Stable Diffusion's decoder takes a gigabyte for one of 256 x 256

logger = logging.getLogger(__name__)
_warn = functools.cache(logger.warning)  # once, not at every picture


def as_pictures(dataset: Dataset, x: np.ndarray) -> np.ndarray:
  """Returns samples as pictures (n, H, W, 1 or 3), about [-1, 1].

  Latents without an autoencoder are shown by their first channels, which have their outlines.

  Args:
    dataset: that they are like.
    x: samples (n, h, w, c).
  """
  try:
    codec = codec_of(dataset)
  except ValueError as error:
    _warn(f"latents are shown by their first channels: {error}")
    codec = None
  if codec is not None:
    return codec.decode(x)
  return visible(x)


def to_pictures(dataset: Dataset, layout: Layout) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that makes samples pictures (n, H, W, 3) of bytes, as networks of features take them.

  Latents are decoded, DECODED_A_DEVICE at a time on every device. [-1, 1] becomes 0 to 255 as ADM does, by
  trunc(127.5 x + 128). The channel of grey pictures is repeated. The function gives every process all pictures.

  Args:
    dataset: that the samples are like.
    layout: of the mesh that they are decoded on.

  Raises:
    ValueError: they are no pictures, or latents without an autoencoder that can be read. The function raises it where
      decoded pictures are not finite.
  """
  shape = dataset.shape
  codec = codec_of(dataset)
  if len(shape) != 3 or (codec is None and (shape[-1] not in (1, 3) or dataset.scaling is not None)):
    what = "latents" if dataset.scaling is not None else "samples"
    hint = "; name the autoencoder of its latents in config.sample.autoencoder" if len(shape) == 3 else ""
    raise ValueError(
      f"config.evaluate.features: expected pictures of 1 or 3 channels, {dataset.name} has {what} of {shape}{hint}"
    )

  @jax.jit
  def run(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if codec is not None:
      x = codec.module.apply({"params": params}, x, method="decode")
    finite = jnp.isfinite(x).all(axis=(1, 2, 3))
    x = jnp.minimum(jnp.clip(x, -1, 1) * 127.5 + 128, 255).astype(jnp.uint8)
    return x if x.shape[-1] == 3 else jnp.repeat(x, 3, axis=-1), finite

  params = () if codec is None else jax.tree.map(layout.everywhere, codec.params)
  one, size = functools.partial(run, params), DECODED_A_DEVICE * layout.batch_parts

  def pictures(x: np.ndarray) -> np.ndarray:
    if codec is None and np.mean(np.abs(x) > FAR) > MOST_FAR:
      _warn(
        f"{dataset.name}: more than {MOST_FAR:.0%} of the samples' numbers lie beyond {FAR:g}, and pixels in [-1, 1]; "
        "if they are latents, name their autoencoder in config.sample.autoencoder"
      )
    seen, finite = in_batches(one, layout, size, x, what=("decoding", "pictures"), whole=True)
    if bad := int(np.sum(~finite)):
      raise ValueError(
        f"{bad} of {len(x)} pictures are not finite, of samples that lie in [{x.min():.3g}, {x.max():.3g}]; those that "
        "an autoencoder overflows on have no score: look at the run's parameters, and at the scale of its latents"
      )
    return seen

  return pictures
