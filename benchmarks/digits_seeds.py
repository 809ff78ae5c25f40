"""Trains and evaluates a teacher and its students on digits for several seeds; prints means and spreads.

    python benchmarks/digits_seeds.py --folder runs/seeds --seeds 0 1 2 --variants gmflow gmflow_2nfe gmflow_4nfe dx

Runs that are complete are not repeated. Each seed has its own teacher.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

from pflow_jax.evaluation.tables import markdown_table

ROOT = pathlib.Path(__file__).parents[1]
KEYS = ("alignment_ratio", "fd_ratio", "fd_pixels_ratio", "diversity_ratio", "precision", "recall", "accuracy")


def pflow(*args):
  start = time.time()
  command = [sys.executable, "-m", "pflow_jax", *map(str, args)]
  subprocess.run(command, check=True, cwd=ROOT)
  return time.time() - start


def run_seed(folder, seed, variants, extra):
  """Trains the missing runs; returns the rows of the evaluation, and training seconds by run."""
  seconds = {}
  common = [f"--config.seed={seed}", *extra]
  seconds["teacher"] = pflow("train", "--config=configs/digits.py:teacher", "--workdir", folder / "teacher", *common)
  for variant in variants:
    teacher = f"--config.teacher.workdir={folder / 'teacher'}"
    config = f"--config=configs/digits.py:{variant}"
    seconds[variant] = pflow("train", config, "--workdir", folder / variant, teacher, *common)
    if not (folder / variant / "evaluation" / "evaluation.json").exists():
      pflow("evaluate", "--workdir", folder / variant)
  rows = {}
  for variant in variants:
    report = json.loads((folder / variant / "evaluation" / "evaluation.json").read_text())
    rows |= {(row["name"] if row["name"].startswith("teacher") else variant): row for row in report["rows"]}
  return rows, seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "seeds")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--variants", nargs="+", default=["gmflow", "gmflow_2nfe", "gmflow_4nfe", "dx"])
  parser.add_argument("flags", nargs="*", help="passed to every training, after --: --config.train.tensorboard=False")
  args = parser.parse_args()
  folder = args.folder.absolute()
  results = [run_seed(folder / f"seed{seed}", seed, args.variants, args.flags) for seed in args.seeds]
  table = []
  for name in results[0][0]:
    entry = {"run": name, "NFE": results[0][0][name]["nfe"]}
    for key in KEYS:
      values = [rows[name].get(key) for rows, _ in results]
      values = np.array([v[0] if isinstance(v, list) else v for v in values if v is not None], float)
      # The spread is the standard deviation over seeds; the yardstick has none.
      entry[key] = (values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0) if len(values) else None
    table.append(entry)
  print(f"\n{len(args.seeds)} seeds, mean ± standard deviation over seeds\n")
  print(markdown_table(table))
  for name in results[0][1]:
    print(f"{name}: " + ", ".join(f"{seconds[name]:.0f} s" for _, seconds in results))


if __name__ == "__main__":
  main()
