"""The shapes and names of a data set: sampling needs nothing else of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from pflow_jax.data.dataset import Dataset, Embedding, Scaling
from pflow_jax.data.records import Batch, Records
from pflow_jax.data.registry import load


@dataclasses.dataclass(frozen=True)
class Description:
  """A `Dataset` without its records, in plain JSON; see there.

  Attributes:
    options: arguments that `load` was given.
    shape: as of `Dataset`.
    num_classes: as of `Dataset`.
    class_names: as of `Dataset`.
    has_x0: as of `Dataset`.
    autoencoder: as of `Dataset`; another one may show the pictures.
    embedding: arguments of an `Embedding` without the empty prompt's arrays, or None.
    scaling: as of `Dataset`.
  """

  options: dict[str, Any]
  shape: tuple[int, ...]
  num_classes: int = 0
  class_names: tuple[str, ...] = ()
  has_x0: bool = True
  embedding: EmbeddingShapes | None = None
  autoencoder: str = dataclasses.field(default="", compare=False)
  scaling: Scaling | None = dataclasses.field(default=None, compare=False)

  @classmethod
  def of(cls, dataset: Dataset, options: Mapping[str, Any]) -> Description:
    """Describes the data set that `load(**options)` gave, `options` in plain JSON."""
    own = dataset.embedding
    shapes = EmbeddingShapes(own.lengths, own.text_width, own.masked, own.pooled_width) if own else None
    names = tuple(dataset.class_names)
    shape, classes = tuple(dataset.shape), dataset.num_classes
    return cls(dict(options), shape, classes, names, dataset.has_x0, shapes, dataset.autoencoder, dataset.scaling)

  def dataset(self) -> Dataset:
    """The data set; its records are read when they are asked for.

    Raises:
      ValueError: it describes no data set.
    """
    if not self.shape or min(self.shape) < 1:
      raise ValueError(f"expected a data set's shape (*space, C) of sizes >= 1, got {self.shape}")
    if self.num_classes < 0 or (self.class_names and len(self.class_names) != self.num_classes):
      raise ValueError(f"expected a name for each of {self.num_classes} classes, got {len(self.class_names)}")
    return Dataset(
      name=str(self.options.get("name")),
      shape=self.shape,
      num_classes=self.num_classes,
      class_names=self.class_names,
      records=_Unread(self),
      embedding=Embedding(**dataclasses.asdict(self.embedding)) if self.embedding else None,
      has_x0=self.has_x0,
      autoencoder=self.autoencoder,
      options=self.options,
      scaling=self.scaling,
    )


@dataclasses.dataclass(frozen=True)
class EmbeddingShapes:
  """The fields of `data.dataset.Embedding` that plain JSON can hold."""

  lengths: tuple[int, ...]
  text_width: int
  masked: bool
  pooled_width: int


@dataclasses.dataclass(frozen=True)
class _Unread:
  """Records that are looked for when they are asked for."""

  description: Description

  @functools.cached_property
  def _records(self) -> Records:
    dataset = load(**self.description.options)
    found = Description.of(dataset, self.description.options)
    differing = [
      f"{field.name} {getattr(self.description, field.name)}, got {getattr(found, field.name)}"
      for field in dataclasses.fields(found)
      if field.compare and getattr(self.description, field.name) != getattr(found, field.name)
    ]
    if differing:
      raise ValueError(f"{dataset.name}: expected the data of the run, of {'; '.join(differing)}.")
    return dataset.records

  @property
  def is_found(self) -> bool:
    """Returns whether they have been asked for before."""
    return "_records" in vars(self)

  @property
  def num_records(self) -> int | None:
    return self._records.num_records

  @property
  def read_threads(self) -> int:
    return self._records.read_threads

  def batches(self, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    return self._records.batches(batch_size, seed, rows)

  def sample(self, n: int, seed: int) -> Batch:
    return self._records.sample(n, seed)
