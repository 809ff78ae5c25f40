"""Waiting time of the devices for the training loop: the gaps between steps in a profile of `pflow train`.

    python benchmarks/loop_overhead.py [--steps 12] [--batch 4] [--idle 0.02]

It trains a DiT-S/2 by flow matching on random latents (32 x 32 x 4), with logging every second step, and reads the
profiler's trace of the steps. A device is busy while a program runs on it. A CPU is busy from the moment at which its
client's thread takes a program up until it releases it, allocations included. It prints the idle share of the time from
the first to the last busy moment. The step is called under `jax.transfer_guard("disallow")`: a host sync there would be
an error.

Measured on two cores of a shared machine, jax 0.10.2: 0.02 % (2.8 ms at most at once, steps of 2 s).
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import jax
import numpy as np
from jax.profiler import ProfileData

from pflow_jax.settings.config_file import read_config_file
from pflow_jax.training.train import train


def busy_intervals(folder: str) -> np.ndarray:
  """Returns (n, 2) start and end, in ns, of the times in which a program runs, merged and in order."""
  trace = max(pathlib.Path(folder).rglob("*.xplane.pb"))
  spans: list[tuple[float, float]] = []
  for plane in ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      name = line.name or ""
      if name.startswith(("tf_XLA", "XLA Modules", "Stream")):
        spans += [(event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
      if name.startswith("tf_XLAPjRtCpuClient"):
        spans += regions(line.events)
  merged: list[list[float]] = []
  for start, end in sorted(spans):
    if merged and start <= merged[-1][1]:
      merged[-1][1] = max(merged[-1][1], end)
    else:
      merged.append([start, end])
  return np.array(merged)


def regions(events) -> list[tuple[float, float]]:
  """Returns the regions of a thread's work, from every StartRegion to the StopRegion after it."""
  spans, start = [], None
  for event in sorted(events, key=lambda event: event.start_ns):
    if event.name.endswith("StartRegion"):
      start = event.start_ns
    elif event.name.endswith("StopRegion") and start is not None:
      spans.append((start, event.start_ns))
      start = None
  return spans


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--idle", type=float, default=0.02, help="share of idle time to compare with")
  args = parser.parse_args()
  config = read_config_file("configs/imagenet.py:teacher")
  config.data = dict(name="synthetic", shape=(32, 32, 4), num_classes=1000)
  config.model.update(width=384, depth=12, num_heads=6, dtype="float32", remat="none")
  config.mesh.fsdp = 1
  config.train.update(steps=args.steps, batch_size=args.batch, log_every=2, checkpoint_every=0, keep_every=0)
  config.train.profile = (4, args.steps - 1)
  with tempfile.TemporaryDirectory() as folder:
    train(config, folder)
    busy = busy_intervals(f"{folder}/profile")
  gaps = busy[1:, 0] - busy[:-1, 1]
  span, steps = busy[-1, 1] - busy[0, 0], args.steps - 4
  share, longest = gaps.sum() / span, np.sort(gaps)[::-1][:steps]
  print(f"{jax.devices()[0].device_kind} x {jax.device_count()}: {steps} steps of {span / steps / 1e6:.1f} ms")
  print(
    f"idle between programs: {share:.3%} of the time, at most {longest.max() / 1e6:.3f} ms at once; below "
    f"{args.idle:.0%}: {'yes' if share < args.idle else 'NO'}"
  )


if __name__ == "__main__":
  main()
