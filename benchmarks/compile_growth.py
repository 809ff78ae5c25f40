"""Growth of a training step's compile time with the depth of the network, whose blocks are one scan.

    python benchmarks/compile_growth.py [--depths 12 48] [--rounds 3]

It compiles the π-ID step of a DiT of width 384 for this machine's devices, without the cache, the depths in turn in
every round. It prints medians over the rounds of the seconds to trace and lower, to compile, and both, and the ratios.

Measured on two cores of a shared machine, jax 0.10.2, 2 rounds: 12.9 s at 12 layers, 12.7 s at 48, a ratio of 0.99.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from pflow_jax.settings.config_file import read_config_file
from pflow_jax.training.experiment import build
from pflow_jax.training.step import make_program


def seconds(depth: int) -> tuple[float, float]:
  """Measures the seconds of (tracing and lowering, compiling)."""
  config = read_config_file("configs/imagenet.py:gmrepa_1nfe")
  config.model.update(width=384, depth=depth, num_heads=6)
  config.train.batch_size = 8 * jax.device_count()
  config.mesh.fsdp = 1
  program = make_program(build(config, abstract=True))
  jax.clear_caches()
  start = time.perf_counter()
  lowered = program.trace().lower()
  middle = time.perf_counter()
  lowered.compile()
  return middle - start, time.perf_counter() - middle


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--depths", type=int, nargs=2, default=(12, 48))
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  jax.config.update("jax_enable_compilation_cache", False)
  seconds(args.depths[0])  # imports and first calls
  measured = {depth: [] for depth in args.depths}
  for _ in range(args.rounds):
    for depth in args.depths:
      measured[depth].append((*(s := seconds(depth)), sum(s)))
  medians = {depth: np.median(rows, axis=0) for depth, rows in measured.items()}
  print(f"{jax.devices()[0].device_kind} x {jax.device_count()}, jax {jax.__version__}: trace and lower, compile, both")
  for depth, row in medians.items():
    print(f"depth {depth}: " + ", ".join(f"{s:.2f} s" for s in row))
  few, many = args.depths
  print(f"{many} over {few}: " + ", ".join(f"{ratio:.3f}" for ratio in medians[many] / medians[few]))


if __name__ == "__main__":
  main()
