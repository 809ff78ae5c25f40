"""Data sets: a shape, its conditions, and the records behind them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pflow_jax.data.pictures import as_html, png_of, sheet
from pflow_jax.data.records import ArrayRecords, AugmentedRecords, Records
from pflow_jax.files.foreign import check_memory, shown

IN_MEMORY = "arrays"  # name of a set that is in no file
MAX_CLASSES = 2**20  # each has a name, and a row of the network's table
SHOWN_IMAGES, SHOWN_POINTS = 32, 50_000  # examples in a notebook's picture
TEXT_DTYPE = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Embedding:
  """Shapes of the arrays that a set's prompts are embedded as, a dict.

  Attributes:
    lengths: L of "text" (B, L, text_width) bfloat16, ascending; a batch has one of them. Empty without "text".
    text_width: features of "text".
    masked: whether there is "mask" (B, L) bool, True where there is a token.
    pooled_width: features of "pooled" (B, pooled_width) float32; 0 without it.
    null: the empty prompt's arrays, without the batch axis and of the longest L; None if they are not known.
  """

  lengths: tuple[int, ...] = ()
  text_width: int = 0
  masked: bool = False
  pooled_width: int = 0
  null: dict[str, np.ndarray] | None = dataclasses.field(default=None, repr=False)

  def leaves(self, length: int | None = None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape, without the batch axis, and dtype of every array, for a text of `length`, by default the longest."""
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    if self.lengths:
      length = self.lengths[-1] if length is None else length
      if length not in self.lengths:
        raise ValueError(f"expected a text length of {self.lengths}, got {length}.")
      leaves["text"] = (length, self.text_width), TEXT_DTYPE
      if self.masked:
        leaves["mask"] = (length,), np.dtype(bool)
    if self.pooled_width:
      leaves["pooled"] = (self.pooled_width,), np.dtype(np.float32)
    return leaves

  @property
  def nbytes(self) -> int:
    """Bytes of an example's arrays, its text of the longest length."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.leaves().values())


@dataclasses.dataclass(frozen=True)
class Scaling:
  """The scale of latents z = (latent - shift) * scale.

  Attributes:
    shift: of the autoencoder, a number a channel; empty where it is not known.
    scale: likewise.
    std: standard deviation of all numbers of z, as it was measured; None where it was not.
  """

  shift: tuple[float, ...] = ()
  scale: tuple[float, ...] = ()
  std: float | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
  """A named set of examples, images or points, with classes, with prompts, or with neither.

  Attributes:
    name: the one that `load` was given.
    shape: (*space, C) of one x0; images are (H, W, C), points are (C,).
    num_classes: 0 for a set without classes, whose labels are then all 0.
    class_names: one name a class, in label order; empty without classes.
    records: `ArrayRecords`, `GeneratedRecords`, `SourceRecords`, `BucketRecords` or `AugmentedRecords`.
    texts: one description a record, in record order, or empty.
    embedding: arrays of the prompts that are the condition in place of a label, or None.
    has_x0: False for prompts alone, on which training is data-free.
    autoencoder: folder of the autoencoder that x0 are latents of, with which pictures are shown; "" for none.
    options: arguments of `load` that give it again; for arrays in memory, the name IN_MEMORY.
    scaling: the scale of x0 that are latents, or None.

  Raises:
    ValueError: for sizes below 1, more classes than MAX_CLASSES, or an example that the machine cannot hold.
  """

  name: str
  shape: tuple[int, ...]
  num_classes: int
  class_names: tuple[str, ...]
  records: Records
  texts: tuple[str, ...] = ()
  embedding: Embedding | None = None
  has_x0: bool = True
  autoencoder: str = ""
  options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": IN_MEMORY}, compare=False)
  scaling: Scaling | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    if not self.shape or min(self.shape) < 1:
      raise ValueError(f"{self.name}: shape must be (*space, C) of sizes >= 1, got {shown(self.shape)}.")
    check_classes(self.name, self.num_classes)
    check_memory(f"{self.name}: an example of shape {shown(self.shape)}", self.example_bytes)

  @property
  def example_bytes(self) -> int:
    """Bytes of an example in memory, its text of the longest length."""
    return 4 * math.prod(self.shape) + (self.embedding.nbytes if self.embedding else 0)

  @property
  def lengths(self) -> tuple[int, ...]:
    """Lengths of text that batches may have, ascending; empty without text."""
    return self.embedding.lengths if self.embedding else ()

  @property
  def null_cond(self) -> Any:
    """The empty condition: the label num_classes, or the empty prompt's arrays, or None if they are not known."""
    return self.embedding.null if self.embedding else self.num_classes

  def cond_shapes(self, batch_size: int, length: int | None = None) -> Any:
    """Shapes of a batch's condition, with text of `length`, one of `lengths`, by default the longest.

    Returns:
      a jax.ShapeDtypeStruct (batch_size,) int32, or a dict of them.
    """
    from jax import ShapeDtypeStruct as struct

    if self.embedding is None:
      return struct((batch_size,), np.int32)
    leaves = self.embedding.leaves(length)
    return {name: struct((batch_size, *shape), dtype) for name, (shape, dtype) in leaves.items()}

  @property
  def num_records(self) -> int | None:
    """Records in an epoch; None for a generated set, which never ends."""
    return self.records.num_records

  @property
  def _is_at_hand(self) -> bool:
    """Returns whether there are records, and nothing has to be looked for to read them."""
    return self.records is not None and getattr(self.records, "is_found", True)

  def __repr__(self) -> str:
    count = "" if not self._is_at_hand else f"{'endless' if self.num_records is None else f'{self.num_records:,}'} "
    kind = "points" if len(self.shape) == 1 else "images" if self.shape[-1] in (1, 3) else "latents"
    parts = [self.name, f"{count}{kind} of {' x '.join(map(str, self.shape))}" if self.has_x0 else f"{count}prompts"]
    parts += [f"{self.num_classes} classes"] if self.num_classes else []
    parts += ["conditioned on texts"] if self.embedding else []
    return f"Dataset({', '.join(parts)})"

  def _repr_html_(self) -> str:
    images = len(self.shape) == 3 and self.shape[-1] in (1, 3)  # latents are no pictures without their decoder
    if not self._is_at_hand or not self.has_x0 or not (images or self.shape == (2,)):
      return as_html(repr(self))
    most = self.num_records
    count = SHOWN_IMAGES if images else SHOWN_POINTS
    try:
      x0 = self.records.sample(count if most is None else min(count, most), 0)["x0"]
    except (OSError, ValueError):  # files may have gone since they were listed
      return as_html(repr(self))
    return as_html(repr(self), png_of(sheet(x0)))


def text_length(cond: Any) -> int | None:
  """L of a batch's cond["text"] (B, L, D); None for a condition without text."""
  return cond["text"].shape[1] if isinstance(cond, dict) and "text" in cond else None


def from_arrays(
  x0: np.ndarray,
  label: np.ndarray | None = None,
  *,
  name: str = IN_MEMORY,
  class_names: Sequence[str] = (),
  texts: tuple[str, ...] = (),
) -> Dataset:
  """A data set held in memory, from arrays of your own.

  Args:
    x0: (n, *space, C); uint8 in [0, 255], scaled to [-1, 1] when read, or floating, used as it is.
    label: (n,) integers, or None for a set without classes.
    name: shown in messages.
    class_names: the names of the classes, in label order; by default their numbers, 0 to the largest label.
    texts: n descriptions, or none.

  Raises:
    ValueError: lengths, types or labels do not fit together.
  """
  x0 = np.asarray(x0)
  if x0.ndim < 2 or x0.size == 0:
    raise ValueError(f"{name}: x0 must be (n, *space, C) with n >= 1 and sizes >= 1, got shape {x0.shape}.")
  if x0.dtype != np.uint8:
    x0 = _floating(name, x0)
  if label is None:
    if class_names:
      raise ValueError(f"{name}: {len(class_names)} class_names without labels; give label=.")
    label = np.zeros(len(x0), np.int32)
  else:
    label = np.asarray(label)
    check_labels(name, label, len(x0))
    class_names = tuple(class_names) or tuple(map(str, range(int(label.max()) + 1)))
    _check_names(name, class_names, label)
  if texts and len(texts) != len(x0):
    raise ValueError(f"{name}: {len(x0)} records need as many texts, got {len(texts)}.")
  return Dataset(
    name=name,
    shape=x0.shape[1:],
    num_classes=len(class_names),
    class_names=tuple(class_names),
    records=ArrayRecords(x0, label.astype(np.int32)),
    texts=tuple(texts),
  )


def augment(dataset: Dataset, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Dataset:
  """A data set whose examples are changed at random each time they are read: mirrored, cut out, recoloured.

  The numbers that an example is changed with depend on the run's seed and its place in the run alone, so a run resumes
  exactly. A config names such a set once a function that returns it is registered, see `register_source`.

  Args:
    dataset: what the examples are read from.
    change: (x0, rng) -> x0 of one example (*space, C), float32, pixels in [-1, 1]; rng is a NumPy Generator. The shape
      may be another one, the same for all examples.

  Raises:
    ValueError: the set has prompts alone, or the function gives no finite numbers of a shape (*space, C).
  """
  if not isinstance(dataset, Dataset) or not callable(change):
    got = f"{type(dataset).__name__} and {type(change).__name__}"
    raise ValueError(f"augment: expected what load or from_arrays returns, and a function (x0, rng) -> x0; got {got}.")
  if not dataset.has_x0:
    raise ValueError(f"{dataset.name}: has prompts alone, and no examples to augment.")
  records = AugmentedRecords(dataset.records, change)
  x0 = records.sample(1, 0)["x0"][0]
  if x0.ndim != len(dataset.shape) or not np.isfinite(x0).all():
    got = f"shape {x0.shape}" if x0.ndim != len(dataset.shape) else "numbers that are not finite"
    raise ValueError(f"augment: change must give finite numbers of a shape (*space, C), as {dataset.shape}; got {got}.")
  return dataclasses.replace(dataset, shape=x0.shape, records=records, options={"name": IN_MEMORY})


def check_classes(name: str, count: int) -> None:
  """Raises ValueError for a number of classes below 0 or above MAX_CLASSES."""
  if not 0 <= count <= MAX_CLASSES:
    raise ValueError(f"{name}: expected 0 to {MAX_CLASSES:,} classes, got {shown(count)}.")


def check_labels(name: str, label: np.ndarray, count: int) -> None:
  """Raises ValueError unless `label` is `count` integers, none of them negative or too large for MAX_CLASSES."""
  if label.shape != (count,) or label.dtype.kind not in "iu":
    raise ValueError(f"{name}: label must be {count} integers, got {label.dtype} of shape {label.shape}.")
  if label.min() < 0:
    raise ValueError(f"{name}: labels must be at least 0, got {label.min()}.")
  check_classes(f"{name}: labels to {label.max()}", int(label.max()) + 1)


def _check_names(name: str, class_names: Sequence[str], label: np.ndarray) -> None:
  if label.max() >= len(class_names):
    raise ValueError(
      f"{name}: labels must lie in [0, {len(class_names)}), one class name each,"
      f" got {label.min()} to {label.max()}; name every class in class_names=."
    )
  wrong = [one for one in class_names if not isinstance(one, str) or not one.strip()]
  if wrong:
    raise ValueError(f"{name}: class_names must be words, got {shown(wrong[0])}.")
  ((word, count),) = collections.Counter(class_names).most_common(1)
  if count > 1:
    raise ValueError(f"{name}: class_names must differ, got {count} times {shown(word)}; tell them apart.")


def _floating(name: str, x0: np.ndarray) -> np.ndarray:
  """x0 as float32, which has to be finite."""
  if x0.dtype.kind != "f":
    raise ValueError(f"{name}: x0 must be uint8 or floating, got {x0.dtype}.")
  with np.errstate(over="ignore"):
    x0 = x0.astype(np.float32, copy=False)
  if not np.isfinite(x0).all():
    raise ValueError(f"{name}: x0 holds values that are not finite; remove those records.")
  return x0


def split_rows(name: str, count: int, split: str, held_out: int) -> np.ndarray:
  """Rows, int64 and sorted, of the "train" or "test" part of `count` records.

  "test" is `held_out` records drawn once and for all (the same in every run); "train" is the rest,
  so with held_out = 0 it is everything.

  Raises:
    ValueError: for another split, or a "test" with nothing held out.
  """
  if split not in ("train", "test"):
    raise ValueError(f"{name}: split must be 'train' or 'test', got {split!r}.")
  if not 0 <= held_out < count:
    raise ValueError(f"{name}: held_out must be in [0, {count}), got {held_out}.")
  if split == "test" and held_out == 0:
    raise ValueError(f"{name}: nothing is held out for the split 'test'; give held_out=<records> to both splits.")
  order = np.random.default_rng(0).permutation(count)
  return np.sort(order[:held_out] if split == "test" else order[held_out:])
