"""`pflow sample --prompt`: pictures of prompts from a student that is conditioned on texts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, PngImagePlugin

from pflow_jax import data
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.evaluation import figures
from pflow_jax.evaluation.pictures import as_pictures
from pflow_jax.evaluation.sample import as_saved, check_local
from pflow_jax.families import text
from pflow_jax.families.autoencoder import Codec, load_autoencoder
from pflow_jax.families.family import Family
from pflow_jax.families.registry import FAMILIES, family_of_embeddings, network_kind
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.mesh.distributed import is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sample import SampleSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training.experiment import Experiment, build, layout_of
from pflow_jax.training.origins import use_teacher, which_of
from pflow_jax.training.sample import (
  check_room,
  evaluations,
  in_batches,
  make_sampler,
  sample_keys,
  warn_of_gaps,
  with_guide,
)
from pflow_jax.training.workdir import CHECKPOINTS

SHOWN = 64  # pictures in the overview


def sample_prompts(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  prompts: str | Sequence[str],
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
    prompts: the texts, a picture each, or one text.
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
  folder, prompts = expanded(folder), as_list(prompts)
  check_local(out, folder)
  out = pathlib.Path(checked_folder(f"{folder}/samples/prompts_seed{seed}" if out is None else out, "out"))
  run_settings = use_teacher(Settings.of(config, converted=True), teacher)
  settings = run_settings.sample
  layout = layout_of(run_settings)  # raises before the encoders are read if these devices cannot run the network
  asked = ask(run_settings, prompts, pipeline, height, width)
  experiment = build(run_settings, dataset=asked.dataset, run=folder)
  nfe = nfe or evaluations(experiment.method, settings)[0]
  params = experiment.load(folder, which_of(run_settings, which), layout)
  noise, x0 = draw(experiment, params, layout, settings, asked, nfe, seed)
  step = newest_step(f"{folder}/{CHECKPOINTS}")  # all processes ask together
  if is_first():
    pictures = as_pictures(experiment.dataset, x0) if asked.codec is None else asked.decoded(x0)
    told = {"model": run_settings.model.kind, "nfe": nfe, "seed": seed, "which": which, "run": str(folder)}
    told |= {"step": step, "temperature": settings.temperature_of_segments}
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = dict(x0=x0, noise=noise, prompts=np.array(prompts), nfe=nfe, **as_saved(asked.cond))
    np.savez(out / "samples.npz", **arrays)
    _write(out, pictures, prompts, told)
  return out


@dataclasses.dataclass(frozen=True)
class Asked:
  """Prompts as a run is asked for them.

  Attributes:
    cond: the condition, a dict of arrays.
    null: the empty prompt's, or the last prompt's where nothing is guided.
    codec: autoencoder of the latents; None for pixels.
    dataset: shapes of what is sampled; None for those of the run.
  """

  cond: dict[str, np.ndarray]
  null: dict[str, np.ndarray]
  codec: Codec | None
  dataset: data.Dataset | None

  def decoded(self, x0: np.ndarray) -> np.ndarray:
    """Returns pictures (n, H, W, C), about [-1, 1].

    Args:
      x0: samples (n, h, w, c).
    """
    return x0 if self.codec is None else self.codec.decode(x0)

  @functools.cached_property
  def digest(self) -> str:
    """A text that tells the empty prompt from others."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(self.null.items()):
      state.update(f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return state.hexdigest()


def ask(
  run_settings: Settings,
  prompts: str | Sequence[str],
  pipeline: str | os.PathLike | None = None,
  height: int | None = None,
  width: int | None = None,
  kept: dict[str, Any] | None = None,
) -> Asked:
  """Returns prompts as the run of `run_settings` is asked for them.

  Args:
    run_settings: of the run.
    prompts: texts, or one text.
    pipeline: folder of the published model.
    height: in pixels.
    width: in pixels.
    kept: the encoder and the autoencoder of an earlier call, which are used again where they are the same; empty at
      first. The call puts its own there.

  Raises:
    ValueError: the run, the folder or a size does not fit.
  """
  settings, prompts = run_settings.sample, as_list(prompts)
  family = family_of(run_settings)
  if pipeline is None and family.autoencoder:
    raise ValueError("pipeline: expected the folder of the published model, for its text encoders and autoencoder")
  if not family.autoencoder and (height or width):
    raise ValueError("height, width: this run samples pictures of the size that it was trained on")
  # The encoders compute in the network's dtype or a wider one.
  dtype = "float32" if run_settings.model.get("dtype", "float32") == "float32" else "bfloat16"
  # A teacher is guided away from the empty prompt, which then comes last. Without guidance `null` is not used.
  texts = [*prompts, *([""] if prompts and settings.guidance is not None else [])]
  if not texts:
    raise ValueError("there are no prompts to encode.")
  kept, place = {} if kept is None else kept, pipeline if pipeline is None else os.path.abspath(pipeline)
  which = family.name, place, run_settings.data.get("max_length"), dtype
  load = lambda: text.load_encoder(family.name, pipeline, max_length=which[2], dtype=dtype)
  cond = text.encode_with(_once(kept, "encoder", which, load), texts)
  null = {name: value[-1] for name, value in cond.items()}
  cond = {name: value[: len(prompts)] for name, value in cond.items()}
  codec = None
  if family.autoencoder and pipeline is not None:
    codec = _once(kept, "codec", place, lambda: load_autoencoder(pipeline))
  return Asked(cond, null, codec, _shapes(run_settings, cond, codec, height, width) if codec else None)


def draw(
  experiment: Experiment,
  params: Any,
  layout: Layout,
  settings: SampleSettings,
  asked: Asked,
  nfe: int,
  seed: int,
  make: Callable[..., Callable[..., jax.Array]] = make_sampler,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws a sample of every prompt.

  Args:
    experiment: the run.
    params: all parameters of its network.
    layout: of them.
    settings: how it is sampled.
    asked: the prompts.
    nfe: network evaluations.
    seed: sample i starts from noise that depends on it and i alone.
    make: makes the sampler, see `training.sample.make_sampler`.

  Returns:
    Noise and samples, (n, *space, C) each.
  """
  dataset, count = asked.dataset or experiment.dataset, len(next(iter(asked.cond.values())))
  assert dataset.embedding is not None
  dataset = dataclasses.replace(dataset, embedding=dataclasses.replace(dataset.embedding, null=asked.null))
  method = dataclasses.replace(experiment.method, dataset=dataset)
  check_room(dataset, count, 2, "prompts")
  key = jax.random.key(seed)
  one = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), dataset.shape, jnp.float32))
  noise = np.asarray(one(jnp.arange(count)))
  params = with_guide(method, settings, params, layout)
  run = functools.partial(make(method, settings, nfe), params)
  x0 = in_batches(run, layout, settings.batch_size, noise, asked.cond, sample_keys(count, seed))
  warn_of_gaps(f"{nfe} NFE", x0, params)
  return noise, x0


def as_list(prompts: str | Sequence[str]) -> list[str]:
  """Returns prompts as a list; one text is one prompt, not its letters."""
  return [prompts] if isinstance(prompts, str) else list(prompts)


def _once(kept: dict[str, Any], name: str, what: Any, make: Callable[[], Any]) -> Any:
  """Returns what is kept under a name if it is `what`, else makes it and keeps it in place of the last one."""
  if name not in kept or kept[name][0] != what:
    kept.pop(name, None)  # the last one's memory is free before the next one is read
    kept[name] = what, make()
  return kept[name][1]


def family_of(settings: Settings) -> Family:
  """Returns the family whose text encoders make the conditions of the run of `settings`.

  Raises:
    ValueError: the run is conditioned on classes.
  """
  own = FAMILIES.get(settings.model.kind)
  if own is not None and own.encoder is not None:
    return own
  if settings.data.get("embeddings"):  # a vector a text takes the place of a class
    return family_of_embeddings(settings.data["embeddings"])
  raise ValueError(
    f"prompt: this run ({settings.model.kind} on {settings.data.get('name')}) knows classes, not texts; use labels"
  )


def _shapes(
  settings: Settings, cond: dict[str, Any], codec: Codec, height: int | None, width: int | None
) -> data.Dataset:
  """Makes a set without records, of the shapes of the samples and of their conditions."""
  trained = tuple(settings.data["shape"])
  sizes = {"height": (height, trained[0]), "width": (width, trained[1])}
  own = network_kind(settings.model.kind).defaults.get("patch_size", 1)
  patch = settings.model.get("patch_size", own) * codec.factor
  for name, (given, _) in sizes.items():
    if given is not None and (given < patch or given % patch):
      raise ValueError(f"{name}: expected a multiple of {patch} pixels, got {given}")
  if codec.module.latent_channels != trained[-1]:
    raise ValueError(
      f"pipeline: its autoencoder has {codec.module.latent_channels} channels, the run's latents {trained[-1]}; give "
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
  figures.save(figures.captioned_images(pictures[:SHOWN], prompts[:SHOWN]), out / "overview.png")
