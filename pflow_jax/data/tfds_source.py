"""Image sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from PIL import Image

from pflow_jax.data.dataset import Dataset, check_classes
from pflow_jax.data.image_source import digest_of
from pflow_jax.data.pixels import MODES, Crop, center_crop, check_image_options, to_pixels, to_unit
from pflow_jax.data.records import Record, SourceRecords
from pflow_jax.files.foreign import MAX_JSON, decoding, in_bytes, open_image, read_json, regular_file, shown
from pflow_jax.files.nearest import nearest

_FILE_MODES = MODES | {4: "RGBA"}  # modes of images that keep their size


class TfdsSource:
  """Random access to the serialized examples of tfds: {"x0": (H, W, C) float32, "label": () int32}.

  Only the image and the label are decoded. Images are decoded here: for some, tfds lets Pillow start other programs.
  """

  def __init__(
    self,
    name: str,
    source: Sequence[bytes],
    features: Any,
    image_key: str,
    label_key: str | None,
    shape: tuple[int, int, int],
    num_classes: int,
    crop: Crop = "fit",
  ):
    """Takes the two features and the serialized examples; messages begin with `name`."""
    self.name, self.source, self.features = name, source, features
    self.image_key, self.label_key = image_key, label_key
    self.shape, self.num_classes, self.crop = shape, num_classes, crop

  def __len__(self) -> int:
    return len(self.source)

  @property
  def labels(self) -> np.ndarray | None:
    """Returns None: the records have them."""
    return None

  def key(self, row: int) -> str:
    """Returns the number of a record, see `data.image_source.Pictures`."""
    return str(row)

  def common_name(self, row: int) -> str:
    """Returns the number of a record: copies are not looked for."""
    return str(row)

  def content(self, row: int) -> str:
    """Returns a digest of a record, which holds for the same one prepared anew."""
    raw = getattr(self.source, "data_source", None)
    record = raw[row] if raw is not None else None
    if isinstance(record, bytes):
      # Counts of bytes do not depend on the order of a record's features, which changes when it is prepared anew.
      return digest_of(np.bincount(np.frombuffer(record, np.uint8), minlength=256))
    pixels, label = self.read(row)
    return digest_of(pixels.tobytes() + str(label).encode())

  def __getitem__(self, row: SupportsIndex) -> Record:
    pixels, label = self.read(int(row))
    return {"x0": to_unit(pixels), "label": np.asarray(label, np.int32)}

  def read(self, row: int) -> tuple[np.ndarray, int]:
    """Returns the pixels of an image, (H, W, C) uint8, and its class.

    Raises:
      ValueError: the record is broken.
    """
    import tensorflow_datasets as tfds

    with decoding(f"{self.name}: record {row} cannot be read"):
      is_image = isinstance(self.features[self.image_key], tfds.features.Image)
      decoders = {self.image_key: tfds.decode.SkipDecoding()} if is_image else None
      record = self.features.deserialize_example_np(self.source[row], decoders=decoders)
      image = record[self.image_key]
      label = 0 if self.label_key is None else int(record[self.label_key])
      if not 0 <= label < max(self.num_classes, 1):
        raise ValueError(f"its label is {shown(label)}, not in [0, {max(self.num_classes, 1)})")
      if not isinstance(image, bytes):
        return self._fitted(_image(np.asarray(image))), label
    with open_image(image, f"of {self.name}, record {row}") as opened:
      return self._fitted(opened), label

  def _fitted(self, image: Image.Image) -> np.ndarray:
    height, width, channels = self.shape
    if (image.mode, image.size) == (_FILE_MODES.get(channels), (width, height)):
      return np.asarray(image).reshape(self.shape)
    if channels not in MODES:
      raise ValueError(f"expected {width} x {height} pixels of {channels} channels, got {image.size} of {image.mode}")
    if self.crop == "adm":
      return center_crop(image, height, channels)
    return to_pixels(image, (height, width), channels)


def _image(pixels: np.ndarray) -> Image.Image:
  return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def tfds_images(
  name: str,
  *,
  split: str = "train",
  data_dir: str | None = None,
  image_size: int | None = None,
  image_key: str = "image",
  label_key: str | None = "label",
  crop: Crop = "fit",
) -> Dataset:
  """A set of TensorFlow Datasets: (H, W, C) or (image_size, image_size, C), classes of its label.

  It is read from `data_dir` if prepared there in array_record or parquet, else downloaded and
  prepared as array_record.

  Args:
    name: as tfds knows it, "name/config:version".
    split: any tfds split, e.g. "train[:90%]".
    data_dir: default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_size: crop to the centred square and resize; None keeps images that have one size.
    image_key: the feature with the image.
    label_key: the feature with the label; None for no classes.
    crop: "adm" cuts and scales to image_size as the published work on ImageNet does, see `data.pixels.center_crop`.

  Raises:
    ValueError: for an unknown set, split or feature, for images of varying size without image_size, and for data
      prepared as tfrecord.
  """
  import tensorflow_datasets as tfds

  builder = _prepare(name, data_dir)
  with decoding(f"tfds:{name}: cannot be read"):
    features = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict):
      raise ValueError(f"expected features by name, got {type(features).__name__}")
  if crop == "adm" and image_size is None:
    raise ValueError(f"tfds:{name}: crop='adm' scales to a square; give image_size=<pixels>, e.g. 256.")
  shape = _image_shape(name, features, image_key, image_size)
  class_names: tuple[str, ...] = ()
  if label_key is not None:
    class_names = _class_names(name, features, label_key)
  with decoding(f"tfds:{name}: cannot be read"):
    try:
      raw = tfds.decode.DeserializeMethod.RAW_BYTES
      source = builder.as_data_source(split=split, deserialize_method=raw)
    except NotImplementedError as error:
      raise ValueError(
        f"{builder.data_path} holds {builder.info.file_format.value} files, which need TensorFlow; give another "
        "data_dir, or prepare it with file_format='array_record'."
      ) from error
    wanted = tfds.features.FeaturesDict({key: features[key] for key in (image_key, label_key) if key is not None})
  source = TfdsSource(f"tfds:{name}", source, wanted, image_key, label_key, shape, len(class_names), crop)
  return Dataset(f"tfds:{name}", shape, len(class_names), class_names, SourceRecords(source))


def _prepare(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  _check_files(name, data_dir)
  with decoding(f"tfds:{name}: cannot be read"):
    try:
      builder = tfds.builder(name, data_dir=data_dir)
      prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError as error:
      # The message of tfds lists its thousand sets. Community sets would need the network to list.
      known = tfds.list_builders(with_community_datasets=False)
      near = nearest(name, known, 3)
      hint = f"; the nearest names are {', '.join(near)}." if near else "."
      raise ValueError(f"tfds has no data set {name!r}{hint}") from error
  if not prepared:
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
  return builder


def _check_files(name: str, data_dir: str | None) -> None:
  """Checks the files of a prepared set before tfds, which opens pipes and imports the modules named in features.json.

  Raises:
    ValueError: for a file that is not regular, too large a table, or a feature of another package.
  """
  root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets"))
  for folder, _, files in os.walk(root / name.partition("/")[0].partition(":")[0]):
    for file in files:
      path = regular_file(os.path.join(folder, file))
      if path.suffix in (".json", ".txt") and path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: expected at most {in_bytes(MAX_JSON)}, got {in_bytes(path.stat().st_size)}")
      if file == "features.json":
        _check_features(path)


def _check_features(path: pathlib.Path) -> None:
  waiting: list[Any] = [read_json(path)]
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      for kind in (value.get("pythonClassName"), value.get("type")):
        module = kind.rpartition(".")[0] if isinstance(kind, str) else ""
        if module and module not in sys.modules and not module.startswith("tensorflow_datasets."):
          raise ValueError(f"{path}: {shown(kind)} is not of tfds; import the module that you have it from first")
    waiting += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


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
  check_classes(f"tfds:{name}", feature.num_classes)
  return tuple(feature.names)
