"""`pflow latents`: a set of pictures as the latents of an autoencoder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from pflow_jax import data
from pflow_jax.data.dataset import IN_MEMORY
from pflow_jax.data.latents import write_latents
from pflow_jax.data.records import ArrayRecords, SourceRecords
from pflow_jax.families.autoencoder import Codec, load_autoencoder
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.foreign import check_memory
from pflow_jax.files.progress import Progress, progress

_ROWS = 64  # pictures that are read at a time


def encode(
  dataset: data.Dataset,
  autoencoder: Codec | str | os.PathLike,
  *,
  out: str | os.PathLike | None = None,
) -> data.Dataset:
  """Encodes the pictures of a data set, in their order, with their classes and texts.

  Args:
    dataset: pictures (H, W, 3) in [-1, 1].
    autoencoder: result of `load_autoencoder`, or the folder that it reads.
    out: new folder, which `latents:<out>` reads; by default the latents are kept in memory.

  Returns:
    The data set of their latents.

  Raises:
    ValueError: they are no pictures, their sides do not fit the autoencoder, or the folder holds latents.
  """
  records, name = dataset.records, dataset.name
  if len(dataset.shape) != 3 or dataset.shape[-1] != 3:
    raise ValueError(f"{name}: expected a set of pictures (H, W, 3), got {dataset.shape}")
  if not isinstance(records, ArrayRecords | SourceRecords):
    raise ValueError(
      f"{name}: its pictures have no order; load it anew, pf.data.load(**data.options) for that of a run"
    )
  codec = autoencoder if isinstance(autoencoder, Codec) else load_autoencoder(autoencoder)
  height, width, _ = dataset.shape
  if height % codec.factor or width % codec.factor:
    raise ValueError(f"{name}: expected sides that are multiples of {codec.factor}, got {height} x {width}; scale them")
  count, folder = records.num_records, codec.folder
  shape = (height // codec.factor, width // codec.factor, codec.module.latent_channels)
  if out is None:
    check_memory(f"latents of {name}", 8 * count * int(np.prod(shape)), "give out=, a folder")
  with progress(count, 0, "latents", unit="pictures") as report:
    batches = _encoded(records, codec, report)
    if out is not None:
      path = checked_folder(out, "out")
      names = {"class_names": dataset.class_names, "texts": dataset.texts, "autoencoder": folder}
      write_latents(path, batches, num_classes=dataset.num_classes, **names)  # type: ignore[arg-type]
      return data.load(f"latents:{path}")
    x0, label = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  embeddings = records.embeddings if isinstance(records, ArrayRecords) else {}
  kept, options = ArrayRecords(x0, label, embeddings), {"name": IN_MEMORY}
  return dataclasses.replace(dataset, shape=shape, records=kept, autoencoder=folder, options=options)


def _encoded(
  records: ArrayRecords | SourceRecords, codec: Codec, report: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields latents and classes of the records in their order."""
  for start in range(0, records.num_records, _ROWS):
    rows = np.arange(start, min(start + _ROWS, records.num_records))
    batch = records.take(rows)
    yield codec.encode(batch["x0"]), records.label[rows] if isinstance(records, ArrayRecords) else batch["cond"]
    report.update(int(rows[-1]) + 1)
