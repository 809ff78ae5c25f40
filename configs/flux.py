"""FLUX.1-dev (12 billion parameters, 1024 x 1024): policies of 4, 8 or 2 evaluations, and a flow map of any number.

    pflow plan    --config configs/flux.py:gm --topology v5e-16
    pflow convert --source FLUX.1-dev/transformer --out gs://BUCKET/flux
    pflow cache   --model flux --encoders FLUX.1-dev --prompts prompts.txt --out /data/flux_prompts
    launch/tpu.sh run -- --config configs/flux.py:gm_data_free --workdir gs://BUCKET/gm \
        --config.teacher.workdir=gs://BUCKET/flux

All are adapters on the frozen teacher. Data: a folder of prompts' embeddings, by default /data/flux_prompts; all but
the "data_free" variants need the latents of an image beside every prompt. docs/plan_text_to_image.md has the planned
needs and cost of a run; none has been trained at this size with this code.

The recipes are those published for π-Flow (arXiv:2510.14974: K = 8 or N = 10, rank 256, batch 256, 3,000 steps at rate
1e-4, the teacher's share of the walk decaying over 2,000) and ArcFlow (arXiv:2602.09014: K = 16, 10,000 steps,
log-gamma at a tenth of the rate; its batch was 4 a GPU on an unpublished number of GPUs: here 64). Published
results of π-Flow, distance to the teacher's samples on HPSv2 prompts (FID / patch-FID): 12.6 / 15.9 at 8 evaluations,
14.3 / 19.2 at 4, 14.4 / 19.7 at 4 without data.

"ayf" is AYF-EMD (Align Your Flow, arXiv:2506.14603): one student for 1, 2, 4, 8 or any other number of evaluations. Of
its student of FLUX.1-dev the paper's text tells that it has low-rank adapters and is sampled in 4 steps. Chosen here:

* Strengths of guidance, as AYF has them on ImageNet: uniform in [2, 5], around the 3.5 that the model is asked for.
  They go to FLUX.1-dev's own input, in the student and in the teacher. So the student starts as its teacher at every
  strength, where a new branch would have to learn what the network knows, and a teacher's velocity is one evaluation.
* The end s of a jump: a new branch embeds the length t - s, in sinusoids of the length itself. It starts at zero and
  trains in full. Adapters as for the policies; without dropout, as the network's own derivative is in its target.
* The teacher's embedding of t stays, with sinusoids of 1000 t where Align Your Flow has t: a frozen network knows no
  other. A ripple of relative size a in the fastest of them adds up to 1000 a to the derivative, and changes its sign
  every 0.003 of t, so that it averages out. So it was on configs/emoji.py's teacher, which has the same sinusoids:
  where v has a root mean square of 1.0 to 1.3, its derivative along the flow has 2.9 to 6.5, and its change over 1/28
  of t 0.7 to 4.9 a unit; the mean of 17 derivatives in that 1/28 is 0.1 to 0.2 from it. Against what is left there are
  a residual divided by its own size, a derivative that counts in full after 2,000 steps, and adapters on both layers of
  that embedding, of which the first has no more than 256 inputs, so that a rank of 256 can change it into any other.
* The derivative is computed in the network's bfloat16 (objective.derivative_dtype), as rCM's is at 14 billion
  parameters (arXiv:2510.08431); embeddings of times, norms and sums of attention are float32. On small networks it errs
  by 1 to 4 %. In float32 the products of a step take 3.1 times as long on a TPU, 6.6 times on an H200.
* Lengths of jumps: logit-normal with mean -0.6 and standard deviation 1.6, AYF's for 64 pixels, in the schedule time
  of shift 3.2. 4 % of them are above 0.9, where AYF's other setting, -0.8 and 1, has 0.13 %: one evaluation is a jump
  of 1.
* 10,000 steps of 64, as many examples as ArcFlow's. Every step's target is made by the network of that step, so that
  smaller steps come before larger batches.

Pictures of 512 x 512, as `pflow plan --config configs/flux.py:ayf`, `--config.data.shape="(64, 64, 16)"` and
`--config.objective.shift=1.88`, FLUX.1's own shift for their 1,024 tokens.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick

JVP_ATTENTION = "flash_jvp"  # of flow maps: it must have a forward derivative


def base(objective: str = "imitation") -> ConfigDict:
  """Returns the settings that all variants share."""
  config = default_config(objective)
  config.data = dict(name="prompts:/data/flux_prompts", model="flux", shape=(128, 128, 16))
  config.model = dict(kind="flux", guidance=3.5, dtype="bfloat16", remat="full", attention="splash", scan_unroll=1)
  config.teacher.dtype = "bfloat16"
  config.adapters.table = (
    ("single_blocks/(mlp_in|out)", 256, 256.0, 0.05),
    ("double_blocks/(img|txt)_(mlp_in|mlp_out)", 256, 256.0, 0.05),
    ("time_embed/(in|out)", 256, 256.0, 0.05),
  )
  config.optimizer.update(learning_rate=1e-4, warmup_steps=0)
  config.train.update(steps=3000, batch_size=256, log_every=10, checkpoint_every=200)
  config.mesh.update(data=-1, fsdp=16)
  config.sample.batch_size = 16
  config.evaluate.num_samples = 256
  return config


def policy() -> ConfigDict:
  """Returns the settings that the policies share."""
  config = base()
  config.objective.update(nfe=4, num_states=4, window=3.0, dropout=0.1, shift=3.2, final_scale=0.5)
  config.objective.update(loss_scale=30.0, ratio_decay=2000)
  return config


def gm() -> ConfigDict:
  """Student of 4 evaluations with a Gaussian mixture as its policy."""
  config = policy()
  config.head = dict(kind="gmflow", num_components=8)
  config.sample.auto_temperature = True
  return config


def gm_8nfe() -> ConfigDict:
  """The same for 8 evaluations."""
  config = gm()
  config.objective.nfe = 8
  return config


def gm_data_free() -> ConfigDict:
  """The student of 4 evaluations, trained without images."""
  config = gm()
  config.objective.data_free = True
  return config


def gm_8nfe_data_free() -> ConfigDict:
  """The student of 8 evaluations, trained without images."""
  config = gm_8nfe()
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
  config.objective.update(nfe=2, final_scale=1.0)
  config.train.update(steps=10_000, batch_size=64)
  return config


def ayf() -> ConfigDict:
  """Flow map of any number of evaluations, for strengths of guidance from 2 to 5; see the text above."""
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
  config.data = dict(name="synthetic_prompts", model="flux", shape=(8, 8, 16), text=(6, 12), pooled=10)
  config.model.update(depth=1, single_depth=1, num_heads=2, head_dim=16, text_width=12, pooled_width=10)
  config.model.update(rope_axes=(4, 6, 6), attention="xla", dtype="float32", remat="none")
  config.adapters.table = tuple((pattern, 8, 8.0, *dropout) for pattern, _, _, *dropout in config.adapters.table)
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2)
  config.mesh.fsdp = 1


VARIANTS = {variant.__name__: variant for variant in (gm, gm_8nfe, gm_data_free, gm_8nfe_data_free, dx, arc, ayf)}


def get_config(variant: str = "gm") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
