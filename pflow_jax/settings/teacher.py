"""The sections `teacher` and `start` of a config: the runs that a run is made from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
  """The section `teacher` of a config.

  Attributes:
    workdir: folder of its run.
    step: of its checkpoint; None is the newest, and a student keeps the one it started with.
    which: "ema" or "params".
    guidance: scale of its guidance, see `core.guidance.guided`.
    interval: flow times in which guidance acts, see `core.guidance.guided`.
    orthogonal: share of the guidance along x0 that is removed, see `core.guidance.guidance_bias`.
    weak_workdir: run of a weaker model, an early checkpoint or a smaller network, which guides it in place of the empty
      condition (autoguidance).
    weak_step: checkpoint of that run; without weak_workdir, an early checkpoint of the teacher's own run.
    bias_noise: noise on the biases of a student's head at its start, see `networks.heads.head_params_from_teacher`.
    dtype: of its parameters, and of a student's that do not train; None keeps the saved one.
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
    """Returns whether a weaker model guides it."""
    return self.weak_workdir is not None or self.weak_step is not None

  def is_guided(self, strengths: tuple[float, float]) -> bool:
    """Returns whether it is guided, by its own settings or for a student of these strengths."""
    return self.guidance != 1 or strengths != (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class StartSettings:
  """The section `start` of a config: a finished run of the same network whose parameters a new run starts from.

  Attributes:
    workdir: of that run.
    step: of its checkpoint; None is the newest.
    which: "ema" or "params".
  """

  workdir: str | None = None
  step: int | None = None
  which: str = "ema"

  def __post_init__(self):
    if self.which not in ("ema", "params"):
      raise ValueError(f"which: expected 'ema' or 'params', got {self.which!r}")
