"""The section `train` of a config."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """The section `train` of a config.

  Attributes:
    steps: optimizer steps of the whole run.
    batch_size: examples a step, over all processes.
    accumulation: micro-batches that a step's batch is cut into, one after the other.
    log_every: steps between two lines of metrics, at least 1.
    checkpoint_every: steps between two checkpoints; 0 saves one at the end alone.
    keep_checkpoints: newest checkpoints to keep.
    keep_every: also keep every checkpoint of a multiple of this, 0 none: an early one can guide (teacher.weak_step).
    sample_every: steps between two pictures of samples; 0 draws none, and by default a long run draws ten, see
      `training.sample.picture_every`.
    max_skipped: non-finite updates in a row after which the run stops with an error.
    profile: (first, last) step of a profiler trace in `<workdir>/profile`; (0, 0) is none.
    tensorboard: whether metrics are written for TensorBoard too.
    wandb: project of Weights & Biases, or ENTITY/PROJECT, that metrics go to as well; "" is none.
    num_workers: processes that read data; 0 reads in this one.
  """

  steps: int
  batch_size: int
  accumulation: int = 1
  log_every: int = 50
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  keep_every: int = 0
  sample_every: int | None = None
  max_skipped: int = 20
  profile: tuple[int, int] = (0, 0)
  tensorboard: bool = True
  wandb: str = ""
  num_workers: int = 0

  def __post_init__(self):
    for name in ("steps", "batch_size", "accumulation", "log_every", "keep_checkpoints", "max_skipped"):
      if getattr(self, name) < 1:
        raise ValueError(f"config.train.{name}: expected at least 1, got {getattr(self, name)}")
    for name in ("checkpoint_every", "keep_every", "sample_every", "num_workers"):
      if (getattr(self, name) or 0) < 0:
        raise ValueError(f"config.train.{name}: expected at least 0, got {getattr(self, name)}")
    if len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]:
      raise ValueError(f"config.train.profile: expected (first, last), 0 <= first <= last, got {self.profile}")
    if self.wandb and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.wandb):
      raise ValueError(f"config.train.wandb: expected PROJECT or ENTITY/PROJECT, got {self.wandb!r}")
