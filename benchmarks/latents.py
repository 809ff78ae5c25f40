"""Speed of latents: of reading them for training, and of encoding pictures.

    python benchmarks/latents.py [--records 20000] [--seconds 5] [--folder FOLDER]
    python benchmarks/latents.py --encode [--pictures 256] [--dtype bfloat16] [--autoencoder DIR]

The first writes folders of random latents of 32 x 32 x 4 in float16: a draw, moments, and moments of picture and mirror
image. Of each it measures how many a second come out of `data.batches`, as training reads them, and beside that how
many records array_record alone reads with as many threads: the difference is this package's and NumPy's. Then it says
where the time goes in one thread: reading, decoding to float32, drawing.

The second writes JPEG files of a usual size of ImageNet's (500 x 375) and measures how many a second are decoded and
cut, how many are encoded by the devices, and how many `pflow latents` makes. The autoencoder has random weights in the
size of Stable Diffusion's unless one is named.

Reading, of 20,000 latents, on two cores of an AMD EPYC that were busy with other work, so that the program had 0.65 of
one core: latents a second, latents per second of a core, and the best microseconds of a thread for reading, with
decoding, and with drawing:

    draw                 14,201   21,764   18   30   30
    moments               7,385   11,408   23   37   74
    moments and mirror    4,560    9,629   30   45   80

Two whole cores are worth 43,000, 23,000 and 19,000 a second by that. What limits draws is array_record's reading,
what limits moments is their noise: 36 microseconds, 64 with NumPy's normal numbers in place of quantiles.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pflow_jax import data
from pflow_jax.conversion.encoding import Encoder
from pflow_jax.conversion.latents import encode, picture_set
from pflow_jax.data.latent_shards import LatentFolder
from pflow_jax.data.latents import Info
from pflow_jax.data.records import Draws
from pflow_jax.families.autoencoder import Codec, load_autoencoder
from pflow_jax.networks.vae import AutoencoderKL

SHAPE, BATCH = (32, 32, 4), 256
KINDS = {"draw": {}, "moments": {"moments": True}, "moments and mirror": {"moments": True, "mirrored": True}}


def write(folder: pathlib.Path, kind: dict[str, Any], records: int) -> data.Dataset:
  """Writes random latents."""
  scaling = {"shift": (0.0,) * 4, "scale": (1.0,) * 4}
  latents = LatentFolder(folder, Info(SHAPE, 1000, **kind, **scaling), records)
  rng = np.random.default_rng(0)
  if latents.claim():
    for number in latents.todo():
      with latents.writing(number) as shard:
        count = len(latents.rows(number))
        values = np.abs(rng.standard_normal((count, *latents.info.stored), np.float32)).astype(np.float16)
        shard.add(values, rng.integers(0, 1000, count))
    latents.finish()
  return data.load(f"latents:{folder}")


def rate(step: Callable[[], int], seconds: float) -> tuple[float, float]:
  """Things a second that `step` makes, by the clock and by the time of all processors."""
  step()
  count, start, used = 0, time.perf_counter(), time.process_time()
  while time.perf_counter() - start < seconds:
    count += step()
  return count / (time.perf_counter() - start), count / (time.process_time() - used)


def reading(folder: pathlib.Path, records: int, seconds: float) -> None:
  """Measures how fast latents are read."""
  titles = f"{'raw records/s':>14} {'latents/s':>10} {'per CPU second':>15} {'of raw':>7}"
  print(f"{'latents of 32 x 32 x 4':24} {titles}")
  for name, kind in KINDS.items():
    dataset = write(folder / name.replace(" ", "_"), kind, records)
    source, threads = dataset.records.source, dataset.records.read_threads
    alone = raw(source._opened.records, records, threads, seconds)
    stream = data.batches(dataset, BATCH, seed=0)
    whole, by_cpu = rate(lambda stream=stream: len(next(stream)["x0"]), seconds)
    print(f"{name:24} {alone:14,.0f} {whole:10,.0f} {by_cpu:15,.0f} {whole / alone:7.0%}")
    parts(source, records)


def raw(shards: Any, records: int, threads: int, seconds: float) -> float:
  """Records a second that array_record alone reads, in any order."""
  orders = np.random.default_rng(1).integers(0, records, (threads, BATCH))
  read = lambda rows: len([shards._records[int(row)] for row in rows])
  with ThreadPoolExecutor(threads) as pool:
    return rate(lambda: sum(pool.map(read, orders)), seconds)[0]


def parts(source: Any, records: int) -> None:
  """Prints the processor time of a latent's parts, one thread."""
  rows = np.random.default_rng(2).integers(0, records, BATCH)
  draws = Draws(0, np.arange(BATCH, dtype=np.uint64))
  steps = {
    "read": lambda: source._opened.records.take(rows),
    "read and decode": lambda: source.batch(rows),
    "read, decode and draw": lambda: source.batch(rows, draws),
  }
  costs = []
  for name, step in steps.items():
    best = np.inf
    for _ in range(5):
      start = time.thread_time()
      step()
      best = min(best, time.thread_time() - start)
    costs.append(f"{name} {best / BATCH * 1e6:.0f}")
  print(f"{'':24} microseconds of one thread: {', '.join(costs)}")


def encoding(folder: pathlib.Path, args: argparse.Namespace) -> None:
  """Measures how fast pictures are encoded."""
  rng = np.random.default_rng(0)
  ramp = np.linspace(0, 200, 500)[None, :, None] * np.linspace(0, 1, 375)[:, None, None]
  for number in range(args.pictures):
    path = folder / "photos" / str(number % 10) / f"{number:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((ramp + rng.integers(0, 56, (375, 500, 3))).astype(np.uint8)).save(path)
  if args.autoencoder:
    codec = load_autoencoder(args.autoencoder, jnp.dtype(args.dtype))
  else:
    module = AutoencoderKL(dtype=jnp.dtype(args.dtype))
    codec = Codec(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
  dataset = picture_set(str(folder / "photos"), args.size)
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    rows = range(args.pictures)
    decoded, by_cpu = rate(lambda: len(list(pool.map(dataset.records.source.read, rows))), 1.0)
  encoder = Encoder(codec, dataset.shape, batch_size=args.batch_size)
  pixels = rng.integers(0, 256, (encoder.batch_size, *dataset.shape), np.uint8)
  numbers = np.arange(encoder.batch_size, dtype=np.uint64)

  def step() -> int:
    jax.block_until_ready(encoder(pixels, numbers))
    return encoder.batch_size

  devices, _ = rate(step, 1.0)
  start = time.perf_counter()
  encode(dataset, codec, out=folder / "z", batch_size=args.batch_size)
  whole = args.pictures / (time.perf_counter() - start)
  kind = f"{jax.local_devices()[0].device_kind} x {jax.local_device_count()}"
  print(f"{kind}, {args.size} pixels, {args.dtype}, pictures a second:")
  print(f"decoded {decoded:,.1f} ({by_cpu:,.1f} per CPU second), encoded {devices:,.1f}, by the program {whole:,.1f}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--records", type=int, default=20_000)
  parser.add_argument("--seconds", type=float, default=5.0)
  parser.add_argument("--folder", help="to keep the latents in")
  parser.add_argument("--encode", action="store_true")
  parser.add_argument("--pictures", type=int, default=256)
  parser.add_argument("--size", type=int, default=256)
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--autoencoder", help="folder of one; default: random weights in the size of Stable Diffusion's")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.folder or temporary)
    if args.encode:
      encoding(folder, args)
    else:
      reading(folder, args.records, args.seconds)


if __name__ == "__main__":
  main()
