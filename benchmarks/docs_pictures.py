"""Draws the pictures of README and docs/ anew.

python benchmarks/docs_pictures.py                 # of the tables in docs/compare_*.md
"""

import argparse
import math
import pathlib
import shutil

import pflow_jax as pf
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.compare_report import COLUMNS, MEASURES, picture

DOCS = pathlib.Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"


def rows_of(page):
  """Reads the table of a comparison's page as rows of `compare_report.summarise`, as far as `picture` reads them."""
  text = page.read_text(encoding="utf-8")
  lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
  keys = {title: key for key, title in COLUMNS.items()}
  rows = []
  for line in lines[2:]:
    cells = {keys[title]: cell for title, cell in zip(lines[0], line, strict=True)}
    row = {"method": cells["title"], "title": cells["title"], "nfe": int(cells["nfe"])}
    for key in MEASURES:
      mean, *sd = (float(part.replace(",", "")) for part in cells[key].replace("-", "nan").split(" ± "))
      row[key] = {"mean": mean, "sd": sd[0] if sd else None} if math.isfinite(mean) else None
    rows.append(row)
  return rows


def draw_digits(folder):
  """Digits of the runs of `make demo`: its picture, and the animation."""
  shutil.copy(folder / "samples.png", IMAGES / "digits.png")
  teacher, student = pf.load(folder / "teacher"), pf.load(folder / "gmflow", teacher=folder / "teacher")
  # One digit of each class, from the same noise.
  paths = {
    "teacher, 128 Euler steps": teacher.trajectories(10, seed=1),
    "student, 1 evaluation, then its policy alone": student.trajectories(10, seed=1),
  }
  evaluations = dict(zip(paths, (128, 1), strict=True))
  title = "Teacher: 128 network evaluations. Student: one."
  pf.plot.animation(paths, evaluations, title=title).save(IMAGES / "digits.gif")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--demo", type=pathlib.Path, help="folder of `make demo`")
  parser.add_argument("--board", type=pathlib.Path, help="workdir of configs/checkerboard.py:gmflow, evaluated")
  args = parser.parse_args()
  for page in sorted(DOCS.glob("compare_*.md")):
    figures.save(picture(rows_of(page)), IMAGES / f"{page.stem}.png")
  if args.demo:
    draw_digits(args.demo)
  if args.board:
    shutil.copy(args.board / "evaluation" / "trajectories.png", IMAGES / "checkerboard.png")


if __name__ == "__main__":
  main()
