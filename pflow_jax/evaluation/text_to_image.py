"""`pflow sample --prompt`: pictures of prompts from a student that is conditioned on texts."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, PngImagePlugin

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import newest_step
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.sample import as_saved, check_local
from pflow_jax.families import text
from pflow_jax.families.autoencoder import Codec, load_autoencoder
from pflow_jax.families.family import Family
from pflow_jax.families.registry import FAMILIES
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.mesh.distributed import is_first
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import build, layout_of
from pflow_jax.training.origins import use_teacher
from pflow_jax.training.sample import check_room, evaluations, in_batches, make_sampler, sample_keys, warn_of_gaps
from pflow_jax.training.teachers import which_of
from pflow_jax.training.workdir import CHECKPOINTS

SHOWN = 64  # pictures in the overview


def sample_prompts(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  prompts: Sequence[str],
  *,
  pipeline: str | os.PathLike | None = None,
  height: int | None = None,
  width: int | None = None,
  nfe: int | None = None,
  seed: int = 0,
  which: str = "ema",
  teacher: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Draws pictures of `prompts` from the run in `folder`, with their settings in each file.

  Args:
    config: of the run, perhaps with other settings for sampling.
    folder: its workdir.
    prompts: the texts, a picture each.
    pipeline: folder of the published model, for its text encoders and its autoencoder; not needed for a run on MiniLM's
      embeddings and pixels.
    height: in pixels; by default that which the run was trained for.
    width: in pixels; by default that which the run was trained for.
    nfe: network evaluations; by default the first of config.sample.nfe.
    seed: picture i starts from noise that depends on it and i alone.
    which: "ema" or "params".
    teacher: workdir of its teacher, if that has moved; only adapters need it.
    out: folder for 0000.png, ... (a file a prompt), overview.png and samples.npz. The latter has noise, prompts, the
      condition and the result "x0", to sample the same elsewhere. Default: <folder>/samples/prompts_seed<seed>.

  Returns:
    `out`.

  Raises:
    ValueError: the run, a folder or a size does not fit.
  """
  folder = expanded(folder)
  check_local(out, folder)
  out = pathlib.Path(checked_folder(f"{folder}/samples/prompts_seed{seed}" if out is None else out, "--out"))
  run_settings = use_teacher(Settings.of(config, converted=True), teacher)
  settings = run_settings.sample
  family = family_of(run_settings)
  if pipeline is None and family.autoencoder:
    raise ValueError("--pipeline: expected the folder of the published model, for its text encoders and autoencoder")
  if not family.autoencoder and (height or width):
    raise ValueError("--height, --width: this run samples pictures of the size that it was trained on")
  layout = layout_of(run_settings)  # raises before the encoders are read if these devices cannot run the network
  # The encoders compute in the network's dtype or a wider one.
  dtype = "float32" if run_settings.model.get("dtype", "float32") == "float32" else "bfloat16"
  # A teacher is guided away from the empty prompt, which then comes last. Without guidance `null` is not used.
  asked = [*prompts, *([""] if prompts and settings.guidance is not None else [])]
  cond = text.encode_prompts(family.name, pipeline, asked, run_settings.data.get("max_length"), dtype=dtype)
  null = {name: value[-1] for name, value in cond.items()}
  cond = {name: value[: len(prompts)] for name, value in cond.items()}
  codec = load_autoencoder(pipeline) if family.autoencoder and pipeline is not None else None
  dataset = _shapes(run_settings, cond, codec, height, width) if codec else None
  experiment = build(run_settings, dataset=dataset, run=folder)
  dataset = experiment.dataset
  assert dataset.embedding is not None
  dataset = dataclasses.replace(dataset, embedding=dataclasses.replace(dataset.embedding, null=null))
  method = dataclasses.replace(experiment.method, dataset=dataset)
  check_room(dataset, len(prompts), 2, "prompts")
  nfe = nfe or evaluations(method, settings)[0]
  params = experiment.load(folder, which_of(run_settings, which), layout)
  key = jax.random.key(seed)
  draw = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), dataset.shape, jnp.float32))
  noise = np.asarray(draw(jnp.arange(len(prompts))))
  keys = sample_keys(len(prompts), seed)
  run = functools.partial(make_sampler(method, settings, nfe), params)
  x0 = in_batches(run, layout, settings.batch_size, noise, cond, keys)
  warn_of_gaps(f"{nfe} NFE", x0, params)
  if is_first():
    pictures = x0 if codec is None else codec.decode(x0)
    told = {"model": run_settings.model.kind, "nfe": nfe, "seed": seed, "which": which, "run": str(folder)}
    told |= {"step": newest_step(f"{folder}/{CHECKPOINTS}"), "temperature": settings.temperature_of_segments}
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", x0=x0, noise=noise, prompts=np.array(prompts), nfe=nfe, **as_saved(cond))  # type: ignore[arg-type]
    _write(out, pictures, prompts, told)
  return out


def family_of(settings: Settings) -> Family:
  """Returns the family whose text encoders make the conditions of the run of `settings`.

  Raises:
    ValueError: the run is conditioned on classes.
  """
  own = FAMILIES.get(settings.model.kind)
  if own is not None and own.encoder is not None:
    return own
  if settings.data.get("embeddings"):  # a vector a text takes the place of a class
    return next(family for family in FAMILIES.values() if family.network is None)
  raise ValueError(
    f"--prompt: this run ({settings.model.kind} on {settings.data.get('name')}) knows classes, not texts; use --labels"
  )


def _shapes(
  settings: Settings, cond: dict[str, Any], codec: Codec, height: int | None, width: int | None
) -> data.Dataset:
  """Makes a set without records, of the shapes of the samples and of their conditions."""
  trained = tuple(settings.data["shape"])
  sizes = {"--height": (height, trained[0]), "--width": (width, trained[1])}
  patch = settings.model.get("patch_size", 2) * codec.factor
  for flag, (given, _) in sizes.items():
    if given is not None and (given < patch or given % patch):
      raise ValueError(f"{flag}: expected a multiple of {patch} pixels, got {given}")
  if codec.module.latent_channels != trained[-1]:
    raise ValueError(
      f"--pipeline: its autoencoder has {codec.module.latent_channels} channels, the run's latents {trained[-1]}; give "
      "the folder of the model that the run was made from"
    )
  space = tuple(default if given is None else given // codec.factor for given, default in sizes.values())
  embedding = data.Embedding(
    lengths=(cond["text"].shape[1],),
    text_width=cond["text"].shape[2],
    masked="mask" in cond,
    pooled_width=cond["pooled"].shape[1] if "pooled" in cond else 0,
  )
  return data.Dataset("prompts", (*space, trained[-1]), 0, (), records=None, embedding=embedding)  # type: ignore[arg-type]


def _write(out: pathlib.Path, pictures: np.ndarray, prompts: Sequence[str], told: dict[str, Any]) -> None:
  for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
    info = PngImagePlugin.PngInfo()
    about = {"prompt": prompt, "index": i, "height": picture.shape[0], "width": picture.shape[1], **told}
    info.add_itxt("parameters", json.dumps(about, ensure_ascii=False))
    pixels = figures.to_bytes(picture)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(out / f"{i:04d}.png", pnginfo=info)
  figures.captioned_images(out / "overview.png", pictures[:SHOWN], prompts[:SHOWN])
