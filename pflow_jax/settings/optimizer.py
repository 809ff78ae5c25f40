"""The sections `optimizer` and `ema` of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pflow_jax.core.averages import MAX_WIDTH, exponent_of


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW with a warm-up, a clip of the global norm and a rate for each group of parameters.

  Attributes:
    learning_rate: the rate after the warm-up, > 0.
    warmup_steps: updates over which the rate rises linearly.
    warmup_factor: share of the rate at update 0, from which it rises to the whole at update `warmup_steps`; None rises
      from 1 / warmup_steps to the whole at the last of them.
    schedule: "constant", or "cosine", which reaches 0 at the end of the run.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    mu_dtype: dtype of the first moment, "bfloat16" saves a quarter of the optimizer's memory; None is that of the
      parameters.
    eps: keeps the quotient of the moments finite.
    weight_decay: decoupled decay of every parameter.
    clip_norm: largest global norm of the gradient (pi-Flow's release uses 50); None never clips.
    clip_start: update from which gradients are clipped; None is `warmup_steps`.
    rates: rows (pattern, factor on the learning rate, and with it on the decay) on the parameter's path; empty is a
      factor of 1 for all, see `mesh.partition.match`.
  """

  learning_rate: float
  warmup_steps: int = 0
  warmup_factor: float | None = None
  schedule: str = "constant"
  b1: float = 0.9
  b2: float = 0.95
  mu_dtype: str | None = None
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float | None = None
  clip_start: int | None = None
  rates: tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    if self.learning_rate <= 0:
      raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
    if self.warmup_steps < 0:
      raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
    if self.warmup_factor is not None and not 0 < self.warmup_factor <= 1:
      raise ValueError(
        f"warmup_factor must be a share in (0, 1], or None for 1 / warmup_steps, got {self.warmup_factor}"
      )
    if self.mu_dtype not in (None, "float32", "bfloat16"):
      raise ValueError(f"mu_dtype: expected 'float32' or 'bfloat16', got {self.mu_dtype!r}")
    if self.schedule not in ("constant", "cosine"):
      raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
    if self.clip_norm is not None and self.clip_norm <= 0:
      raise ValueError(f"clip_norm must be > 0, or None for no clipping, got {self.clip_norm}")
    if self.clip_start is not None and self.clip_start < 0:
      raise ValueError(f"clip_start must be >= 0, or None for warmup_steps, got {self.clip_start}")
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0 and self.weight_decay >= 0):
      raise ValueError(
        "b1, b2, eps, weight_decay: expected decay rates in [0, 1), > 0 and >= 0, got "
        f"{self.b1}, {self.b2}, {self.eps}, {self.weight_decay}"
      )
    if not all(isinstance(row, Sequence) and len(row) == 2 for row in self.rates):
      raise ValueError(
        f"rates: expected rows (pattern, factor), got {self.rates!r}; quote patterns within quotes on the shell"
      )
    for pattern, factor in self.rates:
      if not factor > 0:
        raise ValueError(
          f"rates: expected a factor > 0 for {pattern!r}, got {factor}; to freeze parameters, keep them out of the "
          "optimizer with partition.split"
        )


@dataclasses.dataclass(frozen=True)
class EmaSettings:
  """The moving average of the parameters.

  Attributes:
    kind: "karras", a share of the past that grows with the run, or "constant".
    start: step up to which the average is the parameters themselves.
    gamma: exponent of "karras".
    decay: share of the past in "constant".
    sigma_rel: width of "karras" as a share of the run, EDM2's number, in place of gamma; 0.0827 is gamma 7.
    profiles: widths of more such averages, from step 0 on; EDM2 has (0.05, 0.10). Others are made of them afterwards,
      see `pflow ema`. Each takes the memory of another average.
    snapshot_every: steps between two times at which the profiles are kept, besides the end.
    snapshot_dtype: of what is kept, "float32", "float16" or "bfloat16".
  """

  kind: str = "karras"
  start: int = 0
  gamma: float = 7.0
  decay: float = 0.9999
  sigma_rel: float | None = None
  profiles: tuple[float, ...] = ()
  snapshot_every: int = 0
  snapshot_dtype: str = "float16"

  @property
  def exponent(self) -> float:
    """The exponent of "karras"."""
    return self.gamma if self.sigma_rel is None else float(exponent_of(self.sigma_rel))

  def __post_init__(self):
    for name, widths in (("sigma_rel", [self.sigma_rel]), ("profiles", list(self.profiles))):
      if not all(width is None or 0 < width < MAX_WIDTH for width in widths):
        raise ValueError(f"ema: {name}: expected above 0 and below {MAX_WIDTH:.4f}, got {widths}")
    if len(set(self.profiles)) < len(self.profiles) or bool(self.profiles) != (self.snapshot_every > 0):
      raise ValueError(
        "ema: profiles, snapshot_every: expected different widths and the steps between two snapshots of them, or "
        f"neither, got {self.profiles} and {self.snapshot_every}"
      )
    if self.snapshot_dtype not in ("float32", "float16", "bfloat16"):
      raise ValueError(f"ema: snapshot_dtype: expected 'float32', 'float16' or 'bfloat16', got {self.snapshot_dtype!r}")
    if self.kind not in ("karras", "constant"):
      raise ValueError(f"ema: kind must be 'karras' or 'constant', got {self.kind!r}")
    if self.start < 0 or self.gamma <= 0 or not 0 <= self.decay < 1:
      raise ValueError(
        f"ema: expected start >= 0, gamma > 0, decay in [0, 1), got {self.start}, {self.gamma}, {self.decay}"
      )
