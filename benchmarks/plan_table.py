"""The table in docs/plan_imagenet.md: DiT-XL/2 by three methods on four TPU slices, planned by `pflow plan`.

    python benchmarks/plan_table.py [--out docs/plan_imagenet.md]

Needs the TPU compiler, see `pflow plan`; no TPU. Every row is the config as shipped, compiled for the slice. The global
batch is the config's; where it does not fit, the row shows the accumulation that makes it fit.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from pflow_jax import plan
from pflow_jax.compare import read_config
from pflow_jax.plan_report import EFFICIENCY

METHODS = {"π-ID, GMFlow": "gmflow", "ArcFlow, adapters": "arc_adapters", "AYF-EMD": "ayf_emd"}
SLICES = ("v5e-16", "v5e-256", "v5p-128", "v6e-64")
GIB = 2**30


def fitting(variant: str, where: plan.Slice, fast: bool) -> dict:
  """The report of the first accumulation that fits, a power of 2."""
  config = read_config(f"configs/imagenet.py:{variant}")
  # Parameters in parts over at most 16 chips: more parts are smaller than what is gained by them.
  config.mesh.update(data=-1, fsdp=16)
  while True:
    report = plan.plan(copy.deepcopy(config), where, fast=fast, search=False)
    if report["memory"]["fits"] or config.train.batch_size // config.train.accumulation <= where.num_devices:
      return report
    config.train.accumulation *= 2


def row(title: str, report: dict) -> str:
  mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
  m, flops, estimate = report["memory"], report["flops"], report.get("estimate")
  sent = sum(t["sent"] for t in report["traffic"]["ici"].values()) / GIB
  seconds, hours = estimate["step_seconds"], estimate["chip_hours"]
  cells = [
    title,
    report["topology"],
    mesh,
    f"{report['batch_size']} / {report['accumulation']}",
    f"{m['arguments'] / GIB:.2f} / {m['peak'] / GIB:.2f} of {m['available'] / GIB:.2f}",
    f"{flops['counted'] / 1e15:.2f} ({100 * (flops['counted'] / flops['analytic'] - 1):+.2f} %)",
    f"{sent:.1f}",
    f"{seconds[0]:.2f} to {seconds[1]:.2f}, {estimate['limit']}",
    f"{hours[0]:,.0f} to {hours[1]:,.0f}",
    f"{report['compile_seconds']:.0f}",
  ]
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", default="docs/plan_imagenet.md")
  parser.add_argument("--full", action="store_true", help="compile with all effort, 2 minutes a row and more")
  parser.add_argument("--json", help="also all reports, as JSON")
  args = parser.parse_args()
  head = ["method", "slice", "mesh", "batch / accumulation", "memory of a chip, GiB: arguments / peak"]
  head += ["PFLOP a step (from the closed form)", "sent by a chip, GiB", "step, s (estimate), limit"]
  head += ["chip-hours (estimate)", "compiled in, s"]
  lines, reports = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"], {}
  for title, variant in METHODS.items():
    for name in SLICES:
      start = time.perf_counter()
      report = fitting(variant, plan.Slice(name), not args.full)
      reports[f"{variant} on {name}"] = report
      lines.append(row(title, report))
      print(f"{lines[-1]}  ({time.perf_counter() - start:.0f} s)", flush=True)
  effort = ""
  if not args.full:
    effort = """Compiled with little effort (`pflow plan --fast`), which moves more through main memory than a
compilation in full: π-ID on v5e-256 takes an estimated 0.16 to 0.38 s there, see the README.
"""
  text = f"""# DiT-XL/2 on ImageNet 256: does it fit, and what would it cost

`python benchmarks/plan_table.py{" --full" * args.full}`, jax {plan.jax.__version__}, on a machine without a TPU.
Memory, operations and bytes sent are of the compiled program. Seconds and chip-hours are estimates that no chip has
confirmed: the lower end of a step is what its slowest part (matrix products, main memory or links, at their published
rates) takes alone, the upper end all of them in turn; the lower end of the hours is that of the step, the upper end
{EFFICIENCY:.0%} of such a rate. Hours are those of all steps of the config.
{effort}
""" + "\n".join(lines)
  pathlib.Path(args.out).write_text(text + "\n")
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
  main()
