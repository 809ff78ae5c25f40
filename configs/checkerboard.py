"""Points on a checkerboard: teacher, 1-NFE student and pictures of their trajectories in about 90 seconds on two cores.

pflow train --config configs/checkerboard.py:teacher --workdir runs/board
pflow train --config configs/checkerboard.py:gmflow --workdir runs/board1 --config.teacher.workdir=runs/board
pflow evaluate --workdir runs/board1
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick


def base(objective: str, time_scale: float = 1000.0) -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="checkerboard")
  config.model = dict(kind="mlp", width=128, depth=4, time_scale=time_scale, dtype="float32")
  config.head = dict(kind="velocity")
  config.sample.batch_size = 10_000
  config.evaluate.num_samples = 5_000
  config.train.update(steps=4000, batch_size=512, log_every=100, checkpoint_every=1000)
  config.optimizer.update(learning_rate=2e-3, warmup_steps=50, schedule="cosine")
  return config


# Teachers


def teacher() -> ConfigDict:
  """Teacher of the policy students."""
  return base("flow_matching")


def flow_teacher() -> ConfigDict:
  """Teacher of flow maps, see digits.py."""
  return base("flow_matching", time_scale=1.0)


# Students that predict a policy


def policy(**head) -> ConfigDict:
  """Returns the settings that all policy students share; `head` is the section of that name."""
  config = base("imitation")
  config.head = head
  config.objective.num_states = 2
  config.train.steps = 800
  return config


def gmflow() -> ConfigDict:
  """Student of 1 evaluation with a Gaussian mixture as its policy."""
  config = policy(kind="gmflow", num_components=32)
  config.objective.update(dropout=0.05, substeps=64)
  return config


def dx() -> ConfigDict:
  """Student of 1 evaluation with denoised states on a grid as its policy."""
  config = policy(kind="dx", num_coefficients=10, basis="grid")
  config.objective.window = 10.0
  return config


def arc() -> ConfigDict:
  """Student of 1 evaluation with a mixture of momentum processes as its policy."""
  config = policy(kind="arc", num_components=8)
  config.objective.update(window=3.0, dropout=0.1)
  return config


# Flow maps, students of flow_teacher


def flow_map(objective: str) -> ConfigDict:
  """Returns the settings that all flow maps share."""
  config = base(objective, time_scale=1.0)
  config.optimizer.learning_rate = 5e-4
  config.objective.warmup_steps = 1000
  return config


def ayf_emd() -> ConfigDict:
  """Align Your Flow's Eulerian flow map."""
  config = flow_map("ayf_emd")
  config.objective.anchor = 0.25
  return config


def ayf_emd_adversarial() -> ConfigDict:
  """The same with adversarial finetuning."""
  config = ayf_emd()
  config.adversarial.update(weight=0.1, width=64)
  return config


def ayf_lmd() -> ConfigDict:
  """Align Your Flow's Lagrangian flow map."""
  config = flow_map("ayf_lmd")
  config.objective.anchor = 0.25
  return config


def mean_flow() -> ConfigDict:
  """MeanFlow, which learns from the data."""
  config = flow_map("mean_flow")
  config.objective.update(warmup_steps=0, kappa=0.0, cond_dropout=0.0)  # there are no classes
  return config


def consistency() -> ConfigDict:
  """Consistency model."""
  config = flow_map("consistency")
  config.sample.gamma = 1.0  # a consistency model jumps to the data alone
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.model.update(width=16, depth=1)
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
  config.optimizer.warmup_steps = 1
  config.evaluate.update(num_samples=128, teacher_steps=(4, 128), num_resamples=2)
  config.sample.batch_size = 64


FLOW_MAPS = (ayf_emd, ayf_emd_adversarial, ayf_lmd, mean_flow, consistency)
VARIANTS = {variant.__name__: variant for variant in (teacher, flow_teacher, gmflow, dx, arc, *FLOW_MAPS)}


def get_config(variant: str = "teacher") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
