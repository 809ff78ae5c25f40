"""The results of evaluations in one folder: adm.json with a row for every sampler, draw and reference, and adm.md.

The table has the means of several draws, and beside them the lowest FID, which is lower than that of another draw is to
be expected.

adm.json is there from the start, with "finished" false until the end. A killed evaluation finds in it the checkpoint
that it was of, and the rows that it had measured.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pflow_jax.evaluation.protocol.parts import check_same
from pflow_jax.evaluation.protocol.scores import NEAREST
from pflow_jax.evaluation.protocol.settings import OF_A_CLASS
from pflow_jax.evaluation.tables import markdown_table
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.foreign import read_json
from pflow_jax.settings.sample import REFERENCE_STEPS

NAME = "adm.json"
Row = dict[str, Any]
_KEYS = {"nfe", "reference", "reference_digest", "reference_images", "notes"}  # of every row, beside its numbers

COLUMNS = {
  "nfe": "NFE",
  "num_draws": "draws",
  "fid": "FID",
  "fid_lowest": "FID, lowest draw",
  "fid_interval": "FID at infinitely many samples",
  "sfid": "sFID",
  "inception_score": "IS",
  "kid": "KID x 1000",
  "precision": "precision",
  "recall": "recall",
  "density": "density",
  "coverage": "coverage",
  "alignment": "alignment error",
  "alignment_ratio": "alignment / teacher-4",
  "diversity_ratio": "diversity / teacher-128",
  "images_per_second": "samples/s",
}
_OF_DRAWS = (  # numbers of which several draws have a mean
  *("fid", "fid_unbiased", "sfid", "inception_score", "kid", "precision", "recall", "density", "coverage"),
  "images_per_second",
)


def begun_step(folder: pathlib.Path) -> int | None:
  """Returns the step of the checkpoint of an evaluation in `folder` that was not finished; None without one."""
  path = folder / NAME
  there = read_json(path) if path.exists() else {}
  return there.get("step") if there.get("finished") is False else None


def known_rows(folder: pathlib.Path, about: Mapping[str, Any]) -> list[Row]:
  """Returns the rows that were measured in `folder`, of the same samples.

  Args:
    folder: of the results.
    about: what the samples depend on.

  Raises:
    ValueError: the folder has the evaluation of others, or the file is damaged.
  """
  path = folder / NAME
  if not path.exists():
    return []
  there = read_json(path)
  check_same(folder, there, about)
  rows = there.get("rows")
  if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _KEYS for row in rows):
    raise ValueError(
      f"{path}: expected rows with {', '.join(sorted(_KEYS))}; remove it, and the same command measures anew"
    )
  return [with_pairs({"seed": there["seed"], **row}) for row in rows]


def row_of(rows: Sequence[Row], nfe: int, seed: int, digest: str) -> Row | None:
  """Returns the row of a number of evaluations, a draw and a reference."""
  wanted = nfe, seed, digest
  return next((row for row in rows if (row["nfe"], row["seed"], row["reference_digest"]) == wanted), None)


def joined(rows: Sequence[Row], row: Row) -> list[Row]:
  """Returns rows with one more, which takes the place of that of the same evaluations, draw and reference."""
  others = [one for one in rows if one is not row_of(rows, row["nfe"], row["seed"], row["reference_digest"])]
  return sorted([*others, row], key=lambda one: (one["reference_digest"], one["nfe"], one["seed"]))


def over_draws(rows: Sequence[Row]) -> list[Row]:
  """Returns a row for each number of evaluations: that of its draw, or means of its draws and their lowest FID.

  Args:
    rows: of one reference.
  """
  by_nfe = {nfe: [row for row in rows if row["nfe"] == nfe] for nfe in dict.fromkeys(row["nfe"] for row in rows)}
  return [draws[0] if len(draws) == 1 else _mean(draws) for draws in by_nfe.values()]


def _mean(draws: Sequence[Row]) -> Row:
  """Returns the row of several draws; what the teacher draws too is of the first of them.

  FID has the error of its mean. Other errors, and the interval of FID, are those of a draw and are left out.
  """
  row = {key: value for key, value in draws[0].items() if key != "fid_interval"}
  row |= {key: float(np.mean([_value(one[key]) for one in draws])) for key in _OF_DRAWS if _all_have(draws, key)}
  row |= {"num_draws": len(draws), "fid_lowest": min(_value(one["fid"]) for one in draws)}
  if all(isinstance(one["fid"], tuple) for one in draws):
    row["fid"] = row["fid"], math.hypot(*(one["fid"][1] for one in draws)) / len(draws)
  return row


def _value(number: float | tuple[float, float]) -> float:
  return number[0] if isinstance(number, tuple) else number


def _all_have(rows: Sequence[Row], key: str) -> bool:
  return all(key in row for row in rows)


def with_pairs(row: Row) -> Row:
  """Returns a row with pairs of a value and its error as tuples, which JSON gives as lists."""
  return {key: tuple(value) if isinstance(value, list) and key != "notes" else value for key, value in row.items()}


def write(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
  """Writes adm.json, and of a finished evaluation adm.md."""
  folder.mkdir(parents=True, exist_ok=True)
  write_atomically(folder / NAME, json.dumps(report, indent=2) + "\n")
  if report["finished"]:
    write_atomically(folder / "adm.md", as_markdown(report))


def table(rows: Sequence[Row]) -> str:
  """Returns the rows of one reference as a table in Markdown."""
  rows = over_draws(rows)
  return markdown_table(rows, {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)})


def as_markdown(report: Mapping[str, Any]) -> str:
  """Returns the text of adm.md: a table for every reference, and how it was made."""
  step = "" if report["step"] is None else f", step {report['step']:,}"
  seeds = [report["seed"], *sorted({row["seed"] for row in report["rows"]} - {report["seed"]})]
  several = "; numbers of several draws are their means" if len(seeds) > 1 else ""
  told = [
    f"{report['num_samples']:,} samples of {report['labels']} classes, seed {' and '.join(map(str, seeds))}{several}",
    f"features of {report['network']}",
    f"precision and recall with k = {NEAREST}",
  ]
  if counts := {row["num_paired"] for row in report["rows"] if row.get("num_paired")}:
    told.append(
      f"alignment and diversity on {' or '.join(f'{count:,}' for count in sorted(counts))} samples more, {OF_A_CLASS} "
      f"of a class, beside the teacher's {REFERENCE_STEPS} Euler steps from the same noise"
    )
  parts = [f"# {report['workdir']}{step}\n"]
  for digest in dict.fromkeys(row["reference_digest"] for row in report["rows"]):
    rows = [row for row in report["rows"] if row["reference_digest"] == digest]
    images = rows[0]["reference_images"]
    about = [f"Reference {rows[0]['reference']}" + (f", of {images:,} images" if images else ""), *rows[0]["notes"]]
    parts.append(f"{table(rows)}\n{'; '.join(about)}.\n")
  return "\n".join([*parts, f"{'; '.join(told)}.\n"])
