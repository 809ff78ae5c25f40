"""Points on a checkerboard: teacher, 1-NFE student and pictures of their trajectories in about 90 seconds on two cores.

pflow train --config configs/checkerboard.py:teacher --workdir runs/board
pflow train --config configs/checkerboard.py:gmflow --workdir runs/board1 --config.teacher.workdir=runs/board
pflow evaluate --workdir runs/board1
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, parse_variant
from pflow_jax.training.experiment import FLOW_MAPS

VARIANTS = (
  *("teacher", "flow_teacher", "gmflow", "dx", "arc"),
  *("ayf_emd", "ayf_emd_adversarial", "ayf_lmd", "mean_flow", "consistency"),
)


def get_config(variant: str = "teacher") -> ConfigDict:
  """`variant` is one of VARIANTS, and ",quicktest" after it shrinks the run to a smoke test."""
  name, quicktest = parse_variant(variant, VARIANTS)
  objective = name.removesuffix("_adversarial") if name.startswith(tuple(FLOW_MAPS)) else "imitation"
  if name in ("teacher", "flow_teacher"):
    objective = "flow_matching"
  config = default_config(objective)
  config.data = dict(name="checkerboard")
  config.model = dict(kind="mlp", width=128, depth=4, time_scale=1000.0, dtype="float32")
  config.sample.update(batch_size=10_000)
  config.evaluate.num_samples = 5_000
  config.train.update(steps=4000, batch_size=512, log_every=100, checkpoint_every=1000)
  config.optimizer.update(learning_rate=2e-3, warmup_steps=50, schedule="cosine")
  if objective in ("flow_matching", *FLOW_MAPS) and name != "teacher":
    config.model.time_scale = 1.0  # see configs/digits.py
  if objective == "flow_matching":
    config.policy = dict(kind="velocity")
  else:
    config.train.steps = 800
  if objective == "imitation":
    config.objective.num_states = 2
  if objective in FLOW_MAPS:
    config.policy = dict(kind="velocity")
    config.train.steps = 4000
    config.optimizer.learning_rate = 5e-4
    config.objective.warmup_steps = 1000 if name != "mean_flow" else 0
  if objective in ("ayf_emd", "ayf_lmd"):
    config.objective.anchor = 0.25
  if name == "gmflow":
    config.policy = dict(kind="gmflow", num_components=32)
    config.objective.update(dropout=0.05, substeps=64)
  if name == "dx":
    config.policy = dict(kind="dx", num_coefficients=10, basis="grid")
    config.objective.window = 10.0
  if name == "mean_flow":
    config.objective.update(kappa=0.0, cond_dropout=0.0)  # there are no classes
  if name == "consistency":
    config.sample.gamma = 1.0  # it only knows jumps to the data
  if name == "arc":
    config.policy = dict(kind="arc", num_components=8)
    config.objective.update(window=3.0, dropout=0.1)
  if name == "ayf_emd_adversarial":
    config.adversarial.update(weight=0.1, width=64)
  if quicktest:
    config.model.update(width=16, depth=1)
    config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
    config.optimizer.warmup_steps = 1
    config.evaluate.update(num_samples=128, teacher_steps=(4, 128), num_resamples=2)
    config.sample.batch_size = 64
  return config
