"""Qwen-Image (20 billion parameters, 1024 x 1024): policies of 4 or 2 evaluations, and a flow map of any number.

    pflow plan    --config configs/qwen_image.py:gm --topology v5e-16
    pflow convert --source Qwen-Image/transformer --out gs://BUCKET/qwen
    pflow cache   --model qwen_image --encoders Qwen-Image --prompts prompts.txt --out /data/qwen_prompts
    launch/tpu.sh run -- --config configs/qwen_image.py:gm_data_free --workdir gs://BUCKET/gm \
        --config.teacher.workdir=gs://BUCKET/qwen

It differs from configs/flux.py in the guidance of the teacher, of strength 4 against the empty prompt: a guided teacher
takes two evaluations where FLUX.1-dev takes one. Recipes: π-Flow (arXiv:2510.14974: M = 2, 9,000 steps) and ArcFlow
(arXiv:2602.09014: 15,000 steps; its batch as in configs/flux.py). Published results (FID / patch-FID to the teacher's
samples, HPSv2 prompts, 4 evaluations): 12.8 / 16.6, without data 12.9 / 16.8.

"ayf" is the flow map of configs/flux.py, with what is chosen there and why, the derivative in bfloat16 too. Its
strengths of guidance, in [2, 5] around the teacher's 4, are of the guidance against the empty prompt. The network has
no input for them: they get a new branch, which starts at zero like that of the length, and the student starts as its
teacher without guidance at every strength.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick

JVP_ATTENTION = "flash_jvp"  # of flow maps: it must have a forward derivative


def base(objective: str = "imitation") -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="prompts:/data/qwen_prompts", model="qwen_image", shape=(128, 128, 16))
  config.data.buckets = (128, 256, 512)
  config.model = dict(kind="qwen_image", dtype="bfloat16", remat="full", attention="splash", scan_unroll=1)
  config.teacher.update(guidance=4.0, dtype="bfloat16")
  config.adapters.table = (
    ("double_blocks/(img|txt)_(mlp_in|mlp_out)", 256, 256.0, 0.05),
    ("time_embed/(in|out)", 256, 256.0, 0.05),
  )
  config.optimizer.update(learning_rate=1e-4, warmup_steps=0)
  config.train.update(steps=9000, batch_size=256, log_every=10, checkpoint_every=200)
  config.mesh.update(data=-1, fsdp=16)
  config.sample.batch_size = 16
  config.evaluate.num_samples = 256
  return config


def policy() -> ConfigDict:
  """Returns the settings that the policies share."""
  config = base()
  config.objective.update(nfe=4, num_states=2, window=3.0, dropout=0.1, shift=3.2, final_scale=0.5, loss_scale=30.0)
  return config


def gm() -> ConfigDict:
  """Student of 4 evaluations with a Gaussian mixture as its policy."""
  config = policy()
  config.head = dict(kind="gmflow", num_components=8)
  config.sample.auto_temperature = True
  return config


def gm_data_free() -> ConfigDict:
  """The same, trained without images."""
  config = gm()
  config.objective.data_free = True
  return config


def dx() -> ConfigDict:
  """Student of 4 evaluations with denoised states on a grid as its policy."""
  config = policy()
  config.head = dict(kind="dx", num_coefficients=10, basis="grid")
  config.objective.dropout = 0.0
  return config


def arc() -> ConfigDict:
  """Student of 2 evaluations with a mixture of momentum processes as its policy."""
  config = policy()
  config.head = dict(kind="arc", num_components=16)
  config.optimizer.rates = (("head/proj_out_loggamma/.*", 0.1), (".*", 1.0))
  config.objective.update(nfe=2, num_states=4, final_scale=1.0, ratio_decay=1000)
  config.train.update(steps=15_000, batch_size=64)
  return config


def ayf() -> ConfigDict:
  """Flow map of any number of evaluations, for strengths of guidance from 2 to 5; see configs/flux.py."""
  config = base("ayf_emd")
  config.head = dict(kind="velocity")
  config.model.attention = JVP_ATTENTION
  config.adapters.table = tuple((pattern, rank, alpha) for pattern, rank, alpha, _ in config.adapters.table)
  config.objective.update(guidance=(2.0, 5.0), shift=3.2, time_mean=-0.6, time_std=1.6, warmup_steps=2000)
  config.objective.derivative_dtype = "network"
  config.train.update(steps=10_000, batch_size=64)
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.data = dict(name="synthetic_prompts", model="qwen_image", shape=(8, 8, 16), text=(6, 12))
  config.model.update(depth=2, num_heads=2, head_dim=16, text_width=12, rope_axes=(4, 6, 6))
  config.model.update(attention="xla", dtype="float32", remat="none")
  config.adapters.table = tuple((pattern, 8, 8.0, *dropout) for pattern, _, _, *dropout in config.adapters.table)
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
  config.mesh.fsdp = 1


VARIANTS = {variant.__name__: variant for variant in (gm, gm_data_free, dx, arc, ayf)}


def get_config(variant: str = "gm") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
