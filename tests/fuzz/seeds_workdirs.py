"""Finished runs that nothing was trained for, and what somebody else may have done to their files."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import random
import shutil
from typing import Any

import jax
import numpy as np

from pflow_jax import workdir
from pflow_jax.checkpoint import Checkpointer
from pflow_jax.experiment import build
from pflow_jax.step import make_step
from tests.programs import quick

VALUES: tuple[Any, ...] = (
  *(None, True, False, -1, 0, 1, 2, 3, 17, 2**31, 2**63, 10**30, -0.5, 0.0, 0.5, 1.5, 1e308, 1e400, float("nan")),
  *("", " ", "x", "3", "\x00", "é", "../..", "/dev/null", "gs://b/c", "x" * 5000, "velocity", "float32", "dit"),
  *([], {}, [1], [[]], [None], [1, "a"], [1e400, 1], [10**30], ["a", 1.0], [["a", 1.0]], [["(", 8]], {"a": 1}),
  *({"kind": None}, {"kind": "gmflow"}, {"kind": []}),
)
CONTENTS = (
  b"",
  b"\0",
  b"{",
  b"[" * 100_000,
  b"null",
  b"[]",
  b"{}",
  b"1" * 5000,
  b"\xff\xfe{",
  b'{"_class_name": "Flux"}',
)


def write_run(values: Any, folder: pathlib.Path, step: int = 3) -> pathlib.Path:
  """Writes a workdir as one that was trained for `step` steps, with random parameters."""
  workdir.pin(folder, values)
  experiment = build(values)
  make = make_step(values, experiment)
  init = lambda key, frozen: make.init(key, experiment.init(key, frozen))
  shapes = jax.eval_shape(init, jax.random.key(0), experiment.frozen)
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(scale=0.05, size=leaf.shape) if leaf.dtype == np.float32 else np.zeros(leaf.shape)
  workdir.claim(folder, values)
  with Checkpointer(f"{folder}/{workdir.CHECKPOINTS}") as checkpointer:
    checkpointer.save(step, jax.tree.map(lambda leaf: draw(leaf).astype(leaf.dtype), shapes))
  return folder


def write_runs(root: pathlib.Path) -> pathlib.Path:
  """Writes <root>/teacher and <root>/student, of points on a checkerboard."""
  write_run(quick("checkerboard", "teacher"), root / "teacher")
  write_run(quick("checkerboard", "gmflow", root / "teacher"), root / "student")
  return root


def damage(rng: random.Random, run: pathlib.Path) -> str:
  """Changes the run in a folder as nobody should; returns how."""
  return rng.choice([_structure, _structure, _structure, _structure, _bytes, _content, _place])(rng, run)


def _structure(rng: random.Random, run: pathlib.Path) -> str:
  file = run / workdir.CONFIG
  config = json.loads(file.read_text())
  told = []
  for _ in range(rng.choice([1, 1, 1, 2, 4])):
    section = rng.choice(list(config))
    within = isinstance(config[section], dict) and config[section] and rng.random() < 0.85
    owner, key = (config[section], rng.choice(list(config[section]))) if within else (config, section)
    value = copy.deepcopy(rng.choice(VALUES))
    match rng.randrange(8):
      case 0:
        owner.pop(key)
        told.append(f"without {section}.{key}")
      case 1:
        owner[rng.choice(["", "a.b", "kind", "items", "_fields", "__class__", "x" * 300, "é"])] = value
        told.append(f"another key in {section}")
      case 2:
        other = config[rng.choice(list(config))]
        owner[key] = other
        told.append(f"{section}.{key} is another section")
      case _:
        owner[key] = value
        told.append(f"{section}.{key} = {value!r:.60}")
    if not config:
      break
  file.write_text(json.dumps(config))
  return ", ".join(told)


def _bytes(rng: random.Random, run: pathlib.Path) -> str:
  file = run / workdir.CONFIG
  content = bytearray(file.read_bytes())
  for _ in range(rng.choice([1, 1, 2, 8])):
    at, size = rng.randrange(len(content)), rng.choice([1, 2, 8, 30])
    match rng.randrange(3):
      case 0:
        content[at : at + size] = rng.randbytes(size)
      case 1:
        del content[at : at + size]
      case 2:
        content[at : at + 1] = rng.choice([b"-", b"1", b'"', b"[", b"{", b",", b"e9", b"null", b"1e999", b"NaN"])
  file.write_bytes(content)
  return f"bytes of {file.name}"


def _content(rng: random.Random, run: pathlib.Path) -> str:
  content = rng.choice(CONTENTS)
  (run / workdir.CONFIG).write_bytes(content)
  return f"{workdir.CONFIG} holds {content[:20]!r}"


def _place(rng: random.Random, run: pathlib.Path) -> str:
  """The config or the checkpoints are missing, or something else than they should be."""
  path = run / rng.choice([workdir.CONFIG, workdir.CHECKPOINTS])
  kind = rng.choice(["missing", "pipe", "loop", "device", "folder", "dangling", "file"])
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "folder":
    path.mkdir()
  elif kind == "file":
    path.write_bytes(b"x")
  elif kind != "missing":
    path.symlink_to({"loop": path.name, "device": "/dev/zero", "dangling": "nowhere"}[kind])
  return f"{path.name}: {kind}"
