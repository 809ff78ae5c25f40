"""A user's own arrays, from a file."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from pflow_jax.data.dataset import Dataset, from_arrays, split_rows
from pflow_jax.data.records import ArrayRecords
from pflow_jax.files.array_files import read_npz
from pflow_jax.files.foreign import decoding, shown


def npz(path: str, *, split: str = "train", held_out: int = 0) -> Dataset:
  """Arrays saved with `np.savez(path, x0=..., label=..., class_names=...)`; x0 alone is a set without classes.

  Without class_names the classes are 0 to the largest label, named by their numbers. Floating images (n, H, W, C), or
  videos, without a value below 0 and with one above 2 are refused: they are pixels that were not scaled. Points and
  vectors (n, C), sequences (n, L, C), and latents, which have both signs, may have any range.

  Args:
    path: of the .npz file; x0 (n, *space, C), uint8 or floating, label (n,) integers, class_names (classes,) strings.
    split: "train" or "test".
    held_out: records kept out of "train" for "test".

  Raises:
    ValueError: for a missing or unreadable file, unknown arrays, or arrays that do not fit (see `from_arrays`).
  """
  name = f"npz:{path}"
  try:
    arrays = read_npz(os.path.expanduser(path), ["x0"], ["label", "class_names"])
  except ValueError as error:
    raise ValueError(f"npz:{error}; write one with np.savez(path, x0=..., label=...).") from error
  x0, label = arrays["x0"], arrays.get("label")
  names = _names(name, arrays.get("class_names"))
  whole = from_arrays(x0, label, name=name, class_names=names)
  records = whole.records
  assert isinstance(records, ArrayRecords)
  _check_scale(name, records.x0)
  rows = split_rows(name, records.num_records, split, held_out)
  return dataclasses.replace(whole, records=ArrayRecords(records.x0[rows], records.label[rows]))


def _check_scale(name: str, x0: np.ndarray) -> None:
  if x0.dtype != np.uint8 and x0.ndim >= 4 and x0.min() >= 0 and x0.max() > 2:
    raise ValueError(
      f"{name}: the values of x0 lie in [{x0.min():g}, {x0.max():g}], like pixels; save them as uint8, which is scaled "
      "when it is read, or scale them to about [-1, 1]."
    )


def _names(name: str, names: np.ndarray | None) -> tuple[str, ...]:
  if names is None:
    return ()
  if names.ndim != 1 or names.dtype.kind != "U":
    what = f"{shown(str(names.dtype))} of shape {names.shape}"
    raise ValueError(f"{name}: class_names must be strings (classes,), such as np.array(['cat', 'dog']), got {what}.")
  with decoding(f"{name}: class_names"):
    return tuple(map(str, names))
