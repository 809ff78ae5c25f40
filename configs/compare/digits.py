"""Sixteen methods on digits (8x8) with one teacher, one network and one budget of training compute for every student.

    pflow compare --config configs/compare/digits.py --workdir runs/compare --seeds 0,1,2
    pflow compare --config configs/compare/digits.py --workdir runs/compare --only gmflow,ayf_emd

The table is runs/compare/compare.md, the numbers of every run compare.json, the picture compare.png. The same command
goes on where it was stopped, tries failed runs again, and repeats no finished one.

Hardware and cost: any; a seed is a teacher of 6.5e12 operations and 28 students of 4e12, 1.2e14 in all, and 28
evaluations: more than an hour on one core. --config.flops=2e13 asks for five times as much, in another workdir.

Measured with three seeds, without the last six methods: docs/compare_digits.md, read in docs/methods.md.

Fairness and limits of the comparison:

* A step of each student is counted from its traced program, evaluations of the teacher and of a discriminator included;
  the number of steps follows. Rates and batch sizes are those of configs/digits.py, chosen for about 9e12 operations.
* A policy student knows one number of evaluations, so that a policy method trains four students. A flow map is one
  student for all four. The table has the operations of a method, not of a student.
* The adversarial student starts from the finished AYF-EMD student and is trained for the budget once more.
* The autoguided student knows strengths 1 to 2 and is sampled at 1.5, while alignment is measured to the teacher
  without guidance: its alignment includes the change by guidance. `sample.guidance` needs no new training.
* MeanFlow learns from the data, but starts from the teacher's parameters, as all do. It and consistency keep their
  own share of flow matching (0.75 and none), AYF has half.
* A consistency model renews its noise between steps: by design its samples at 2 and more evaluations are other samples
  than the teacher's, and their alignment shows that alone.
"""

import pathlib

from ml_collections import ConfigDict

from pflow_jax.evaluation.comparison import all_methods

PATH = pathlib.Path(__file__).parents[1] / "digits.py"


def get_config(variant: str = "full") -> ConfigDict:
  """Returns the config of a variant: "full", or "quicktest" for a smoke test."""
  flops = 3e8 if variant == "quicktest" else 4e12
  return all_methods(PATH, variant, flops=flops, weak_steps=1000, adapters=True, rivals=True)
