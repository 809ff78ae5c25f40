"""A feature network that is a random map of an image's quarters."""

import numpy as np

from pflow_jax.evaluation.feature_networks import Features


class StubNetwork:
  """A `FeatureNetwork` without weights from anywhere.

  Attributes:
    name: see `FeatureNetwork`.
    num_features: see `FeatureNetwork`.
    num_spatial: see `FeatureNetwork`.
    num_logits: see `FeatureNetwork`.
    most: the most pictures that it was given at once.
  """

  num_logits = 0

  def __init__(self, num_features=6, spatial=4, name="stub 1"):
    self.name, self.num_features, self.most = name, num_features, 0
    self.num_spatial = spatial
    rng = np.random.default_rng(num_features)
    self._pool, self._spatial = (
      rng.normal(size=(12, n)).astype(np.float32) if n else None for n in (num_features, spatial)
    )

  def __call__(self, pictures):
    assert pictures.dtype == np.uint8
    assert pictures.ndim == 4
    assert pictures.shape[-1] == 3
    self.most = max(self.most, len(pictures))
    n, h, w, _ = pictures.shape
    quarters = (
      pictures.reshape(n, 2, h // 2, 2, w // 2, 3).mean(axis=(2, 4)).reshape(n, 12).astype(np.float32) / 128 - 1
    )
    spatial = None if self._spatial is None else quarters @ self._spatial
    return Features(quarters @ self._pool, spatial, None)
