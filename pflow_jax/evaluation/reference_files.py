"""Files of references that others publish: moments of features, and perhaps features or images.

| file | holds |
|---|---|
| ADM's VIRTUAL_*.npz | mu, sigma, mu_s, sigma_s of the training set, arr_0 with 10,000 images |
| pytorch-fid's .npz, EDM's | mu, sigma |
| .npz of MeanFlow and others in JAX | ref_mu, ref_sigma |
| LakonLab's .pkl | mean, cov, real_feats_np, num_real_feeded |
| EDM2's .pkl | num_images, and mu and sigma by metric: fid, fd_dinov2 |
| StyleGAN's .pkl (FeatureStats) | raw_mean, raw_cov, num_items, perhaps all_features |

Which one it is is told by what it holds. Nothing of a pickle is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pflow_jax.evaluation.metrics import Moments
from pflow_jax.files.array_files import Npz
from pflow_jax.files.foreign import regular_file, shown
from pflow_jax.files.pickled_arrays import read_pickled

IMAGES = "arr_0"
_MOMENTS = (("mu", "sigma"), ("ref_mu", "ref_sigma"), ("mean", "cov"))
_SPATIAL = ("mu_s", "sigma_s")
_COUNTS = ("num_real_feeded", "num_images", "num_items")


class Found(NamedTuple):
  """Contents of a file.

  Attributes:
    pool: moments of the pooled features; None in a file of images alone.
    spatial: moments of spatial features, or None.
    features: (M, F) float32, or None.
    network: name of the feature network; "" if the file does not tell.
    shape: of the images that the file has, (N, H, W, 3), or None.
  """

  pool: Moments | None
  spatial: Moments | None = None
  features: np.ndarray | None = None
  network: str = ""
  shape: tuple[int, ...] | None = None

  @property
  def lacks_features(self) -> bool:
    """Returns whether there are images, whose features are yet to be made."""
    return self.shape is not None and self.features is None


def read_reference(path: str | os.PathLike, metric: str) -> Found:
  """Reads a file of a reference, without its images.

  Args:
    path: of the file.
    metric: which of several that a file has moments for.

  Raises:
    ValueError: the file is no reference, or damaged.
  """
  with regular_file(path).open("rb") as file:
    is_archive = file.read(2) == b"PK"
  return _read_archive(path) if is_archive else _read_pickle(path, metric)


def checked_features(features: Any, width: int | None, *, name: str) -> np.ndarray:
  """Returns features (M, F) as float32.

  Args:
    features: from a file.
    width: F that they should have, if it is known.
    name: of the file, in errors.

  Raises:
    ValueError: they are no such features, or not finite.
  """
  features = np.asarray(features)
  if features.ndim != 2 or not features.size or features.dtype.kind != "f" or width not in (None, features.shape[1]):
    expected = f"(M, {'F' if width is None else width})"
    raise ValueError(f"{name}: expected features {expected} of floating numbers, got {features.dtype} {features.shape}")
  if not np.isfinite(features).all():
    raise ValueError(f"{name}: some of the features are not finite; make the file anew")
  return features.astype(np.float32, copy=False)


def _read_archive(path: str | os.PathLike) -> Found:
  with Npz(path) as file:
    there = file.members.keys()
    pair = next((pair for pair in _MOMENTS if there >= set(pair)), ())
    keys = {*pair, *(_SPATIAL if there >= set(_SPATIAL) else ()), *(there & {"features", "network", "num_images"})}
    shape = file.shape(IMAGES) if IMAGES in there else None
    if not pair and shape is None:
      raise _unknown(path, there)
    arrays = file.read(keys)
  if not pair:
    return Found(None, shape=shape)
  pool = _moments(path, arrays, pair)
  features = checked_features(arrays["features"], len(pool.mean), name=str(path)) if "features" in arrays else None
  spatial = _moments(path, arrays, _SPATIAL) if _SPATIAL[0] in arrays else None
  network = arrays.get("network", np.array(""))
  if network.shape != () or network.dtype.kind != "U":
    raise ValueError(f"{path}: expected the name of a feature network, got {network.dtype} {network.shape}")
  return Found(pool, spatial, features, str(network), shape)


def _read_pickle(path: str | os.PathLike, metric: str) -> Found:
  content = read_pickled(path)
  if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
    raise _unknown(path, [type(content).__name__])
  if {"raw_mean", "raw_cov", "num_items"} <= content.keys():
    return _feature_stats(path, content)
  pair = next((pair for pair in _MOMENTS if content.keys() >= set(pair)), None)
  if pair is not None:
    features = content.get("real_feats_np")
    pool = _moments(path, content, pair)
    return Found(pool, None, None if features is None else checked_features(features, len(pool.mean), name=str(path)))
  inner = {key: value for key, value in content.items() if isinstance(value, dict)}
  if not inner:
    raise _unknown(path, content)
  if metric not in inner:
    raise ValueError(f"{path}: expected a metric of {shown(sorted(inner), 200)}, got {shown(metric)}")
  pair = next((pair for pair in _MOMENTS if inner[metric].keys() >= set(pair)), None)
  if pair is None:
    raise _unknown(path, inner[metric])
  return Found(_moments(path, {**inner[metric], "num_images": content.get("num_images")}, pair))


def _feature_stats(path: str | os.PathLike, content: Mapping[str, Any]) -> Found:
  """StyleGAN's sums of features and of their outer products."""
  count = _count(path, content)
  total, products = (np.asarray(content[key]) for key in ("raw_mean", "raw_cov"))
  if (
    total.ndim != 1 or products.shape != (len(total), len(total)) or (total.dtype, products.dtype) != (np.float64,) * 2
  ):
    got = f"{total.dtype} {total.shape} and {products.dtype} {products.shape}"
    raise ValueError(f"{path}: expected raw_mean (F,) and raw_cov (F, F) of float64, got {got}")
  if count is None or count < 2:
    raise ValueError(f"{path}: expected num_items, at least 2, got {count}")
  mean = total / count
  cov = (products - count * mean[:, None] * mean[None, :]) / (count - 1)
  parts = content.get("all_features")
  features = None
  if isinstance(parts, list) and parts:
    each = [checked_features(part, len(mean), name=str(path)) for part in parts]
    features = np.concatenate(each)
  return Found(Moments.from_arrays(mean, cov, count, name=str(path)), None, features)


def _moments(path: str | os.PathLike, content: Mapping[str, Any], pair: tuple[str, ...]) -> Moments:
  mean, cov = (content[key] for key in pair)
  return Moments.from_arrays(mean, cov, _count(path, content), name=f"{path}, {' and '.join(pair)}")


def _count(path: str | os.PathLike, content: Mapping[str, Any]) -> int | None:
  """The number of images that the moments are of, if the file tells."""
  found = next((content[key] for key in _COUNTS if content.get(key) is not None), None)
  if found is None:
    return None
  count = np.asarray(found)
  if count.shape != () or count.dtype.kind not in "iu":
    raise ValueError(f"{path}: expected a number of images, got {shown(found)}")
  return int(count)


def _unknown(path: str | os.PathLike, names: Iterable[str]) -> ValueError:
  expected = "moments of features (mu and sigma, ref_mu and ref_sigma, mean and cov) or images (arr_0)"
  return ValueError(f"{path}: expected {expected}, got {shown(sorted(names), 200)}")
