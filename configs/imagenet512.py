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
| mean_flow | none; it may start from EDM2 S | none |

The pair of snapshots, and the strength 2.1 at which the teacher alone has FID 1.34, are those of EDM2's release
(arXiv:2406.02507). Of the flow maps' recipe the paper tells strengths in [1, 3], the interval's distribution, warm-up
and normalisation of the derivative, and the adversarial stage; batch, steps, rates and the average's width are chosen
here. The recipe is in pflow_jax/settings/align_your_flow.py. One thing differs: the student hears the noise level as
its teacher does, by random features of log sigma, and not by t, since it starts as its teacher. None has been trained
at this size with this code; docs/imagenet.md has the way from the files to the table.

A finished student is sampled with other noise between its jumps by `--config.sample.gamma=0.3`, and at another of its
strengths by `--config.sample.guidance=1.5`. Improved MeanFlow, decoupled MeanFlow and FreeFlow need a transformer:
configs/imagenet.py.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.align_your_flow import Recipes

RECIPES = Recipes(
  data=dict(name="latents:/data/imagenet512", shape=(64, 64, 4), num_classes=1000),
  channels=4,
  strength=2.1,  # of the published pair, at FID 1.34
  time_mean=-0.8,
  time_std=1.0,
)
VARIANTS = RECIPES.variants


def get_config(variant: str = "ayf_emd") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return RECIPES.get_config(variant)
