"""What a run was made from, told by content: its data, its teacher, and the run that it started from.

A workdir keeps it in inputs.json. With it a run is sampled and exported where its data and its teacher are not, a
teacher that moved together with the run is found, and data or a teacher that were exchanged are noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from pflow_jax.checkpoints.stream import Stored, open_leaves
from pflow_jax.data import Dataset, Description, Fingerprint, changes
from pflow_jax.files import foreign
from pflow_jax.files.checksums import CHECKSUMS

INPUTS = "inputs.json"
CONFIG, CHECKPOINTS = "config.json", "checkpoints"  # of a workdir, see `workdir`

VERSION = 1  # of the fingerprints: those of another one are not compared
LEAVES = 64  # of which values are read for a fingerprint
_BLOCK = 4096  # values of each


@dataclasses.dataclass(frozen=True)
class _Versioned:
  version: int


@dataclasses.dataclass(frozen=True)
class ModelInput:
  """A model that a run was made from.

  Attributes:
    workdir: its folder at the time, absolute.
    relative: the same from the run's own folder, None if there is no way.
    step, which: of its parameters.
    about: what it is, for people: its kind, network and policy.
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
  """All that a run was made from.

  Attributes:
    models: by what they are to the run, "teacher", "weak" or "start".
  """

  data: DataInput
  models: dict[str, ModelInput] = dataclasses.field(default_factory=dict)
  version: int = VERSION

  def changes(self, now: Inputs) -> list[str]:
    """What differs of two, a line each, of what a run needs all the time: of what it started from it has its own."""
    lines = [f"data, {line}" for line in changes(self.data.fingerprint, now.data.fingerprint)]
    for name, model in self.models.items():
      other = now.models.get(name)
      if name != "start" and other and other.parameters != model.parameters:
        lines.append(f"{name}, parameters: was {model.parameters}, is {other.parameters} (in {other.workdir})")
    return lines

  def dataset(self, options: Mapping[str, Any]) -> Dataset | None:
    """The data set of these options, of which nothing is read before its records are; None if the run's was another."""
    if self.data.description.options != json.loads(json.dumps(dict(options))):
      return None
    return self.data.description.dataset()

  def moved(self, folders: Mapping[str, str]) -> Inputs:
    """The same, of models that are now in other folders, by name."""
    models = {
      name: dataclasses.replace(model, workdir=folders.get(name, model.workdir)) for name, model in self.models.items()
    }
    return dataclasses.replace(self, models=models)

  def as_json(self, workdir: str | os.PathLike) -> str:
    """The content of the file in `workdir`."""
    models = {
      name: dataclasses.replace(model, relative=relative_path(model.workdir, workdir))
      for name, model in self.models.items()
    }
    return json.dumps(dataclasses.asdict(dataclasses.replace(self, models=models)), indent=2) + "\n"


def read_inputs(workdir: str | os.PathLike) -> Inputs | None:
  """What the run in `workdir` says that it was made from; None where it does not, as runs of old.

  Raises:
    ValueError: for a file that is none.
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
  """A folder as it can be named from anywhere."""
  text = os.fspath(path)
  return text if foreign.is_remote(text) else os.path.abspath(os.path.expanduser(text))


def relative_path(path: str, start: str | os.PathLike) -> str | None:
  """The way from the folder `start` to `path`, both absolute or of one bucket; None if there is none."""
  (store, path), (other, folder) = (absolute_path(one).rpartition("://")[::2] for one in (path, start))
  bucket = lambda text: text.partition("/")[0]  # of a path on this machine, ""
  if store != other or bucket(path) != bucket(folder):
    return None
  return posixpath.relpath(f"/{path}" if store else path, f"/{folder}" if store else folder)


def joined(workdir: str | os.PathLike, relative: str) -> str:
  """The folder that lies `relative` to `workdir`."""
  store, separator, path = absolute_path(workdir).rpartition("://")
  return f"{store}{separator}{posixpath.normpath(posixpath.join(path, relative))}"


def is_run(folder: str) -> bool:
  """Whether there is a run in `folder`; a store that cannot be reached has none."""
  try:
    return (epath.Path(folder) / CONFIG).exists()
  except (OSError, ImportError, ValueError, RuntimeError):
    return False


def locate(name: str, given: str, workdir: str | os.PathLike, inputs: Inputs) -> str:
  """The folder of a model that the run in `workdir` was made from, wherever both have moved.

  Args:
    name: of the model, one of `Inputs.models`.
    given: its folder as the run's config says; another than at the time was given by somebody, and is the only one.
    inputs: of the run; where they do not know the model, `given` is believed.

  Raises:
    ValueError: where it is not, or another model is in its place.
  """
  model = inputs.models.get(name)
  if model is None:
    return given
  flag = "--teacher" if name == "teacher" else f"--config.teacher.{name}_workdir"
  folders = [given]
  if given == model.workdir and model.relative is not None:
    # First: with the run it may have left a machine, or a bucket, that would be waited for.
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
  """How the model in `folder` differs from `model`; None if it is the same."""
  if model.files and digest_of_files(folder, model.step) == model.files:
    return None
  try:
    parameters = digest_of_parameters(folder, model.step, model.which)
  except ValueError as error:
    return str(error)
  return None if parameters == model.parameters else f"its parameters are {parameters}"


def digest_of_files(folder: str, step: int | None) -> str:
  """Digest of the checksums of a checkpoint's files; "" where it has none.

  In an object store, where there are no checksums, of the names of files of data, which are drawn anew at every save.
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
  """Digest of the parameters in a workdir: names, shapes, types, and values of them from all over.

  It does not depend on how they are stored. At most a chunk is read of at most LEAVES leaves.

  Raises:
    ValueError: as `checkpoint.load_params`.
  """
  leaves = open_leaves(f"{folder}/{CHECKPOINTS}", which=which, step=step)
  names = sorted(leaves)
  shapes = [[name, list(leaves[name].shape), leaves[name].dtype.name] for name in names]
  # The choice depends on names and shapes alone.
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


def paths_of_data(options: Mapping[str, Any]) -> Iterator[str]:
  """Keys of the section `data` that only say where the data are."""
  if str(options.get("name")).partition(":")[0] in ("folder", "npz", "latents", "prompts"):
    yield "data.name"
  yield from ("data.embeddings", "data.cache_dir", "data.data_dir")
