"""The command `pflow evaluate`: a function whose arguments are the flags. Slow imports wait until they are needed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pflow_jax.commands.flags import Count, Repeated, Seed
from pflow_jax.commands.programs import Which


def evaluate(
  config: Any,
  workdir: str,
  also: Repeated = [],  # noqa: B006
  out: str | None = None,
  teacher: str | None = None,
  features: str | None = None,
  protocol: Literal["yardsticks", "adm"] = "yardsticks",
  reference: str | None = None,
  num: Count | None = None,
  nfe: Count | None = None,
  seed: Seed | None = None,
  labels: Literal["random", "balanced"] | None = None,
  which: Which | None = None,
  step: Annotated[int, 0, None] | None = None,
  keep: Literal["none", "npz", "png"] | None = None,
  paired: Annotated[int, 0, None] | None = None,
  draws: Count | None = None,
) -> None:
  """Measures a run: a student beside its teacher, or samples as papers on ImageNet do.

  Args:
    workdir: folder of the run
    also: workdir of another student of the same teacher; may be repeated
    out: folder of the results; default: <workdir>/evaluation, or <workdir>/adm
    teacher: workdir of the run's teacher, if it has moved
    features: file of the feature network, such as StyleGAN's inception-2015-12-05.pt
    protocol: adm: 50,000 samples against a reference, in parts; draws, keep, labels, nfe, num, paired, reference,
      seed, step and which are of it alone
    reference: file of moments and features, such as VIRTUAL_imagenet256_labeled.npz, or of pflow reference
    num: number of samples; default: 50000
    nfe: network evaluations; default: those of the config
    seed: of noise and classes; default: 0
    labels: classes drawn one by one, or all equally often; default: random
    which: averaged or last parameters; default: ema
    step: of the checkpoint; default: that of an evaluation which was killed, or the newest
    keep: samples as a file that ADM's evaluator reads, or as a folder of pictures; default: none
    paired: more samples, which the teacher draws too, for alignment and diversity; default: 512
    draws: draws of so many samples, with seeds one after another: the table has means and the lowest FID. EDM2's
      is that of 3; default: 1
  """
  from pflow_jax.settings.tree import Settings

  settings = Settings.of(config, converted=True)
  if features is not None:
    settings = settings.changed("evaluate", features=features)
  own: dict[str, Any] = dict(num_samples=num, seed=seed, labels=labels, keep=keep, num_paired=paired, draws=draws)
  own = {name: value for name, value in own.items() if value is not None}
  if protocol == "adm":
    from pflow_jax.evaluation.protocol import Protocol, evaluate_by_protocol

    if also or reference is None:
      problem = "also: expected one run" if also else "reference: expected a file of moments and features"
      raise ValueError(f"{problem} for --protocol=adm")
    if nfe is not None:
      settings = settings.changed("sample", nfe=(nfe,))
    common: dict[str, Any] = dict(protocol=Protocol(**own), which=which or "ema", step=step)
    evaluate_by_protocol(settings, workdir, reference, **common, teacher=teacher, out=out)
    return
  if own or not (reference is nfe is which is step is None):
    names = "num, nfe, seed, labels, which, step, keep, paired, draws, reference"
    raise ValueError(f"{names}: are of --protocol=adm; give it too")
  from pflow_jax.evaluation.evaluate import evaluate as run

  run(settings, workdir, others=also, teacher=teacher, out=out)
