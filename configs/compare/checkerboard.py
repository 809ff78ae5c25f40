"""Nine methods on the checkerboard with one teacher, one network and one budget of training compute for every student.

    pflow compare --config configs/compare/checkerboard.py --workdir runs/compare_board --seeds 0,1,2

Hardware and cost: any; a seed is a teacher of 4.1e12 operations and 18 students of 3e12, 5.8e13 in all, and 18
evaluations: 45 minutes on one core. Measured with one seed: docs/compare_checkerboard.md. digits.py beside this file
explains the table, and the fairness of the comparison.
"""

import pathlib

from ml_collections import ConfigDict

from pflow_jax.evaluation.comparison import all_methods

PATH = pathlib.Path(__file__).parents[1] / "checkerboard.py"


def get_config(variant: str = "full") -> ConfigDict:
  """Returns the config of a variant: "full", or "quicktest" for a smoke test."""
  flops = 1e7 if variant == "quicktest" else 3e12
  return all_methods(PATH, variant, flops=flops, weak_steps=500, adapters=False)
