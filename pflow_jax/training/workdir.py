"""A run's folder: the config that it was started with, and the keys that may change when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.checkpoints.stream import Stored
from pflow_jax.families.registry import network_kind
from pflow_jax.files import foreign
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import expanded
from pflow_jax.mesh.distributed import from_first
from pflow_jax.settings.tree import Settings
from pflow_jax.training.inputs import (
  CHECKPOINTS,
  CONFIG,
  INPUTS,
  Inputs,
  absolute_path,
  is_run,
  joined,
  paths_of_data,
  read_inputs,
)
from pflow_jax.training.network import COMPUTED, head_class

AVERAGES = "averages"  # folder, in a run's, of snapshots of its profiles
RUN = "run"  # part of a snapshot, beside the profiles: 16 random bytes that all snapshots of a run share

# Keys that may differ when a run is resumed: its length and its reports.
CHANGEABLE = (
  *("teacher.workdir", "teacher.weak_workdir", "start.workdir"),  # they may have moved; their steps are checked
  *(f"model.{key}" for key in COMPUTED),
  "evaluate.",
  "sample.",
  "mesh.",
  "train.steps",
  "train.log_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.keep_every",
  "train.sample_every",
  "train.max_skipped",
  "train.profile",
  "train.tensorboard",
  "train.wandb",
)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens a config to {"train.steps": 10, ...}; lists stay values."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    name = f"{prefix}{key}"
    flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
  return flat


def load_settings(workdir: str | os.PathLike) -> Settings:
  """Loads the settings that the run in `workdir` was started with, former names of keys included.

  Raises:
    ValueError: there is no run, or its config cannot be read.
  """
  path = epath.Path(expanded(workdir)) / CONFIG
  try:
    found = path.exists()
  except (OSError, ValueError) as error:  # too long a name, a folder that cannot be read
    if foreign.may_pass(error):
      raise
    raise ValueError(f"{foreign.shown(str(path))}: cannot be looked at ({error})") from error
  if not found:
    raise ValueError(
      f"no run in {workdir}: expected the file {CONFIG} that `pflow train --workdir {workdir}` writes, or, once it has "
      f"ended, `pflow convert --out {workdir}`"
    )
  values = None
  try:
    values = foreign.read_json(path)
    if "_class_name" in values:  # a config of diffusers
      raise ValueError(f"{path}: is of a model for PyTorch; `pflow convert --source {workdir}` makes a run of it")
    return Settings.of(values, converted=True, quiet=True, where=str(path))
  except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
    text = str(error) if str(path) in str(error) else f"{path}: {error}"
    raise ValueError(f"{text}; expected the config of a run: restore it, or start a new run") from error


def load_config(workdir: str | os.PathLike) -> ConfigDict:
  """Loads the same settings as a config, whose keys a command line can change."""
  settings = load_settings(workdir)
  owners = {"model": network_kind(settings.model.kind).module, "head": head_class(settings.head)}
  return settings.config({section: typing.get_type_hints(owner) for section, owner in owners.items()})


def run_of(snapshot: Mapping[str, Mapping[str, Stored]]) -> str:
  """Returns the name of the run that a snapshot is of, 32 hexadecimal digits, which are 0 where it has none.

  Args:
    snapshot: as opened by `checkpoints.stream.open_parts`.

  Raises:
    ValueError: the name is no such one.
  """
  if RUN not in snapshot:
    return bytes(16).hex()
  leaf = snapshot[RUN].get("")
  if leaf is None or leaf.shape != (16,) or leaf.dtype != np.uint8:
    raise ValueError(f"{RUN}: expected 16 bytes that name a run, got {leaf and (leaf.shape, leaf.dtype.name)}")
  return leaf.read(()).tobytes().hex()


def has_checkpoint(workdir: str | os.PathLike) -> bool:
  """Returns whether a step has been saved, intact or not (<step>.damaged); a save that was cut short does not count."""
  checkpoints = epath.Path(workdir) / CHECKPOINTS
  return checkpoints.exists() and any(
    re.fullmatch(r"\d+(\.damaged\+*)?", child.name) for child in checkpoints.iterdir()
  )


def pinned(workdir: str | os.PathLike | None, settings: Settings) -> Settings:
  """Returns the settings with everything fixed that they point to and that may change.

  A student's teachers get absolute folders and the step of a checkpoint: a teacher that trains on would otherwise
  change under a student that is resumed or evaluated. One that has moved with the run is found. The autoencoder of
  pictures and the network of features get absolute paths. A folder of prompts gets the options of `data.pinned`.

  Args:
    workdir: of the run; None for a run without one.
    settings: of the run.
  """
  settings = dataclasses.replace(settings, data=data.pinned(settings.data))
  if settings.sample.autoencoder:
    autoencoder = expanded(settings.sample.autoencoder, "config.sample.autoencoder")
    settings = settings.changed("sample", autoencoder=absolute_path(autoencoder))
  if settings.evaluate.features:
    features = expanded(settings.evaluate.features, "config.evaluate.features")
    settings = settings.changed("evaluate", features=absolute_path(features))
  inputs, before = None, None
  if workdir is not None and from_first((epath.Path(workdir) / CONFIG).exists() and has_checkpoint(workdir)):
    inputs, before = read_inputs(workdir), load_settings(workdir)
  of_models = ("teacher", "teacher", ""), ("weak", "teacher", "weak_"), ("start", "start", ""), ("", "sample", "weak_")
  for name, section, prefix in of_models:
    values, folder, step = getattr(settings, section), prefix + "workdir", prefix + "step"
    if values is None or not getattr(values, folder):
      continue
    place = absolute_path(expanded(getattr(values, folder), f"config.{section}.{folder}"))
    known = inputs.models.get(name) if inputs else None
    if known and workdir is not None and known.relative is not None and not is_run(place):
      beside = joined(workdir, known.relative)
      place = beside if is_run(beside) else place
    number = getattr(values, step)
    if number is None:
      number = getattr(before.need(section), step) if before else newest_step(f"{place}/{CHECKPOINTS}")
    settings = settings.changed(section, **{folder: place, step: number})
  return settings


def claim(workdir: str | os.PathLike, settings: Settings, inputs: Inputs | None = None, *, write: bool = True) -> None:
  """Writes the config and the inputs of a run into its workdir; checks both against a run to be resumed.

  A workdir without a checkpoint has nothing to resume, and takes any config. An early run, whose inputs are not
  described, takes any inputs, which describe it from then on.

  Args:
    workdir: the folder of the run.
    settings: of the run.
    inputs: its data and models.
    write: False only checks (all processes but the first).

  Raises:
    ValueError: keys differ that may not, each of them named, or the inputs are others.
  """
  folder, new = epath.Path(workdir), settings.plain()
  path = folder / CONFIG
  changeable: tuple[str, ...] = CHANGEABLE
  if settings.optimizer is not None and settings.optimizer.schedule == "cosine":
    # The rate of every step depends on the length of the run.
    changeable = tuple(key for key in CHANGEABLE if key != "train.steps")
  if path.exists() and has_checkpoint(folder):
    before = read_inputs(workdir)
    if before and inputs:
      changes = before.changes(inputs)
      if changes:
        raise ValueError(
          f"{workdir} was trained on something else than there is now; bring that back, or, to go on with what there "
          f"is, remove {folder / INPUTS}:" + "".join(f"\n  {line}" for line in changes)
        )
      changeable += tuple(paths_of_data(settings.data))  # the same data may be elsewhere
    old_flat, new_flat = flatten(load_settings(workdir).plain()), flatten(new)
    missing = "(absent)"
    differing = [
      f"  {key}: the run has {old_flat.get(key, missing)!r}, now {new_flat.get(key, missing)!r}"
      for key in sorted(old_flat.keys() | new_flat.keys())
      if old_flat.get(key, missing) != new_flat.get(key, missing) and not key.startswith(changeable)
    ]
    if differing:
      raise ValueError(
        f"{workdir} holds a run with another config; resume it with its own, or give a new --workdir:\n"
        + "\n".join(differing)
      )
  if write:
    folder.mkdir(parents=True, exist_ok=True)
    files = {CONFIG: json.dumps(new, indent=2) + "\n"}
    if inputs is not None:
      files = {INPUTS: inputs.as_json(workdir)} | files
    for name, text in files.items():
      write_atomically(folder / name, text)
