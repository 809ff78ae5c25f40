"""Image sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from PIL import Image

from pflow_jax.data.dataset import Dataset
from pflow_jax.data.pixels import check_image_options, to_pixels, to_unit
from pflow_jax.data.records import Record, SourceRecords


class TfdsSource:
  """Random access to a tfds data source: {"x0": (H, W, C) float32, "label": () int32}."""

  def __init__(
    self,
    source: Sequence[dict[str, Any]],
    image_key: str,
    label_key: str | None,
    shape: tuple[int, int, int],
  ):
    self.source = source
    self.image_key = image_key
    self.label_key = label_key
    self.shape = shape

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, row: SupportsIndex) -> Record:
    record = self.source[int(row)]
    pixels = record[self.image_key]
    if pixels.shape != self.shape:
      size, _, channels = self.shape
      image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
      pixels = to_pixels(image, size, channels)
    label = 0 if self.label_key is None else record[self.label_key]
    return {"x0": to_unit(pixels), "label": np.asarray(label, np.int32)}


def tfds_images(
  name: str,
  *,
  split: str = "train",
  data_dir: str | None = None,
  image_size: int | None = None,
  image_key: str = "image",
  label_key: str | None = "label",
) -> Dataset:
  """A set of TensorFlow Datasets: (H, W, C) or (image_size, image_size, C), classes of its label.

  It is read from `data_dir` if prepared there in array_record or parquet, else downloaded and
  prepared as array_record.

  Args:
    name: as tfds knows it, "name/config:version".   split: any tfds split, e.g. "train[:90%]".
    data_dir: default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_size: crop to the centred square and resize; None keeps images that have one size.
    image_key, label_key: features to read; label_key None for no classes.
  Raises: ValueError for an unknown set, split or feature, for images of varying size without
    image_size, and for data prepared as tfrecord.
  """
  builder = _prepare(name, data_dir)
  features = builder.info.features
  shape = _image_shape(name, features, image_key, image_size)
  class_names: tuple[str, ...] = ()
  if label_key is not None:
    class_names = _class_names(name, features, label_key)
  try:
    source = builder.as_data_source(split=split)
  except NotImplementedError as error:
    raise ValueError(
      f"tfds:{name}: {builder.data_path} holds {builder.info.file_format.value} files, which need"
      " TensorFlow; give another data_dir, or prepare it with file_format='array_record'."
    ) from error
  records = SourceRecords(TfdsSource(source, image_key, label_key, shape))
  return Dataset(f"tfds:{name}", shape, len(class_names), class_names, records)


def _prepare(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.registered import DatasetNotFoundError

  if data_dir is not None:
    data_dir = str(pathlib.Path(data_dir).expanduser())
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except DatasetNotFoundError as error:
    # The message of tfds lists its thousand sets. Community sets would need the network to list.
    known = tfds.list_builders(with_community_datasets=False)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; the nearest names are {', '.join(nearest)}." if nearest else "."
    raise ValueError(f"tfds has no data set {name!r}{hint}") from error
  if not builder.is_prepared():
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
  return builder


def _feature(name: str, features: Any, key: str, option: str) -> Any:
  if key not in features:
    raise ValueError(f"tfds:{name}: no feature {key!r}; choose {option}= from {sorted(features)}.")
  return features[key]


def _image_shape(name: str, features: Any, image_key: str, image_size: int | None) -> tuple[int, int, int]:
  feature = _feature(name, features, image_key, "image_key")
  if len(feature.shape) != 3 or feature.np_dtype != np.uint8:
    raise ValueError(
      f"tfds:{name}: expected (H, W, C) uint8 images in {image_key!r}, got {feature.shape}"
      f" {np.dtype(feature.np_dtype)}; choose image_key= from {sorted(features)}."
    )
  height, width, channels = feature.shape
  if image_size is None and height is not None and width is not None:
    return height, width, channels
  check_image_options(f"tfds:{name}", image_size, channels)
  size = int(image_size or 0)
  return size, size, channels


def _class_names(name: str, features: Any, label_key: str) -> tuple[str, ...]:
  feature = _feature(name, features, label_key, "label_key")
  if not getattr(feature, "num_classes", None):
    raise ValueError(
      f"tfds:{name}: {label_key!r} is not a class label; choose label_key= from {sorted(features)},"
      " or None for no classes."
    )
  return tuple(feature.names)
