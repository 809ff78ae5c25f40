"""Reports of `plan` as text, as a table of meshes, and as JSON."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# The share of the roofline that such runs reach in practice if all is well.
EFFICIENCY = 0.45
FAST = "compiled with --fast: memory is as it will be, what is moved, seconds and chip-hours are overestimated"


def as_text(report: dict[str, Any]) -> str:
  """Writes a report as text."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
  m, estimate = report["memory"], report.get("estimate")
  per = "chip" if report["devices"] == report["chips"] else "device (there are two a chip)"
  what = f"{report['config']['objective']}, {report['config']['head']}"
  slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
  lines = [
    f"{what} on {slices}{report['topology']}: {report['chips']} chips, mesh {mesh}",
    f"batch {report['batch_size']}, accumulation {report['accumulation']}, remat {report['remat']}",
    f"data {report['data']}",
    f"parameters: {report['parameters']['trained']:,} train, the teacher has {report['parameters']['teacher']:,}",
  ]
  if "note" in report:
    lines += ["", report["note"], ""]
  names = ("parameters", "average", "optimizer", "teacher", "batch", "activations")
  parts = ", ".join(f"{name} {_size(m[name])}" for name in names if name in m)
  rest = "" if "peak" in m else f"; with activations, which only the compiler knows, of {_size(m['available'])}"
  lines.append(f"memory of a {per}: {parts}{rest}")
  if "fits" in m:
    verdict = "fits" if m["fits"] else "DOES NOT FIT"
    least = "" if "compiled" in report else ", its arguments alone"
    lines.append(f"  {verdict}: peak {_size(m['peak'])} of {_size(m['available'])}{least}")
    if "compiled" in report:
      lines.append(f"  compiled {report['compiled']} in {report['compile_seconds']:.0f} s")
  for attempt in report.get("tried", ()):
    result = attempt.get("refused") or f"{'fits' if attempt['fits'] else 'does not fit'}, {_size(attempt['peak'])}"
    lines.append(f"  with {' '.join(attempt['change'])}: {result.splitlines()[0]}")
  if report.get("tried") and not report["tried"][-1].get("fits"):
    lines.append("  nothing that was tried fits: take a larger slice, a smaller batch, or adapters (config.adapters)")
  lines.append(f"operations a step: {report['flops'] / 1e12:,.1f} TFLOP")
  for network in ("ici", "dcn"):
    for kind, t in sorted(report.get("traffic", {}).get(network, {}).items()):
      lines.append(
        f"  {network}: {t['count']} {kind}, {_size(t['payload'])}, of which a {per} sends {_size(t['sent'])}"
      )
  if estimate and "note" in report:
    hours = estimate["chip_hours"][0]
    least = _time(estimate["step_seconds"][0])
    lines.append(
      f"a step takes at least {least}, its operations alone; {report['steps']:,} of them {hours:,.0f} chip-hours"
    )
  elif estimate:
    times = ", ".join(f"{name} {_time(s)}" for name, s in estimate["seconds"].items())
    least, most = estimate["step_seconds"]
    lines += [
      f"estimate of a step: {_time(least)} if all overlaps, {_time(most)} if nothing does; limited by "
      f"{estimate['limit']} ({times})",
      f"estimate of {report['steps']:,} steps: {estimate['chip_hours'][0]:,.0f} chip-hours at that limit, "
      f"{estimate['chip_hours'][1]:,.0f} at {EFFICIENCY:.0%} of it",
    ]
  if report.get("compiled") == "fast":
    lines.append(f"  {FAST}")
  for s in report.get("sample", ()):
    per_image = f"{s['flops'] / s['batch_size'] / 1e9:,.0f} GFLOP an image"
    verdict = "" if s["fits"] else "DOES NOT FIT, "
    lines.append(
      f"sampling, {s['nfe']} NFE, {s['batch_size']} at a time: {verdict}peak {_size(s['peak'])}, {per_image}, estimate "
      f"at least {_time(s['compute_seconds'])}"
    )
  return "\n".join(lines)


def as_bytes(report: dict[str, Any]) -> str:
  """Writes the bytes that a step moves to and from main memory as two tables, by kind of work and by operation.

  Raises:
    ValueError: the report is of a step that was not compiled.
  """
  moved = report.get("traffic", {}).get("moved")
  if moved is None:
    why = "the TPU compiler is not installed" if "note" in report else "the step does not fit"
    raise ValueError(f"--bytes: expected a compiled step, whose bytes can be listed, but {why}")
  total = report["traffic"]["hbm"]
  kinds = sorted(moved["kinds"].items(), key=lambda kind: -kind[1])
  rows = [("", "GB", "share"), *((kind, f"{n / 1e9:.2f}", f"{n / total:.1%}") for kind, n in kinds if n)]
  rows.append(("all", f"{total / 1e9:.2f}", "100.0%"))
  listed: list[tuple[str, ...]] = [("operation", "GB", "times", "kind", "first result")]
  for one in moved["operations"]:
    listed.append((one["name"], f"{one['bytes'] / 1e9:.2f}", str(one["count"]), one["kind"], one["shape"]))
  per = "chip" if report["devices"] == report["chips"] else "device"
  head = [f"to and from the main memory of a {per} in a step, by the compiled program (no profile was compared)", ""]
  return "\n".join([*head, *_aligned(rows), "", *_aligned(listed)])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_table(reports: Sequence[dict[str, Any]]) -> str:
  """Writes reports of several meshes as a table, the fastest that fit first."""

  def rank(report: dict[str, Any]) -> tuple[bool, float]:
    fits = report.get("memory", {}).get("fits", "refused" not in report)
    return not fits, report.get("estimate", {}).get("step_seconds", [math.inf])[0]

  rows: list[tuple[str, ...]] = [("mesh", "peak", "fits", "sent", "step, all overlapped", "nothing", "limit")]
  for report in sorted(reports, key=rank):
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    if "refused" in report:
      rows.append((mesh, "refused: " + report["refused"].splitlines()[0][:60], "", "", "", "", ""))
      continue
    m, estimate, traffic = report["memory"], report.get("estimate"), report.get("traffic", {})
    sent = sum(t["sent"] for network in ("ici", "dcn") for t in traffic.get(network, {}).values())
    times = [_time(s) for s in estimate["step_seconds"]] if estimate else ["", ""]
    fits = {True: "yes", False: "no"}.get(m.get("fits"), "?")
    peak = _size(m["peak"]) if "peak" in m else "?"
    rows.append((mesh, peak, fits, _size(sent) if traffic else "?", *times, estimate["limit"] if estimate else ""))
  lines = _aligned(rows)
  notes = [report["note"] for report in reports if "note" in report]
  notes += [FAST for report in reports if report.get("compiled") == "fast"]
  return "\n".join([*lines, *dict.fromkeys(notes)])


def write_json(path: str | os.PathLike, reports: Any) -> None:
  """Writes reports to a JSON file."""
  pathlib.Path(path).write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


def _size(count: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.2f} GiB"


def _time(seconds: float) -> str:
  return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
