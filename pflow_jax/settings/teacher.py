"""The sections `teacher` and `start` of a config: the runs that a run is made from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
  """The section `teacher` of a config.

  Attributes:
    workdir, step: of its run; step None is the newest checkpoint, and a student keeps the one it started with.
    which: "ema" or "params".
    guidance, interval, orthogonal: how it is guided, see `guidance.guided`.
    weak_workdir, weak_step: a weaker model, an early checkpoint or a smaller network, which guides it in place of the
      empty condition (autoguidance). weak_step alone is a checkpoint of the teacher's own run.
    bias_noise: of a student's start, see `heads.head_params_from_teacher`.
    dtype: that its parameters, and what of a student does not train, are kept in; None is as they were saved.
  """

  workdir: str | None = None
  step: int | None = None
  which: str = "ema"
  guidance: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  orthogonal: float = 0.0
  weak_workdir: str | None = None
  weak_step: int | None = None
  bias_noise: float = 0.05
  dtype: str | None = None

  def __post_init__(self):
    if self.which not in ("ema", "params"):
      raise ValueError(f"which: expected 'ema' or 'params', got {self.which!r}")
    if not self.guidance > 0:
      raise ValueError(f"guidance: expected a strength > 0, got {self.guidance}")
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise ValueError(f"interval: expected flow times (low, high), 0 <= low <= high <= 1, got {self.interval}")
    if self.bias_noise < 0:
      raise ValueError(f"bias_noise: expected at least 0, got {self.bias_noise}")
    if self.dtype not in (None, "float32", "bfloat16"):
      raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {self.dtype!r}")

  @property
  def autoguided(self) -> bool:
    """Whether a weaker model guides it."""
    return self.weak_workdir is not None or self.weak_step is not None

  def is_guided(self, strengths: tuple[float, float]) -> bool:
    """Whether it is guided, by itself or for a student that asks for these strengths."""
    return self.guidance != 1 or strengths != (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class StartSettings:
  """The section `start` of a config: a finished run of the same network whose parameters a new run starts from."""

  workdir: str | None = None
  step: int | None = None
  which: str = "ema"

  def __post_init__(self):
    if self.which not in ("ema", "params"):
      raise ValueError(f"which: expected 'ema' or 'params', got {self.which!r}")
