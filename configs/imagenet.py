"""ImageNet 256 x 256 in latents of 32 x 32 x 4, DiT-XL/2: the published recipes, for TPU slices and nodes of GPUs.

    pflow plan --config configs/imagenet.py:gmrepa_1nfe --topology v5e-256
    pflow convert --source repa_imagenet.pth --out gs://BUCKET/repa
    launch/tpu.sh run -- --config configs/imagenet.py:gmrepa_1nfe --workdir gs://BUCKET/gmrepa_1nfe \
        --config.teacher.workdir=gs://BUCKET/repa

Data: a folder of latents that every worker can read, by default /data/imagenet256, see `pflow_jax.data.write_latents`.
The networks compute in bfloat16 from float32 parameters, and a policy's teacher is kept in bfloat16.

| variant | teacher | published for it, FID at so many evaluations |
|---|---|---|
| gmrepa_1nfe, gmrepa_2nfe | REPA's, of π-Flow's release | 2.85 at 1, 1.97 at 2 (pi-Flow, arXiv:2510.14974) |
| gmdit_1nfe | the flow-matching DiT of that release | 3.34 at 1 |
| dx | REPA's | 4.73 at 1 |
| mean_flow | none | 3.43 at 1, 2.93 at 2 (MeanFlow, arXiv:2505.13447) |
| teacher | - | trains a flow-matching DiT by GMFlow's recipe (arXiv:2504.05304) |
| flow_teacher | - | trains SiT's network by its recipe (arXiv:2401.08740): 2.06 with 250 steps of its SDE |
| arc, arc_adapters | REPA's | none: ArcFlow (arXiv:2602.09014), its text-to-image students' settings, untried here |
| ayf_emd | REPA's, or flow_teacher | none: Align Your Flow (arXiv:2506.14603), untried with this network |
| improved_mean_flow | none | 1.70 at 1, 1.53 at 2 (iMF-XL/2, arXiv:2512.02012, a deeper network of another kind) |
| decoupled_mean_flow | none; it starts from REPA's | 2.16 at 1, 1.51 with more (DMF-XL/2+, arXiv:2510.24474) |
| free_flow | REPA's | 1.45 at 1 (FreeFlow-XL/2, arXiv:2511.19428) |

The policies' recipes are those of π-Flow's release (LakonLab v0.2.0, configs/piflow_imagenet), dx's is its paper's. Not
as published are: moments in float32, where the release's AdamW has 8 bits (optimizer.mu_dtype="bfloat16" halves the
first of them); the weight decay of `teacher`, which is on biases too; and its average, whose half-life of 5 % of the
run is not cut at 30 million images. Of GMFlow's teacher the paper says batch and number of steps; rate, decay, clip and
times are those of its release's own model. Of the last three rows: iMF's network has 48 blocks of width 1024, rotary
positions and its conditions as tokens, of which SiT's has nothing, and its release's file is of B/2, trained for 640
epochs; DMF's recipe is its release's script, and what the + of its best row adds is not in it; FreeFlow's code is not
public, so that guidance (that with which the teacher alone is best), rate, batch and steps are chosen here. None has
been trained at this size with this code; docs/plan_imagenet.md has the planned needs and cost of a run.

How a converted teacher is checked: docs/teacher.md.
"""

from ml_collections import ConfigDict

from pflow_jax.settings.defaults import default_config, pick

IMAGES = 1_281_167


def base(objective: str, time_scale: float = 1.0) -> ConfigDict:
  """Returns the settings that all variants share; `time_scale` is 1 for REPA's and SiT's networks, 1000 for DiT's."""
  config = default_config(objective)
  config.data = dict(name="latents:/data/imagenet256", shape=(32, 32, 4), num_classes=1000)
  config.model = dict(kind="dit", patch_size=2, width=1152, depth=28, num_heads=16, scan_unroll=1)
  # A student has its teacher's network: π-Flow's release reads all of its teachers with 1e-5 (1e-6 in the files of REPA
  # and SiT themselves), and of them SiT's alone counts time the other way round.
  config.model.update(time_scale=time_scale, norm_eps=1e-5, flip_time=False)
  config.model.update(dtype="bfloat16", residual_dtype="float32", remat="full", attention="xla")
  config.head = dict(kind="velocity")
  config.train.update(log_every=100, checkpoint_every=1000, keep_every=20_000)
  config.mesh.update(data=-1, fsdp=16)
  config.sample.batch_size = 512
  config.evaluate.num_samples = 5000
  config.evaluate.nearest_k = 3  # as in the published figures (the evaluation suite of ADM)
  return config


def epochs(count: int, batch_size: int) -> int:
  """Steps of so many epochs."""
  return count * IMAGES // batch_size


# Teachers


def teacher() -> ConfigDict:
  """Teacher of a policy, a flow-matching DiT."""
  config = base("flow_matching", time_scale=1000.0)
  config.objective.update(cond_dropout=0.1, time_mean=0.0)
  config.optimizer.update(learning_rate=2e-4, weight_decay=0.05, warmup_steps=1000, warmup_factor=0.001)
  config.optimizer.update(clip_norm=10.0, clip_start=1000)
  config.ema.gamma = 12.5  # half of its weight is on the last 5 % of the run
  config.train.update(steps=200_000, batch_size=4096)
  return config


def flow_teacher() -> ConfigDict:
  """Teacher of flow maps, whose derivative in t is trained, and of policies: SiT."""
  config = base("flow_matching")
  config.objective.cond_dropout = 0.1
  config.optimizer.update(learning_rate=1e-4, b2=0.999)
  config.ema.update(kind="constant", decay=0.9999)
  config.train.update(steps=epochs(1400, 256), batch_size=256)
  return config


# Students that predict a policy


def policy(guidance: float, interval: tuple[float, float] = (0.0, 0.7), time_scale: float = 1.0, **head) -> ConfigDict:
  """Returns the settings that all policy students share.

  Args:
    guidance: strength of the teacher's guidance.
    interval: flow times in which it acts.
    time_scale: see `base`.
    **head: the section of that name.
  """
  config = base("imitation", time_scale)
  # With these, and model.attention="pallas" on TPUs, a step moves a third of the bytes: docs/tpu.md. The stream in
  # bfloat16 is as under PyTorch's autocast.
  config.model.update(residual_dtype="bfloat16", remat="layers")
  config.head = head
  config.teacher.update(guidance=guidance, interval=interval, orthogonal=0.0, dtype="bfloat16")
  config.objective.update(num_states=2, substeps=128, loss_scale=3.0)
  config.optimizer.update(learning_rate=5e-5, b1=0.9, b2=0.95, weight_decay=0.0)
  config.optimizer.update(warmup_steps=400, warmup_factor=0.001, clip_norm=50.0, clip_start=400)
  config.ema.update(kind="karras", gamma=7.0, start=400)
  config.train.update(steps=140_000, batch_size=4096)
  return config


def mixture(**settings) -> ConfigDict:
  """Returns the settings of students with a Gaussian mixture as their policy; arguments as of `policy`."""
  config = policy(kind="gmflow", num_components=32, logstd_inner_dim=1024, **settings)
  config.objective.dropout = 0.05
  return config


def gmrepa_1nfe() -> ConfigDict:
  """Student of 1 evaluation, of REPA's teacher."""
  return mixture(guidance=3.2)


def gmrepa_2nfe() -> ConfigDict:
  """Student of 2 evaluations, of REPA's teacher."""
  config = mixture(guidance=2.8)
  config.objective.nfe = 2
  config.train.steps = 24_000
  return config


def gmdit_1nfe() -> ConfigDict:
  """Student of 1 evaluation, of the flow-matching DiT."""
  return mixture(guidance=2.7, interval=(0.0, 0.6), time_scale=1000.0)


def dx() -> ConfigDict:
  """Student of 1 evaluation with denoised states on a grid as its policy, of REPA's teacher."""
  config = policy(guidance=3.2, kind="dx", num_coefficients=10, basis="grid")
  config.objective.window = 10.0  # without it the training diverges
  config.train.steps = 40_000
  return config


def arc() -> ConfigDict:
  """Student of 2 evaluations with a mixture of momentum processes as its policy, of REPA's teacher."""
  config = policy(guidance=2.8, kind="arc", num_components=16)
  config.optimizer.rates = (("head/proj_out_loggamma/.*", 0.1), (".*", 1.0))
  config.objective.update(nfe=2, num_states=4, window=3.0, dropout=0.1)
  config.train.steps = 24_000
  return config


def arc_adapters() -> ConfigDict:
  """The same with adapters on the frozen teacher, as ArcFlow has them."""
  config = arc()
  config.adapters.table = (("blocks/(mlp_in|mlp_out)|time_embed/.*", 96),)
  config.optimizer.learning_rate = 1e-4
  return config


# Flow maps


def ayf_emd() -> ConfigDict:
  """Align Your Flow's Eulerian flow map, for several strengths of guidance."""
  config = base("ayf_emd")
  config.teacher.guidance = 2.0
  config.objective.update(guidance=(1.0, 3.0), warmup_steps=10_000)
  config.optimizer.update(learning_rate=1e-4, warmup_steps=1000, clip_norm=50.0)
  config.train.update(steps=50_000, batch_size=2048)
  return config


def mean_flow() -> ConfigDict:
  """MeanFlow of XL/2, 240 epochs, which learns from the data; the paper's are latents of sd-vae-ft-mse."""
  config = base("mean_flow")
  config.objective.update(omega=0.2, kappa=0.92, interval=(0.0, 0.75))
  config.optimizer.update(learning_rate=1e-4, b2=0.95)
  config.ema.update(kind="constant", decay=0.9999)
  config.train.update(steps=epochs(240, 256), batch_size=256)
  return config


def improved_mean_flow() -> ConfigDict:
  """Improved MeanFlow on SiT's network, whose last 8 blocks an instantaneous velocity has of its own."""
  config = base("improved_mean_flow")
  config.model.velocity_depth = 8
  config.optimizer.update(learning_rate=1e-4, b2=0.95, warmup_steps=epochs(10, 1024))
  config.ema.update(kind="constant", decay=0.9999)
  config.train.update(steps=epochs(640, 1024), batch_size=1024)
  # Of the release's XL/2 at 1 evaluation; at 2 it is 4 in (0.36, 0.64).
  config.sample.update(guidance=8.0, interval=(0.42, 0.62), nfe=(1,))
  return config


def decoupled_mean_flow() -> ConfigDict:
  """Decoupled MeanFlow, for a start from REPA's teacher (config.teacher), whose last 8 of 28 blocks see s."""
  config = base("decoupled_mean_flow")
  config.model.late_blocks = 8
  config.objective.derivative_dtype = "network"  # as in the release, under bfloat16 autocast
  config.optimizer.update(learning_rate=1e-4, b2=0.95, clip_norm=1.0)
  config.ema.update(kind="constant", decay=0.9999)
  config.train.update(steps=400_000, batch_size=256)
  config.sample.nfe = (1, 2, 4)
  return config


def free_flow() -> ConfigDict:
  """FreeFlow, a student of 1 evaluation that sees noise alone."""
  config = base("free_flow")
  config.teacher.update(guidance=1.8, interval=(0.0, 0.7), dtype="bfloat16")
  config.objective.warmup_steps = 10_000
  config.optimizer.update(learning_rate=1e-4, warmup_steps=1000, clip_norm=50.0)
  config.train.update(steps=100_000, batch_size=1024)
  return config


def quicktest(config: ConfigDict) -> None:
  """Shrinks a config to a smoke test."""
  config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=10)
  config.model.update(width=16, depth=2, num_heads=2)
  for option in {"velocity_depth", "late_blocks"} & set(config.model):
    config.model[option] = 1
  config.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, keep_every=0)
  config.optimizer.warmup_steps = config.ema.start = 1
  config.mesh.fsdp = 1
  config.evaluate.update(num_samples=128, teacher_steps=(4, 128), classifier_steps=5, num_resamples=2)
  config.sample.batch_size = 64
  if config.get("adapters"):
    config.adapters.table = tuple((pattern, 8) for pattern, _ in config.adapters.table)


TEACHERS = (teacher, flow_teacher)
POLICIES = (gmrepa_1nfe, gmrepa_2nfe, gmdit_1nfe, dx, arc, arc_adapters)
FLOW_MAPS = (ayf_emd, mean_flow, improved_mean_flow, decoupled_mean_flow, free_flow)
VARIANTS = {variant.__name__: variant for variant in (*TEACHERS, *POLICIES, *FLOW_MAPS)}


def get_config(variant: str = "gmrepa_1nfe") -> ConfigDict:
  """Returns the config of a variant, one of VARIANTS; ",quicktest" after it shrinks the run to a smoke test."""
  return pick(variant, VARIANTS, quicktest)
