"""`pflow latents`: a set of pictures as the latents of an autoencoder."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from pflow_jax import data
from pflow_jax.conversion.encoding import Encoder, Store
from pflow_jax.conversion.foreign_latents import adopt, is_foreign
from pflow_jax.conversion.latent_writing import MAX_BAD, Chosen, encoded, naming, say, too_many, write
from pflow_jax.data.dataset import IN_MEMORY
from pflow_jax.data.image_source import Pictures, digest_of
from pflow_jax.data.latent_parts import check_values
from pflow_jax.data.latent_shards import SHARD_RECORDS
from pflow_jax.data.latents import UNREADABLE, Info, check_scale, read_info
from pflow_jax.data.records import ArrayRecords, SourceRecords
from pflow_jax.families.autoencoder import Codec, load_autoencoder
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.foreign import check_memory
from pflow_jax.files.progress import progress

# Options of data sets that do not change the pictures: where they are, and how they are looked at beforehand.
_ELSEWHERE = ("name", "data_dir", "embeddings", "check", "allow_unreadable")


def encode(
  dataset: data.Dataset,
  autoencoder: Codec | str | os.PathLike,
  *,
  out: str | os.PathLike | None = None,
  store: Store = "draw",
  mirror: bool = False,
  dtype: str = "float32",
  batch_size: int | None = None,
  seed: int = 0,
  shard_records: int = SHARD_RECORDS,
  max_bad: int = MAX_BAD,
) -> data.Dataset:
  """Encodes the pictures of a data set, in their order, with their classes and texts, on all devices.

  Pictures that cannot be read are left out, and named together in unreadable.txt of the folder; the same call reads
  them anew. A picture is left out too if one before has its name (in another archive, say), its class and its bytes.

  Args:
    dataset: pictures (H, W, 3) in [-1, 1].
    autoencoder: result of `load_autoencoder`, or the folder that it reads.
    out: folder, new or begun by the same call, which `latents:<out>` reads; several processes all see it. By default
      the latents are kept in memory.
    store: numbers to keep of the distribution that an autoencoder gives: a draw, whose noise depends on `seed` and the
      picture's key alone; its mean; or "moments", mean and standard deviation, of which training draws anew each time.
    mirror: keep the same of the mirror image, which training takes half of the time.
    dtype: to compute in, "float32" or "bfloat16"; a Codec has its own.
    batch_size: pictures at a time in this process; by default 16 a device.
    seed: of the draws.
    shard_records: pictures of a file.
    max_bad: pictures that cannot be read, after which it stops.

  Returns:
    The data set of their latents, with the same condition.

  Raises:
    ValueError: they are no pictures, their sides do not fit the autoencoder, the folder holds other things, its disk
      has no room, too many cannot be read, or embeddings of texts are the condition, which do not go with moments and
      mirror images.
    RuntimeError: a shard that was written cannot be read back.
  """
  name = dataset.name
  pictures = _pictures(dataset)
  codec = autoencoder if isinstance(autoencoder, Codec) else load_autoencoder(autoencoder, jnp.dtype(dtype))
  try:
    encoder = Encoder(codec, dataset.shape, store=store, mirror=mirror, batch_size=batch_size, seed=seed)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  nbytes = 4 * 4 * encoder.batch_size * int(np.prod(dataset.shape))  # batches that are read ahead, in float32
  check_memory(f"{encoder.batch_size} pictures at a time", nbytes, "give a smaller batch_size")
  embeddings = dataset.options.get("embeddings")
  if store == "moments" or mirror:
    drawn = "moments and mirror images are drawn of while they are read"
    if out is None:
      raise ValueError(f"{name}: {drawn}; give out=, a folder")
    if embeddings:
      raise ValueError(f"{name}: {drawn}, embeddings are for what is in memory; leave out embeddings=")
  chosen = Chosen(pictures)
  texts = [dataset.texts[row] for row in chosen.rows] if dataset.texts else []
  if out is None:
    return _in_memory(dataset, chosen, codec, encoder, texts, max_bad)
  scaling = codec.normalisation
  made = {
    "images": name.partition(":")[0],
    **chosen.described,
    "options": {key: value for key, value in dataset.options.items() if key not in _ELSEWHERE},
    "pictures": list(dataset.shape),
    "crop": getattr(getattr(pictures, "form", pictures), "crop", "none"),
    "autoencoder_digest": codec.digest(),
    "store": store,
    "dtype": jnp.dtype(codec.module.dtype).name,
    "seed": seed,
  }
  info = Info(
    encoder.shape,
    dataset.num_classes,
    class_names=tuple(dataset.class_names),
    autoencoder=codec.folder,
    moments=store == "moments",
    mirrored=mirror,
    shift=scaling.shift,
    scale=scaling.scale,
    made=made,
  )
  options: dict[str, Any] = {"shard_records": shard_records, "max_bad": max_bad, "texts": texts}
  write(out, info, chosen, encoder, encoder.batch_size, **options)
  return data.load(f"latents:{checked_folder(out, 'out')}", **({"embeddings": embeddings} if embeddings else {}))


def make(
  images: str,
  out: str,
  *,
  autoencoder: str | None = None,
  split: str = "train",
  size: int | None = None,
  options: Mapping[str, Any] = MappingProxyType({}),
  shard_records: int = SHARD_RECORDS,
  max_bad: int = MAX_BAD,
  **encoding: Any,
) -> Info:
  """Makes a folder of latents of pictures that are named, or of latents of others.

  Args:
    images: see `picture_set`; or latents of others, see `conversion.foreign_latents.adopt`.
    out: the folder.
    autoencoder: folder of the autoencoder; latents of others need none.
    split: of the data set.
    size: see `picture_set`.
    options: of the data set.
    shard_records: see `encode`.
    max_bad: see `encode`.
    **encoding: other keyword arguments of `encode`.

  Returns:
    The folder's description.

  Raises:
    ValueError: see `encode`; or pictures could not be read, and the folder is complete without them.
  """
  if not {"name", "split"}.isdisjoint(options):
    raise ValueError("option: name and split have flags of their own, --images and --split")
  if is_foreign(images):
    info = adopt(images, out, autoencoder=autoencoder, shard_records=shard_records, max_bad=max_bad, **options)
  elif autoencoder is None:
    raise ValueError("autoencoder: pictures need one; give its folder")
  else:
    dataset = picture_set(images, size, split=split, options=options)
    encode(dataset, autoencoder, out=out, shard_records=shard_records, max_bad=max_bad, **encoding)
    found = read_info(checked_folder(out, "out"))
    assert found is not None
    info = found
  again = f", {info.made['repeated']:,} repeated pictures left out," if info.made.get("repeated") else ""
  use = f"train with --config.data.name=latents:{out}"
  say(f"wrote {info.num_records:,} latents of {info.shape}{again} in {out}; {use}")
  if info.unreadable:
    raise ValueError(
      f"{info.unreadable:,} pictures could not be read and are left out; {out}/{UNREADABLE} names them. The latents of "
      "the others are complete; once some are repaired, the same command adds them"
    )
  return info


def picture_set(
  images: str, size: int | None = None, *, split: str = "train", options: Mapping[str, Any] | None = None
) -> data.Dataset:
  """Loads the pictures that `pflow latents --images` names.

  Args:
    images: a folder of pictures, or the name of a data set.
    size: side that image files are scaled and cut to, as ADM does; by default 256, unless options say a size. Of a set
      with an option of that name it is that option.
    split: of the data set.
    options: of the data set, by name.

  Raises:
    ValueError: there is no such data set, or it has a size of its own.
  """
  kind, colon, _ = images.partition(":")
  if kind not in data.sources() and os.path.isdir(os.path.expanduser(images)):
    kind, images = "folder", f"folder:{images}"
  source = data.sources().get(kind) if colon or kind in data.sources() else None
  known = inspect.signature(source).parameters if source else {}
  options = dict(options or {})
  if "crop" in known and options.get("image_size") is None:
    options |= {"image_size": 256 if size is None else size, "crop": "adm"}
  elif size is not None and "size" in known:
    options["size"] = size
  elif size is not None:
    raise ValueError(f"size: is for image files, {images} has a size of its own; see the options of the data set")
  if "check" in known:  # what cannot be read is told at the end
    options = {"check": False, **options}
  return data.load(images, split=split, **options)


class _Records:
  """Pictures in memory, or of a source that has nothing but x0, one by one."""

  def __init__(self, records: ArrayRecords | SourceRecords, num_classes: int):
    self._records, self._num_classes = records, num_classes

  @property
  def labels(self) -> np.ndarray | None:
    return self._records.label if isinstance(self._records, ArrayRecords) and self._num_classes else None

  def __len__(self) -> int:
    return int(self._records.num_records)

  def key(self, row: int) -> str:
    return str(row)

  def common_name(self, row: int) -> str:
    return str(row)

  def content(self, row: int) -> str:
    picture, label = self.read(row)
    return digest_of(picture.tobytes() + str(label).encode())

  def read(self, row: int) -> tuple[np.ndarray, int]:
    records = self._records
    if isinstance(records, ArrayRecords):
      # Where embeddings are the condition, labels are of classes that there were before.
      return records.x0[row], int(records.label[row]) if self._num_classes else 0
    batch = records.take(np.array([row]))
    return batch["x0"][0], int(batch["cond"][0])


def _pictures(dataset: data.Dataset) -> Pictures:
  """The pictures of a data set, one by one.

  Raises:
    ValueError: they have no order.
  """
  records = dataset.records
  if isinstance(records, SourceRecords) and isinstance(records.source, Pictures):
    return records.source
  if not isinstance(records, ArrayRecords | SourceRecords):
    raise ValueError(
      f"{dataset.name}: its pictures have no order; load it anew, pf.data.load(**data.options) for that of a run"
    )
  return _Records(records, dataset.num_classes)


def _in_memory(
  dataset: data.Dataset, chosen: Chosen, codec: Codec, encoder: Encoder, texts: list[str], max_bad: int
) -> data.Dataset:
  """The data set of latents that are kept in memory."""
  count, size, bad = len(chosen), encoder.batch_size, dict[int, str]()
  check_memory(f"latents of {dataset.name}", 8 * count * int(np.prod(encoder.shape)), "give out=, a folder")
  x0, label = np.empty((count, *encoder.shape), np.float32), np.empty(count, np.int32)
  places = ((0, np.arange(start, min(start + size, count))) for start in range(0, count, size))
  with progress(count, 0, "latents", unit="pictures") as report:
    for batch, stored in encoded(places, chosen, encoder):
      if len(stored):
        with naming(batch, stored, chosen):
          check_values(stored, batch.label, dataset.num_classes)
        x0[batch.kept], label[batch.kept] = stored[:, 0, 0], batch.label
      bad |= batch.unreadable
      if len(bad) > min(max_bad, count - 1):
        raise ValueError(f"{dataset.name}: {too_many(bad, chosen, min(max_bad, count - 1))}")
      report.update(int(batch.places[-1]) + 1)
  kept = np.setdiff1d(np.arange(count), np.array(list(bad), int))
  if bad:
    say(f"{len(bad):,} of {count:,} pictures cannot be read and are left out: {'; '.join(bad.values())}")
  embeddings = dataset.records.embeddings if isinstance(dataset.records, ArrayRecords) else {}
  records = ArrayRecords(x0[kept], label[kept], {name: of[chosen.rows[kept]] for name, of in embeddings.items()})
  scaling = dataclasses.replace(codec.normalisation, std=float(records.x0.std(dtype=np.float64)))
  about: dict[str, Any] = {"autoencoder": codec.folder, "options": {"name": IN_MEMORY}, "scaling": scaling}
  check_scale(dataset.name, scaling)
  return dataclasses.replace(
    dataset, shape=encoder.shape, records=records, texts=tuple(texts[place] for place in kept) if texts else (), **about
  )
