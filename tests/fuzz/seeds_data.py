"""Valid files of every kind that the readers of data take, small, each with the call that reads all of it."""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from pflow_jax import data
from pflow_jax.data import emoji
from pflow_jax.data.latent_shards import LatentFolder, write_latents
from pflow_jax.data.latents import Info
from pflow_jax.data.pixels import read_pixels
from pflow_jax.files.array_files import read_npy
from tests import prompt_folders
from tests.data.test_emoji import write_package

Seed = tuple[pathlib.Path, Callable[[], Any]]  # a file or a folder, and what reads it

ENDINGS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")


def whole(dataset: data.Dataset) -> None:
  """Reads a set as a run does: all records, and a batch."""
  data.examples(dataset, dataset.num_records or 4)
  next(data.batches(dataset, 3, seed=0, num_threads=0))
  assert dataset.null_cond is not None or dataset.embedding is not None
  dataset.cond_shapes(2)


def npz_images(folder: pathlib.Path) -> Seed:
  x0 = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)
  np.savez(folder / "a.npz", x0=x0, label=np.arange(6) % 3, class_names=np.array(["cat", "dog", "owl"]))
  return folder / "a.npz", lambda: whole(data.load(f"npz:{folder}/a.npz"))


def npz_compressed(folder: pathlib.Path) -> Seed:
  np.savez_compressed(folder / "a.npz", x0=np.zeros((5, 8, 8, 4), np.float16), label=np.arange(5))
  return folder / "a.npz", lambda: whole(data.load(f"npz:{folder}/a.npz", held_out=1))


def npz_points(folder: pathlib.Path) -> Seed:
  np.savez(folder / "a.npz", x0=np.random.default_rng(0).normal(size=(7, 2)))
  return folder / "a.npz", lambda: whole(data.load(f"npz:{folder}/a.npz"))


def npy(folder: pathlib.Path) -> Seed:
  np.save(folder / "a.npy", np.ones((2, 3, 4), np.float32))
  return folder / "a.npy", lambda: read_npy(folder / "a.npy")


def _image(path: pathlib.Path, mode: str = "RGB") -> None:
  pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
  image = Image.fromarray(pixels)
  image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
  exif = Image.Exif()
  exif[0x0112] = 6  # turned
  image.save(path, ENDINGS[path.suffix[1:]], **({} if path.suffix in (".bmp", ".gif") else {"exif": exif}))


def _image_seed(ending: str, mode: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    _image(folder / f"a.{ending}", mode)
    return folder / f"a.{ending}", lambda: read_pixels(folder / f"a.{ending}", (4, 4), 3)

  return seed


def frames(folder: pathlib.Path) -> Seed:
  images = [Image.new("P", (6, 6), colour) for colour in range(4)]
  images[0].save(folder / "a.gif", save_all=True, append_images=images[1:])
  return folder / "a.gif", lambda: read_pixels(folder / "a.gif", (4, 4), 1)


def class_folders(folder: pathlib.Path) -> Seed:
  for name in ("cat", "dog"):
    (folder / name / "more").mkdir(parents=True)
    for i, ending in enumerate(ENDINGS):
      _image((folder / name / "more" if i % 2 else folder / name) / f"{i}.{ending}")
  (folder / "cat" / "notes.txt").write_text("no image")
  return folder, lambda: whole(data.load(f"folder:{folder}", image_size=4, held_out=1))


def flat_folder(folder: pathlib.Path) -> Seed:
  for i in range(3):
    _image(folder / f"{i}.png")
  return folder, lambda: whole(data.load(f"folder:{folder}", image_size=4, check=False, channels=1))


def prompts_txt(folder: pathlib.Path) -> Seed:
  (folder / "p.txt").write_text("a cat\n\n  ein Füßchen \na cat\n猫\n", encoding="utf-8")
  return folder / "p.txt", lambda: data.read_prompts(f"{folder}/p.txt")


def prompts_jsonl(folder: pathlib.Path) -> Seed:
  rows = [
    {"text": "a cat", "id": 1, "file": "1.npy"},
    {"caption": "a\ndog", "file": "x/2.npy", "more": [1, {"a": None}]},
  ]
  (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return folder / "p.jsonl", lambda: data.read_prompts(f"{folder}/p.jsonl", file_field="file")


def prompts_csv(folder: pathlib.Path) -> Seed:
  (folder / "p.csv").write_text('id,caption\n1,"a cat, red\nand blue"\n2,a dog\n\n3,\n')
  return folder / "p.csv", lambda: data.read_prompts(f"{folder}/p.csv")


def latents(folder: pathlib.Path) -> Seed:
  rng = np.random.default_rng(0)
  batch = rng.normal(size=(7, 2, 2, 3)).astype(np.float16), rng.integers(0, 4, 7)
  write_latents(str(folder), [batch], num_classes=4, shard_size=4)
  return folder, lambda: whole(data.load(f"latents:{folder}"))


def moments(folder: pathlib.Path) -> Seed:
  rng = np.random.default_rng(0)
  info = Info((2, 2, 3), 4, moments=True, mirrored=True, shift=(0.0,) * 3, scale=(0.5,) * 3)
  written = LatentFolder(folder, info, 7, shard_records=4)
  written.claim()
  for number in written.todo():
    with written.writing(number) as shard:
      count = len(written.rows(number))
      shard.add(rng.random((count, *info.stored)).astype(np.float16), rng.integers(0, 4, count))
  written.finish()
  return folder, lambda: whole(data.load(f"latents:{folder}"))


def tar_archive(folder: pathlib.Path) -> Seed:
  """As WebDataset has them."""
  _image(folder / "0.png")
  with tarfile.open(folder / "a.tar", "w") as tar:
    for number in range(4):
      tar.add(folder / "0.png", f"n/{number}.png")
      member = tarfile.TarInfo(f"n/{number}.cls")
      member.size = 1
      tar.addfile(member, io.BytesIO(b"%d" % (number % 2)))
  (folder / "0.png").unlink()
  return folder / "a.tar", lambda: whole(data.load(f"webdataset:{folder}", image_size=4, crop="adm"))


def parquet_file(folder: pathlib.Path) -> Seed:
  """As the Hugging Face Hub has them."""
  import pyarrow
  from pyarrow import parquet

  _image(folder / "0.png")
  rows = [{"bytes": (folder / "0.png").read_bytes(), "path": f"{number}.png"} for number in range(4)]
  (folder / "0.png").unlink()
  parquet.write_table(pyarrow.table({"image": rows, "label": [0, 1, 0, 1]}), folder / "a.parquet", row_group_size=2)
  return folder / "a.parquet", lambda: whole(data.load(f"parquet:{folder}", image_size=4))


def foreign_latents(folder: pathlib.Path) -> Seed:
  """As EDM2's dataset_tool.py encodes them."""
  from pflow_jax.conversion.foreign_latents import EDM2

  with zipfile.ZipFile(folder / "a.zip", "w") as archive:
    for number in range(3):
      buffer = io.BytesIO()
      np.save(buffer, np.ones((8, 2, 2), np.float32))
      archive.writestr(f"{number}.npy", buffer.getvalue())
    archive.writestr("dataset.json", json.dumps({"labels": [[f"{number}.npy", number] for number in range(3)]}))

  def read() -> None:
    found = EDM2(f"{folder}/a.zip")
    for row in range(len(found)):
      found.read(row)

  return folder / "a.zip", read


def _prompts_seed(model: str, shape: tuple[int, ...] | None) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    path = prompt_folders.write(folder / "prompts", model, shape=shape)
    return pathlib.Path(path), lambda: whole(data.load(f"prompts:{path}", **({} if shape else {"shape": (2, 2, 1)})))

  return seed


def named_images(folder: pathlib.Path) -> Seed:
  """Images whose condition is the embedding of their names."""
  package = folder / "emoji-datasource-google-16.0.0"
  write_package(package)
  names = ["waving hand", "waving hand: light skin tone, dark skin tone", "blue book"]
  path = prompt_folders.write(folder / "names", "minilm", shape=None, prompts=names)
  return folder, lambda: whole(data.load("emoji", cache_dir=str(folder), embeddings=path))


def emoji_archive(folder: pathlib.Path) -> Seed:
  """What npm gives; a damaged one is a RuntimeError, for it can be fetched again."""
  write_package(folder / "package")
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    tar.add(folder / "package", "package")
  shutil.rmtree(folder / "package")
  (folder / "a.tgz").write_bytes(gzip.compress(buffer.getvalue(), 1))

  def read() -> None:
    with tempfile.TemporaryDirectory(dir=folder) as target:
      try:
        emoji._unpack(folder / "a.tgz", pathlib.Path(target))
      except RuntimeError as error:
        raise ValueError(str(error)) from error

  return folder / "a.tgz", read


def _tfds_seed(file_format: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    from tests.data.test_tfds_source import as_foreign, prepare

    with tempfile.TemporaryDirectory() as prepared:
      path = as_foreign(prepare(prepared, file_format), folder)
    return path, lambda: whole(data.load("tfds:foreign", data_dir=str(folder), image_size=4))

  return seed


def encoder(folder: pathlib.Path) -> Seed:
  """The folder of a text encoder, without its weights, which are PyTorch's."""
  from pflow_jax.families.text import load_encoder
  from tests.encoders import write_minilm

  write_minilm(folder)
  return folder, lambda: (encoder := load_encoder("minilm", folder)).digest() and encoder.text_lengths(["a cat"])


def _reference(ending: str) -> Callable[[pathlib.Path], Seed]:
  """A reference of eight features, as others publish them, and what reads its images too."""

  def seed(folder: pathlib.Path) -> Seed:
    from pflow_jax.evaluation.references import load_reference
    from tests.evaluation.stub_network import StubNetwork

    rng, path = np.random.default_rng(0), folder / f"a.{ending}"
    features = rng.normal(size=(20, 8)).astype(np.float32)
    mean, cov = features.mean(axis=0), np.cov(features, rowvar=False)
    if ending == "npz":
      images = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
      np.savez(path, mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, network="stub 1", num_images=20, arr_0=images)
    else:
      content = {"mean": mean, "cov": cov, "real_feats_np": features, "num_real_feeded": 20}
      content |= {"fid": {"mu": mean, "sigma": cov}, "all_features": [features], "num_items": 20}
      path.write_bytes(pickle.dumps(content))
    return path, lambda: load_reference(path, StubNetwork(8))

  return seed


SEEDS: dict[str, Callable[[pathlib.Path], Seed]] = {
  "npz_images": npz_images,
  "npz_compressed": npz_compressed,
  "npz_points": npz_points,
  "npy": npy,
  **{f"image_{ending}": _image_seed(ending, "RGB") for ending in ENDINGS},
  **{f"image_tif_{mode}": _image_seed("tif", mode) for mode in MODES[1:]},
  "frames": frames,
  "class_folders": class_folders,
  "flat_folder": flat_folder,
  "prompts_txt": prompts_txt,
  "prompts_jsonl": prompts_jsonl,
  "prompts_csv": prompts_csv,
  "latents": latents,
  "moments": moments,
  "tar_archive": tar_archive,
  "foreign_latents": foreign_latents,
  "prompts_qwen_image": _prompts_seed("qwen_image", prompt_folders.SHAPE),
  "prompts_flux": _prompts_seed("flux", None),
  "prompts_minilm": _prompts_seed("minilm", None),
  "named_images": named_images,
  "emoji_archive": emoji_archive,
  "reference_npz": _reference("npz"),
  "reference_pkl": _reference("pkl"),
}
# These start TensorFlow Datasets, PyTorch and pyarrow, which takes longer than hundreds of cases of the others.
SLOW_SEEDS: dict[str, Callable[[pathlib.Path], Seed]] = {
  "tfds_array_record": _tfds_seed("array_record"),
  "tfds_parquet": _tfds_seed("parquet"),
  "encoder": encoder,
  "parquet_file": parquet_file,
}
