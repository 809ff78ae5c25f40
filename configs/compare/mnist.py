"""The methods of digits.py beside this file on MNIST's digits, 28x28: a harder set of 5,000, with the same recipes.

    pflow compare --config configs/compare/mnist.py --workdir runs/compare_mnist --seeds 0,1,2
    pflow compare --config configs/compare/mnist.py --workdir runs/compare_mnist --only gmflow,ayf_emd,free_flow

Hardware and cost: any; a seed is a teacher of 3.2e13 operations and 28 students of 1.25e13, 3.8e14 in all. Rates and
batch sizes are those of configs/digits.py, unchanged. digits.py beside this file explains the table, and the fairness
of the comparison.
"""

import pathlib

from ml_collections import ConfigDict

from pflow_jax.evaluation.comparison import all_methods

PATH = pathlib.Path(__file__).parents[1] / "digits.py"


def get_config(variant: str = "full") -> ConfigDict:
  """Returns the config of a variant: "full", or "quicktest" for a smoke test."""
  quicktest = variant == "quicktest"
  changes = dict(data=dict(name="mnist5k"), model=dict(patch_size=4))
  if not quicktest:
    changes["train"] = dict(steps=4000)
  flops = 1e9 if quicktest else 1.25e13
  return all_methods(PATH, variant, flops=flops, weak_steps=1000, adapters=True, rivals=True, changes=changes)
