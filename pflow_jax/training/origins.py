"""The models that a run is made from: places of their parameters, and the run's description of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import load_params, params_shapes
from pflow_jax.files import foreign
from pflow_jax.mesh.distributed import agreed
from pflow_jax.mesh.sharding import Layout
from pflow_jax.settings.sections import call
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.inputs import (
  INPUTS,
  DataInput,
  Inputs,
  ModelInput,
  absolute_path,
  digest_of_files,
  digest_of_parameters,
  read_inputs,
)

Params = Any
ABOUT = ("objective", "head", "model", "source")  # sections of a model's settings in its description


@dataclasses.dataclass(frozen=True)
class Saved:
  """Parameters in a workdir, read when they are asked for."""

  workdir: str
  which: str
  step: int | None
  dtype: str | None = None

  def shapes(self) -> Params:
    """Shapes of the parameters."""
    return params_shapes(self._folder, **self._where)

  def load(self, layout: Layout | None = None) -> Params:
    """Loads the parameters, to the devices as `layout` says, without one to the host."""
    return load_params(self._folder, layout=layout, **self._where)

  @functools.cached_property
  def digest(self) -> str:
    """Digest of the content, independent of its place and format, see `training.inputs.digest_of_parameters`."""
    return digest_of_parameters(self.workdir, self.step, self.which)

  def described(self, known: ModelInput | None = None) -> ModelInput:
    """Describes the model for a run that is made from it; with its earlier description `known`, less is read."""
    files = digest_of_files(self.workdir, self.step)
    parameters = known.parameters if known and files and files == known.files else self.digest
    plain = workdir.load_settings(self.workdir).plain()
    about: dict[str, Any] = {name: plain[name] for name in ABOUT if name in plain}
    return ModelInput(self.workdir, None, int(self.step or 0), self.which, about, parameters, files)

  @property
  def _folder(self) -> str:
    return f"{self.workdir}/{workdir.CHECKPOINTS}"

  @property
  def _where(self) -> dict[str, Any]:
    return {"which": self.which, "step": self.step, "dtype": self.dtype}


def inputs_of(
  settings: Settings, dataset: data.Dataset, saved: Mapping[str, Saved], folder: str | os.PathLike
) -> Inputs:
  """Describes the inputs of the run of `settings`, pinned (see `training.workdir.pinned`), in the workdir `folder`.

  Args:
    settings: of the run.
    dataset: its data.
    saved: its teachers, by their roles, see `training.parts.ROLES`.
    folder: its workdir.
  """
  start = settings.start

  def compute() -> Inputs:
    is_old = workdir.has_checkpoint(folder)
    kept = read_inputs(folder) if is_old else None
    known = kept.models if kept else {}
    models = {name: one.described(known.get(name)) for name, one in saved.items()}
    if "start" in known:
      models["start"] = known["start"]  # a resumed run has its own parameters; the start may be gone
    elif start.workdir and not is_old:
      models["start"] = Saved(start.workdir, start.which, start.step).described()
    description = data.Description.of(dataset, settings.plain()["data"])
    return Inputs(DataInput(description, data.fingerprint(dataset)), models)

  told = agreed(lambda: json.dumps(dataclasses.asdict(compute())))
  return foreign.parse_json(told, Inputs, where=INPUTS)


def use_teacher(settings: Settings, folder: str | os.PathLike | None) -> Settings:
  """Returns the settings of a run with the folder of its teacher, if one is given.

  Raises:
    ValueError: the run has no teacher.
  """
  if folder is None:
    return settings
  if settings.teacher is None:
    raise ValueError(f"teacher: expected a student, {settings.kind!r} has no teacher; leave it out")
  if not os.fspath(folder).strip():
    raise ValueError(f"teacher: expected the workdir of the teacher, got {os.fspath(folder)!r}")
  return settings.changed("teacher", workdir=absolute_path(folder))


def which_of(settings: Settings, which: str = "ema") -> str:
  """Name of the parameters to read of a run: `which`; "params" for a converted teacher, which has no average."""
  return "params" if settings.converted else which


def inputs_of_import(settings: Settings, folder: str | os.PathLike) -> Inputs | None:
  """Inputs of a run that was converted to the workdir `folder`; None for a teacher, which was trained elsewhere."""
  if settings.converted:
    return None
  saved, t = {}, settings.teacher
  if t is not None and t.workdir:
    saved["teacher"] = Saved(t.workdir, which_of(workdir.load_settings(t.workdir), t.which), t.step)
  return inputs_of(settings, call(data.load, "data", settings.data), saved, folder)
