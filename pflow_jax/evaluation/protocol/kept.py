"""Pictures of samples that are kept: a file that ADM's evaluator reads, or a folder of PNG."""

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
from pflow_jax.evaluation.protocol.settings import PART, Protocol
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.files.foreign import in_bytes

SHOWN = 64  # samples in the picture
SPARE = 2**30  # bytes of a disk that stay free


def check_disk(
  path: pathlib.Path, dataset: data.Dataset, network: FeatureNetwork, protocol: Protocol, samplers: int
) -> None:
  """Raises ValueError where the disk has no room for what will be written."""
  codec = codec_of(dataset)
  height, width = (n * (1 if codec is None else codec.factor) for n in dataset.shape[:2])
  # Pool, spatial features and logits of Inception are three such arrays; a PNG is smaller than its bytes.
  needed = protocol.num_samples * 3 * 4 * network.num_features
  if protocol.keep != "none":
    # Parts hold what an .npz then holds in one file.
    needed += protocol.num_samples * height * width * 3 * (2 if protocol.keep == "npz" else 1)
  needed = needed * samplers - sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  path.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(path).free
  if needed > 0 and needed + SPARE > free:
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
  with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow encodes outside Python's lock
    save = lambda i: Image.fromarray(seen[i]).save(folder / f"{start + i:06}.png")
    list(pool.map(save, range(len(seen))))


def gather(parts: Parts, path: pathlib.Path, keep: str) -> None:
  """Moves the pictures of all parts into one file or folder; what was moved before is left there."""
  if keep == "npz":
    _save_npz(parts, path.with_name(path.name + ".npz"))
  elif keep == "png":
    path.mkdir(exist_ok=True)
    for part in parts.paths():
      for picture in sorted(part.glob("*.png")):
        picture.rename(path / picture.name)


def _save_npz(parts: Parts, path: pathlib.Path) -> None:
  """Writes all pictures as arr_0 (N, H, W, 3) and the labels as arr_1, a part at a time; parts lose them."""
  if path.exists():
    parts.remove("pictures")
    return
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
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  parts.remove("pictures")
