"""Pictures of samples that are kept beside their features: a file that ADM's evaluator reads, or a folder of PNG."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from pflow_jax import data
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.feature_networks import FeatureNetwork
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.settings import PART, Keep
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.files.array_files import Npz
from pflow_jax.files.atomic import replace_safely, sync
from pflow_jax.files.foreign import in_bytes

SHOWN = 64  # samples in the picture
SPARE = 2**30  # bytes of a disk that stay free
NAME = "samples"  # of the file or folder, among the parts whose pictures it has


def bytes_of_samples(samplers: list[Parts], dataset: data.Dataset, network: FeatureNetwork, keep: Keep) -> int:
  """Returns the bytes that the samples of an evaluation are yet to take on the disk, at most at a time."""
  codec = codec_of(dataset)
  height, width = (n * (1 if codec is None else codec.factor) for n in dataset.shape[:2])
  picture = 0 if keep == "none" else height * width * 3  # a PNG is smaller
  row = 4 * (network.num_features + network.num_spatial + network.num_logits + 1) + picture
  needed = row * sum(parts.num_missing() for parts in samplers)
  # A file is written while the parts have its pictures, one file after the other.
  to_write = [parts.count * picture for parts in samplers if keep == "npz" and not _is_whole(parts)]
  return needed + max(to_write, default=0)


def check_disk(path: pathlib.Path, needed: int) -> None:
  """Raises ValueError where the disk has no room for so many bytes."""
  path.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(path).free
  if needed + SPARE > free:
    raise ValueError(
      f"{path}: features and samples take {in_bytes(needed)}, the disk has {in_bytes(free)} free; name another folder "
      "with --out, or keep no samples"
    )


def save_picture(seen: np.ndarray, path: pathlib.Path) -> None:
  """Writes the first samples as one picture, into a folder that is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figures.save(figures.image_grid({"": seen / np.float32(127.5) - 1}, columns=math.isqrt(SHOWN)), path)


def save_pngs(seen: np.ndarray, start: int, folder: pathlib.Path) -> None:
  """Writes samples from number `start` on, each as a file that its number names."""

  def save(i: int) -> None:
    path = folder / f"{start + i:06}.png"
    Image.fromarray(seen[i]).save(path)
    sync(path)

  with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow encodes outside Python's lock
    list(pool.map(save, range(len(seen))))


def gather(parts: Parts, keep: Keep) -> str:
  """Moves the pictures of all parts into one file or folder among them.

  Returns:
    a sentence where that does not have all pictures: it was moved elsewhere before; else "".
  """
  path = parts.folder / (f"{NAME}.npz" if keep == "npz" else NAME)
  if keep == "npz":
    if parts.has("pictures"):
      _save_npz(parts, path)
    if not _is_whole(parts):
      return f"{path} is not there any more, or not whole, and its samples are not drawn again"
    parts.remove("pictures")
  elif keep == "png":
    path.mkdir(exist_ok=True)
    for part in parts.paths():
      for picture in sorted(part.glob("*.png")):
        picture.rename(path / picture.name)
    if (count := sum(1 for _ in path.glob("*.png"))) < parts.count:
      return f"{path} has {count} of {parts.count} pictures; others were moved, and are not drawn again"
  return ""


def _is_whole(parts: Parts) -> bool:
  """Returns whether there is a file with as many pictures as the parts have rows."""
  path = parts.folder / f"{NAME}.npz"
  try:
    with Npz(path) as file:
      return file.shape("arr_0")[0] == file.shape("arr_1")[0] == parts.count
  except (OSError, ValueError, KeyError, IndexError):
    return False


def _save_npz(parts: Parts, path: pathlib.Path) -> None:
  """Writes all pictures as arr_0 (N, H, W, 3) and the labels as arr_1, a part at a time."""
  partial = path.with_name(path.name + ".partial")
  try:
    # Not compressed: pictures hardly become smaller, and are read a part at a time.
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
      for name, key in (("arr_0", "pictures"), ("arr_1", "label")):
        rows = parts.rows(key)
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
          descr = np.lib.format.dtype_to_descr(rows[0:1].dtype)
          header = {"descr": descr, "fortran_order": False, "shape": rows.shape}
          np.lib.format.write_array_header_1_0(file, header)
          for start in range(0, rows.shape[0], PART):
            file.write(np.ascontiguousarray(rows[start : start + PART]).data)
    replace_safely(partial, path)  # the parts' pictures are removed then
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
