"""Inputs of a run, described by their content: its data, its teacher, and the run that it started from.

A workdir keeps the description in inputs.json. It lets a run be sampled and exported where its data and its teacher are
missing, finds a teacher that moved together with the run, and reveals data or a teacher that were exchanged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from pflow_jax.checkpoints.stream import Stored, open_leaves
from pflow_jax.data import Dataset, Description, Fingerprint, changes
from pflow_jax.data.dataset import Scaling
from pflow_jax.families.autoencoder import other_scale
from pflow_jax.files import foreign
from pflow_jax.files.checksums import CHECKSUMS

INPUTS = "inputs.json"
CONFIG, CHECKPOINTS = "config.json", "checkpoints"  # names in a workdir, see `workdir`

VERSION = 1  # of the fingerprints: different versions are not compared
LEAVES = 64  # number of leaves of which values are read for a fingerprint
_BLOCK = 4096  # values read of each
UNUSUAL_SCALE, OTHER_SCALE = 5 / 3, 3.0  # ratios of standard deviations of latents that are told, and refused

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Versioned:
  version: int


@dataclasses.dataclass(frozen=True)
class ModelInput:
  """A model that a run was made from.

  Attributes:
    workdir: its folder at the time, absolute.
    relative: the same from the run's own folder, None if there is no way.
    step: of its checkpoint.
    which: "ema" or "params".
    about: its kind, network and policy, for people.
    parameters: digest of names, shapes and spread values of its parameters, however they are stored.
    files: digest of the checksums of its checkpoint's files, which is faster to compare; "" where there are none.
  """

  workdir: str
  relative: str | None
  step: int
  which: str
  about: dict[str, Any]
  parameters: str
  files: str = ""


@dataclasses.dataclass(frozen=True)
class DataInput:
  """The data that a run was trained on, see `data.Description` and `data.fingerprint`."""

  description: Description
  fingerprint: Fingerprint


@dataclasses.dataclass(frozen=True)
class Inputs:
  """All inputs of a run.

  Attributes:
    data: the data that it was trained on.
    models: by their role, "teacher", "weak" or "start".
    version: of the fingerprints.
  """

  data: DataInput
  models: dict[str, ModelInput] = dataclasses.field(default_factory=dict)
  version: int = VERSION

  def changes(self, now: Inputs) -> list[str]:
    """Differences between two inputs, a line each. The run that was started from does not count: it is copied."""
    lines = [f"data, {line}" for line in changes(self.data.fingerprint, now.data.fingerprint)]
    for name, model in self.models.items():
      other = now.models.get(name)
      if name != "start" and other and other.parameters != model.parameters:
        lines.append(f"{name}, parameters: was {model.parameters}, is {other.parameters} (in {other.workdir})")
    return lines

  def dataset(self, options: Mapping[str, Any]) -> Dataset | None:
    """The data set of these options, read when its records are asked for; None if the run's was another."""
    if self.data.description.options != json.loads(json.dumps(dict(options))):
      return None
    return self.data.description.dataset()

  def moved(self, folders: Mapping[str, str]) -> Inputs:
    """Returns these inputs with other folders of models, by name."""
    models = {
      name: dataclasses.replace(model, workdir=folders.get(name, model.workdir)) for name, model in self.models.items()
    }
    return dataclasses.replace(self, models=models)

  def as_json(self, workdir: str | os.PathLike) -> str:
    """Content of the file in `workdir`."""
    models = {
      name: dataclasses.replace(model, relative=relative_path(model.workdir, workdir))
      for name, model in self.models.items()
    }
    return json.dumps(dataclasses.asdict(dataclasses.replace(self, models=models)), indent=2) + "\n"


def read_inputs(workdir: str | os.PathLike) -> Inputs | None:
  """Reads the inputs of the run in `workdir`; None where they are not described, as in early runs.

  Raises:
    ValueError: the file does not describe inputs.
  """
  path = epath.Path(workdir) / INPUTS
  if not path.exists():
    return None
  if foreign.read_json(path, _Versioned).version != VERSION:
    return None
  inputs = foreign.read_json(path, Inputs)
  try:
    inputs.data.description.dataset()
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return inputs


def absolute_path(path: str | os.PathLike) -> str:
  """Absolute path of a folder."""
  text = os.fspath(path)
  return text if foreign.is_remote(text) else os.path.abspath(os.path.expanduser(text))


def relative_path(path: str, start: str | os.PathLike) -> str | None:
  """The way from the folder `start` to `path`, both absolute or of one bucket; None if there is none."""
  (store, path), (other, folder) = (absolute_path(one).rpartition("://")[::2] for one in (path, start))
  bucket = lambda text: text.partition("/")[0]  # "" for a path on this machine
  if store != other or bucket(path) != bucket(folder):
    return None
  return posixpath.relpath(f"/{path}" if store else path, f"/{folder}" if store else folder)


def joined(workdir: str | os.PathLike, relative: str) -> str:
  """Absolute path of the folder `relative` to `workdir`."""
  store, separator, path = absolute_path(workdir).rpartition("://")
  return f"{store}{separator}{posixpath.normpath(posixpath.join(path, relative))}"


def is_run(folder: str) -> bool:
  """Returns whether there is a run in `folder`; False for a store that cannot be reached."""
  try:
    return (epath.Path(folder) / CONFIG).exists()
  except (OSError, ImportError, ValueError, RuntimeError):
    return False


def locate(name: str, given: str, workdir: str | os.PathLike, inputs: Inputs) -> str:
  """Finds the folder of a model that the run in `workdir` was made from, wherever both have moved.

  Args:
    name: of the model, one of `Inputs.models`.
    given: its folder in the run's config. If it is another than at the time of training, the user has given it, and no
      other folder is tried.
    workdir: of the run.
    inputs: of the run; if they do not have the model, `given` is returned.

  Raises:
    ValueError: the model is missing, or another model is in its place.
  """
  model = inputs.models.get(name)
  if model is None:
    return given
  flag = "--teacher" if name == "teacher" else f"--config.teacher.{name}_workdir"
  folders = [given]
  if given == model.workdir and model.relative is not None:
    # The relative folder comes first: `given` may be on a machine, or in a bucket, that does not answer any more.
    folders = list(dict.fromkeys([joined(workdir, model.relative), given]))
  refused = []
  for folder in folders:
    if is_run(folder):
      other = _difference(model, folder)
      if other is None:
        return folder
      refused.append(f"{folder} ({other})")
  kind = f"the {name} of the run in {workdir}, {model.about.get('model', {}).get('kind')} {model.parameters},"
  if refused:
    raise ValueError(f"{kind} is not what is in {' and '.join(refused)}; give its folder with {flag}")
  raise ValueError(f"{kind} is needed, and there is no run in {' or '.join(folders)}; give its folder with {flag}")


def _difference(model: ModelInput, folder: str) -> str | None:
  """Describes the difference of the model in `folder` from `model`; None if it is the same."""
  if model.files and digest_of_files(folder, model.step) == model.files:
    return None
  try:
    parameters = digest_of_parameters(folder, model.step, model.which)
  except ValueError as error:
    return str(error)
  return None if parameters == model.parameters else f"its parameters are {parameters}"


def digest_of_files(folder: str, step: int | None) -> str:
  """Digest of the checksums of a checkpoint's files; "" where it has none.

  An object store has no checksums: the digest is of the names of files of data, which are drawn anew at every save.
  """
  path = epath.Path(folder) / CHECKPOINTS / str(step)
  if foreign.is_remote(folder):
    return _digest_of_names(path)
  return _digest(foreign.read_json(path / CHECKSUMS)) if (path / CHECKSUMS).exists() else ""


def _digest_of_names(path: epath.Path) -> str:
  """Digest of the names of the files that have the arrays of a checkpoint; "" if there are none."""
  found = [file for pattern in ("*/d/*", "*/*/d/*") for file in path.glob(pattern)] if path.exists() else []
  return _digest(sorted(str(file.relative_to(path)) for file in found)) if found else ""


def digest_of_parameters(folder: str, step: int | None, which: str) -> str:
  """Digest of the parameters in a workdir: their names, shapes, types, and a spread sample of their values.

  It does not depend on the storage's format. At most a chunk is read of at most LEAVES leaves.

  Raises:
    ValueError: as `checkpoints.checkpoint.load_params`.
  """
  leaves = open_leaves(f"{folder}/{CHECKPOINTS}", which=which, step=step)
  names = sorted(leaves)
  shapes = [[name, list(leaves[name].shape), leaves[name].dtype.name] for name in names]
  # The chosen leaves depend on names and shapes alone.
  chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(len(names), LEAVES)).astype(int))]
  blocks = {name: np.asarray(leaves[name].read(_block(name, leaves[name]))) for name in chosen}
  values = {name: hashlib.sha256(np.ascontiguousarray(block).tobytes()).hexdigest() for name, block in blocks.items()}
  return _digest([shapes, values])


def _block(name: str, leaf: Stored) -> tuple[slice, ...]:
  """A part of a leaf of at most _BLOCK values, somewhere in it."""
  number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
  room, index = _BLOCK, []
  for size in reversed(leaf.shape):
    length = min(size, room)
    number, start = divmod(number, size - length + 1)
    index.append(slice(start, start + length))
    room //= max(length, 1)
  return tuple(reversed(index))


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def scaling_told(source: Mapping[str, Any], channels: int) -> Scaling | None:
  """Returns shift and scale of the latents of a converted teacher; None where they are not told.

  Args:
    source: origin of the teacher, which has them as one number, or as one a channel.
    channels: of the latents.
  """
  told = [np.atleast_1d(source[key]) for key in ("latent_shift", "latent_scale") if source.get(key) is not None]
  if len(told) < 2 or not all(one.ndim == 1 and one.dtype.kind in "if" for one in told):
    return None
  shift, scale = (one.astype(float).tolist() * (channels if len(one) == 1 else 1) for one in told)
  return Scaling(tuple(shift), tuple(scale))


def check_scale(folder: str, expected: float, source: Mapping[str, Any], dataset: Dataset) -> None:
  """Compares the scale of latents with the one that a converted teacher was trained on.

  Args:
    folder: of the teacher, for errors.
    expected: standard deviation of a teacher's data, about.
    source: origin of the teacher; "latent_shift" and "latent_scale" are those of its data, where they are known.
    dataset: that a student is trained on.

  Raises:
    ValueError: shift or scale is another, or the standard deviation as it was measured is another by far; one that is
      somewhat other is a warning.
  """
  known = scaling_told(source, dataset.shape[-1])
  if known is not None and (problem := other_scale(known, dataset.scaling)):
    raise ValueError(
      f"config.data.name: {dataset.name} has latents of another shift or scale than the teacher in {folder}: "
      f"{problem}; give latents of its autoencoder, or, if it was trained on these, mend latent_shift and "
      f"latent_scale in {CONFIG} there"
    )
  std = dataset.scaling.std if dataset.scaling else None
  if not std:
    return
  ratio, text = max(std / expected, expected / std), f"{dataset.name} has a standard deviation of {std:.3g}"
  if ratio > OTHER_SCALE:
    raise ValueError(
      f"config.data.name: {text}, the teacher in {folder} takes latents of about {expected:g}; write them with the "
      "scale of its autoencoder (`pflow latents`), or give that of moments, config.data.scale and shift"
    )
  if ratio > UNUSUAL_SCALE:
    logger.warning(
      "%s, the teacher in %s takes latents of about %g: are they of its autoencoder?", text, folder, expected
    )


def paths_of_data(options: Mapping[str, Any]) -> Iterator[str]:
  """Keys of the section `data` that are places of the data alone."""
  if str(options.get("name")).partition(":")[0] in ("folder", "parquet", "webdataset", "npz", "latents", "prompts"):
    yield "data.name"
  yield from ("data.embeddings", "data.cache_dir", "data.data_dir")
