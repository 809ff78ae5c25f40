"""Images in parquet files, as the Hugging Face Hub has them: a column with the bytes of files, one with classes.

Rows are read a row group at a time, so images come fast in their order, and slowly in any other: a data set of these is
for `pflow latents`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pflow_jax.data.dataset import Dataset, check_classes
from pflow_jax.data.image_source import Form, ImageSource, find_files, relative_names
from pflow_jax.data.pixels import Crop
from pflow_jax.data.records import SourceRecords
from pflow_jax.data.tar_source import check_split, numbered_classes
from pflow_jax.files.foreign import check_memory, decoding, shown

_KEPT = 8  # row groups in memory: threads that read images in their order are in a few at a time


class ParquetSource(ImageSource):
  """Random access to the images of parquet files, see `ImageSource`."""

  def __init__(
    self,
    groups: Sequence[tuple[str, int, int]],
    files: Sequence[tuple[str, int]],
    column: str,
    names: Sequence[str | None],
    labels: np.ndarray,
    form: Form,
  ):
    """Takes path, number and rows of each row group, name and rows of each file, the column of bytes, and of each image
    the path that its row tells, if any, and its class."""
    self.groups, self.files, self.column = groups, files, column
    self.names, self._labels, self.form = names, labels, form
    self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
    self._begins = np.cumsum([0, *(rows for _, rows in files)])
    self._forget()

  def _forget(self) -> None:
    self._read: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name not in ("_read", "_lock")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state
    self._forget()

  def __len__(self) -> int:
    return len(self.names)

  def open(self, row: int) -> tuple[str | bytes, str]:
    number = int(np.searchsorted(self._starts, row, "right")) - 1
    path, group, _ = self.groups[number]
    place = row - int(self._starts[number])
    with decoding(f"{path}, row group {group}"):
      content = self._group(number)[place].as_py()
    name = f"{self.names[row] or f'group {group}, row {place}'} of {path}"
    if content is None:
      raise ValueError(f"{name}: there are no bytes of an image")
    return content, name

  def label(self, row: int) -> int:
    return int(self._labels[row])

  @property
  def labels(self) -> np.ndarray:
    return self._labels

  def key(self, row: int) -> str:
    file = int(np.searchsorted(self._begins, row, "right")) - 1
    return f"{self.files[file][0]}:{row - int(self._begins[file])}"

  def common_name(self, row: int) -> str:
    return self.names[row] or self.key(row)

  def _group(self, number: int) -> Any:
    """The column of a row group; of several threads that want it one reads it."""
    with self._lock:
      if number not in self._read:
        path, group, _ = self.groups[number]
        self._read[number] = _column(_open(path).read_row_group(group, columns=[self.column]), self.column)
      self._read.move_to_end(number)
      while len(self._read) > _KEPT:
        self._read.popitem(last=False)
      return self._read[number]


def parquet(
  path: str,
  *,
  split: str = "train",
  image_size: int | None = None,
  channels: int = 3,
  crop: Crop = "fit",
  image_key: str = "image",
  label_key: str | None = "label",
  num_classes: int | None = None,
) -> Dataset:
  """Images in the column of parquet files, as bytes or as the Hub's pairs of bytes and path.

  Args:
    path: a file, a folder of *.parquet, or a pattern: data/train-*.parquet.
    split: "train"; for others give their own files.
    image_size: side in pixels, required.
    channels: 3 (RGB) or 1 (grey).
    crop: "adm" cuts and scales as the published work on ImageNet does, see `data.pixels.center_crop`.
    image_key: the column of images.
    label_key: the column of classes, numbers; None for no classes.
    num_classes: by default those that the Hub's description names, else one more than the largest number.

  Raises:
    ValueError: for files without these columns, row groups that the machine cannot hold, and classes that do not fit.
    ImportError: pyarrow is not there.
  """
  name = f"parquet:{path}"
  try:
    import pyarrow.parquet as _  # noqa: F401
  except ImportError as error:
    raise ImportError("parquet files are read with pyarrow; `pip install pyarrow`") from error
  check_split(name, split)
  form = Form.checked(name, image_size, channels, crop)
  paths = find_files(name, path, ".parquet")
  groups: list[tuple[str, int, int]] = []
  files: list[tuple[str, int]] = []
  names: list[str | None] = []
  labels: list[np.ndarray] = []
  column, class_names = "", None
  for file, short in zip(paths, relative_names(path, paths), strict=True):
    with decoding(f"{file} cannot be read as parquet"):
      opened = _open(file)
      column, name_column = _columns(opened.schema_arrow, image_key)
      class_names = class_names or _names(opened.schema_arrow, label_key)
      for group in range(opened.num_row_groups):
        about = opened.metadata.row_group(group)
        check_memory(f"row group {group}", 2 * _KEPT * about.total_byte_size, "write it with fewer rows in a group")
        groups.append((file, group, about.num_rows))
      files.append((short, opened.metadata.num_rows))
      names += _names_of_rows(opened, name_column)
      if label_key is not None:
        labels.append(_labels(opened, label_key))
  if not names:
    raise ValueError(f"{name}: there are no rows.")
  found, classes = np.zeros(len(names), np.int32), tuple[str, ...]()
  if label_key is not None:
    count = len(class_names) if class_names and num_classes is None else num_classes
    found, classes = numbered_classes(name, np.concatenate(labels), count)
    classes = class_names if class_names and len(class_names) == len(classes) else classes
  check_classes(name, len(classes))
  source = ParquetSource(groups, files, column, names, found, form)
  return Dataset(name, form.shape, len(classes), classes, SourceRecords(source))


def _open(path: str) -> Any:
  from pyarrow.parquet import ParquetFile

  return ParquetFile(path)


def _columns(schema: Any, image_key: str) -> tuple[str, str | None]:
  """Names of the columns of bytes and of paths, the latter None if there is none.

  Raises:
    ValueError: there is no such column.
  """
  import pyarrow.types as types

  index = schema.get_field_index(image_key)
  kind = schema.field(index).type if index >= 0 else None
  if kind is not None and (types.is_binary(kind) or types.is_large_binary(kind)):
    return image_key, None
  if kind is not None and types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
    return f"{image_key}.bytes", f"{image_key}.path" if kind.get_field_index("path") >= 0 else None
  got = "there is none" if kind is None else f"it has {kind}"
  raise ValueError(f"expected a column {image_key!r} of bytes, {got}; choose image_key= from {shown(schema.names)}")


def _column(table: Any, name: str) -> Any:
  """A column of a table that has it alone; that of bytes may be a field of another."""
  column = table.column(0).combine_chunks()
  return column.field(name.rpartition(".")[2]) if "." in name else column


def _names_of_rows(opened: Any, column: str | None) -> list[str | None]:
  """The paths of images that the rows of a file tell; None where there are none."""
  if column is None:
    return [None] * opened.metadata.num_rows
  return _column(opened.read(columns=[column]), column).to_pylist()


def _labels(opened: Any, label_key: str) -> np.ndarray:
  if label_key not in opened.schema_arrow.names:
    raise ValueError(
      f"there is no column {label_key!r}; choose label_key= from {shown(opened.schema_arrow.names)}, or None for no "
      "classes"
    )
  column = opened.read(columns=[label_key]).column(0)
  labels = column.to_numpy()
  if column.null_count or labels.dtype.kind not in "iu":
    got = f"{column.type} with {column.null_count} gaps"
    raise ValueError(f"expected whole numbers in the column {label_key!r}, got {got}")
  return labels


def _names(schema: Any, label_key: str | None) -> tuple[str, ...] | None:
  """Names of the classes, by the Hub's description of the columns; None where it has none."""
  with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
    described = json.loads((schema.metadata or {})[b"huggingface"])
    names = described["info"]["features"][label_key]["names"]
    if all(isinstance(name, str) and name.strip() for name in names) and len(set(names)) == len(names) > 0:
      return tuple(names)
  return None
