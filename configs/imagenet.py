"""ImageNet 256 x 256 in latents of 32 x 32 x 4, DiT-XL/2: the sizes that TPU slices are for.

    pflow plan --config configs/imagenet.py:gmflow --topology v5e-256
    launch/tpu.sh run -- --config configs/imagenet.py:teacher --workdir gs://BUCKET/teacher
    launch/tpu.sh run -- --config configs/imagenet.py:gmflow --workdir gs://BUCKET/gmflow \
        --config.teacher.workdir=gs://BUCKET/teacher

Data: a folder of latents that every worker can read, by default /data/imagenet256, see `pflow_jax.data.write_latents`
(latents of Stable Diffusion's autoencoder, scaled to unit variance).

gmflow is pi-Flow's published recipe (arXiv:2510.14974, teacher without REPA): FID 3.34 at 1 evaluation there.
gmflow_2nfe and dx take its K, N, window, rate and number of steps, which were published with a REPA teacher and its
guidance. Without a published recipe for this network, and untried: arc_adapters (ArcFlow, arXiv:2602.09014, with the
settings of its text-to-image students and rank 96), ayf_emd (Align Your Flow, arXiv:2506.14603) and both teachers. None
has been trained at this size with this code; docs/plan_imagenet.md has the planned needs and cost of a run.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick


def base(objective: str, time_scale: float = 1000.0) -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="latents:/data/imagenet256", shape=(32, 32, 4), num_classes=1000)
  config.model = dict(kind="dit", patch_size=2, width=1152, depth=28, num_heads=16, scan_unroll=1)
  config.model.update(
    time_scale=time_scale, norm_eps=1e-6, flip_time=False
  )  # the teacher's values: 1e-5 for most, True for SiT
  config.model.update(dtype="bfloat16", remat="full", attention="xla")
  config.head = dict(kind="velocity")
  config.train.update(batch_size=4096, log_every=100, checkpoint_every=1000, keep_every=20_000)
  config.optimizer.update(learning_rate=5e-5, warmup_steps=1000, clip_norm=50.0)
  config.ema.gamma = 7.0
  config.mesh.update(data=-1, fsdp=16)
  config.sample.batch_size = 512
  config.evaluate.num_samples = 5000
  config.evaluate.nearest_k = 3  # as in the published figures (the evaluation suite of ADM)
  return config


# Teachers


def teacher(time_scale: float = 1000.0) -> ConfigDict:
  """Teacher of the policy students."""
  config = base("flow_matching", time_scale)
  config.objective.cond_dropout = 0.1
  config.optimizer.learning_rate = 1e-4
  config.train.update(steps=1_000_000, batch_size=1024)
  return config


def flow_teacher() -> ConfigDict:
  """Teacher of flow maps, see digits.py."""
  return teacher(time_scale=1.0)


# Students


def policy(**head) -> ConfigDict:
  """Returns the settings that all policy students share; `head` is the section of that name."""
  config = base("imitation")
  config.head = head
  config.teacher.update(guidance=2.7, interval=(0.0, 0.6))
  config.objective.update(num_states=2, loss_scale=3.0)
  config.train.steps = 140_000
  return config


def gmflow() -> ConfigDict:
  """Student of 1 evaluation with a Gaussian mixture as its policy."""
  config = policy(kind="gmflow", num_components=32)
  config.objective.dropout = 0.05
  return config


def gmflow_2nfe() -> ConfigDict:
  """The same for 2 evaluations."""
  config = gmflow()
  config.objective.nfe = 2
  config.train.steps = 24_000
  return config


def dx() -> ConfigDict:
  """Student of 1 evaluation with denoised states on a grid as its policy."""
  config = policy(kind="dx", num_coefficients=10, basis="grid")
  config.objective.window = 10.0
  config.train.steps = 40_000
  return config


def arc_adapters() -> ConfigDict:
  """Student of 2 evaluations with a mixture of momentum processes as its policy, and adapters on the frozen teacher."""
  config = policy(kind="arc", num_components=16)
  config.adapters.table = (("blocks/(mlp_in|mlp_out)|time_embed/.*", 96),)
  config.optimizer.update(learning_rate=1e-4, rates=(("head/proj_out_loggamma/.*", 0.1), (".*", 1.0)))
  config.objective.update(nfe=2, num_states=4, window=3.0, dropout=0.1)
  config.train.steps = 24_000
  return config


def ayf_emd() -> ConfigDict:
  """Align Your Flow's Eulerian flow map, for several strengths of guidance."""
  config = base("ayf_emd", time_scale=1.0)
  config.teacher.guidance = 2.0
  config.objective.update(guidance=(1.0, 3.0), warmup_steps=10_000)
  config.optimizer.learning_rate = 1e-4
  config.train.update(steps=50_000, batch_size=2048)
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=10)
  config.model.update(width=16, depth=2, num_heads=2)
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, keep_every=0)
  config.optimizer.warmup_steps = 1
  config.mesh.fsdp = 1
  config.evaluate.update(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)
  config.sample.batch_size = 64
  if config.get("adapters"):
    config.adapters.table = tuple((pattern, 8) for pattern, _ in config.adapters.table)


VARIANTS = {
  variant.__name__: variant for variant in (teacher, flow_teacher, gmflow, gmflow_2nfe, dx, arc_adapters, ayf_emd)
}


def get_config(variant: str = "gmflow") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
