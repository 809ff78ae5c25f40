"""A user's own arrays, from a file."""

from __future__ import annotations

import pathlib

import numpy as np

from pflow_jax.data.dataset import Dataset, from_arrays, split_rows


def npz(path: str, *, split: str = "train", held_out: int = 0) -> Dataset:
  """Arrays saved with `np.savez(path, x0=..., label=..., class_names=...)`; x0 alone is a set without classes.

  Args:
    path: of the .npz file; x0 (n, *space, C), uint8 or floating, label (n,) integers, class_names (classes,) strings.
    split: "train" or "test".   held_out: records kept out of "train" for "test".
  Raises: ValueError for a missing or unreadable file, unknown arrays, or arrays that do not fit (see `from_arrays`).
  """
  name = f"npz:{path}"
  if not pathlib.Path(path).exists():
    raise ValueError(f"{name}: there is no such file; write one with np.savez(path, x0=..., label=...).")
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = dict(file)
  except Exception as error:  # a damaged zip or header fails in a dozen ways
    raise ValueError(f"{name}: not a readable .npz of plain arrays ({error}).") from error
  unknown = sorted(arrays.keys() - {"x0", "label", "class_names"})
  if "x0" not in arrays or unknown:
    raise ValueError(f"{name}: expected x0 and perhaps label and class_names, got {sorted(arrays)}.")
  x0, label = arrays["x0"], arrays.get("label")
  names = tuple(map(str, arrays.get("class_names", ())))
  if label is not None and not names:
    names = tuple(map(str, range(int(label.max()) + 1)))
  rows = split_rows(name, len(x0), split, held_out)
  return from_arrays(name, x0[rows], None if label is None else label[rows], class_names=names)
