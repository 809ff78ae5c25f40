"""Handwritten digits, 8x8: teacher and students in minutes on a laptop."""

import ml_collections

VARIANTS = ("teacher", "gmflow", "dx", "arc")


def get_config(variant: str = "teacher") -> ml_collections.ConfigDict:
  """`variant` is one of VARIANTS, and ",quicktest" after it shrinks the run to a smoke test."""
  name, *switches = variant.split(",")
  if name not in VARIANTS or set(switches) - {"quicktest"}:
    raise ValueError(f"variant: expected one of {VARIANTS}, optionally with ',quicktest', got {variant!r}")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = dict(name="digits")
  config.model = dict(kind="dit", patch_size=2, width=64, depth=4, num_heads=4)
  config.mesh = dict(data=-1, fsdp=1)
  config.sample = dict(nfe=(1, 2, 4), batch_size=500)
  config.evaluate = dict(num_samples=2000)
  config.train = dict(steps=2000, batch_size=128, log_every=100, checkpoint_every=1000)
  config.ema = dict(kind="karras", gamma=7.0)
  config.optimizer = dict(learning_rate=2e-3, warmup_steps=100, schedule="cosine", b2=0.95)
  if name == "teacher":
    config.policy = dict(kind="velocity")
    config.objective = dict(kind="flow_matching", cond_dropout=0.0)
  else:
    config.teacher = dict(workdir=ml_collections.config_dict.placeholder(str), guidance=1.0)
    config.optimizer.learning_rate = 1e-3
    config.objective = dict(kind="imitation", nfe=(1, 2, 4), num_states=2, substeps=64)
  if name == "gmflow":
    config.policy = dict(kind="gmflow", num_components=16)
    config.objective.dropout = 0.05
  if name == "dx":
    config.policy = dict(kind="dx", num_coefficients=10, basis="grid")
    config.objective.update(nfe=(1,), window=10.0)
    config.sample.nfe = (1,)
  if name == "arc":
    config.policy = dict(kind="arc", num_components=8)
    config.objective.update(window=3.0, dropout=0.1)
  if "quicktest" in switches:
    config.model.update(width=16, depth=1, num_heads=2)
    config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
    config.optimizer.warmup_steps = 1
    config.evaluate.update(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)
    config.sample.batch_size = 64
  return config
