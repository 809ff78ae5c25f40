"""ImageNet 64 x 64 in pixels: Align Your Flow's flow maps of EDM2 S.

    pflow plan --config configs/imagenet64.py:ayf_emd --topology v5e-64
    pflow convert --source edm2-img64-s-1073741-0.045.pkl --dtype bfloat16 --out gs://BUCKET/edm2_s64
    pflow convert --source edm2-img64-xs-0134217-0.110.pkl --dtype bfloat16 --out gs://BUCKET/edm2_xs64_weak
    launch/tpu.sh run -- --config configs/imagenet64.py:ayf_emd --workdir gs://BUCKET/ayf_s64 \
        --config.teacher.workdir=gs://BUCKET/edm2_s64 --config.teacher.weak_workdir=gs://BUCKET/edm2_xs64_weak
    launch/tpu.sh run -- --config configs/imagenet64.py:ayf_emd_adversarial --workdir gs://BUCKET/ayf_s64_adversarial \
        --config.teacher.workdir=gs://BUCKET/edm2_s64 --config.teacher.weak_workdir=gs://BUCKET/edm2_xs64_weak \
        --config.start.workdir=gs://BUCKET/ayf_s64

Data: a folder of pictures that every worker can read, by default /data/imagenet64, with a sub-folder for each of the
1,000 classes. They enter as pixels / 127.5 - 1, as in EDM2. Pictures of another size are cut and scaled as ADM does
each time they are read, which takes as long as to decode them: scale them once, as docs/imagenet.md shows.

| variant | teacher | published for EDM2 S, FID at 1 / 2 / 4 evaluations |
|---|---|---|
| ayf_emd | EDM2 S, guided by EDM2 XS at 134 million images | 2.98 / 1.25 / - (Align Your Flow, arXiv:2506.14603) |
| ayf_emd_adversarial | the same | none |
| ayf_lmd | the same | none |
| consistency | the same, at one strength | none |
| mean_flow | none; it may start from EDM2 S | none |

The pair of snapshots, and the strength 1.7 at which the teacher alone has FID 1.01, are those of EDM2's release
(arXiv:2406.02507), which trained them on log sigma of mean -0.8 and deviation 1.6. Of the flow maps' recipe the paper
tells the same as for configs/imagenet512.py; that the length of a jump is logit-normal(-0.6, 1.6) here is known from
its readers alone. All else is said there. None has been trained at this size with this code.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.align_your_flow import Recipes

RECIPES = Recipes(
  data=dict(name="folder:/data/imagenet64", image_size=64, crop="adm", num_classes=1000, check=False),
  channels=3,
  strength=1.7,  # of the published pair, at FID 1.01
  time_mean=-0.6,
  time_std=1.6,
)
VARIANTS = RECIPES.variants


def get_config(variant: str = "ayf_emd") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return RECIPES.get_config(variant)
