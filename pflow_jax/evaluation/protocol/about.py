"""Descriptions of what samples depend on, all in this file: where one differs, samples are not taken up again.

A section of a config counts unless it is named here as one that does not: a setting that comes later is compared.
"""

from __future__ import annotations

from typing import Any

from pflow_jax.evaluation.evaluate import described_teacher
from pflow_jax.evaluation.feature_networks import FeatureNetwork
from pflow_jax.evaluation.protocol.settings import Protocol
from pflow_jax.families.autoencoder import codec_of
from pflow_jax.settings.sample import REFERENCE_STEPS, YARDSTICK_STEPS
from pflow_jax.training.experiment import Experiment
from pflow_jax.training.inputs import digest_of_parameters
from pflow_jax.training.network import COMPUTED

# Sections that made the parameters, or say where samples are drawn and measured. What samples have of the data and of
# the teacher is described by itself: shape, number of classes, strength of guidance, and the base of adapters.
UNRELATED = {
  *("seed", "data", "teacher", "start", "adversarial", "optimizer", "ema", "train", "evaluate", "mesh", "source")
}
# Of the section sample; all but the size of a batch are described by themselves.
NOT_OF_SAMPLES = ("nfe", "batch_size", "autoencoder", "weak_workdir", "weak_step")
# Other ways of computing round otherwise, as other devices do. A stream of fewer digits is another network to measure.
_ROUNDING = frozenset(COMPUTED) - {"residual_dtype"}


def of_sampler(experiment: Experiment, folder: str, step: int | None, which: str, protocol: Protocol) -> dict[str, Any]:
  """Describes all that a run's samples depend on, except their number of evaluations and their classes.

  Args:
    experiment: the run.
    folder: its workdir.
    step: of its checkpoint.
    which: "ema" or "params".
    protocol: with the seed.
  """
  settings = experiment.settings
  plain = {name: value for name, value in settings.plain().items() if name not in UNRELATED}
  sampling = {name: value for name, value in plain["sample"].items() if name not in NOT_OF_SAMPLES}
  base = {"base": experiment.saved["teacher"].digest} if experiment.network.adapters.table else {}
  guide = experiment.method.guide(settings.sample)
  weak = {"guide": guide.saved.digest} if guide is not None and guide.saved is not None else {}
  return {
    "parameters": digest_of_parameters(folder, step, which),
    "step": step,
    "which": which,
    **base,
    **weak,
    **plain,
    "model": _as_computed(plain["model"]),
    "sample": {**sampling, "guidance": experiment.method.strength(settings.sample)},
    **_of_noise(experiment, protocol),
  }


def of_features(experiment: Experiment, network: FeatureNetwork, protocol: Protocol) -> dict[str, Any]:
  """Describes what the features of samples depend on beside them, and what is kept."""
  codec = codec_of(experiment.dataset)
  return {
    "autoencoder": "" if codec is None else codec.digest(),
    "network": network.name,
    "num_samples": protocol.num_samples,
    "labels": protocol.labels,
    "keep": protocol.keep,
  }


def of_teacher(experiment: Experiment, protocol: Protocol) -> dict[str, Any]:
  """Describes all that the samples of a run's teacher depend on, those of the pairs."""
  assert experiment.teacher is not None
  return {
    "teacher": f"{described_teacher(experiment)}, in {experiment.teacher.settings.dtype}",
    "steps": [YARDSTICK_STEPS, REFERENCE_STEPS],
    "model": _as_computed(experiment.settings.plain()["model"]),
    **_of_noise(experiment, protocol),
    **of_pairs(protocol),
  }


def of_pairs(protocol: Protocol) -> dict[str, Any]:
  """Describes what the noise of the pairs depends on beside the seed: their numbers come after all others."""
  return {"first number": protocol.num_samples}


def _of_noise(experiment: Experiment, protocol: Protocol) -> dict[str, Any]:
  dataset = experiment.dataset
  return {"seed": protocol.seed, "shape": list(dataset.shape), "num_classes": dataset.num_classes}


def _as_computed(model: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in model.items() if name not in _ROUNDING}
