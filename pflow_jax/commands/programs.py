"""The commands, as functions whose arguments are the flags. Slow imports wait until they are needed.

`config` is the config that --config or --workdir names, changed by flags of its own.
"""

from __future__ import annotations

import pathlib
from typing import Annotated, Any, Literal

from pflow_jax.commands.command import fail, mesh_sizes, options, resumable, stop, whole_numbers
from pflow_jax.commands.flags import Count, Positional, Repeated, Seed

Which = Literal["ema", "params"]
Dtype = Literal["float32", "bfloat16"]


def train(
  config: Any, workdir: str, force: bool = False, teacher: str | None = None, preview_autoencoder: str | None = None
) -> None:
  """Trains, or resumes the run in the workdir.

  Args:
    workdir: folder of the run
    force: take the workdir over from another process that trains in it
    teacher: workdir of the run's teacher, if it has moved
    preview_autoencoder: folder of an autoencoder, a tiny one, say, that shows samples of latents as pictures
  """
  from pflow_jax.evaluation.sample import preview_size, save_picture
  from pflow_jax.files.lock import TakenOver
  from pflow_jax.settings.tree import Settings
  from pflow_jax.training.origins import use_teacher
  from pflow_jax.training.rescue import Rescued
  from pflow_jax.training.train import train as run

  settings = use_teacher(Settings.of(config), teacher)
  if preview_autoencoder is not None:
    from pflow_jax.families.autoencoder import load_autoencoder

    settings = settings.changed("sample", autoencoder=load_autoencoder(preview_autoencoder).folder)  # or it is refused
  try:
    state = run(settings, workdir, force=force, picture=(save_picture, preview_size))
  except (Rescued, TakenOver) as error:
    # Another try would begin anew in a folder that takes nothing, or take the workdir back with --force.
    raise ValueError(str(error)) from error
  if int(state.step) < settings.need("train").steps:
    stop(f"stopped at step {int(state.step)}, which is saved; the same command resumes")


def sample(
  config: Any,
  workdir: str,
  num: Count | None = None,
  nfe: Count | None = None,
  seed: Seed = 0,
  labels: list[str] | None = None,
  which: Which = "ema",
  out: str | None = None,
  prompt: Repeated = [],  # noqa: B006
  prompts: str | None = None,
  pipeline: str | None = None,
  height: int | None = None,
  width: int | None = None,
  teacher: str | None = None,
) -> None:
  """Draws pictures and arrays from a run.

  Args:
    workdir: folder of the run
    num: number of samples; default: 16
    nfe: network evaluations; default: those of the config
    seed: seed of the noise
    labels: classes by name or number, separated by commas; default: all in turn
    which: averaged or last parameters
    out: path of the results without ending; of prompts, their folder
    prompt: a prompt; may be repeated
    prompts: .txt, .jsonl or .csv with more of them
    pipeline: folder of the model whose encoders a prompt needs
    height: of a prompt's picture in pixels; default: as trained
    width: of a prompt's picture in pixels; default: as trained
    teacher: workdir of the run's teacher, if it has moved
  """
  from pflow_jax.mesh.distributed import is_first

  common: dict[str, Any] = dict(nfe=nfe, seed=seed, which=which, teacher=teacher, out=out)
  if prompt or prompts:
    from pflow_jax.data import read_prompts
    from pflow_jax.evaluation.text_to_image import SHOWN, sample_prompts

    for name, value in (("labels", labels), ("num", num)):
      if value is not None:
        raise ValueError(f"--{name} and --prompt: expected one of them")
    texts = [*prompt, *(read_prompts(prompts).texts if prompts else [])]
    sizes: dict[str, Any] = dict(pipeline=pipeline, height=height, width=width)
    folder = sample_prompts(config, workdir, texts, **sizes, **common)
    if is_first():
      print(f"wrote the pictures, overview.png (of {SHOWN} at most) and samples.npz in {folder}")
    return
  from pflow_jax.evaluation.sample import sample as run

  given = {"pipeline": pipeline, "height": height, "width": width}
  of_prompts = [f"--{name}" for name, value in given.items() if value is not None]
  if of_prompts:
    raise ValueError(f"{', '.join(of_prompts)}: of pictures of prompts; give --prompt or --prompts too")
  picture = run(config, workdir, num=num or 16, labels=labels, **common)
  if is_first():
    print(f"wrote {num or 16} samples: {picture} and {picture.with_suffix('.npz')}")


def plot(
  runs: Positional,
  metric: str = "loss",
  smooth: float = 0.0,
  log: bool | None = None,
  out: str | None = None,
) -> None:
  """Compares curves of runs, in the terminal and in a picture.

  Args:
    runs: workdirs of runs, which may still train
    metric: its name, or a pattern such as loss_t* for several
    smooth: share of the average so far in every value, in [0, 1)
    log: logarithmic values; default: where all are positive
    out: file for the picture, a PNG
  """
  from pflow_jax.evaluation import figures, histories
  from pflow_jax.files.folders import checked_file

  path = None if out is None else checked_file(out)
  series = histories.series_of(histories.histories_of(runs), metric, smooth)
  log = histories.is_logarithmic(series, log)
  print(histories.as_text(series, metric, log=log))
  if path is not None:
    figures.save(histories.as_figure(series, metric, log=log), path)
    print(f"wrote {path}")


def merge(workdir: str, out: str, teacher: str | None = None) -> None:
  """Writes a run with adapters as one without.

  Args:
    workdir: folder of a run with adapters
    out: folder of the new run
    teacher: workdir of the run's teacher, if it has moved
  """
  from pflow_jax.conversion.merge import merge as run

  step = run(workdir, out, teacher=teacher)
  print(f"wrote {out}: step {step} of {workdir}, its adapters merged")


def compare(config: Any, workdir: str, seeds: list[str] = ["0"], only: list[str] = []) -> None:  # noqa: B006
  """Trains and measures methods side by side.

  Args:
    workdir: folder of all runs and the table
    seeds: seeds, separated by commas; each has its own teacher
    only: methods to work on, separated by commas; default: all
  """
  from pflow_jax.evaluation.compare import compare as run

  report = run(config, workdir, seeds=whole_numbers("--seeds", seeds), only=only)
  print(f"wrote {workdir}/compare.md, compare.json and compare.png")
  failed = [f"seed {one['seed']}, {one['run']}" for one in report["runs"] if "error" in one]
  if failed:
    fail(2, f"failed, and tried again by the same command: {'; '.join(failed)}")


def plan(
  config: Any,
  topology: str,
  slices: Count = 1,
  mesh: list[str] = [],  # noqa: B006
  batch: Count | None = None,
  fast: bool = False,
  search: bool = True,
  sampling: bool = True,
  sweep: bool = False,
  bytes: bool = False,
  json: str | None = None,
) -> None:
  """Tells whether a run fits on these TPUs or GPUs, and the cost.

  Args:
    topology: v5e:16x16, v5p:4x4x4, a Cloud name, v5e-256, or a node of GPUs, h100-8
    slices: slices of that topology
    mesh: sizes, data=4,fsdp=64; default: the config's
    batch: global batch size; default: the config's
    fast: compile in less time: the same memory, but time and traffic are overestimated
    search: if it does not fit, look for changes that make it fit
    sampling: plan the sampler as well
    sweep: compare all sizes of fsdp, compiled with --fast
    bytes: list what a step moves to and from main memory, by kind of work and by operation
    json: file for the report
  """
  from pflow_jax.files.folders import checked_file
  from pflow_jax.planning import plan as planner
  from pflow_jax.planning import report as reports
  from pflow_jax.settings.tree import Settings

  if bytes and sweep:
    raise ValueError("--bytes: a sweep compares meshes and lists no operations; leave --sweep out")
  settings, where = Settings.of(config), planner.Slice(topology, slices)
  settings = settings.changed("mesh", **(({"slice": slices} if slices > 1 else {}) | mesh_sizes(mesh)))
  if batch:
    settings = settings.changed("train", batch_size=batch)
  if json is not None and not pathlib.Path(checked_file(json, "--json")).absolute().parent.is_dir():
    raise ValueError(f"--json: there is no folder for {json}")
  result: Any
  if sweep:
    result = planner.sweep(settings, where)
    print(reports.as_table(result))
  else:
    if where.chip.platform == "tpu" and planner.has_compiler():
      print(f"planning for {where.num_chips} chips; compiling takes a minute or a few", flush=True)
    result = planner.plan(settings, where, fast=fast, search=search, sampling=sampling)
    print(reports.as_text(result))
  if json:
    reports.write_json(json, result)
    print(f"wrote {json}")
  if bytes:
    print(f"\n{reports.as_bytes(result)}")


def demo(
  workdir: Repeated,
  base: str | None = None,
  pipeline: str | None = None,
  preview_autoencoder: str | None = None,
  batch_size: Count = 8,
  host: str = "127.0.0.1",
  port: Annotated[int, 1, 65535] | None = None,
) -> None:
  """Opens a page in the browser that shows runs beside each other.

  Args:
    workdir: workdir of a run, or a folder of PyTorch; may be repeated
    base: teacher of an adapter of PyTorch
    pipeline: folder of a published model, for encoders and autoencoder
    preview_autoencoder: folder of an autoencoder, a tiny one, say, that shows samples of latents as pictures
    batch_size: samples at a time
    host: address to listen on; who reaches it can use this machine
    port: to listen on; default: the first free one from 7860 on
  """
  import threading

  from pflow_jax.commands.demo import open_page

  page, address = open_page(workdir, base, pipeline, preview_autoencoder, batch_size, host=host, port=port, share=False)
  print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
  try:
    threading.Event().wait()
  finally:
    page.close(verbose=False)


def convert(
  source: str,
  out: str,
  base: str | None = None,
  which: Which = "ema",
  dtype: Dtype | None = None,
  max_shard_gb: float | None = None,
  key: str = "",
  mesh: list[str] = [],  # noqa: B006
  teacher: str | None = None,
  convention: Literal["repa", "sit", "flowdit"] | None = None,
  format: Literal["diffusers", "timm"] = "diffusers",
) -> None:
  """Converts weights from PyTorch, or a run to PyTorch.

  Args:
    source: workdir, folder of diffusers, or .safetensors, .pth or .pt
    out: new workdir, or for a run the new folder for PyTorch
    base: workdir of the teacher of an adapter from PyTorch
    which: averaged or last parameters of a run
    dtype: default: as it is stored
    max_shard_gb: size of a file for PyTorch, in 10^9 bytes; default: one file for a policy, else 5
    key: of the state dict in a .pth file that has several; default: ema, if there is one
    mesh: fsdp=16: parts that lie together in the checkpoint
    teacher: workdir of the run's teacher, if it has moved
    convention: time and sign of a DiT, where its files do not tell them
    format: of a run's names for PyTorch: timm is of the code of SiT and REPA
  """
  from pflow_jax.conversion.program import convert as run

  options: dict[str, Any] = dict(base=base, teacher=teacher, which=which, dtype=dtype, max_shard_gb=max_shard_gb)
  with resumable():
    run(source, out, key=key, mesh=mesh_sizes(mesh), convention=convention, format=format, **options)


def latents(
  images: str,
  out: str,
  autoencoder: str | None = None,
  split: str = "train",
  option: Repeated = [],  # noqa: B006
  size: Count | None = None,
  moments: bool = False,
  mean: bool = False,
  mirror: bool = False,
  dtype: Dtype = "float32",
  batch_size: Count | None = None,
  seed: Seed = 0,
  max_bad: Annotated[int, 0, None] = 100,
  shard_records: Count = 4096,
) -> None:
  """Encodes pictures once.

  Args:
    images: a folder of pictures, or a data set of them, tfds:imagenet2012, parquet:hub, webdataset:tars or emoji, say
    out: folder for the latents, which the data set latents:<out> reads; the same command goes on with one
    autoencoder: folder of a published autoencoder, or of a tiny one, taesd/taef2
    split: of the data set
    option: key=value of the data set, held_out=100, say; may be repeated
    size: side that image files are scaled and cut to, as ADM does; default: 256, or as the data set is
    moments: store mean and standard deviation, of which training draws anew each time, in place of one draw
    mean: store the mean in place of one draw
    mirror: store the same of the mirror image
    dtype: to compute in
    batch_size: pictures at a time in a process; default: 16 a device
    seed: of the draws
    max_bad: pictures that cannot be read, after which it stops
    shard_records: pictures in a file
  """
  from pflow_jax.conversion.latents import make

  given: dict[str, Any] = {"split": split, "autoencoder": autoencoder, "size": size, "options": options(option)}
  given |= {"mirror": mirror, "dtype": dtype, "batch_size": batch_size, "seed": seed}
  if moments and mean:
    raise ValueError("moments, mean: expected one of them")
  store = "moments" if moments else "mean" if mean else "draw"
  with resumable():
    make(images, out, store=store, max_bad=max_bad, shard_records=shard_records, **given)


def push(folder: str, repo: str, private: bool = False) -> None:
  """Uploads an export to the Hugging Face Hub.

  Args:
    folder: what `pflow convert` made of a run
    repo: USER/NAME on the Hub
    private: make a repository that others do not see
  """
  from pflow_jax.conversion.push import push as run

  print(f"uploaded {folder} to {run(folder, repo, private=private)}")


def cache(
  prompts: str,
  model: str,
  out: str,
  encoders: str | None = None,
  batch_size: Count = 16,
  max_length: Count | None = None,
  shard_records: Count | None = None,
  dtype: Dtype | None = None,
  field: str | None = None,
  latents: str | None = None,
  images: str | None = None,
  height: Count = 1024,
  width: Count = 1024,
) -> None:
  """Embeds prompts once.

  Args:
    prompts: .txt, .jsonl or .csv, or data:emoji
    model: the model to embed for: flux, qwen_image, minilm
    out: folder for the embeddings
    encoders: folder of the model's pipeline; minilm needs none
    batch_size: prompts at a time
    max_length: tokens of a text; default: 512
    shard_records: prompts in a file; default: files of 4 GiB at most
    dtype: compute dtype of the encoders
    field: field with the prompt; default: prompt, text or caption
    latents: field that names a .npy file with the latents of a prompt's image
    images: field that names a prompt's image, for the pipeline's autoencoder
    height: of images, which are cut and scaled to it
    width: of images
  """
  from pflow_jax.conversion.cache import cache as run

  options: dict[str, Any] = dict(encoders=encoders, batch_size=batch_size, max_length=max_length)
  options |= dict(shard_records=shard_records, dtype=dtype, field=field)
  with resumable():
    run(prompts, model, out, latents=latents, images=images, height=height, width=width, **options)
