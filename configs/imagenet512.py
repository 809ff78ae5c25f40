"""ImageNet 512 x 512 in EDM2's latents of 64 x 64 x 4: Align Your Flow's flow maps of EDM2 S.

    pflow plan --config configs/imagenet512.py:ayf_emd --topology v5e-64
    pflow convert --source edm2-img512-s-2147483-0.070.pkl --dtype bfloat16 --out gs://BUCKET/edm2_s
    pflow convert --source edm2-img512-xs-0134217-0.125.pkl --dtype bfloat16 --out gs://BUCKET/edm2_xs_weak
    launch/tpu.sh run -- --config configs/imagenet512.py:ayf_emd --workdir gs://BUCKET/ayf_s \
        --config.teacher.workdir=gs://BUCKET/edm2_s --config.teacher.weak_workdir=gs://BUCKET/edm2_xs_weak
    launch/tpu.sh run -- --config configs/imagenet512.py:ayf_emd_adversarial --workdir gs://BUCKET/ayf_s_adversarial \
        --config.teacher.workdir=gs://BUCKET/edm2_s --config.teacher.weak_workdir=gs://BUCKET/edm2_xs_weak \
        --config.start.workdir=gs://BUCKET/ayf_s

Data: a folder of latents that every worker can read, by default /data/imagenet512: EDM2's moments, made by its own
programs and taken over by `pflow latents --images edm2:FILE.zip`.

| variant | teacher | published for EDM2 S, FID at 1 / 2 / 4 evaluations |
|---|---|---|
| ayf_emd | EDM2 S, guided by EDM2 XS at 134 million images | 3.32 / 1.87 / 1.70 (Align Your Flow, arXiv:2506.14603) |
| ayf_emd_adversarial | the same | 1.92 / 1.81 / 1.64 |
| ayf_lmd | the same | - / - / 6.70 |
| consistency | the same, at one strength | 3.07 / 2.50 / - (sCD, arXiv:2410.11081, guided by the empty class) |
| mean_flow | none; it starts from EDM2 S | none |

The pair of snapshots, and the strength 2.1 at which the teacher alone has FID 1.34, are those of EDM2's release
(arXiv:2406.02507). Of the flow maps' recipe the paper tells strengths in [1, 3], the interval's distribution, warm-up
and normalisation of the derivative, and the adversarial stage; batch, steps, rates and the average's width are chosen
here. One thing differs: the student hears the noise level as its teacher does, by random features of log sigma, and not
by t, since it starts as its teacher. None has been trained at this size with this code.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick

STRENGTH = 2.1  # of the published pair, at FID 1.34


def base(objective: str) -> ConfigDict:
  """Returns the settings that all variants share: EDM2 S as it was released."""
  config = default_config(objective)
  config.data = dict(name="latents:/data/imagenet512", shape=(64, 64, 4), num_classes=1000)
  config.model = dict(kind="edm2", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_levels=(2, 3))
  config.model.update(channels_per_head=64, time_embedding="fourier", time_scale=1.0)
  config.model.update(dtype="bfloat16", remat="full", attention="xla")
  config.head = dict(kind="denoiser", sigma_data=0.5, max_sigma=80.0, min_sigma=0.002)
  config.optimizer.update(learning_rate=1e-4, b1=0.9, b2=0.99, warmup_steps=1000, clip_norm=50.0)
  # Which width of the average is best is found afterwards, by `pflow ema`.
  config.ema.update(sigma_rel=0.05, profiles=(0.05, 0.10), snapshot_every=5000)
  config.train.update(steps=50_000, batch_size=2048, log_every=100, checkpoint_every=1000, keep_every=10_000)
  config.mesh.update(data=-1, fsdp=1)
  config.sample.batch_size = 512
  config.evaluate.num_samples = 5000
  config.evaluate.nearest_k = 3
  return config


def flow_map(objective: str) -> ConfigDict:
  """Returns the settings of the flow maps of an autoguided teacher."""
  config = base(objective)
  config.teacher.update(guidance=STRENGTH, dtype="bfloat16")
  config.objective.update(guidance=(1.0, 3.0), time_mean=-0.8, time_std=1.0, warmup_steps=10_000)
  return config


def ayf_emd() -> ConfigDict:
  """Align Your Flow's Eulerian flow map."""
  return flow_map("ayf_emd")


def ayf_emd_adversarial() -> ConfigDict:
  """Its adversarial stage of 3,000 steps, for a start from a finished ayf_emd (config.start)."""
  config = flow_map("ayf_emd")
  config.adversarial.update(weight=0.1, r1=0.1, r2=0.1)
  config.objective.warmup_steps = 0
  config.optimizer.update(learning_rate=2e-5, warmup_steps=0)
  config.ema.update(profiles=(), snapshot_every=0)
  config.train.update(steps=3000, keep_every=1000)
  return config


def ayf_lmd() -> ConfigDict:
  """Align Your Flow's Lagrangian flow map."""
  return flow_map("ayf_lmd")


def consistency() -> ConfigDict:
  """Consistency model of the autoguided teacher, the limit in which every jump ends at the data."""
  config = base("consistency")
  config.teacher.update(guidance=STRENGTH, dtype="bfloat16")
  config.sample.gamma = 1.0
  return config


def mean_flow() -> ConfigDict:
  """MeanFlow on EDM2's network, which learns from the data alone."""
  config = base("mean_flow")
  config.objective.update(omega=0.2, kappa=0.92, interval=(0.0, 0.75))
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=10)
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


VARIANTS = {variant.__name__: variant for variant in (ayf_emd, ayf_emd_adversarial, ayf_lmd, consistency, mean_flow)}


def get_config(variant: str = "ayf_emd") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
