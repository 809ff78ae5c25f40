"""The sections `sample` and `evaluate` of a config."""

from __future__ import annotations

import dataclasses

from pflow_jax.core.objectives.imitation import MAX_SUBSTEPS
from pflow_jax.core.policies import auto_temperature
from pflow_jax.core.solvers import NOISE_LEVELS, RHO, SOLVERS, check_solver

MAX_EVALUATIONS = 10_000
REFERENCE_STEPS, YARDSTICK_STEPS = 128, 4  # Euler steps of the teacher; students are measured against both


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """The section `sample` of a config.

  Attributes:
    nfe: numbers of network evaluations to sample with; () is the one that a policy student was trained for, 1, 2, 4
      and 8 for a flow map, 128 for a teacher (127 by Heun's method, which takes odd numbers alone).
    h: noise level between segments, or between a teacher's Euler steps; 0 is deterministic.
    temperature: of the policies of every segment but the last.
    auto_temperature: take the release's temperature for each nfe instead, see `core.policies.auto_temperature`.
    substeps: of the rollouts, in a unit of schedule time, see `core.rollout.rollout`.
    method: of the rollouts, see `core.rollout.rollout`.
    solver: of a teacher that is sampled itself: "euler", "heun", "dpmpp_2m", "sde" or "edm", see
      `core.solvers`.
    diffusion: coefficient of "sde", see `core.solvers.DIFFUSIONS`.
    terminal: flow time at which the last step of "sde" begins.
    sigmas: lowest and highest noise level of "edm", sigma = t / (1 - t).
    rho: exponent of the grid of "edm".
    gamma: noise that a flow map renews between its steps, see `core.samplers.sample_flow_map`.
    guidance: strength of guidance. A flow map that was trained for several takes this one; None is its teacher's
      (teacher.guidance), which evaluation always compares with. A teacher that is sampled itself takes it as the
      strength of classifier-free guidance; None is none.
    interval: flow times (low, high) in which the guidance of a teacher that is sampled itself acts.
    weak_workdir: run of a weaker model, which guides a teacher that is sampled itself in place of the empty condition
      (autoguidance).
    weak_step: checkpoint of that run; None is the newest.
    batch_size: samples at a time.
    autoencoder: folder of the autoencoder that shows samples of latents as pictures, a tiny one, say; "" is the one
      that made the latents, if it is known.
  """

  nfe: tuple[int, ...] = ()
  h: float = 0.0
  temperature: float = 1.0
  auto_temperature: bool = False
  substeps: int = 128
  method: str = "auto"
  solver: str = "euler"
  diffusion: str = "sigma"
  terminal: float = 0.04
  sigmas: tuple[float, float] = NOISE_LEVELS
  rho: float = RHO
  gamma: float = 0.0
  guidance: float | None = None
  interval: tuple[float, float] = (0.0, 1.0)
  weak_workdir: str | None = None
  weak_step: int | None = None
  batch_size: int = 256
  autoencoder: str = ""

  @property
  def temperature_of_segments(self) -> float | str:
    """The temperature, or "auto"."""
    return "auto" if self.auto_temperature else self.temperature

  def temperature_at(self, nfe: int) -> float:
    """The temperature of samples with `nfe` evaluations."""
    return auto_temperature(nfe) if self.auto_temperature else self.temperature

  def __post_init__(self):
    if min(self.nfe, default=1) < 1 or self.batch_size < 1:
      raise ValueError(f"config.sample: expected nfe and batch_size of at least 1, got {self.nfe}, {self.batch_size}")
    if max(self.nfe, default=1) > MAX_EVALUATIONS or not 1 <= self.substeps <= MAX_SUBSTEPS:
      raise ValueError(
        f"config.sample: expected at most {MAX_EVALUATIONS:,} evaluations and 1 to {MAX_SUBSTEPS:,} substeps, got "
        f"{self.nfe} and {self.substeps}"
      )
    if not (self.h >= 0 and self.temperature >= 0 and 0 <= self.gamma <= 1):
      raise ValueError(
        "config.sample: expected h and temperature of at least 0 and gamma in [0, 1], got "
        f"{self.h}, {self.temperature}, {self.gamma}"
      )
    check_solver(self.solver, self.diffusion, self.terminal, self.h, self.sigmas, self.rho)
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise ValueError(f"interval: expected flow times (low, high), 0 <= low <= high <= 1, got {self.interval}")
    if self.weak_step is not None and not self.weak_workdir:
      raise ValueError("config.sample.weak_step: is of a weaker model, whose run config.sample.weak_workdir names")
    if self.weak_workdir and self.guidance in (None, 1):
      raise ValueError(
        "config.sample.weak_workdir: a weaker model guides nothing at strength 1; set config.sample.guidance"
      )


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
  """The section `evaluate` of a config.

  Attributes:
    num_samples: samples of every sampler.
    teacher_steps: Euler steps of the teacher; 4 and 128 are the yardsticks of the ratios.
    solvers: other solvers that the teacher is measured with too, see `SampleSettings`: each with the numbers of
      evaluations in teacher_steps, or the nearest below that it takes.
    seed: of the noise.
    classifier_steps: training steps of the classifier whose features and classes are used (images with classes).
    num_resamples: of the bootstrap errors.
    nearest_k: precision and recall take the ball of a sample to reach to its k-th neighbour.
    features: file of the network in whose features Fréchet distance, precision and recall are measured, such as
      StyleGAN's inception-2015-12-05.pt; "" is the classifier, or for data without classes or pictures their
      coordinates. In 2048 features a resample takes minutes of a CPU's time: set num_resamples to 2.
    width: of its features, 64, 192, 768 or 2048: a distance needs twice as many samples. Papers have 2048.
  """

  num_samples: int = 2000
  teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 128)
  solvers: tuple[str, ...] = ()
  seed: int = 1234
  classifier_steps: int = 600
  num_resamples: int = 50
  nearest_k: int = 5
  features: str = ""
  width: int = 2048

  def __post_init__(self):
    if self.num_samples < 1 or self.classifier_steps < 1 or self.num_resamples < 2:
      raise ValueError(
        "config.evaluate: expected num_samples and classifier_steps of at least 1 and num_resamples of at least 2, got "
        f"{self.num_samples}, {self.classifier_steps} and {self.num_resamples}"
      )
    if not 1 <= self.nearest_k < self.num_samples:
      raise ValueError(
        f"config.evaluate.nearest_k: expected 1 to {self.num_samples - 1} (below num_samples), got {self.nearest_k}"
      )
    if min(self.teacher_steps, default=0) < 1 or max(self.teacher_steps) > MAX_EVALUATIONS:
      raise ValueError(
        f"config.evaluate.teacher_steps: expected 1 to {MAX_EVALUATIONS:,}, got {tuple(self.teacher_steps)}"
      )
    if not {REFERENCE_STEPS, YARDSTICK_STEPS} <= set(self.teacher_steps):
      raise ValueError(
        f"config.evaluate.teacher_steps: expected {YARDSTICK_STEPS} and {REFERENCE_STEPS} among them (the yardsticks "
        f"of every ratio), got {tuple(self.teacher_steps)}"
      )
    if not set(self.solvers) <= set(SOLVERS[1:]):
      raise ValueError(
        f"config.evaluate.solvers: expected some of {SOLVERS[1:]} (Euler's are in teacher_steps), got "
        f"{tuple(self.solvers)}"
      )
