"""The way from pictures to the papers' table on two cores, in which every program is killed and goes on.

    git clone https://github.com/madebyollin/taesd
    python benchmarks/imagenet_way.py --folder runs/way --autoencoder taesd/taef2 [--inception inception-2015-12-05.pt]

Digits of MNIST as files → latents of a tiny autoencoder → a teacher, as a file of SiT's authors → converted →
students of 1 and 2 evaluations → `pflow evaluate --protocol=adm`. Without --inception the feature network has random
weights, of which numbers compare with each other alone. Without --autoencoder so has the autoencoder. Prints the table,
and the seconds of every program. A program is killed (SIGKILL) as soon as it has written something, and started again.

Every command is printed as it is to be typed. docs/imagenet.md has a run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

CONFIG = "configs/mnist_latents.py"
POLL = 0.05  # seconds between two looks for what a program has written


def write_digits(folder: pathlib.Path, count: int) -> None:
  """Writes digits of MNIST as PNG, a folder for each class, of which all have about the same number."""
  from pflow_jax import data

  x0, label = data.examples(data.load("mnist5k"), 5000)
  for i in np.argsort(np.arange(5000) % 500, kind="stable")[:count]:  # the set is sorted, 500 of a class
    own = folder / str(label[i])
    own.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint((x0[i, ..., 0] + 1) * 127.5).astype(np.uint8)).save(own / f"{i:04}.png")


def write_inception(file: pathlib.Path) -> None:
  """Writes random weights as pytorch-fid's file of Inception has them."""
  from safetensors.numpy import save_file

  from pflow_jax.families.inception.names import NAMES

  rng, tensors = np.random.default_rng(0), {}
  for name, shape in sorted(NAMES[0].shapes().items()):
    x = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
      x *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
    elif name.endswith(("bn.weight", "running_var")):
      x = 1 + np.clip(x, -2, 2) / 4
    tensors[name] = x
  save_file(tensors, file)


def write_autoencoder(folder: pathlib.Path) -> None:
  """Writes a narrow tiny autoencoder with random weights, whose latents of digits have a variance of 1."""
  import jax
  import jax.numpy as jnp

  from pflow_jax import data
  from pflow_jax.families.autoencoder import Codec
  from pflow_jax.families.taesd.network import TinyAutoencoder

  narrow, shallow = (16, 16, 16, 16), (1, 1, 1, 1)
  module = TinyAutoencoder(encoder_widths=narrow, encoder_depths=shallow, decoder_widths=narrow, decoder_depths=shallow)
  params = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  x = jax.image.resize(data.examples(data.load("mnist5k"), 16)[0], (16, 64, 64, 3), "linear")
  deviation = jnp.std(module.apply({"params": params}, x, method="encode"))
  params["encoder"]["conv_out"] = jax.tree.map(lambda leaf: leaf / deviation, params["encoder"]["conv_out"])
  Codec(module, params).save(folder)


class Way:
  """Runs programs, each killed once where it has a pattern to wait for.

  Attributes:
    folder: of all results.
    kill: whether to kill.
    seconds: of the programs, killed ones with their second start, by name.
  """

  def __init__(self, folder: pathlib.Path, kill: bool):
    self.folder, self.kill, self.seconds = folder, kill, dict[str, float]()

  def run(self, name: str, argv: Sequence[str], pattern: str = "") -> None:
    """Runs a command of pflow.

    Args:
      name: of the stage.
      argv: after "pflow".
      pattern: of a file below the folder; the program is killed once there is one.
    """
    print(f"$ pflow {shlex.join(argv)}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pflow_jax", *argv]
    if self.kill and pattern:
      process = subprocess.Popen(command)
      while process.poll() is None and not any(self.folder.glob(pattern)):
        time.sleep(POLL)
      if process.poll() is None:
        process.kill()
        print(f"killed once there was {pattern}; the same command again", flush=True)
      process.wait()
    if subprocess.run(command).returncode:
      raise SystemExit(f"{name} failed")
    self.seconds[name] = time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/way"))
  parser.add_argument("--autoencoder", help="folder of one; default: random weights")
  parser.add_argument("--inception", help="file of one; default: random weights")
  parser.add_argument("--pictures", type=int, default=2500)
  parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
  parser.add_argument("--samples", type=int, default=1000)
  parser.add_argument("--paired", type=int, default=128)
  parser.add_argument("--quicktest", action="store_true", help="networks and trainings of a smoke test")
  parser.add_argument("--nokill", action="store_true", help="let all programs end by themselves")
  args = parser.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  way, f = Way(args.folder, not args.nokill), args.folder
  f.mkdir(parents=True, exist_ok=True)
  if not (f / "pictures").exists():
    write_digits(f / "pictures", args.pictures)
  inception = args.inception or f"{f}/inception.safetensors"
  if not args.inception and not pathlib.Path(inception).exists():
    write_inception(pathlib.Path(inception))
  autoencoder = args.autoencoder or f"{f}/autoencoder"
  if not args.autoencoder and not (f / "autoencoder").exists():
    write_autoencoder(f / "autoencoder")
  quick = ",quicktest" if args.quicktest else ""
  config = lambda variant: f"--config={CONFIG}:{variant}{quick}"
  latents = f"--config.data={{'name': 'latents:{f}/latents'}}" if quick else f"--config.data.name=latents:{f}/latents"
  width = 64 if args.quicktest else 192

  of = ["--images", f"{f}/pictures", f"--size={args.size}"]
  way.run("latents", ["latents", *of, "--autoencoder", autoencoder, f"--out={f}/latents"], "latents/*")
  reference = [f"--out={f}/reference.npz", f"--width={width}", f"--keep={min(2000, args.pictures)}"]
  way.run("reference", ["reference", *of, f"--features={inception}", *reference])
  saved = "checkpoints/*/_CHECKPOINT_METADATA"
  way.run("teacher", ["train", config("teacher"), f"--workdir={f}/trained", latents], f"trained/{saved}")
  way.run("to SiT", ["convert", f"--source={f}/trained", f"--out={f}/sit", "--format=timm"], "sit/*")
  way.run("from SiT", ["convert", f"--source={f}/sit", f"--out={f}/teacher", "--convention=sit"], "teacher/*")
  for n in (1, 2):
    student = [f"--workdir={f}/student{n}", f"--config.teacher.workdir={f}/teacher", latents]
    way.run(f"student, {n} NFE", ["train", config(f"gm_{n}nfe"), *student], f"student{n}/{saved}")
    measured = [f"--features={inception}", f"--reference={f}/reference.npz", f"--num={args.samples}"]
    way.run(
      f"evaluation, {n} NFE",
      ["evaluate", f"--workdir={f}/student{n}", "--protocol=adm", *measured, f"--paired={args.paired}", "--keep=npz"],
      f"student{n}/adm/*/part_00000",
    )
  total = sum(way.seconds.values())
  print("\n" + "\n".join(f"{name:20} {seconds:7.0f} s" for name, seconds in way.seconds.items()))
  print(f"{'all':20} {total:7.0f} s\n")
  from pflow_jax.evaluation.protocol.report import table

  rows = [json.loads((f / f"student{n}/adm/adm.json").read_text())["rows"][0] for n in (1, 2)]
  rows = [{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows]
  print(table(rows))


if __name__ == "__main__":
  main()
