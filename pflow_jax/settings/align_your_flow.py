"""Recipes of Align Your Flow with the networks of EDM2, which configs/imagenet64.py and configs/imagenet512.py share.

Students of a teacher compute their derivative in the network's bfloat16 (objective.derivative_dtype): on a small one it
errs by 3 %, where the value errs by 2 %, and in float32, which is the safer choice, the products of a step take 2.6
times as long on a TPU. MeanFlow, whose residual has the noise of the data, keeps float32.

References:
  Align Your Flow, arXiv:2506.14603; EDM2, arXiv:2312.02696; autoguidance, arXiv:2406.02507.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick


@dataclasses.dataclass(frozen=True)
class Recipes:
  """Configs of students of EDM2 S on 64 x 64 pixels or latents, by variant.

  Attributes:
    data: the section of that name.
    channels: of the data.
    strength: of the teacher's guidance by a weaker model.
    time_mean: of the logit-normal from which the length of an Align Your Flow's jump is drawn.
    time_std: of that logit-normal.
  """

  data: Mapping[str, Any]
  channels: int
  strength: float
  time_mean: float
  time_std: float

  def get_config(self, variant: str) -> ConfigDict:
    """Returns the config of a variant; ",quicktest" after its name shrinks the run to a smoke test."""
    return pick(variant, self.variants, self.quicktest)

  @property
  def variants(self) -> dict[str, Callable[[], ConfigDict]]:
    """Makers of configs by the names of variants."""
    own = (self.ayf_emd, self.ayf_emd_adversarial, self.ayf_lmd, self.consistency, self.mean_flow)
    return {make.__name__: make for make in own}

  def ayf_emd(self) -> ConfigDict:
    """Align Your Flow's Eulerian flow map."""
    return self._flow_map("ayf_emd")

  def ayf_emd_adversarial(self) -> ConfigDict:
    """Its adversarial stage of 3,000 steps, for a start from a finished ayf_emd (config.start)."""
    config = self.ayf_emd()
    config.adversarial.update(weight=0.1, r1=0.1, r2=0.1)
    config.objective.warmup_steps = 0
    config.optimizer.update(learning_rate=2e-5, warmup_steps=0)
    config.ema.update(profiles=(), snapshot_every=0)
    config.train.update(steps=3000, keep_every=1000)
    return config

  def ayf_lmd(self) -> ConfigDict:
    """Align Your Flow's Lagrangian flow map."""
    return self._flow_map("ayf_lmd")

  def consistency(self) -> ConfigDict:
    """Consistency model of the autoguided teacher, the limit in which every jump ends at the data."""
    config = self._of_teacher("consistency")
    config.sample.gamma = 1.0
    return config

  def mean_flow(self) -> ConfigDict:
    """MeanFlow on EDM2's network, which learns from the data alone."""
    config = self._base("mean_flow")
    config.objective.update(omega=0.2, kappa=0.92, interval=(0.0, 0.75))
    return config

  def quicktest(self, config: ConfigDict) -> None:
    """Shrinks a config to a smoke test."""
    config.data = dict(name="synthetic", shape=(8, 8, self.channels), num_classes=10)
    config.model.update(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_levels=(1,), channels_per_head=8)
    config.model.update(dtype="float32", remat="none")
    config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, keep_every=0)
    config.optimizer.warmup_steps = 1
    if config.ema.snapshot_every:
      config.ema.snapshot_every = 2
    if config.get("adversarial"):
      config.adversarial.width = 4
    config.evaluate.update(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)
    config.sample.batch_size = 64

  def _base(self, objective: str) -> ConfigDict:
    """Returns the settings that all variants share: EDM2 S as it was released."""
    config = default_config(objective)
    config.data = dict(self.data)
    config.model = dict(kind="edm2", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_levels=(2, 3))
    config.model.update(channels_per_head=64, time_embedding="fourier", time_scale=1.0)
    config.model.update(dtype="bfloat16", remat="full", attention="xla")
    config.head = dict(kind="denoiser", sigma_data=0.5, max_sigma=80.0, min_sigma=0.002)
    config.optimizer.update(learning_rate=1e-4, b1=0.9, b2=0.99, warmup_steps=1000, clip_norm=50.0)
    # Which width of the average is best is found afterwards, by `pflow ema`.
    config.ema.update(sigma_rel=0.05, profiles=(0.05, 0.10), snapshot_every=5000)
    config.train.update(steps=50_000, batch_size=2048, log_every=100, checkpoint_every=1000, keep_every=10_000)
    config.mesh.update(data=-1, fsdp=1)
    config.sample.update(nfe=(1, 2, 4), batch_size=512)
    # The release samples its teachers with 63 evaluations.
    config.evaluate.update(num_samples=5000, nearest_k=3, teacher_steps=(4, 63, 128), solvers=("edm",))
    return config

  def _of_teacher(self, objective: str) -> ConfigDict:
    """Returns the settings of students of an autoguided teacher."""
    config = self._base(objective)
    config.teacher.update(guidance=self.strength, dtype="bfloat16")
    config.objective.derivative_dtype = "network"
    return config

  def _flow_map(self, objective: str) -> ConfigDict:
    """Returns the settings of Align Your Flow."""
    config = self._of_teacher(objective)
    config.objective.update(guidance=(1.0, 3.0), time_mean=self.time_mean, time_std=self.time_std, warmup_steps=10_000)
    return config
