"""Points on a checkerboard: teacher, 1-NFE student and pictures of their trajectories in about 90 seconds on two cores.

pflow train --config configs/checkerboard.py:teacher --workdir runs/board
pflow train --config configs/checkerboard.py:gmflow --workdir runs/board1 --config.teacher.workdir=runs/board
pflow evaluate --workdir runs/board1
"""

from ml_collections import ConfigDict

from pflow_jax.defaults import default_config, parse_variant

VARIANTS = ("teacher", "gmflow", "dx")


def get_config(variant: str = "teacher") -> ConfigDict:
  """`variant` is one of VARIANTS, and ",quicktest" after it shrinks the run to a smoke test."""
  name, quicktest = parse_variant(variant, VARIANTS)
  config = default_config("flow_matching" if name == "teacher" else "imitation")
  config.data = dict(name="checkerboard")
  config.model = dict(kind="mlp", width=128, depth=4)
  config.sample.update(batch_size=10_000)
  config.evaluate.num_samples = 5_000
  config.train.update(steps=4000, batch_size=512, log_every=100, checkpoint_every=1000)
  config.optimizer.update(learning_rate=2e-3, warmup_steps=50, schedule="cosine")
  if name == "teacher":
    config.policy = dict(kind="velocity")
  else:
    config.train.steps = 800
    config.objective.num_states = 2
  if name == "gmflow":
    config.policy = dict(kind="gmflow", num_components=32)
    config.objective.update(dropout=0.05, substeps=64)
  if name == "dx":
    config.policy = dict(kind="dx", num_coefficients=10, basis="grid")
    config.objective.window = 10.0
  if quicktest:
    config.model.update(width=16, depth=1)
    config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
    config.optimizer.warmup_steps = 1
    config.evaluate.update(num_samples=128, teacher_steps=(4, 128), num_resamples=2)
    config.sample.batch_size = 64
  return config
