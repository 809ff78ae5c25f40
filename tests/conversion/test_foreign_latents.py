"""Latents that other projects wrote become a folder of latents; nothing in their files is run."""

import json
import os
import pathlib
import re
import zipfile

import jax
import numpy as np
import pytest
import torch

from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.conversion import foreign_latents
from pflow_jax.conversion.foreign_latents import adopt
from pflow_jax.data.latents import read_info
from pflow_jax.data.records import Draws
from pflow_jax.families.autoencoder import Codec
from pflow_jax.networks.vae import AutoencoderKL
from pflow_jax.torch_io import pickled

pytestmark = pytest.mark.usefixtures("float32")

COUNT = 7
RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=(COUNT, 4, 6, 5)).astype(np.float32) * 4
STD = RNG.uniform(0.1, 0.5, MEAN.shape).astype(np.float32)
LABEL = np.array([2, 0, 1, 2, 0, 0, 1])


def write_lakonlab(root):
  """As tools/cache_imagenet_data_sdvae.py: classes are views of a batch's."""
  labels, lines = torch.from_numpy(LABEL), []
  for i in range(COUNT):
    name = f"n{LABEL[i]:02d}/n{i}.pth"
    (root / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"x": torch.from_numpy(MEAN[i].copy()), "y": labels[i]}, root / "cache" / name)
    lines.append(f"{name} {LABEL[i]}\n")
  (root / "cache.txt").write_text("".join(lines))
  return f"lakonlab:{root}/cache.txt"


def write_meanflow(root):
  """As utils/data_util.py."""
  for i in range(COUNT):
    values = torch.from_numpy(np.concatenate([MEAN[i], STD[i]]).transpose(1, 2, 0).copy()).permute(2, 0, 1)
    torch.save({"image": values, "label": torch.tensor(LABEL[i])}, root / f"{i:08d}.pt")
  return f"meanflow:{root}"


def write_edm2(root, labels=True):
  """As dataset_tool.py encode."""
  names = [f"{i // 4:05d}/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
  for i, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    np.save(root / name, np.concatenate([MEAN[i], STD[i]]))
  pairs = [[name, int(label)] for name, label in zip(names, LABEL, strict=True)]
  (root / "dataset.json").write_text(json.dumps({"labels": pairs if labels else None}))
  return f"edm2:{root}"


def write_edm2_zip(root):
  write_edm2(root / "files")
  with zipfile.ZipFile(root / "latents.zip", "w", zipfile.ZIP_STORED) as archive:
    for path in sorted((root / "files").rglob("*.*")):
      archive.write(path, path.relative_to(root / "files").as_posix())
  return f"edm2:{root}/latents.zip"


WRITERS = {"lakonlab": write_lakonlab, "meanflow": write_meanflow, "edm2": write_edm2, "edm2_zip": write_edm2_zip}
EDM2 = np.array([5.81, 3.25, 0.12, -2.15]), 0.5 / np.array([4.17, 4.62, 3.71, 3.28])


@pytest.mark.parametrize("kind", WRITERS)
def test_records_are_those_of_the_files(tmp_path, kind):
  name = WRITERS[kind](tmp_path)
  info = adopt(name, tmp_path / "z", shard_records=4)
  dataset = data.load(f"latents:{tmp_path}/z")
  assert (dataset.shape, dataset.num_records, info.moments) == ((6, 5, 4), COUNT, kind != "lakonlab")
  assert dataset.num_classes == (1000 if kind == "meanflow" else 3)
  batch = dataset.records.take(np.arange(COUNT))
  np.testing.assert_array_equal(batch["cond"], LABEL)
  raw = np.moveaxis(MEAN, 1, -1)
  if kind == "lakonlab":
    expected = raw  # scaled already
    assert (info.shift, info.scale) == ((0,) * 4, (0.18215,) * 4)
  elif kind == "meanflow":
    expected = raw * 0.18215
  else:
    expected = (raw - EDM2[0]) * EDM2[1]
  np.testing.assert_allclose(batch["x0"], expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
  if info.moments:
    scale = 0.18215 if kind == "meanflow" else EDM2[1]
    draws = [Draws(0, np.arange(COUNT * i, COUNT * (i + 1), dtype=np.uint64)) for i in range(300)]
    x0 = np.stack([dataset.records.take(np.arange(COUNT), one)["x0"] for one in draws])
    ratio = x0.var(0) / np.square(np.moveaxis(STD, 1, -1) * scale)
    np.testing.assert_allclose(ratio, 1, atol=5.5 * np.sqrt(2 / 300))
    np.testing.assert_allclose(ratio.mean(), 1, atol=5 * np.sqrt(2 / 300 / ratio.size))


def test_the_command_goes_on_and_tells_what_cannot_be_read(tmp_path, capsys):
  name = write_lakonlab(tmp_path)
  broken = tmp_path / "cache" / "n00" / "n1.pth"
  whole = broken.read_bytes()
  broken.write_bytes(whole[:200])

  class Runs:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "run"),)

  torch.save({"x": Runs(), "y": torch.tensor(0)}, tmp_path / "cache" / "n00" / "n4.pth")
  words = ["latents", "--images", name, "--out", f"{tmp_path}/z", "--option", "num_classes=10"]
  with pytest.raises(SystemExit) as end:
    main(words)
  said = capsys.readouterr()
  assert end.value.code == 2
  assert "2 pictures could not be read and are left out" in said.err
  listed = (tmp_path / "z" / "unreadable.txt").read_text().splitlines()
  assert [line.split(": ")[0] for line in listed] == ["n00/n1.pth", "n00/n4.pth"]
  assert "holds more than tensors" in listed[1]
  assert not (tmp_path / "run").exists(), "nothing was run"
  dataset = data.load(f"latents:{tmp_path}/z")
  assert (dataset.num_records, dataset.num_classes) == (5, 10)
  with pytest.raises(SystemExit) as end:
    main(words)
  said = capsys.readouterr()
  assert (end.value.code, "is complete" in said.out) == (2, True)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda root: torch.save({"x": torch.zeros(4, 6, 5), "y": torch.tensor(1)}, root / "n1.pth"), "its list says 0"),
    (lambda root: torch.save({"x": torch.zeros(4, 6, 4), "y": torch.tensor(0)}, root / "n1.pth"), r"\(4, 6, 5\), got"),
    (lambda root: torch.save({"x": torch.zeros(4, 6, 5)}, root / "n1.pth"), "expected x and a number y"),
    (lambda root: torch.save({"x": torch.zeros(4, 6, 5, dtype=int), "y": torch.tensor(0)}, root / "n1.pth"), "int64"),
    (lambda root: (root / "n1.pth").unlink(), "there is no such file"),
  ],
)
def test_a_file_that_is_another_is_left_out(tmp_path, change, message):
  name = write_lakonlab(tmp_path)
  change(tmp_path / "cache" / "n00")
  info = adopt(name, tmp_path / "z")
  assert (info.num_records, info.unreadable) == (6, 1)
  text = (tmp_path / "z" / "unreadable.txt").read_text()
  assert text.startswith("n00/n1.pth: ")
  assert re.search(message, text), text


def test_refusals(tmp_path):
  def refused(name, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
      adopt(name, tmp_path / "z", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "z").exists()

  root = tmp_path / "a"
  root.mkdir()
  name = write_lakonlab(root)
  refused(name, "has no option 'classes'.*The options are: ", classes=3)
  refused(name, r"lakonlab:.*num_classes: input should be a valid integer, got 'x'", num_classes="x")
  refused(f"{name}.gone", "there is no such file")
  (root / "cache.txt").write_text("a.pth 0\n../../secret.pth 1\n")
  refused(name, r"expected paths below its folder, got '../../secret.pth'")
  (root / "cache.txt").write_text("a.pth zero\n")
  refused(name, "expected lines of a path and a class, got 'a.pth zero'")
  (root / "cache.txt").write_text("")
  refused(name, "expected lines of a path and a class, got none")
  refused(f"meanflow:{root}", r"there are no files \*\.pt")
  refused(f"edm2:{root}", r"expected files \*\.npy and dataset\.json")
  edm2 = write_edm2(tmp_path / "b")
  (tmp_path / "b" / "dataset.json").write_text('{"labels": [["00000/img-mean-std-00000000.npy", 1]]}')
  refused(edm2, r"dataset\.json has no class of 6 files, such as '00000/img-mean-std-00000001\.npy'")
  (tmp_path / "b" / "dataset.json").write_text('{"labels": [["a", "b"]]}')
  refused(edm2, r"dataset\.json: labels\.0\.1: ")
  write_edm2(tmp_path / "b", labels=False)
  assert foreign_latents.EDM2(str(tmp_path / "b")).info.num_classes == 0
  np.save(tmp_path / "b" / "00000" / "img-mean-std-00000000.npy", np.zeros((6, 6, 5), np.float32))
  refused(edm2, "expected 4 channels, got 3")
  (tmp_path / "b.zip").write_bytes(b"PK no zip")
  refused(f"edm2:{tmp_path}/b.zip", r"b\.zip cannot be read as a zip archive")


def test_an_autoencoder_of_other_channels_or_another_scale_is_refused(tmp_path):
  (tmp_path / "a").mkdir()
  name = write_meanflow(tmp_path / "a")

  def saved(**fields):
    module = AutoencoderKL(widths=(4, 8), depth=1, groups=2, mid_attention=False, **fields)
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    folder = tmp_path / "-".join(map(str, fields.values()))
    Codec(module, params).save(folder)
    return folder

  with pytest.raises(ValueError, match="autoencoder: makes latents of 3 channels, meanflow:.* has 4"):
    adopt(name, tmp_path / "z", autoencoder=saved(latent_channels=3))
  other = "another scale than meanflow:.* has: scale .*0.13025.*, the data's .*0.18215"
  with pytest.raises(ValueError, match=other):
    adopt(name, tmp_path / "z", autoencoder=saved(scale=0.13025))
  own = saved(scale=0.18215)
  assert adopt(name, tmp_path / "z", autoencoder=own).autoencoder == str(own)
  assert read_info(str(tmp_path / "z")).made["images"] == "meanflow"


def test_files_that_are_alike_are_opened_once_and_read_as_they_are(tmp_path, monkeypatch):
  write_lakonlab(tmp_path)
  opened = []
  real = pickled.open_pickled
  monkeypatch.setattr(pickled, "open_pickled", lambda file: opened.append(file) or real(file))
  files = pickled.PickledAlike()
  paths = sorted((tmp_path / "cache").rglob("*.pth"))
  for _ in range(2):
    for path in paths:
      tensors = files.open(path)
      number = int(path.stem[1:])
      np.testing.assert_array_equal(tensors.read("x"), MEAN[number])
      assert tensors.read("y") == LABEL[number]
  assert len(opened) == COUNT, "each has its class at another place of its batch's"
  torch.save({"x": torch.from_numpy(MEAN[0].copy()), "y": torch.tensor(2)}, paths[0])
  torch.save({"x": torch.from_numpy(MEAN[1].copy()), "y": torch.tensor(2)}, paths[1])
  del opened[:]
  np.testing.assert_array_equal(files.open(paths[0]).read("x"), MEAN[0])
  np.testing.assert_array_equal(files.open(paths[1]).read("x"), MEAN[1])
  assert len(opened) == 1
  whole = paths[1].read_bytes()
  paths[1].write_bytes(whole.replace(b"torch", b"posix", 1))
  with pytest.raises(ValueError, match=r"holds more than tensors|cannot be read"):
    files.open(paths[1])
  assert pathlib.Path(opened[-1]) == paths[1]
