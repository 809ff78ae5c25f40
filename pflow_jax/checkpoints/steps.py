"""Steps of a folder of checkpoints: which are saved, which of them are intact, and the shapes of their leaves.

A damaged one is told by the checksums that are written with it, see `files.checksums`.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from pflow_jax.files.checksums import damage
from pflow_jax.files.folders import absolute, is_remote
from pflow_jax.mesh.distributed import agreed

logger = logging.getLogger(__name__)

STATE = "state"  # the folder, in a step's, of the arrays


def newest_step(directory: str | epath.PathLike) -> int | None:
  """Returns the step of the newest intact checkpoint, equal in all processes, or None without any.

  Raises:
    ValueError: all are damaged.
  """
  return newest_agreed(absolute(directory), None)[0]


def steps_of(directory: epath.Path) -> list[int]:
  """Returns the steps that are saved, in order; none of a folder that is not there."""
  return sorted(ocp.path.step.checkpoint_steps(directory)) if directory.exists() else []


def newest_intact(directory: epath.Path, step: int | None) -> tuple[int | None, dict[int, str]]:
  """Looks for the newest checkpoint whose files are as they were written.

  Args:
    directory: of the checkpoints.
    step: looks at this one alone; None at all.

  Returns:
    its step, None if none is saved; and the reasons why newer ones are damaged, by their steps.

  Raises:
    ValueError: there is no such step, or all that were looked at are damaged.
  """
  steps = steps_of(directory)
  if step is not None and step not in steps:
    raise ValueError(f"no checkpoint of step {step} in {directory}, there are {steps}")
  damaged: dict[int, str] = {}
  for candidate in reversed(steps) if step is None else [step]:
    reason = damage_of(directory / str(candidate))
    if reason is None:
      return candidate, damaged
    damaged[candidate] = reason
    logger.warning("skipping the damaged checkpoint %s: %s", directory / str(candidate), reason)
  if damaged:
    reasons = "; ".join(f"{s}: {reason}" for s, reason in damaged.items())
    raise ValueError(
      f"no intact checkpoint among those looked at in {directory} ({reasons}); bring one back, or remove the folder to "
      "start over"
    )
  return None, damaged


def damage_of(path: epath.Path) -> str | None:
  """Describes the damage of a saved step; None if it is intact, or in an object store, which checks its own."""
  return None if is_remote(path) else damage(pathlib.Path(path))


def newest_agreed(directory: epath.Path, step: int | None) -> tuple[int | None, dict[int, str]]:
  """Returns `newest_intact` of the first process, in all: folders on a network look alike only after a while."""

  def compute() -> list[Any]:
    found, damaged = newest_intact(directory, step)
    return [found, list(damaged.items())]

  found, damaged = agreed(compute)
  return found, dict(map(tuple, damaged))


def leaves_of(path: epath.Path) -> dict[str, Any]:
  """Returns shape and dtype of every leaf of a checkpoint, as nested dicts and lists; opens them, and reads none.

  Args:
    path: of one step.

  Raises:
    ValueError: a leaf cannot be opened.
    OSError: the storage may be at fault.
  """
  try:
    return ocp.PyTreeCheckpointHandler().metadata(path / STATE).tree
  except OSError:
    raise
  except Exception as error:
    kind = OSError if is_remote(path) else ValueError
    raise kind(f"the checkpoint {path} cannot be opened: {in_short(error)}") from error


@contextlib.contextmanager
def storage(path: epath.Path) -> Iterator[None]:
  """Raises OSError, within it, for a refusal of the storage, for which Orbax and tensorstore raise a ValueError."""
  try:
    yield
  except (OSError, RuntimeError, MemoryError):
    raise
  except Exception as error:  # a file that was changed by hand can raise any error
    raise OSError(f"{path} cannot be written or read: {in_short(error)}") from error


def in_short(error: BaseException) -> str:
  """Returns the message of an error of tensorstore without the array's specification and the lines of its source."""
  text = re.split(r" \[(?:tensorstore_spec|source locations)=|\n", str(error), maxsplit=1)[0]
  return text or type(error).__name__
