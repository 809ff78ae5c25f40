"""Colour emoji, 64 x 64, on a CPU, in the latents of FLUX.2's tiny autoencoder: teachers of texts and of classes.

    git clone https://github.com/madebyollin/taesd       # the autoencoder, MIT, 5 MB: taesd/taef2
    pflow data    emoji
    pflow latents --images emoji --option size=64 --option skin_tones=false --option names=all \
      --option classes=picture --autoencoder taesd/taef2 --out runs/emoji_latents
    pflow cache   --prompts data:latents:runs/emoji_latents --model minilm --out runs/emoji_names
    pflow train   --config configs/emoji.py:teacher --workdir runs/emoji
    pflow train   --config configs/emoji.py:gmflow --workdir runs/emoji_gmflow --config.teacher.workdir=runs/emoji
    pflow sample  --workdir runs/emoji_gmflow --prompt "red heart" --prompt "grinning cat" --seed 1

1,911 pictures (Noto, Apache-2.0) with 2,843 names, embedded by MiniLM; a picture is 8 x 8 x 32 numbers. The variants
`classes_*` take a class for each picture instead, and need no texts.

On two cores of an AMD EPYC without AVX-512, beside other work, all eight variants take 1 h 40 min, the teacher of texts
46 min and its student of 1 evaluation 9 min. docs/text_to_image.md has the pictures and the table.

Findings, one seed, two cores, some four minutes each, with classes; the loss is that of all pictures:

* Patches: 2 gave 0.71 after 423 steps, 1 gave 0.83 after the 133 steps that take as long. EDM2's U-Net (128 channels,
  two levels) gave 1.50 after 129.
* More pictures: 0.67 after 590 steps of the pictures as they are. With their mirror images it was 0.68 after 556, with
  all skin tones 0.70 after 543; the pictures as they are interpolate to 0.68 at both.
* Guidance, with texts after 2,500 steps, 32 Euler steps: at 1, 2 and 3 the samples of sixteen names are at 0.43, 0.36
  and 0.37 from their pictures.
* Blocks that are unrolled make a step a fifth faster.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick


def base(objective: str) -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="latents:runs/emoji_latents", embeddings="runs/emoji_names")
  config.model = dict(kind="dit", patch_size=2, width=320, depth=6, num_heads=5, scan_unroll=6, time_scale=1000.0)
  config.model.update(dtype="float32", remat="none", attention="xla")
  config.train.update(batch_size=128, log_every=100, checkpoint_every=500)
  config.optimizer.update(learning_rate=1e-3, warmup_steps=200, schedule="cosine")
  config.sample.batch_size = 64
  config.evaluate.update(num_samples=1000, teacher_steps=(1, 4, 128))
  return config


def teacher() -> ConfigDict:
  """Teacher, which learns from emoji and their names."""
  config = base("flow_matching")
  config.head = dict(kind="velocity")
  config.objective.cond_dropout = 0.1
  config.train.steps = 2600
  return config


def gmflow() -> ConfigDict:
  """Student of 1 evaluation with a Gaussian mixture as its policy."""
  config = base("imitation")
  config.head = dict(kind="gmflow", num_components=8)
  config.teacher.update(guidance=2.0, interval=(0.0, 0.8))
  config.objective.update(num_states=2, dropout=0.05, substeps=64)
  config.train.update(steps=400, batch_size=64)
  config.optimizer.warmup_steps = 50
  return config


def gmflow_2nfe() -> ConfigDict:
  """The same for 2 evaluations."""
  config = gmflow()
  config.objective.nfe = 2
  config.train.steps = 250
  return config


def gmflow_4nfe() -> ConfigDict:
  """The same for 4 evaluations."""
  config = gmflow()
  config.objective.nfe = 4
  config.train.steps = 200
  return config


def of_classes(variant) -> ConfigDict:
  """Returns a variant with a class for each picture instead of texts, which takes half the steps."""
  config = variant()
  del config.data.embeddings
  config.train.steps //= 2
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  if "embeddings" in config.data:
    config.data = dict(name="synthetic_prompts", model="minilm", shape=(8, 8, 4), pooled=12)
  else:
    config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=12)
  config.model.update(patch_size=2, width=16, depth=1, num_heads=2, scan_unroll=1)
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
  config.optimizer.warmup_steps = 1
  config.sample.batch_size = 8


OF_TEXTS = {variant.__name__: variant for variant in (teacher, gmflow, gmflow_2nfe, gmflow_4nfe)}
OF_CLASSES = {f"classes_{name}": lambda variant=variant: of_classes(variant) for name, variant in OF_TEXTS.items()}
VARIANTS = OF_TEXTS | OF_CLASSES


def get_config(variant: str = "teacher") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
