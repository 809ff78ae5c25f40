"""`pflow convert`: models of PyTorch as workdirs of ours, and runs of ours as folders for PyTorch."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from collections.abc import Mapping

import jax
import numpy as np

from pflow_jax.conversion.from_torch import to_jax
from pflow_jax.conversion.models import DIFFUSERS
from pflow_jax.conversion.runs import is_run
from pflow_jax.conversion.to_torch import to_torch
from pflow_jax.families.dit.recognise import CONVENTIONS
from pflow_jax.files.folders import checked_folder, expanded
from pflow_jax.training.teachers import at_hand

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def convert(
  source: str | os.PathLike,
  out: str | os.PathLike,
  *,
  base: str | os.PathLike | None = None,
  teacher: str | os.PathLike | None = None,
  which: str = "ema",
  dtype: str | None = None,
  max_shard_gb: float | None = None,
  key: str = "",
  mesh: Mapping[str, int] | None = None,
  convention: str | None = None,
  format: str = DIFFUSERS,
) -> bool:
  """Converts a model in either direction, a tensor at a time; goes on where an interrupted call stopped.

  Args:
    source: a run of ours, or a model of PyTorch: a folder that diffusers wrote, a .safetensors or a .pth file with
      config.json beside it, or a student of π-Flow or ArcFlow; of ImageNet also a checkpoint of SiT or REPA, or a file
      of π-Flow's release, which need no config.json.
    out: the new folder: for a run one that PyTorch reads, for anything else a workdir.
    base: workdir of the teacher that a student of PyTorch is an adapter for.
    teacher: workdir of a run's teacher, if that has moved.
    which: of a run's parameters, "ema" or "params".
    dtype: of floating tensors, "float32" or "bfloat16"; None is as they are stored.
    max_shard_gb: size of a file for PyTorch, in 10^9 bytes; by default a student with a policy is one file, as the
      loaders of π-Flow and ArcFlow want it, and any other network has files of 5.
    key: of the state dict in a .pth file, where it holds several; by default "ema", "state_dict" or "model" of these.
    mesh: sizes of the axes of a mesh whose devices' parts are to lie together in the checkpoint, see
      `settings.mesh.MeshSettings`. In a job of several processes it is that of all their devices.
    convention: of the time that a DiT is given, and of the sign of its velocity, where its files do not tell: "repa",
      "sit" or "flowdit", see `families.dit.recognise.CONVENTIONS`.
    format: of the names that a run's tensors get: "diffusers", which π-Flow's release has too, or "timm", of the code
      of SiT and REPA.

  Returns:
    Whether anything was left to do.

  Raises:
    ValueError: it cannot be converted. Nothing is written then.
  """
  if dtype not in (None, "float32", "bfloat16"):
    raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
  if which not in ("ema", "params"):
    raise ValueError(f"which: expected 'ema' or 'params', got {which!r}")
  if max_shard_gb is not None and not max_shard_gb > 0:
    raise ValueError(f"max_shard_gb: expected more than 0, got {max_shard_gb}")
  if convention not in (None, *CONVENTIONS):
    raise ValueError(f"convention: expected one of {list(CONVENTIONS)}, got {convention!r}")
  source, out = expanded(source, "source"), checked_folder(out, "out")
  base = None if base is None else expanded(base, "base")
  _return_freed_memory()
  options = {"which": which, "dtype": dtype, "key": key}
  options |= ({"convention": convention} if convention else {}) | ({"format": format} if format != DIFFUSERS else {})
  wanted = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
  if is_run(source):
    if base is not None or mesh or convention is not None:
      raise ValueError("base, mesh, convention: expected a model of PyTorch, the source is a run; leave them out")
    max_bytes, known = None if max_shard_gb is None else int(max_shard_gb * 10**9), at_hand(source, teacher)
    return to_torch(str(source), pathlib.Path(out), which, wanted, max_bytes, format, options, known)
  if format != DIFFUSERS:
    raise ValueError("format: expected a run, the source is a model of PyTorch; leave it out")
  if teacher is not None:
    raise ValueError(
      "teacher: expected a run, the source is a model of PyTorch; the teacher of its adapters is the base"
    )
  path = pathlib.Path(source)
  if not path.exists():
    raise ValueError(f"source: there is no file or folder {source}")
  if (path / "model_index.json").is_file() and (path / "transformer").is_dir():
    path = path / "transformer"  # of a pipeline
  return to_jax(path, out, None if base is None else str(base), wanted, key, mesh, convention, options)


def _return_freed_memory() -> None:
  """Makes glibc's malloc give every large block back when it is freed.

  Left to itself it keeps, in an arena for each thread, as much as the largest block ever freed: several tensors' worth.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    mallopt(_MMAP_THRESHOLD, 2**20)
