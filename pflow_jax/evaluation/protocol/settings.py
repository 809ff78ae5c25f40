"""Settings of the evaluation that papers on ImageNet report."""

from __future__ import annotations

import dataclasses
from typing import Literal

PART = 1024  # samples of a part
PAIRS_IN_PART = 128  # of those that the teacher draws too, in a hundred times as many evaluations
OF_A_CLASS = 8  # of those
Keep = Literal["none", "npz", "png"]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Number and kind of samples in an evaluation.

  Attributes:
    num_samples: of every sampler, in a draw.
    seed: of noise and classes.
    labels: "random", each class drawn by itself, or "balanced", all classes equally often in a random order.
    keep: what is kept of the samples: "none", "npz", a file that ADM's own evaluator reads, or "png", a folder.
    num_paired: samples more, OF_A_CLASS of a class, that a student's teacher draws too, for alignment and diversity; 0
      leaves them out.
    draws: draws of so many samples, each with a seed of its own from `seed` on. EDM2 reports the lowest FID of three.

  Raises:
    ValueError: numbers out of range.
  """

  num_samples: int = 50_000
  seed: int = 0
  labels: Literal["random", "balanced"] = "random"
  keep: Keep = "none"
  num_paired: int = 512
  draws: int = 1

  @property
  def seeds(self) -> range:
    """Seeds of the draws."""
    return range(self.seed, self.seed + self.draws)

  def of(self, seed: int) -> Protocol:
    """Returns the protocol of one draw."""
    return dataclasses.replace(self, seed=seed, draws=1)

  def __post_init__(self):
    paired = self.num_paired
    if self.num_samples < 2 or paired < 0 or paired == 1 or self.num_samples + paired >= 2**31:
      raise ValueError(
        "num, paired: expected at least 2 samples, and 0 pairs or at least 2, fewer than 2^31 together, got "
        f"{self.num_samples} and {paired}"
      )
    if self.draws < 1 or self.seed < 0 or self.seeds.stop > 2**32:
      raise ValueError(
        f"seed, draws: expected at least 0 and at least 1, and seeds below 2^32, got {self.seed} and {self.draws}"
      )
