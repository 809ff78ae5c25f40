"""Valid models of PyTorch and runs of ours, tiny, each with the call that reads all of it.

A seed is a function (folder) -> (path, read): it writes below the folder, `path` is what may be damaged, and `read()`
reads it as `pflow convert` does, but for the writing. It raises what the command would.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.conversion import from_torch, program
from pflow_jax.conversion.models import Model
from pflow_jax.families.autoencoder import load_autoencoder
from pflow_jax.families.text import load_encoder
from pflow_jax.settings.defaults import default_config
from pflow_jax.settings.tree import Settings
from pflow_jax.torch_io import shards
from pflow_jax.torch_io.tensors import open_tensors
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from tests import authors, edm2, encoders
from tests.conftest import GOLDEN
from tests.conversion.folders import make_torch, write_torch

Seed = tuple[pathlib.Path, Callable[[], Any]]


@contextlib.contextmanager
def without_writing() -> Iterator[None]:
  """Conversions that read every tensor and write nothing; shapes of one network are made once."""
  cached: dict[str, Any] = {}
  shapes = Model.shapes

  def shapes_once(self):
    key = repr(self)
    if key not in cached:
      cached[key] = shapes(self)
    return cached[key]

  def save_leaves(directory, state, **options):
    for leaf in jax.tree.leaves(state):
      for layer in range(leaf.shape[0]) if leaf.stacked else [None]:
        np.ascontiguousarray(leaf.layer(layer))

  def write(self, produce, report):
    for tensor in self.tensors:
      produce(tensor.name)

  with (
    mock.patch.object(Model, "shapes", shapes_once),
    mock.patch.object(from_torch, "save_leaves", save_leaves),
    mock.patch.object(workdir, "claim"),
    mock.patch.object(shards.ModelFolder, "write", write),
    contextlib.redirect_stdout(io.StringIO()),
  ):
    yield


def read_source(source: pathlib.Path, **options: Any) -> None:
  """Reads a source of `pflow convert`; a refusal must leave no output behind."""
  out = source.parent / f"{source.name}.out"
  try:
    with without_writing():
      program.convert(source, out, **options)
  except ValueError:
    if out.exists():
      raise AssertionError(f"{list(out.iterdir())} was written before the refusal") from None
    raise
  finally:
    shutil.rmtree(out, ignore_errors=True)


def shards_of(kind: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    write_torch(folder / "model", kind)
    return folder / "model", lambda: read_source(folder / "model")

  return seed


def pipeline(folder: pathlib.Path) -> Seed:
  write_torch(folder / "pipeline" / "transformer", "dit", shard="1GB")
  (folder / "pipeline" / "model_index.json").write_text('{"transformer": ["diffusers", "DiTTransformer2DModel"]}')
  return folder / "pipeline", lambda: read_source(folder / "pipeline")


def pickled(folder: pathlib.Path) -> Seed:
  path = folder / "model"
  path.mkdir()
  state = {}
  for name, tensor in make_torch("dit").state_dict().items():
    block, _, rest = name.partition(".norm1.emb.")
    if not rest or block == "transformer_blocks.0":
      state[f"emb.{rest}" if rest else name] = tensor
  state.pop("pos_embed.pos_embed", None)
  state["proj_out_1.weight"] = state["proj_out_1.weight"].T.contiguous().T  # columns first
  torch.save({"state_dict": state, "meta": {"step": 3}}, path / "teacher.pth")
  fields = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16, num_embeds_ada_norm=5, sample_size=8)
  fields |= {"_class_name": "DiTTransformer2DModelMod", "num_timesteps": 1, "flip_model_timesteps": True}
  (path / "config.json").write_text(json.dumps(fields))
  return path, lambda: read_source(path / "teacher.pth")


def snapshot(folder: pathlib.Path) -> Seed:
  """An EDM2 as NVIDIA's code pickles it, with its classes."""
  path = edm2.snapshot(folder / "model.pkl", "weak")
  return path, lambda: read_source(path)


def checkpoint(folder: pathlib.Path) -> Seed:
  """A training's checkpoint by the names of SiT's code, which tells its time, and not its heads."""
  path = folder / "model"
  path.mkdir()
  with np.load(GOLDEN / "authors_sit.npz") as file:
    state = authors.tensors(dict(file))
  torch.save({"state_dict": state, "args": authors.ARGS["sit"]}, path / "0400000.pth")
  (path / "config.json").write_text('{"num_attention_heads": 2}')
  return path, lambda: read_source(path / "0400000.pth")


def student_config(kind: str, teacher: pathlib.Path, table: tuple[Any, ...]) -> Any:
  config = default_config("imitation")
  if kind == "dit":
    config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=5)
  else:
    config.data = dict(name="synthetic_prompts", model=kind, shape=(8, 8, 4), text=(6, 12), pooled=10)
  config.model = workdir.load_config(teacher).model.to_dict()
  config.head = dict(kind="gmflow", num_components=3, logstd_inner_dim=8)
  config.teacher.workdir = str(teacher)
  config.adapters.table = table
  return config


@functools.cache
def _runs(folder: pathlib.Path) -> pathlib.Path:
  """Folders torch/<kind>, run/<kind>, student/<kind> and adapter/<kind>, made once."""
  for kind in ("dit", "flux"):
    write_torch(folder / "torch" / kind, kind, shard="1GB")
    with contextlib.redirect_stdout(io.StringIO()):
      program.convert(folder / "torch" / kind, folder / "run" / kind)
      table = (("(blocks/(qkv|mlp_in)|double_blocks/(img|txt)_mlp_in)", 4),) if kind == "flux" else ()
      config = student_config(kind, folder / "run" / kind, table)
      experiment = build(config)
      shapes = jax.eval_shape(experiment.init, jax.random.key(0), experiment.frozen)
      params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
      workdir.claim(folder / "student" / kind, Settings.of(config, converted=True))
      with Checkpointer(folder / "student" / kind / workdir.CHECKPOINTS) as checkpointer:
        checkpointer.save(7, {"params": params, "ema": params})
      program.convert(folder / "student" / kind, folder / "adapter" / kind)
  return folder


def _copied(folder: pathlib.Path, name: str) -> pathlib.Path:
  made = _runs(folder.parent / "made")
  shutil.copytree(made / name, folder / name)
  return folder / name


def full_student(folder: pathlib.Path) -> Seed:
  path = _copied(folder, "adapter/dit")
  return path, lambda: read_source(path)


def adapter(folder: pathlib.Path) -> Seed:
  path, base = _copied(folder, "adapter/flux"), _copied(folder, "run/flux")
  return path, lambda: read_source(path, base=base)


def base(folder: pathlib.Path) -> Seed:
  path, base = _copied(folder, "adapter/flux"), _copied(folder, "run/flux")
  return base / "config.json", lambda: read_source(path, base=base)


def run(kind: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    path = _copied(folder, f"run/{kind}")
    return path / "config.json", lambda: read_source(path)

  return seed


def student_run(kind: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    path = _copied(folder, f"student/{kind}")
    return path / "config.json", lambda: read_source(path)

  return seed


def autoencoder(name: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    import diffusers

    sizes: dict[str, Any] = dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])
    sizes |= dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    if name == "AutoencoderKL":
      sizes = dict(block_out_channels=(8, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2)
      sizes |= dict(up_block_types=("UpDecoderBlock2D",) * 2)
    getattr(diffusers, name)(**sizes).save_pretrained(folder / "vae")
    return folder / "vae", lambda: load_autoencoder(folder)

  return seed


def encoder(model: str) -> Callable[[pathlib.Path], Seed]:
  def seed(folder: pathlib.Path) -> Seed:
    path = getattr(encoders, f"write_{model}")(folder / model)

    def read() -> None:
      one = load_encoder(model, path, dtype="float32", device="cpu")
      one.text_lengths(["a cat"])
      one.encode(["a cat"])
      one.digest()

    return path, read

  return seed


class _Program(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.layers(x)


def unloaded(name: str) -> Callable[[pathlib.Path], Seed]:
  """A file that is read without PyTorch: a program of torch.jit.save, or an old file of torch.save."""

  def seed(folder: pathlib.Path) -> Seed:
    path = folder / name
    if name == "program.pt":
      torch.jit.script(_Program()).save(str(path))
    else:
      torch.save(_Program().state_dict(), path, _use_new_zipfile_serialization=False)

    def read() -> None:
      tensors = open_tensors(path)
      for one in tensors.places:
        tensors.read(one)

    return path, read

  return seed


SEEDS: dict[str, Callable[[pathlib.Path], Seed]] = {
  "flux_shards": shards_of("flux"),
  "qwen_image_shards": shards_of("qwen_image"),
  "pipeline": pipeline,
  "pickled": pickled,
  "checkpoint": checkpoint,
  "snapshot": snapshot,
  "full_student": full_student,
  "adapter": adapter,
  "base": base,
  "run_dit": run("dit"),
  "run_flux": run("flux"),
  "student_dit": student_run("dit"),
  "student_flux": student_run("flux"),
  "vae": autoencoder("AutoencoderKL"),
  "qwen_vae": autoencoder("AutoencoderKLQwenImage"),
  "flux_encoders": encoder("flux"),
  "qwen_image_encoder": encoder("qwen_image"),
  "minilm_encoder": encoder("minilm"),
  "program": unloaded("program.pt"),
  "old_pickle": unloaded("old.bin"),
}
