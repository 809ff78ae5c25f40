"""Files of an evaluation: JSON, Markdown, pictures, and one page of HTML that holds all of it."""

from __future__ import annotations

import base64
import datetime
import html
import json
import math
import pathlib
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pflow_jax.evaluation import figures
from pflow_jax.evaluation.measure import Report
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.samplers import teacher_name
from pflow_jax.evaluation.tables import cell, html_table, markdown_table
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import told_apart
from pflow_jax.files.versions import version_of
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS
from pflow_jax.settings.tree import Settings

PACKAGES = ("pflow-jax", "jax", "jaxlib", "flax", "numpy")

# What is best in a column: the lowest, the highest, or what is nearest to 1. A speed is no merit of a method.
BETTER = {
  **dict.fromkeys(("alignment", "alignment_ratio", "fd", "fd_ratio", "fd_pixels_ratio"), "lower"),
  **dict.fromkeys(("precision", "recall", "accuracy"), "higher"),
  "diversity_ratio": "nearer to 1",
}
MEANINGS = {
  "nfe": "network evaluations a sample",
  "alignment": (
    "root-mean-square distance to the teacher's {reference}-step sample from the same noise, mean over the samples, in "
    "units of the data (images are in [-1, 1])"
  ),
  "alignment_ratio": "the same, relative to the teacher's {yardstick} Euler steps",
  "fd": "Fréchet distance to the data ({features})",
  "fd_ratio": "the same, relative to the teacher's {reference} steps",
  "fd_pixels_ratio": "Fréchet distance in pixels, relative to the teacher's {reference} steps",
  "diversity_ratio": "mean distance between samples of a class, relative to the teacher's {reference} steps",
  "precision": "share of samples that lie among the data",
  "recall": "share of the data that lie among the samples",
  "accuracy": "share of samples that the classifier finds in their class",
  "images_per_second": "samples a second on {device}, compilation aside",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; } p, ul { max-width: 60rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid #e3e6e9; white-space: nowrap; text-align: left; }
th { border-bottom: 2px solid #6e7781; white-space: normal; vertical-align: bottom; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } .note { color: #57606a; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; } summary { cursor: pointer; }
"""


class EvaluatedRun(NamedTuple):
  """A run of an evaluation: its settings, and the metrics of its training by name."""

  settings: Settings
  history: Mapping[str, np.ndarray]


def save_report(report: Report, out: pathlib.Path, runs: Mapping[str, EvaluatedRun]) -> dict[str, Any]:
  """Writes evaluation.json, .md and .html, samples.png and, of points, trajectories.png into a folder.

  Args:
    report: the evaluation.
    out: the folder, which is made.
    runs: the runs that were evaluated, by workdir or name.

  Returns:
    The content of evaluation.json.
  """
  now = datetime.datetime.now(datetime.UTC)
  about = {"workdirs": list(runs), "when": now.isoformat(timespec="seconds"), "versions": versions(), **report.about}
  content = {**about, "rows": report.rows}
  pictures = {name: figures.to_png(figure) for name, figure in samples_of(report).items()}
  out.mkdir(parents=True, exist_ok=True)
  for name, png in pictures.items():
    write_atomically(out / name, png)
  write_atomically(out / "evaluation.json", json.dumps(content, indent=2) + "\n")
  write_atomically(out / "evaluation.md", markdown(report, about))
  write_atomically(out / "evaluation.html", page(report, about, pictures, runs))
  return content


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that numbers depend on."""
  return {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}


def samples_of(report: Report) -> dict[str, Any]:
  """Draws the samples of teacher and students, and of points their trajectories; returns figures by file name."""
  dataset = report.dataset
  rows = {row["name"]: row for row in report.rows}
  euler = [teacher_name(steps) for steps in (1, YARDSTICK_STEPS, REFERENCE_STEPS)]
  shown = [name for name in rows if name in report.students or name in euler]
  shown.sort(key=lambda name: (name in report.students, -rows[name]["nfe"]))
  samples = {name: report.samples[name] for name in shown}
  if dataset.shape == (2,):
    paths = {name: report.paths[name] for name in shown if name in report.paths}
    return {
      "samples.png": figures.scatter_panels({"data": report.real} | samples),
      "trajectories.png": figures.trajectory_plot(report.real, paths),
    }
  count = min(len(report.labels), max(10, min(dataset.num_classes, 12)))
  names = dataset.class_names
  errors = {name: cell(rows[name]["alignment"]) if "alignment" in rows[name] else "reference" for name in shown}
  grid = figures.image_grid(
    {name: as_pictures(dataset, x[:count]) for name, x in samples.items()},
    column_labels=[names[i] for i in report.labels[:count]] if names else None,
    title=f"{dataset.name}: teacher and students from the same noise",
    caption=(
      "A column is one noise and one class, a row one sampler. Error: root-mean-square distance to the teacher's "
      f"{REFERENCE_STEPS} steps, mean of {len(report.labels):,} samples; lower is better."
    ),
    notes=errors,
    notes_title="error",
  )
  return {"samples.png": grid}


def best(report: Report) -> set[tuple[int, str]]:
  """Finds the (row, column) of the best values, ties included.

  Compared are the samplers of at most as many evaluations as a student has; the reference has no rival.
  """
  most = max((row["nfe"] for row in report.rows if row["name"] in report.students), default=math.inf)
  reference = teacher_name(REFERENCE_STEPS)
  rivals = {i: row for i, row in enumerate(report.rows) if row["nfe"] <= most and row["name"] != reference}
  found: set[tuple[int, str]] = set()
  for key, better in BETTER.items():
    values = {i: _number(row[key]) for i, row in rivals.items() if key in row and math.isfinite(_number(row[key]))}
    if len(values) > 1:
      first = cell(min(values.values(), key=_RANKS[better]))
      found |= {(i, key) for i, value in values.items() if cell(value) == first}
  return found


_RANKS: dict[str, Callable[[float], float]] = {
  "lower": lambda value: value,
  "higher": lambda value: -value,
  "nearer to 1": lambda value: abs(value - 1),
}


def _number(value: Any) -> float:
  """Returns a measure without its standard error."""
  return float(value[0] if isinstance(value, (list, tuple)) else value)


def markdown(report: Report, about: Mapping[str, Any]) -> str:
  """Writes the table with its title, conditions and units as Markdown."""
  lines = [f"* {head}: {text}" for head, text in _meanings(report, about)]
  return (
    f"# Evaluation on {about['data']}\n\n{_conditions(about)}\n\n"
    f"{markdown_table(report.rows, report.columns, best(report))}\n{_reading(report)}\n\n" + "\n".join(lines) + "\n"
  )


def page(
  report: Report, about: Mapping[str, Any], pictures: Mapping[str, bytes], runs: Mapping[str, EvaluatedRun]
) -> str:
  """Writes one page of HTML that needs no other file: table, pictures, curves, settings, versions.

  Args:
    report: the evaluation.
    about: its description, as in evaluation.json.
    pictures: PNGs of its samples, by file name.
    runs: the runs that were evaluated, by workdir or name.
  """
  escape = html.escape
  curves = {"metrics by number of evaluations": metrics_by_nfe(report), "training loss": losses(runs)}
  shown = [_image(png, name) for name, png in pictures.items()]
  drawn = [_image(figures.to_png(figure), name) for name, figure in curves.items() if figure is not None]
  meanings = "".join(f"<li><i>{escape(head)}</i>: {escape(text)}</li>\n" for head, text in _meanings(report, about))
  settings = "".join(
    f"<details><summary>{escape(name)}</summary><pre>{escape(json.dumps(run.settings.plain(), indent=2, default=str))}"
    "</pre></details>\n"
    for name, run in runs.items()
  )
  title = escape(f"Evaluation on {about['data']}")
  table = html_table(report.rows, report.columns, best(report))
  installed = html_table([{"package": name, "version": version} for name, version in about["versions"].items()])
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n<body>\n'
    f'<h1>{title}</h1>\n<p>{escape(_conditions(about))}</p>\n<div class="wide">\n{table}</div>\n'
    f'<p class="note">{escape(_reading(report).replace("**", ""))}</p>\n<ul class="note">\n{meanings}</ul>\n'
    f"<h2>Samples</h2>\n{''.join(shown)}<h2>Curves</h2>\n{''.join(drawn)}"
    f"<h2>Settings</h2>\n{settings}<h2>Versions</h2>\n{installed}</body>\n</html>\n"
  )


def metrics_by_nfe(report: Report) -> Any:
  """Draws alignment and Fréchet distance over the number of evaluations; None if none can be drawn."""
  panels: dict[str, dict[str, tuple[list[float], ...]]] = {}
  for key, title in (
    ("alignment_ratio", f"alignment error / teacher-{YARDSTICK_STEPS}\n(lower is better)"),
    ("fd_ratio", f"Fréchet distance / teacher-{REFERENCE_STEPS}\n(lower is better)"),
  ):
    for row in report.rows:
      value, error = row[key] if isinstance(row.get(key), tuple) else (row.get(key, 0.0), 0.0)
      if not (math.isfinite(value) and value > 0):  # a logarithmic axis has no place for it
        continue
      student = re.fullmatch(r"student, \d+ NFE(?: \((.*)\))?", row["name"])
      label = (student[1] or "student") if student else re.sub(r", \d+ (steps?|NFE)$", "", row["name"])
      line = panels.setdefault(title, {}).setdefault(label, ([], [], []))
      for values, number in zip(line, (row["nfe"], value, error if math.isfinite(error) else 0.0), strict=True):
        values.append(number)
  note = "bars: standard error over the samples"
  if not panels:
    return None
  return figures.curve_panels(panels, xlabel="network evaluations (NFE)", dashed=("teacher",), note=note)


def losses(runs: Mapping[str, EvaluatedRun]) -> Any:
  """Draws the training loss of each run that has one; None if none has."""
  series = {}
  for name, run in zip(told_apart(list(runs)), runs.values(), strict=True):
    step, loss = (np.asarray(run.history.get(key, ()), float) for key in ("step", "loss"))
    kept = np.isfinite(loss)
    if kept.any():
      series[name] = step[kept], loss[kept]
  if not series:
    return None
  yscale = "log" if min(y.min() for _, y in series.values()) > 0 else "linear"
  label = "training loss (lower is better)"
  return figures.curves(series, xlabel="optimizer step", ylabel=label, xscale="linear", yscale=yscale, markers=False)


def _conditions(about: Mapping[str, Any]) -> str:
  """Returns a line that says what was measured, when, where and with what."""
  when = datetime.datetime.fromisoformat(about["when"]).strftime("%Y-%m-%d %H:%M UTC")
  packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
  return (
    f"{about['num_samples']:,} samples of every sampler, from the same noise and conditions, beside "
    f"{about['num_real']:,} of the data. {when}, on {about['device']}; {packages}."
  )


def _reading(report: Report) -> str:
  """Returns a line that says what errors and bold numbers are."""
  most = max((row["nfe"] for row in report.rows if row["name"] in report.students), default=None)
  among = f"among samplers of at most {most} evaluations" if most else f"{REFERENCE_STEPS} steps aside"
  return f"±: standard error over the samples. **Bold**: the best of its column {among}."


def _meanings(report: Report, about: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns each column's heading with what it is, its unit, and what is better."""
  known = {"reference": REFERENCE_STEPS, "yardstick": YARDSTICK_STEPS, **about}
  return [
    (title, MEANINGS[key].format(**known) + (f"; {BETTER[key]} is better" if key in BETTER else ""))
    for key, title in report.columns.items()
    if key in MEANINGS
  ]


def _image(png: bytes, name: str) -> str:
  """Returns an HTML image that holds its bytes, at half its pixels, as figures are drawn for twice the density."""
  width, content = int.from_bytes(png[16:20], "big") // 2, base64.b64encode(png).decode()
  return f'<p><img width="{width}" alt="{html.escape(name)}" src="data:image/png;base64,{content}"></p>\n'
