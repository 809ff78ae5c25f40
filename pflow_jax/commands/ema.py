"""`pflow ema`: its flags."""

from __future__ import annotations


def ema(workdir: str, sigma_rel: float, out: str | None = None, step: int | None = None) -> None:
  """Writes a run with another average of its parameters, made of the snapshots that config.ema.profiles left.

  Args:
    workdir: folder of a run with such snapshots
    sigma_rel: width of the average as a share of the run, such as 0.05
    out: folder of the new run; default: WORKDIR-ema-SIGMA_REL
    step: at which the average ends, one of the snapshots'; default: the last
  """
  from pflow_jax.conversion.averages import average as run

  out = out or f"{workdir.rstrip('/')}-ema-{sigma_rel:.3f}"
  made = run(workdir, out, sigma_rel=sigma_rel, step=step)
  print(f"wrote {out}: the average of width {sigma_rel:g} of {workdir} at step {made}")
