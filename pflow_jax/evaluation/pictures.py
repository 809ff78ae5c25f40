"""Samples as pictures: pixels as they are, latents decoded."""

from __future__ import annotations

import functools
import logging

import numpy as np

from pflow_jax.data import Dataset
from pflow_jax.evaluation.figures import visible
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
