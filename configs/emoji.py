"""Emoji from their names, 32 x 32, on a CPU: a text-conditional teacher and students of 4 evaluations and 1.

    pflow data emoji
    pflow cache  --prompts data:emoji --model minilm --out runs/emoji_names
    pflow train  --config configs/emoji.py:teacher --workdir runs/emoji
    pflow train  --config configs/emoji.py:gmflow --workdir runs/emoji_gmflow --config.teacher.workdir=runs/emoji
    pflow sample --workdir runs/emoji_gmflow --prompt "red heart" --prompt "grinning cat" --seed 1

3,786 pictures (Noto, Apache-2.0) and MiniLM's embeddings of their names, in place of a class. On two cores of a CPU a
step of the teacher takes 0.6 s, one of the student 1.4 s; docs/text_to_image.md shows the pictures.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick


def base(objective: str) -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="emoji", size=32, embeddings="runs/emoji_names")
  config.model = dict(kind="dit", patch_size=4, width=128, depth=6, num_heads=4, scan_unroll=1, time_scale=1000.0)
  config.model.update(dtype="float32", remat="none", attention="xla")
  config.train.update(batch_size=64, log_every=100, checkpoint_every=500)
  config.optimizer.update(learning_rate=1e-3, warmup_steps=200, schedule="cosine")
  config.sample.batch_size = 64
  config.evaluate.num_samples = 2000
  return config


def teacher() -> ConfigDict:
  """Teacher, which learns from emoji and their names."""
  config = base("flow_matching")
  config.head = dict(kind="velocity")
  config.objective.cond_dropout = 0.1
  config.train.steps = 6000
  return config


def gmflow() -> ConfigDict:
  """Student of 4 evaluations with a Gaussian mixture as its policy."""
  config = base("imitation")
  config.head = dict(kind="gmflow", num_components=8)
  config.teacher.guidance = 3.0
  config.objective.update(nfe=4, num_states=2, dropout=0.05, substeps=64)
  config.train.steps = 1500
  return config


def gmflow_1nfe() -> ConfigDict:
  """The same for 1 evaluation."""
  config = gmflow()
  config.objective.nfe = 1
  config.train.steps = 3000
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.data = dict(name="synthetic_prompts", model="minilm", shape=(8, 8, 3), pooled=12)
  config.model.update(patch_size=2, width=16, depth=1, num_heads=2)
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
  config.optimizer.warmup_steps = 1
  config.sample.batch_size = 8


VARIANTS = {variant.__name__: variant for variant in (teacher, gmflow, gmflow_1nfe)}


def get_config(variant: str = "teacher") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
