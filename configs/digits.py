"""Handwritten digits, 8x8: teacher and students in minutes on a laptop."""

from ml_collections import ConfigDict

from pflow_jax.defaults import default_config

VARIANTS = ("teacher", "gmflow", "dx", "arc")


def get_config(variant: str = "teacher") -> ConfigDict:
  """`variant` is one of VARIANTS, and ",quicktest" after it shrinks the run to a smoke test."""
  name, *switches = variant.split(",")
  if name not in VARIANTS or set(switches) - {"quicktest"}:
    raise ValueError(f"variant: expected one of {VARIANTS}, optionally with ',quicktest', got {variant!r}")
  config = default_config("flow_matching" if name == "teacher" else "imitation")
  config.data = dict(name="digits")
  config.model = dict(kind="dit", patch_size=2, width=64, depth=4, num_heads=4, scan_unroll=4)
  config.train.update(steps=2500, batch_size=128, log_every=100, checkpoint_every=1000)
  config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine")
  config.sample.batch_size = 500
  if name == "teacher":
    config.policy = dict(kind="velocity")
  else:
    config.optimizer.learning_rate = 1e-3
    config.objective.update(num_states=2, substeps=64)
  if name == "gmflow":
    config.policy = dict(kind="gmflow", num_components=16)
    config.objective.dropout = 0.05
  if name == "dx":
    config.policy = dict(kind="dx", num_coefficients=10, basis="grid")
    config.objective.update(window=10.0)
  if name == "arc":
    config.policy = dict(kind="arc", num_components=8)
    config.objective.update(window=3.0, dropout=0.1)
  if "quicktest" in switches:
    config.model.update(width=16, depth=1, num_heads=2, scan_unroll=1)
    config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
    config.optimizer.warmup_steps = 1
    config.evaluate.update(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)
    config.sample.batch_size = 64
  return config
