"""ImageNet's way on 5,000 digits and a CPU: latents of a tiny autoencoder, a teacher like SiT, students.

    python benchmarks/imagenet_way.py --folder runs/way --autoencoder taesd/taef2

docs/imagenet.md has the commands one by one. The network is SiT's, small: time is 1 at the data and the norms have its
epsilon, so that the teacher can be written as a file of SiT's authors and read again. A picture of 64 x 64 is
8 x 8 x 32 numbers.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick


def base(objective: str) -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="latents:runs/way/latents", shape=(8, 8, 32), num_classes=10)
  config.model = dict(kind="dit", patch_size=2, width=192, depth=6, num_heads=3, scan_unroll=6)
  config.model.update(time_scale=1.0, norm_eps=1e-6, flip_time=True, dtype="float32", remat="none", attention="xla")
  config.train.update(batch_size=128, log_every=50, checkpoint_every=100)
  config.optimizer.update(learning_rate=1e-3, schedule="cosine")
  config.sample.batch_size = 256
  config.evaluate.update(width=192, nearest_k=3)
  return config


def teacher() -> ConfigDict:
  """Teacher, which learns from the digits."""
  config = base("flow_matching")
  config.head = dict(kind="velocity")
  config.objective.cond_dropout = 0.1
  config.optimizer.warmup_steps = 100
  config.train.steps = 800
  return config


def gm_1nfe() -> ConfigDict:
  """Student of 1 evaluation with a Gaussian mixture as its policy."""
  config = base("imitation")
  config.head = dict(kind="gmflow", num_components=8)
  config.teacher.update(guidance=1.5, interval=(0.0, 0.8))
  config.objective.update(num_states=2, dropout=0.05, substeps=64)
  config.optimizer.warmup_steps = 50
  config.train.update(steps=200, batch_size=64)
  return config


def gm_2nfe() -> ConfigDict:
  """The same for 2 evaluations."""
  config = gm_1nfe()
  config.objective.nfe = 2
  config.train.steps = 150
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=10)
  config.model.update(width=64, depth=1, num_heads=1, scan_unroll=1)
  config.train.update(steps=4, batch_size=8, log_every=1, checkpoint_every=2)
  config.optimizer.warmup_steps = 1
  config.sample.batch_size = 64
  config.evaluate.update(width=64, num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)


VARIANTS = {variant.__name__: variant for variant in (teacher, gm_1nfe, gm_2nfe)}


def get_config(variant: str = "teacher") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
