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
has been trained at this size with this code: what a run needs and would take is planned, see docs/plan_imagenet.md.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, parse_variant

VARIANTS = ("teacher", "flow_teacher", "gmflow", "gmflow_2nfe", "dx", "arc_adapters", "ayf_emd")


def get_config(variant: str = "gmflow") -> ConfigDict:
  """`variant` is one of VARIANTS, and ",quicktest" after it shrinks the run to a smoke test."""
  name, quicktest = parse_variant(variant, VARIANTS)
  objective = {"teacher": "flow_matching", "flow_teacher": "flow_matching", "ayf_emd": "ayf_emd"}.get(name, "imitation")
  config = default_config(objective)
  config.data = dict(name="latents:/data/imagenet256", shape=(32, 32, 4), num_classes=1000)
  config.model = dict(kind="dit", patch_size=2, width=1152, depth=28, num_heads=16, scan_unroll=1, time_scale=1000.0)
  config.model.update(norm_eps=1e-6, flip_time=False)  # as its converted teacher's: 1e-5 of most, True of SiT
  config.model.update(dtype="bfloat16", remat="full", attention="xla")
  config.train.update(batch_size=4096, log_every=100, checkpoint_every=1000, keep_every=20_000)
  config.optimizer.update(learning_rate=5e-5, warmup_steps=1000, clip_norm=50.0)
  config.ema.gamma = 7.0
  config.mesh.update(data=-1, fsdp=16)
  config.sample.batch_size = 512
  config.evaluate.num_samples = 5000
  config.evaluate.nearest_k = 3  # as in the published figures (the evaluation suite of ADM)
  if name in ("flow_teacher", "ayf_emd"):
    config.model.time_scale = 1.0  # see configs/digits.py
  if objective == "flow_matching":
    config.policy = dict(kind="velocity")
    config.objective.cond_dropout = 0.1
    config.optimizer.learning_rate = 1e-4
    config.train.update(steps=1_000_000, batch_size=1024)
  if objective == "imitation":
    config.teacher.update(guidance=2.7, interval=(0.0, 0.6))
    config.objective.update(num_states=2, loss_scale=3.0)
    config.train.steps = 140_000
  if name.startswith("gmflow"):
    config.policy = dict(kind="gmflow", num_components=32)
    config.objective.dropout = 0.05
  if name == "gmflow_2nfe":
    config.objective.nfe = 2
    config.train.steps = 24_000
  if name == "dx":
    config.policy = dict(kind="dx", num_coefficients=10, basis="grid")
    config.objective.window = 10.0
    config.train.steps = 40_000
  if name == "arc_adapters":
    config.policy = dict(kind="arc", num_components=16)
    config.adapters.table = (("blocks/(mlp_in|mlp_out)|time_embed/.*", 96),)
    config.optimizer.update(learning_rate=1e-4, rates=(("head/proj_out_loggamma/.*", 0.1), (".*", 1.0)))
    config.objective.update(nfe=2, num_states=4, window=3.0, dropout=0.1)
    config.train.steps = 24_000
  if name == "ayf_emd":
    config.policy = dict(kind="velocity")
    config.teacher.update(guidance=2.0)
    config.objective.update(guidance=(1.0, 3.0), warmup_steps=10_000)
    config.optimizer.learning_rate = 1e-4
    config.train.update(steps=50_000, batch_size=2048)
  if quicktest:
    config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=10)
    config.model.update(width=16, depth=2, num_heads=2)
    config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, keep_every=0)
    config.optimizer.warmup_steps = 1
    config.mesh.fsdp = 1
    config.evaluate.update(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)
    config.sample.batch_size = 64
    if name == "arc_adapters":
      config.adapters.table = (("blocks/(mlp_in|mlp_out)|time_embed/.*", 8),)
  return config
