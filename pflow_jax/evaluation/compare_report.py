"""The table and the picture of a comparison, from the results of its runs; see `compare`."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax.evaluation import figures
from pflow_jax.evaluation.tables import markdown_table
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS

TEACHER = "teacher"
MEASURES = ("alignment_ratio", "fd_ratio", "diversity_ratio", "recall")
COLUMNS = {
  "title": "method",
  "nfe": "NFE",
  "alignment_ratio": f"alignment / teacher-{YARDSTICK_STEPS}",
  "fd_ratio": f"FD / teacher-{REFERENCE_STEPS}",
  "diversity_ratio": f"diversity / teacher-{REFERENCE_STEPS}",
  "recall": "recall",
  "training_tflop": "training TFLOP",
  "ms_per_image": "ms / image",
  "remarks": "remarks",
}


def summarise(runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[dict[str, Any]]:
  """Makes one row for each method and number of evaluations, the teacher's Euler steps first.

  A measure is dict(mean, sd, seeds), sd None for one seed; `worse` names those in which a student does not beat as many
  Euler steps of its teacher, over the same seeds; `failed` has the seeds without a result. training_flops is the
  method's total: all its students, the runs that they start from, the weak teacher.

  Args:
    runs: as in compare.json.
    titles: of the methods by name, in their order.
  """
  rows: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
  failed: dict[tuple[str, int], list[int]] = {}
  spent: dict[str, dict[int, dict[str, int]]] = {}
  for run in runs:
    seed, method = run["seed"], run["method"]
    if "error" in run:
      for nfe in run["nfe"]:
        failed.setdefault((method, nfe), []).append(seed)
      continue
    spent.setdefault(method, {}).setdefault(seed, {}).update(run["spent"])
    for row in run.get("rows", ()):
      if row["name"].startswith(TEACHER) and row["name"].endswith("NFE"):
        continue  # of another solver than Euler's
      key = (TEACHER if row["name"].startswith("teacher") else method, row["nfe"])
      rows.setdefault(key, {}).setdefault(seed, row)

  def worse(method, nfe):
    mine, teachers = rows.get((method, nfe), {}), rows.get((TEACHER, nfe), {})
    pairs = [(mine[seed], teachers[seed]) for seed in mine if seed in teachers and method != TEACHER]
    return [
      name
      for name, key in (("alignment", "alignment_ratio"), ("FD", "fd_ratio"))
      # The teacher's own reference has no error.
      if pairs
      and not sum(_number(a.get(key, math.inf)) for a, _ in pairs) < sum(_number(b.get(key, 0)) for _, b in pairs)
    ]

  table = []
  for name in (TEACHER, *titles):
    for nfe in sorted({nfe for owner, nfe in (*rows, *failed) if owner == name}):
      seen = rows.get((name, nfe), {})
      table.append(
        {"method": name, "title": titles.get(name, name), "nfe": nfe}
        | {key: _spread({seed: _number(row[key]) for seed, row in seen.items() if key in row}) for key in MEASURES}
        | {"ms_per_image": _spread({seed: 1e3 / row["images_per_second"] for seed, row in seen.items()})}
        # All seeds cost the same, except those with a part that failed.
        | {"training_flops": max((sum(parts.values()) for parts in spent.get(name, {}).values()), default=None)}
        | {"worse": worse(name, nfe), "failed": failed.get((name, nfe), [])}
      )
  return table


def _number(value: Any) -> float:
  """Returns a measure without its standard error over samples."""
  return float(value[0] if isinstance(value, (list, tuple)) else value)


def _spread(values: Mapping[int, float]) -> dict[str, Any] | None:
  """Mean and sample standard deviation over seeds; None without any."""
  if not values:
    return None
  numbers = list(values.values())
  sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
  return {"mean": float(np.mean(numbers)), "sd": sd, "seeds": {str(seed): value for seed, value in values.items()}}


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
  """Writes the rows of `summarise` as a Markdown table."""

  def cell(value):
    return value and ((value["mean"], value["sd"]) if value["sd"] is not None else value["mean"])

  def remarks(row):
    said = [f"worse: {', '.join(row['worse'])}"] if row["worse"] else []
    said += [f"failed: seed {', '.join(map(str, row['failed']))}"] if row["failed"] else []
    return "; ".join(said) or None

  lines = [
    {"title": row["title"], "nfe": row["nfe"], "remarks": remarks(row)}
    | {key: cell(row[key]) for key in (*MEASURES, "ms_per_image")}
    | {"training_tflop": row["training_flops"] / 1e12 if row["training_flops"] else None}
    for row in table
  ]
  return markdown_table(lines, COLUMNS)


def write_report(
  folder: pathlib.Path, budget: float, titles: Mapping[str, str], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """Writes compare.json, compare.md and compare.png of the runs so far; returns the content of compare.json."""
  table = summarise(runs, titles)
  reports = [run for run in runs if "rows" in run]
  settings = {
    key: sorted({run[key] for run in reports if key in run}) for key in ("data", "num_samples", "features", "device")
  }
  seeds = sorted({run["seed"] for run in runs})
  report = {"flops": budget, "seeds": seeds, **settings, "table": table, "runs": runs}
  report = json.loads(json.dumps(report))
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  errors = "".join(f"* seed {run['seed']}, {run['run']}: {run['error']}\n" for run in runs if "error" in run)
  text = (
    f"Every student is trained for as many steps as {budget:.3g} operations pay for, its teacher's evaluations "
    "included. Training TFLOP is the total of a method: its students, what they start from, a weak teacher. Alignment "
    f"is the mean RMS distance to the teacher's {REFERENCE_STEPS}-step sample from the same noise. *Worse*: no better "
    f"than as many Euler steps of the teacher. Seeds: {', '.join(map(str, seeds))}"
    f"{'; mean ± standard deviation over the seeds' if len(seeds) > 1 else ''}.\n"
  )
  text += f"\n{markdown(table)}" if table else ""
  text += f"\nFailed:\n\n{errors}" if errors else ""
  (folder / "compare.md").write_text(text, encoding="utf-8")
  figure = picture(table)
  if figure is not None:
    figures.save(figure, folder / "compare.png")
  return report


def picture(table: Sequence[Mapping[str, Any]]) -> Any:
  """Draws alignment and Fréchet distance over NFE of the rows of `summarise`; None while a measure has no rows."""
  panels = {
    f"alignment error / teacher-{YARDSTICK_STEPS}\n(lower is better)": _lines(table, "alignment_ratio"),
    f"Fréchet distance / teacher-{REFERENCE_STEPS}\n(lower is better)": _lines(table, "fd_ratio"),
  }
  if not all(panels.values()):
    return None
  spread = any(row["alignment_ratio"] and row["alignment_ratio"]["sd"] for row in table)
  note = "bars: standard deviation over seeds" if spread else None
  return figures.curve_panels(panels, xlabel="network evaluations (NFE)", dashed=(TEACHER,), note=note)


def _lines(table: Sequence[Mapping[str, Any]], key: str) -> dict[str, tuple[list[float], ...]]:
  """Lines of a measure over NFE, with its deviation over seeds, by method; the teacher's has only students' NFE."""
  students = {row["nfe"] for row in table if row["method"] != TEACHER}
  lines: dict[str, tuple[list[float], ...]] = {}
  for row in table:
    if row[key] and row["nfe"] in students:
      point = row["nfe"], row[key]["mean"], row[key]["sd"] or 0.0
      for values, value in zip(lines.setdefault(row["title"], ([], [], [])), point, strict=True):
        values.append(value)
  return lines
