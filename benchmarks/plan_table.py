"""The tables in docs/plan_*.md: needs and cost of runs on TPU slices, planned by `pflow plan`.

    python benchmarks/plan_table.py imagenet            # DiT-XL/2 by three methods
    python benchmarks/plan_table.py text_to_image       # FLUX.1 and Qwen-Image by π-ID
    python benchmarks/plan_table.py flow_maps           # the same by AYF-EMD, with two kinds of attention
    python benchmarks/plan_table.py imagenet512         # EDM2 S by AYF-EMD

It goes on where it was stopped: reports are kept in runs/plan_<table>.json, row by row.

It needs the TPU compiler, see `pflow plan`, and no TPU. Every row is the shipped config with another mesh, which has
parameters in as many parts as there are chips, at most 16, and with the fewest micro-batches (`train.accumulation`)
that fit.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from pflow_jax.planning import plan
from pflow_jax.planning.report import EFFICIENCY
from pflow_jax.settings.config_file import read_config_file

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
  """A config, and the slices that it is planned for.

  Attributes:
    config: of the folder configs/.
    slices: names of topologies.
    changes: values of its keys by their paths, {"model.attention": "xla"}.
  """

  config: str
  slices: tuple[str, ...]
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """Returns the config with what is changed."""
    return " ".join([self.config, *(f"{key}={value}" for key, value in self.changes.items())])


@dataclasses.dataclass(frozen=True)
class Table:
  """A table to print.

  Attributes:
    title: its heading.
    methods: cases by name.
    most: examples a chip that are tried first.
  """

  title: str
  methods: dict[str, Case]
  most: int


IMAGENET_SLICES = ("v5e-16", "v5e-256", "v5p-128", "v6e-64")
SMALLEST = ("v5e:2x2", "v5e-16", "v5p:1x1x1", "v6e-4")
IMAGENET512_SLICES = ("v5e-64", "v6e-64")
FLOW_MAP_SLICES = ("v5e-16", "v5p:2x2x1", "v6e-16")
SLICES = ("v5e:2x2", "v5e-16", "v5e-256", "v5p:1x1x1", "v5p:2x2x1", "v5p-128", "v6e-1", "v6e-4", "v6e-16", "v6e-64")


TABLES = {
  "imagenet": Table(
    "DiT-XL/2 on ImageNet 256",
    {
      "π-ID, GMFlow": Case("imagenet.py:gmrepa_1nfe", IMAGENET_SLICES),
      "ArcFlow, adapters": Case("imagenet.py:arc_adapters", IMAGENET_SLICES),
      "AYF-EMD": Case("imagenet.py:ayf_emd", IMAGENET_SLICES),
    },
    most=4096,
  ),
  "text_to_image": Table(
    "Students of FLUX.1-dev and Qwen-Image at 1024 x 1024",
    {
      "FLUX.1-dev, GMFlow": Case("flux.py:gm", SLICES),
      "the same, without data": Case("flux.py:gm_data_free", SMALLEST),
      "Qwen-Image, GMFlow": Case("qwen_image.py:gm", SLICES),
    },
    most=2,
  ),
  "flow_maps": Table(
    "Flow maps of FLUX.1-dev and Qwen-Image by AYF-EMD",
    {
      **{
        f"{title}, {8 * side}², {attention}": Case(
          f"{config}.py:ayf", FLOW_MAP_SLICES, {"data.shape": (side, side, 16), "model.attention": attention}
        )
        for title, config in (("FLUX.1-dev", "flux"), ("Qwen-Image", "qwen_image"))
        for side in (64, 128)
        for attention in ("xla", "flash_jvp")
      },
    },
    most=1,
  ),
  "imagenet512": Table(
    "Flow maps of EDM2 S on ImageNet 512",
    {
      "AYF-EMD": Case("imagenet512.py:ayf_emd", IMAGENET512_SLICES),
      "AYF-EMD, adversarial": Case("imagenet512.py:ayf_emd_adversarial", IMAGENET512_SLICES),
    },
    most=4096,
  ),
}


def fitting(case: Case, where: plan.Slice, most: int, fast: bool) -> dict:
  """The report of the first accumulation that fits, a power of 2; the last report if none does."""
  config = read_config_file(f"configs/{case.config}")
  config.update_from_flattened_dict(case.changes)
  # Parameters are in parts over at most 16 chips: smaller parts save little memory.
  config.mesh.update(data=-1, fsdp=min(16, where.num_devices))
  if config.model.kind == "dit" and config.objective.kind == "imitation":  # a flow map needs a forward derivative
    config.model.attention = "pallas"
  config.train.accumulation = max(1, config.train.batch_size // (where.num_devices * most))
  while True:
    report = plan.plan(copy.deepcopy(config), where, fast=fast, search=False, sampling=False)
    if report["memory"]["fits"] or config.train.batch_size // config.train.accumulation <= where.num_devices:
      return report
    config.train.accumulation *= 2


def row(title: str, report: dict) -> str:
  mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "1 chip"
  m, estimate = report["memory"], report.get("estimate")
  if not m["fits"]:
    batch = f"{report['batch_size']} / {report['accumulation']}"
    refused = f"DOES NOT FIT: {m['peak'] / GIB:.2f} of {m['available'] / GIB:.2f}"
    return "| " + " | ".join([title, report["topology"], mesh, batch, refused, *[""] * 5]) + " |"
  sent = sum(t["sent"] for t in report["traffic"]["ici"].values()) / GIB
  seconds, hours = estimate["step_seconds"], estimate["chip_hours"]
  cells = [
    title,
    report["topology"],
    mesh,
    f"{report['batch_size']} / {report['accumulation']}",
    f"{m['arguments'] / GIB:.2f} / {m['peak'] / GIB:.2f} of {m['available'] / GIB:.2f}",
    f"{report['flops'] / 1e15:.2f}",
    f"{sent:.1f}",
    f"{seconds[0]:.2f} to {seconds[1]:.2f}, {estimate['limit']}",
    f"{hours[0]:,.0f} to {hours[1]:,.0f}",
    f"{report['compile_seconds']:.0f}",
  ]
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("table", choices=TABLES)
  parser.add_argument("--out", help="default: docs/plan_<table>.md")
  parser.add_argument("--full", action="store_true", help="compile with all effort, 2 minutes a row and more")
  parser.add_argument("--json", help="file for the reports; default: runs/plan_<table>.json")
  args = parser.parse_args()
  head = ["method", "slice", "mesh", "batch / accumulation", "memory of a chip, GiB: arguments / peak"]
  head += ["PFLOP a step", "sent by a chip, GiB", "step, s (estimate), limit"]
  head += ["chip-hours (estimate)", "compiled in, s"]
  lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"]
  table, kept = TABLES[args.table], pathlib.Path(args.json or f"runs/plan_{args.table}.json")
  kept.parent.mkdir(parents=True, exist_ok=True)
  reports = json.loads(kept.read_text()) if kept.exists() else {}
  for title, case in table.methods.items():
    for name in case.slices:
      start = time.perf_counter()
      key = f"{case.name} on {name}{', in full' * args.full}"
      if key not in reports:
        reports[key] = fitting(case, plan.Slice(name), table.most, not args.full)
        kept.write_text(json.dumps(reports, indent=2) + "\n")
      lines.append(row(title, reports[key]))
      print(f"{lines[-1]}  ({time.perf_counter() - start:.0f} s)", flush=True)
  effort = ""
  if not args.full:
    effort = """Compiled with little effort (`pflow plan --fast`), which moves more through main memory than a
compilation in full: π-ID on v5e-256 takes an estimated 0.14 to 0.25 s there, see [TPU pods](tpu.md).
"""
  kernel = """Policy students have `model.attention="pallas"`, a flow map's needs a forward derivative and is XLA's.
"""
  text = f"""# {table.title}: does it fit, and what would it cost

`python benchmarks/plan_table.py {args.table}{" --full" * args.full}`, jax {plan.jax.__version__}, without a
TPU at hand. Memory, operations and bytes sent are of the compiled program. Seconds and hours are estimates that no chip
has confirmed: the lower end of a step is what its slowest part (matrix products, main memory or links, at their
published rates) takes alone, the upper end all of them in turn; the lower end of the hours is that of the step, the
upper end {EFFICIENCY:.0%} of such a rate. Hours are those of all steps of the config.
{effort}{kernel if args.table == "imagenet" else ""}{smallest(reports)}
""" + "\n".join(lines)
  pathlib.Path(args.out or f"docs/plan_{args.table}.md").write_text(text + "\n")


def smallest(reports: dict[str, dict]) -> str:
  """For every config and chip the smallest of the slices that fits."""
  found: dict[str, dict[str, dict]] = {}
  for name, report in reports.items():
    chips = found.setdefault(name.split(" on ")[0], {})
    if report["memory"]["fits"] and report["chips"] < chips.get(report["chip"], {"chips": 1e9})["chips"]:
      chips[report["chip"]] = report
  lines = []
  for config, chips in found.items():
    fits = [f"{r['topology']} ({r['memory']['peak'] / GIB:.2f} GiB of a chip)" for r in chips.values()]
    lines.append(f"The smallest slices here that configs/{config} fits on: {', '.join(fits)}.")
  return "".join(f"\n{line}" for line in lines) + "\n" if lines else ""


if __name__ == "__main__":
  main()
