"""Samples as pictures: pixels as they are, latents decoded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np

from pflow_jax.data import Dataset
from pflow_jax.evaluation.figures import to_bytes, visible
from pflow_jax.families.autoencoder import codec_of

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


def to_pictures(dataset: Dataset) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that makes samples pictures (n, H, W, 3) of bytes, as networks of features take them.

  Latents are decoded, [-1, 1] is rounded to 0 to 255, and the channel of grey pictures is repeated.

  Args:
    dataset: that the samples are like.

  Raises:
    ValueError: they are no pictures, or latents without an autoencoder that can be read.
  """
  shape = dataset.shape
  codec = codec_of(dataset)
  if len(shape) != 3 or (codec is None and shape[-1] not in (1, 3)):
    hint = "; name the autoencoder of its latents in config.sample.autoencoder" if len(shape) == 3 else ""
    raise ValueError(
      f"config.evaluate.features: expected pictures of 1 or 3 channels, {dataset.name} has samples of {shape}{hint}"
    )

  def pictures(x: np.ndarray) -> np.ndarray:
    found = to_bytes(x if codec is None else codec.decode(x))
    return found if found.shape[-1] == 3 else np.repeat(found, 3, axis=-1)

  return pictures
