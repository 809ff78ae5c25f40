"""References that samples are compared with: moments of a data set's features, and features for precision and recall.

They are read from the files that others publish, see `evaluation.reference_files`, or made of a set of pictures.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pflow_jax import data
from pflow_jax.data.records import ArrayRecords, SourceRecords
from pflow_jax.evaluation.feature_networks import PICTURES_AT_ONCE, FeatureNetwork, open_feature_network
from pflow_jax.evaluation.figures import to_bytes
from pflow_jax.evaluation.metrics import SAMPLES_PER_FEATURE, Moments, MomentSums
from pflow_jax.evaluation.reference_files import IMAGES, read_reference
from pflow_jax.files.array_files import Npz
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.foreign import check_memory, shown
from pflow_jax.files.progress import progress
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.settings.mesh import MeshSettings

_FORMAT = "pflow-reference-1"
_UNIT_RANGE = 1.001  # pixels lie in [-1, 1]; those of a resized float picture may be rounded beyond


@dataclasses.dataclass(frozen=True)
class Reference:
  """Moments of features, and features, that samples are compared with.

  Attributes:
    pool: moments of pooled features (F,); their `count` is the number of images, None where it is not known.
    spatial: moments of spatial features, for sFID; None without.
    features: pooled features of some images, (M, F) float32, for precision and recall; None without.
    network: name of the feature network; "" where it is not known.
  """

  pool: Moments
  spatial: Moments | None = None
  features: np.ndarray | None = None
  network: str = ""

  @property
  def num_images(self) -> int | None:
    """Number of images that the moments are of; None where it is not known."""
    return self.pool.count

  def check_network(self, network: FeatureNetwork) -> None:
    """Raises ValueError unless this is a reference of `network`, told by the width and, where it is known, the name."""
    width = len(self.pool.mean)
    if width != network.num_features:
      raise ValueError(
        f"reference: expected moments of {network.num_features} features, which {network.name} has, got {width}: they "
        "are of another feature network"
      )
    if self.network and self.network != network.name:
      raise ValueError(
        f"reference: expected features of {network.name}, got those of {shown(self.network, 100)}; make it again"
      )

  def save(self, path: str | os.PathLike) -> None:
    """Writes one .npz, whole or not at all; `load_reference` reads it, and for its mu and sigma pytorch-fid does."""
    arrays: dict[str, Any] = {"format": _FORMAT, "network": self.network, "mu": self.pool.mean, "sigma": self.pool.cov}
    if self.num_images is not None:
      arrays["num_images"] = self.num_images
    if self.spatial is not None:
      arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.cov}
    if self.features is not None:
      arrays["features"] = self.features
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


Network = FeatureNetwork | str | os.PathLike
"""A feature network, or its file, which is opened on all devices."""


def load_reference(path: str | os.PathLike, network: Network | None = None, *, metric: str = "fid") -> Reference:
  """Reads a reference.

  ADM's files have 10,000 images beside the moments: with `network` their features are made, a part at a time. Of a file
  of images alone, such as samples in ADM's form, the moments are made as well.

  Args:
    path: a file as of `evaluation.reference_files`, or of `Reference.save`.
    network: that the samples' features are made with, or its file; by default nothing is compared or made.
    metric: which of the moments of EDM2's files, "fid" or "fd_dinov2".

  Raises:
    ValueError: the file is no reference or damaged, is of another network, or has images alone and no network is given.
  """
  found = read_reference(path, metric)
  network = None if network is None else _opened(network)
  reference = found.pool and Reference(found.pool, found.spatial, found.features, found.network)
  if reference and network:
    reference.check_network(network)
  if reference and (network is None or not found.lacks_features):
    return reference
  if network is None or found.shape is None:
    raise ValueError(f"{path}: holds images and no moments; give the feature network that makes them")
  made = _made_of_file(path, found.shape, network)
  return dataclasses.replace(reference, features=made.features) if reference else made


def make_reference(
  dataset: data.Dataset, network: Network, *, width: int = 2048, keep: int = 0, seed: int = 0, quiet: bool = False
) -> Reference:
  """Makes a reference of all pictures of a data set, a part at a time, in their order.

  Args:
    dataset: pictures (H, W, 3), or (H, W, 1), whose channel is repeated.
    network: that makes the features, or its file.
    width: of the features of a file, see `open_feature_network`.
    keep: pictures whose features are kept for precision and recall, drawn without replacement; ADM's protocol has
      10,000, and 0 keeps none.
    seed: of that draw.
    quiet: whether to print no progress.

  Raises:
    ValueError: they are no pictures in an order, or there are too few for moments of so many features.
  """
  name, records = dataset.name, dataset.records
  if not dataset.has_x0 or len(dataset.shape) != 3 or dataset.shape[-1] not in (1, 3):
    raise ValueError(f"{name}: expected a set of pictures (H, W, 3) or (H, W, 1), got {dataset.shape}")
  if not isinstance(records, ArrayRecords | SourceRecords):
    raise ValueError(
      f"{name}: its pictures have no order; load it anew, pf.data.load(**data.options) for that of a run"
    )
  opened = _opened(network, width)
  count, width = records.num_records, opened.num_features
  if not 0 <= keep <= count:
    raise ValueError(f"keep: expected 0 <= keep <= {count}, the number of pictures, got {keep}")
  if count < 2 or (not keep and count < SAMPLES_PER_FEATURE * width):
    raise ValueError(
      f"{name}: a Fréchet distance in {width} features needs at least {SAMPLES_PER_FEATURE * width} pictures, got "
      f"{count}; take more, or keep features for precision and recall"
    )
  check_memory(f"{keep} kept features", 3 * 4 * keep * width, "keep fewer")
  kept = np.sort(np.random.default_rng(seed).choice(count, keep, replace=False))
  return _made(_pictures(name, records), count, opened, kept, quiet)


def _opened(network: Network, width: int = 2048) -> FeatureNetwork:
  """Returns a network, opened on all devices where it is a file."""
  if isinstance(network, (str, os.PathLike)):
    return open_feature_network(network, make_layout(MeshSettings().sizes, ()), width)
  return network


def _made_of_file(path: str | os.PathLike, shape: tuple[int, ...], network: FeatureNetwork) -> Reference:
  """Makes moments and features of all images, of this shape, of an .npz file."""
  if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
    raise ValueError(f"{path}: expected images (N, H, W, 3) as {IMAGES}, got {shape}")
  check_memory(f"{path}: features of {shape[0]} images", 2 * 4 * shape[0] * network.num_features)
  with Npz(path) as file:
    return _made(_images(path, file), shape[0], network, np.arange(shape[0]))


def _images(path: str | os.PathLike, file: Npz) -> Iterator[np.ndarray]:
  for images in file.rows(IMAGES, PICTURES_AT_ONCE):
    if images.dtype != np.uint8:
      raise ValueError(f"{path}: expected images of uint8 as {IMAGES}, got {images.dtype}")
    yield images


def _made(
  pictures: Iterator[np.ndarray], count: int, network: FeatureNetwork, kept: np.ndarray, quiet: bool = False
) -> Reference:
  """Makes a reference of `count` pictures, with the features of those numbered `kept`, in ascending order."""
  pool, spatial = MomentSums(network.num_features), None
  features, done = np.empty((len(kept), network.num_features), np.float32), 0
  with progress(count, 0, "reference", quiet or not is_first(), unit="pictures") as report:
    for part in pictures:
      made = network(part)
      pool.update(made.pool)
      if made.spatial is not None:
        spatial = spatial or MomentSums(made.spatial.shape[1])
        spatial.update(made.spatial)
      first, last = np.searchsorted(kept, [done, done + len(part)])
      features[first:last] = made.pool[kept[first:last] - done]
      report.update(done := done + len(part))
  return Reference(
    pool.moments(), spatial.moments() if spatial else None, features if len(kept) else None, network.name
  )


def _pictures(name: str, records: ArrayRecords | SourceRecords) -> Iterator[np.ndarray]:
  """Yields the pictures in their order, (n, H, W, 3) uint8; the next are read while some are worked on."""
  with ThreadPoolExecutor(os.cpu_count()) as readers, ThreadPoolExecutor(1) as ahead:

    def read(start: int) -> np.ndarray:
      rows = range(start, min(start + PICTURES_AT_ONCE, records.num_records))
      if isinstance(records, ArrayRecords):
        return _as_bytes(name, records.x0[rows.start : rows.stop])
      # Pillow decodes outside Python's lock.
      return np.stack(list(readers.map(lambda row: _as_bytes(name, records.source[row]["x0"]), rows)))

    waiting: Future[np.ndarray] = ahead.submit(read, 0)
    for start in range(PICTURES_AT_ONCE, records.num_records + PICTURES_AT_ONCE, PICTURES_AT_ONCE):
      pictures = waiting.result()
      if start < records.num_records:
        waiting = ahead.submit(read, start)
      yield pictures


def _as_bytes(name: str, x: np.ndarray) -> np.ndarray:
  """Returns pictures (..., H, W, 1 or 3) of bytes, or of [-1, 1], as bytes (..., H, W, 3)."""
  if x.dtype != np.uint8:
    if not np.abs(x).max() <= _UNIT_RANGE:
      raise ValueError(
        f"{name}: expected pixels in [-1, 1], got {shown(float(np.abs(x).max()))}; latents are no pictures"
      )
    x = to_bytes(x)
  return x if x.shape[-1] == 3 else np.repeat(x, 3, axis=-1)
