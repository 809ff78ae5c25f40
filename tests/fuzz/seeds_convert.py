"""Valid models of PyTorch and runs of ours, tiny, each with the call that reads all of it, and ways to damage them.

A seed is a function (folder) -> (path, read): it writes below the folder, `path` is what may be damaged, and `read()`
reads it as `pflow convert` does, but for the writing. It raises what the command would.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from pflow_jax import workdir
from pflow_jax.autoencoder import load_autoencoder
from pflow_jax.checkpoint import Checkpointer
from pflow_jax.convert import program, shards
from pflow_jax.convert.models import Model
from pflow_jax.defaults import default_config
from pflow_jax.experiment import build
from pflow_jax.text import load_encoder
from tests import encoders
from tests.convert.folders import make_torch, write_torch

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
    mock.patch.object(program, "save_leaves", save_leaves),
    mock.patch.object(program.workdir, "claim"),
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


# ---- Seeds ----


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


def student_config(kind: str, teacher: pathlib.Path, table: tuple[Any, ...]) -> Any:
  config = default_config("imitation")
  if kind == "dit":
    config.data = dict(name="synthetic", shape=(8, 8, 4), num_classes=5)
  else:
    config.data = dict(name="synthetic_prompts", model=kind, shape=(8, 8, 4), text=(6, 12), pooled=10)
  config.model = workdir.load_config(teacher).model.to_dict()
  config.policy = dict(kind="gmflow", num_components=3, logstd_inner_dim=8)
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
      workdir.claim(folder / "student" / kind, config)
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


SEEDS: dict[str, Callable[[pathlib.Path], Seed]] = {
  "flux_shards": shards_of("flux"),
  "qwen_image_shards": shards_of("qwen_image"),
  "pipeline": pipeline,
  "pickled": pickled,
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
}


# ---- Damage ----

VALUES: tuple[Any, ...] = (
  *(None, True, False, -1, 0, 1, 2, 3, 1.5, 10**8, 10**9, 2**31, 2**63, 10**40, 1e308, -0.0, 1e-300, "", "x", "3"),
  *("\x00", "\ud800", "x" * 5000, "\x1b[2J", "../x", "/etc/passwd", "dit", "flux", "gs://b/c", "float32", "DX", "nan"),
  *([], {}, [1], [0], [-1], [10**9] * 3, [[]], ["a"], [True], {"a": 1}, {"kind": "dit"}, [2, 2, 3], [1.5], [None]),
  *([["a", 1]], [["(", 1]], [[1, "a"]], {"a": {"b": [1]}}),
)
TEXTS = (
  *(b"", b"\0", b"{", b"[" * 10**5, b"null", b"{}", b"[]", b"1" * 5000, b"\xff\xfe{\0}\0"),
  *(b'{"a": NaN}', b'{"a": 1e999}'),
)


def change(rng: random.Random, value: Any) -> Any:
  """The value with one of those within it replaced, dropped, added or renamed."""
  if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    draw = rng.random()
    if draw < 0.1:
      del value[key]
    elif draw < 0.2 and isinstance(value, dict):
      value[rng.choice([str(key) + "x", "new", "kind", "a.b", "", "__metadata__"])] = rng.choice(VALUES)
    else:
      value[key] = change(rng, value[key])
    return value
  return rng.choice(VALUES)


def damage(rng: random.Random, path: pathlib.Path) -> str:
  """Damages one or two files of the folder, or the file; returns how."""
  files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
  told = []
  for file in rng.sample(files, min(len(files), rng.choice([1, 1, 1, 2]))):
    kind = rng.choice([_bytes, _bytes, _place, *OF_FILES.get(file.suffix, [])])
    told.append(f"{file.name}: {kind(rng, file)}")
  return ", ".join(told)


def _bytes(rng: random.Random, file: pathlib.Path) -> str:
  content = bytearray(file.read_bytes())
  for _ in range(rng.choice([1, 1, 2, 8])):
    # What matters is at the beginning, and of an archive at the end.
    at = rng.choice([rng.randrange(300), rng.randrange(len(content) + 1), len(content) - rng.randrange(600)])
    at, size = max(min(at, len(content)), 0), rng.choice([1, 1, 2, 8, 30])
    match rng.randrange(5):
      case 0 | 1:
        content[at : at + size] = rng.randbytes(size)
      case 2:
        content[at : at + size] = rng.choice([b"\0", b"\xff", b"\x7f"]) * size
      case 3:
        del content[at : at + rng.choice([size, len(content)])]
      case 4:
        content[at:at] = rng.randbytes(size)
  file.write_bytes(content)
  return "bytes"


def _place(rng: random.Random, file: pathlib.Path) -> str:
  file.unlink()
  kind = rng.choice(["missing", "pipe", "loop", "device", "folder", "dangling", "sparse", "up", "outside"])
  if kind == "pipe":
    os.mkfifo(file)
  elif kind == "folder":
    file.mkdir()
  elif kind == "sparse":
    with file.open("wb") as stream:
      stream.truncate(2**40)
  elif kind != "missing":
    targets = {"loop": file.name, "device": "/dev/zero", "dangling": "nowhere", "up": "..", "outside": "/etc/passwd"}
    file.symlink_to(targets[kind])
  return kind


def _json(rng: random.Random, file: pathlib.Path) -> str:
  text = json.dumps(change(rng, json.loads(file.read_text())))
  file.write_text(text)
  return f"JSON {text[:1500]}"


def _text(rng: random.Random, file: pathlib.Path) -> str:
  content = rng.choice(TEXTS)
  file.write_bytes(content)
  return f"text {content[:20]!r}"


def _header(rng: random.Random, file: pathlib.Path) -> str:
  content = file.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  header = change(rng, json.loads(content[8 : 8 + length]))
  text = json.dumps(header).encode()
  if rng.random() < 0.1:  # a name twice
    text = text[:-1] + b', "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' * 2 + b"}"
  length = rng.choice([len(text)] * 9 + [0, 2**63, 2**40, len(text) + 1, 10**8])
  file.write_bytes(struct.pack("<Q", length) + text + content[8 + struct.unpack("<Q", content[:8])[0] :])
  return f"header of {length}: {text[:1500]!r}"


class _Call:
  """Something that is called when it is unpickled."""

  def __init__(self, function: Any, *args: Any):
    self.call = function, args

  def __reduce__(self):
    return self.call


def hostile_states(state: dict[Any, Any]) -> dict[str, Any]:
  """State dicts with something in them that no model has."""
  name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.ndim == 2)
  loop: dict[Any, Any] = dict(state)
  loop["loop"] = loop
  many: Any = {"a": state}
  for _ in range(60):
    many = {"left": many, "right": many}
  deep: Any = {}
  for _ in range(300):
    deep = {"d": deep}
  with_one = lambda value: state | {name: value}
  return {
    "loop": loop,
    "many": many,
    "deep": deep,
    "numbers": dict(enumerate(state.values())),
    "mixed": state | {3: tensor},
    "newline": state | {"a\nb": tensor},
    "escape": state | {"\x1b[2J": tensor},
    "long": state | {"x" * 10**5: tensor},
    "list": list(state.values()),
    "none": None,
    "empty": {},
    "tensor": tensor,
    "strides": with_one(torch.zeros(1).expand(tensor.shape)),
    "huge": with_one(torch.zeros(1).expand(2**20, 2**20)),
    "rank": with_one(torch.zeros((1,) * 60)),
    "scalar": with_one(torch.tensor(1.0)),
    "nothing": with_one(torch.zeros(0, 2**40)),
    "complex": with_one(tensor.to(torch.complex64)),
    "sparse": with_one(tensor.to_sparse()),
    "quantised": with_one(torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "meta": with_one(tensor.to("meta")),
    "double": with_one(tensor.double()),
    "half": with_one(tensor.bfloat16()),
    "code": state | {"code": _Call(os.mkdir, "ran")},
    "memory": state | {"memory": _Call(bytearray, 2**40)},
    "some_memory": state | {"memory": _Call(bytearray, 2**34)},
    "tensors": state | {"memory": _Call(torch.Tensor, 2**20, 2**20)},
    "text": state | {"text": "x" * 10**6},
  }


def _pickle(rng: random.Random, file: pathlib.Path) -> str:
  state = torch.load(file, weights_only=True)["state_dict"]
  states = hostile_states(state)
  name = rng.choice([*states, "legacy", "tar", "pickle", "protocol 4", "no torch"])
  if name == "legacy":
    torch.save(state, file, _use_new_zipfile_serialization=False)
  elif name == "tar":
    with tarfile.open(file, "w") as archive:
      archive.add(__file__, "storages")
  elif name == "pickle":
    file.write_bytes(pickle.dumps(list(state)))
  elif name == "protocol 4":
    torch.save({"state_dict": state, "meta": {"step": 3}}, file, pickle_protocol=4)
  elif name == "no torch":
    file.write_bytes(b"\x80\x02c" + b"posix\nmkdir\n" + b"." * 50)
  else:
    torch.save(states[name] if rng.random() < 0.5 else {"state_dict": states[name]}, file)
  return name


def _zip(rng: random.Random, file: pathlib.Path) -> str:
  """The archive with an entry changed, dropped, doubled or compressed, or the pickle's bytes damaged."""
  with zipfile.ZipFile(file) as archive:
    entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
  row = [name.endswith("data.pkl") for name, _ in entries].index(True)
  row = rng.choice([row, rng.randrange(len(entries))])
  name, content = entries[row]
  kinds = ["drop", "twice", "pickle", "pickle", "pickle", "compressed", "absolute", "order", "empty", "comment"]
  kind = rng.choice(kinds)
  if kind == "drop":
    del entries[row]
  elif kind == "twice":
    entries.append((name, content))
  elif kind == "pickle" and content:
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 3])):
      at = rng.randrange(len(damaged))
      damaged[at : at + rng.choice([0, 1, 1, 4])] = rng.randbytes(rng.choice([0, 1, 1, 4]))
    entries[row] = name, bytes(damaged)
  elif kind == "absolute":
    entries[row] = rng.choice(["/etc/x", "../../x", "\\x", "data.pkl"]), content
  elif kind == "order":
    entries = [(n, b"big" if n.endswith("byteorder") else c) for n, c in entries]
  elif kind == "empty":
    entries[row] = name, b""
  method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
  with zipfile.ZipFile(file, "w", method) as archive:
    archive.comment = b"x" * 100 if kind == "comment" else b""
    for entry in entries:
      archive.writestr(*entry)
  return f"zip {kind} {name}"


OF_FILES = {".json": [_json] * 9 + [_text], ".safetensors": [_header] * 6, ".pth": [_pickle, _zip] * 4}
