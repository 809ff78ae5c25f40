"""A run's folder: the config it was started with, and what may change when it is resumed."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict, config_dict

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import newest_step
from pflow_jax.files import foreign
from pflow_jax.files.folders import expanded
from pflow_jax.mesh.distributed import from_first
from pflow_jax.settings.sections import check_sections
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

# Type of the keys that may be unset (None), or have no default: a ConfigDict needs it to take them from the command
# line.
UNSET_TYPES = {
  "dtype": str,
  "steps": int,
  "batch_size": int,
  "learning_rate": float,
  "clip_norm": float,
  "time_mean": float,
  "workdir": str,
  "step": int,
  "weak_workdir": str,
  "weak_step": int,
  "guidance": float,
}

# Keys of the section `model` that say how a network is computed, not which it is.
COMPUTED = ("remat", "attention", "scan_unroll")

# What may differ when a run is resumed: how long it goes on, and what it reports.
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
)


def as_plain(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON would give it back: nested dicts, lists, numbers, strings, None."""
  return json.loads(json.dumps(config.to_dict()))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"train.steps": 10, ...}; lists stay values."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    name = f"{prefix}{key}"
    flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
  return flat


def load_config(workdir: str | os.PathLike) -> ConfigDict:
  """The config that the run in `workdir` was started with.

  Sections are objects, and their kinds strings; what else is in them is looked at where it is used.

  Raises: ValueError when there is none.
  """
  path = epath.Path(expanded(workdir)) / CONFIG
  try:
    found = path.exists()
  except (OSError, ValueError) as error:  # a name that is too long, a folder that cannot be read
    if foreign.may_pass(error):
      raise
    raise ValueError(f"{foreign.shown(str(path))}: cannot be looked at ({error})") from error
  if not found:
    raise ValueError(
      f"no run in {workdir}: expected the file {CONFIG} that `pflow train --workdir {workdir}` writes, or, once it has "
      f"ended, `pflow convert --out {workdir}`"
    )
  try:
    values = foreign.read_json(path)
    if "_class_name" in values:  # as diffusers writes it
      raise ValueError(f"{path}: is of a model for PyTorch; `pflow convert --source {workdir}` makes a run of it")
    config = ConfigDict(_with_tuples(values))
    check_sections(config, list(config), where=str(path))
  except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
    raise ValueError(f"{error}; expected the config of a run: restore it, or start a new run") from error
  for section in config.values():
    if isinstance(section, ConfigDict):
      # JSON's null has lost the type that a flag is read with.
      unset = [key for key, value in section.items() if value is None and key in UNSET_TYPES]
      section.update({key: config_dict.placeholder(UNSET_TYPES[key]) for key in unset})
  return config


def has_checkpoint(workdir: str | os.PathLike) -> bool:
  """Whether a step of the run has been saved, intact or not (<step>.damaged); a save that was cut short is none."""
  checkpoints = epath.Path(workdir) / CHECKPOINTS
  return checkpoints.exists() and any(
    re.fullmatch(r"\d+(\.damaged\+*)?", child.name) for child in checkpoints.iterdir()
  )


def pin(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Makes a config name for good what it was only pointed to.

  A student's teachers, by absolute folders and the step of a checkpoint of each: one that trains on would otherwise
  change under a student that is resumed or evaluated. One that has moved with the run is found. Of a folder of prompts
  what `data.pinned` tells.
  """
  if "data" in config:
    config.data = data.pinned(config.data)
  resumed = from_first((epath.Path(workdir) / CONFIG).exists() and has_checkpoint(workdir))
  inputs = read_inputs(workdir) if resumed else None
  for name, section, prefix in (("teacher", "teacher", ""), ("weak", "teacher", "weak_"), ("start", "start", "")):
    values = config.get(section, {})
    folder, step = prefix + "workdir", prefix + "step"
    if not values.get(folder):
      continue
    values[folder] = absolute_path(expanded(values[folder], f"config.{section}.{folder}"))
    known = inputs.models.get(name) if inputs else None
    if known and known.relative is not None and not is_run(values[folder]):
      beside = joined(workdir, known.relative)
      values[folder] = beside if is_run(beside) else values[folder]
    if values.get(step) is None:
      values[step] = load_config(workdir)[section][step] if resumed else newest_step(f"{values[folder]}/{CHECKPOINTS}")


def _with_tuples(value: Any) -> Any:
  """JSON's lists as tuples, which config flags can override."""
  if isinstance(value, dict):
    return {key: _with_tuples(inner) for key, inner in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def claim(workdir: str | os.PathLike, config: ConfigDict, inputs: Inputs | None = None, *, write: bool = True) -> None:
  """Writes the config into a workdir, and what the run is made from; checks both against a run to be resumed.

  A workdir without a checkpoint has nothing to resume, and takes any config. A run of old, which does not say what it
  was made from, takes any inputs, and says so from now on.

  Args:
    write: False only checks (all processes but the first).
  Raises: ValueError naming every key that differs and may not, or all that is not what the run was made from.
  """
  folder, new = epath.Path(workdir), as_plain(config)
  path = folder / CONFIG
  changeable: tuple[str, ...] = CHANGEABLE
  if config.get("optimizer", {}).get("schedule") == "cosine":
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
      changeable += tuple(paths_of_data(config.data))  # the data are the same, wherever they are
    old_flat, new_flat = flatten(as_plain(load_config(workdir))), flatten(new)
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
      partial = folder / f"{name}.partial"
      partial.write_text(text)
      partial.replace(folder / name)
