"""Commands on what runs are made from and leave: data, prompts, weights."""

from __future__ import annotations

import functools

from pflow_jax.commands.command import USAGE, define_join_flags, define_teacher_flag, fail, mesh_sizes, run_command


def data_command(argv: list[str]) -> None:
  if argv in (["-h"], ["--help"]):
    print(USAGE)
    return
  if argv != ["emoji"]:
    fail(2, "usage: pflow data emoji")
  from pflow_jax.data import fetch_emoji

  try:
    print(f"emoji are in {fetch_emoji()}")
  except (ValueError, RuntimeError) as error:
    fail(2, str(error))


def cache_command(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("prompts", None, ".txt, .jsonl or .csv, or data:emoji", flag_values=values)
    flags.DEFINE_string("model", None, "that they are for: flux, qwen_image, minilm", flag_values=values)
    flags.DEFINE_string("out", None, "folder for the embeddings", flag_values=values)
    flags.DEFINE_string("encoders", None, "folder of the model's pipeline; minilm needs none", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "prompts at a time", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_length", None, "tokens of a text; default: 512", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
      "shard_records", None, "prompts in a file; default: files of 4 GiB at most", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "that the encoders compute in", flag_values=values)
    flags.DEFINE_string("field", None, "that holds the prompt; default: prompt, text or caption", flag_values=values)
    flags.DEFINE_string(
      "latents", None, "field that names a .npy file with the latents of a prompt's image", flag_values=values
    )
    flags.DEFINE_string(
      "images", None, "field that names a prompt's image, for the pipeline's autoencoder", flag_values=values
    )
    flags.DEFINE_integer("height", 1024, "of images, which are cut and scaled to it", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("width", 1024, "of images", lower_bound=1, flag_values=values)
    flags.mark_flags_as_required(["prompts", "model", "out"], flag_values=values)

  def cache(values):
    from pflow_jax.conversion.cache import cache as run
    from pflow_jax.families.autoencoder import load_autoencoder

    options = {
      name: values[name].value for name in ("encoders", "batch_size", "max_length", "shard_records", "dtype", "field")
    }
    if values.images:
      if values.latents or not values.encoders:
        raise ValueError("--images: expected --encoders, the pipeline with the autoencoder, and no --latents")
      codec = load_autoencoder(values.encoders)
      options |= {"read_x0": functools.partial(codec.read, size=(values.height, values.width))}
    try:
      run(values.prompts, values.model, values.out, file_field=values.images or values.latents, **options)
    except KeyboardInterrupt as stopped:
      raise KeyboardInterrupt("stopped; the same command goes on where it was") from stopped

  run_command(define, cache, argv)


def convert_command(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("source", None, "workdir, folder of diffusers, or .safetensors or .pth", flag_values=values)
    flags.DEFINE_string("out", None, "new workdir, or for a run the new folder for PyTorch", flag_values=values)
    flags.DEFINE_string("base", None, "workdir of the teacher of an adapter from PyTorch", flag_values=values)
    flags.DEFINE_enum("which", "ema", ["ema", "params"], "averaged or last parameters of a run", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "default: as it is stored", flag_values=values)
    flags.DEFINE_float("max_shard_gb", 5.0, "size of a file for PyTorch, in 10^9 bytes", flag_values=values)
    flags.DEFINE_string("key", "", "of the state dict in a .pth file that has several", flag_values=values)
    flags.DEFINE_list("mesh", [], "fsdp=16: parts that lie together in the checkpoint", flag_values=values)
    flags.mark_flags_as_required(["source", "out"], flag_values=values)
    define_teacher_flag(values)
    define_join_flags(values)

  def convert(values):
    from pflow_jax.conversion.program import convert as run

    try:
      run(
        values.source,
        values.out,
        base=values.base,
        teacher=values.teacher,
        which=values.which,
        dtype=values.dtype,
        max_shard_gb=values.max_shard_gb,
        key=values.key,
        mesh=mesh_sizes(values.mesh),
      )
    except KeyboardInterrupt as stopped:
      raise KeyboardInterrupt("stopped; the same command goes on where it was") from stopped

  run_command(define, convert, argv)


def merge_command(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("workdir", None, "folder of a run with adapters", flag_values=values)
    flags.DEFINE_string("out", None, "folder of the new run", flag_values=values)
    flags.mark_flags_as_required(["workdir", "out"], flag_values=values)
    define_teacher_flag(values)

  def merge(values):
    from pflow_jax.conversion.merge import merge as run

    step = run(values.workdir, values.out, teacher=values.teacher)
    print(f"wrote {values.out}: step {step} of {values.workdir}, its adapters merged")

  run_command(define, merge, argv)
