"""Seconds and memory of all metrics of a set of features as large as papers take.

    python benchmarks/metrics.py [--samples 50000] [--real 10000] [--groups 20] [--folder /tmp] [--whole_kernel]

Random features, logits of 1008 classes and spatial features of 2023 numbers lie in files that are mapped, as those of a
sampler's shards would. Every metric is of `samples` fakes; precision, recall, density, coverage and KID are to `real`
features, k = 3, Fréchet distances to moments. The memory is the process's largest resident set while the metric is
computed, mapped files and what JAX takes on a CPU among it; Linux keeps the peak and lets it be reset. It has to stay
below 6 GB.

Measured at the whole size on two cores of an AMD EPYC that others used as well, in seconds of the clock and of a CPU:
moments 34, 17; FID 37, 17 and with the reference's root kept 9, 4; its interval 314, 143; moments of spatial features
23, 11; sFID 24, 12; Inception score 4, 2; KID 80, 33; PRDC 483, 266. In all 17 minutes, of CPU time 8.5. The peak was
2.53 GB.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pflow_jax.evaluation import metrics
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.evaluation.protocol.scores import merged, sums_of_groups
from pflow_jax.evaluation.protocol.settings import PART

BAR = 6e9  # bytes
CLASSES, SPATIAL = 1008, 2023  # numbers of logits and of spatial features


def resident(name: str) -> int:
  """Bytes of VmRSS, the resident set, or VmHWM, its peak."""
  return int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


class Table:
  """Prints a line for every metric.

  Attributes:
    peak: the largest so far, in bytes.
  """

  def __init__(self) -> None:
    self.peak = 0
    print(f"{'':28} {'seconds':>9} {'of a CPU':>9} {'peak GB':>8}")

  def run(self, name: str, function: Callable[[], Any]) -> Any:
    """Calls a function; prints its seconds, those of all cores, its peak and its result, which is returned."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, resident("VmHWM")
    numbers = result if isinstance(result, tuple) else (result,) if isinstance(result, float) else ()
    shown = ", ".join(f"{x:.6g}" for x in numbers)
    print(f"{name:28} {seconds:9.1f} {cpu:9.1f} {peak / 1e9:8.2f}   {shown}".rstrip(), flush=True)
    self.peak = max(self.peak, peak)
    return result


def write(folder: pathlib.Path, name: str, shape: tuple[int, int], seed: int, scale: float = 1.0) -> metrics.Joined:
  """Writes features of a spectrum that falls as Inception's does, non-negative, in parts, and maps them."""
  rng = np.random.default_rng(seed)
  spectrum = (scale * (1 + np.arange(shape[1])) ** -0.5).astype(np.float32)
  parts = Parts(folder / name, {}, count=shape[0], size=PART)
  for number in range(len(parts)):
    rows = (len(parts.rows_of(number)), shape[1])
    parts.write(number, {name: np.abs(rng.standard_normal(rows, np.float32) * spectrum + 0.1)})
  return parts.rows(name)


def of_moments(table: Table, fake: metrics.Joined, reference: metrics.Moments, num_groups: int) -> None:
  """Measures what follows from moments of the pooled features."""
  groups = table.run(f"moments, {num_groups} groups", lambda: sums_of_groups(fake, num_groups))
  moments = table.run("merging them", lambda: merged(groups))
  table.run("FID", lambda: metrics.frechet_distance(moments, reference))
  table.run("FID again, root kept", lambda: metrics.frechet_distance(moments, reference))
  table.run("interval of FID", lambda: metrics.frechet_interval(groups, reference))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--samples", type=int, default=50_000)
  parser.add_argument("--real", type=int, default=10_000)
  parser.add_argument("--features", type=int, default=2048)
  parser.add_argument("--groups", type=int, default=20, help="of the interval; default: 20")
  parser.add_argument("--folder", help="for the files, removed at the end; default: a temporary one")
  parser.add_argument("--whole_kernel", action="store_true", help="also MMD² of all samples")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    root = pathlib.Path(folder)
    fake = write(root, "pool", (args.samples, args.features), 0)
    real = write(root, "real", (args.real, args.features), 1, 1.02)[0 : args.real]  # a reference's are in memory
    spatial = write(root, "spatial", (args.samples, SPATIAL), 2)
    logits = write(root, "logits", (args.samples, CLASSES), 3, 9)
    kind, start = jax.devices()[0].device_kind, resident("VmRSS") / 1e9
    print(f"{args.samples} x {args.features} fake, {args.real} real, on {kind}; {start:.2f} GB at the start")
    found = metrics.Moments.from_features(real)
    reference = metrics.Moments(found.mean, found.cov, None)  # as of a training set: of more samples than features
    table = Table()
    of_moments(table, fake, reference, args.groups)
    spatial_moments = table.run("moments of spatial features", lambda: merged(sums_of_groups(spatial, 1)))
    table.run("sFID", lambda: metrics.frechet_distance(spatial_moments, spatial_moments))
    table.run("Inception score", lambda: metrics.inception_score(logits))
    table.run("KID, 100 subsets of 1000", lambda: metrics.kernel_distance(real, fake))
    if args.whole_kernel:
      table.run("KID, all samples", lambda: metrics.whole_kernel_distance(real, fake))
    table.run("PRDC, k = 3", lambda: metrics.prdc(real, fake, 3))
  verdict = "within" if table.peak <= BAR else "above"
  print(f"peak {table.peak / 1e9:.2f} GB, {verdict} {BAR / 1e9:.0f} GB")


if __name__ == "__main__":
  main()
