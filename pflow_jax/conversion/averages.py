"""`pflow ema`: a run with an average of its parameters that is made of snapshots, after the training."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from pflow_jax.checkpoints.steps import damage_of, steps_of
from pflow_jax.checkpoints.stream import Index, Stored, open_parts, save_leaves
from pflow_jax.core.averages import reconstruction
from pflow_jax.files.folders import absolute, checked_folder, expanded
from pflow_jax.files.lock import Lock
from pflow_jax.training import workdir
from pflow_jax.training.inputs import locate, read_inputs

logger = logging.getLogger(__name__)

Snapshot = Mapping[str, Mapping[str, Stored]]
"""Leaves by their paths, by the number of the profile."""


@dataclasses.dataclass(frozen=True)
class _Sum:
  """A leaf that is a sum of others with factors; a `checkpoints.stream.Leaf`.

  Attributes:
    name: path of the leaf.
    parts: the others.
    factors: (N,).
  """

  name: str
  parts: Sequence[Stored]
  factors: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of all parts."""
    return self.parts[0].shape

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the sum, whatever that of the parts is."""
    return np.dtype(np.float32)

  @property
  def stacked(self) -> bool:
    """Returns whether it is made in pieces along its first axis."""
    return len(self.shape) > 2

  def layer(self, index: int | None) -> np.ndarray:
    """Makes a piece."""
    rest = [slice(0, size) for size in self.shape]
    if index is None:
      return self.read(tuple(rest))
    return self.read((slice(index, index + 1), *rest[1:]))[0]

  def read(self, index: Index) -> np.ndarray:
    """Makes a part. The factors alternate in sign: it is summed in float64.

    Raises:
      ValueError: a number is not finite.
    """
    total: np.ndarray | float = 0.0
    for part, factor in zip(self.parts, self.factors, strict=True):
      values = np.asarray(part.read(index), np.float64)
      if not np.all(np.isfinite(values)):
        raise ValueError(
          f"{part.folder.parent}: expected finite numbers, {self.name} has others; move this snapshot out of its "
          f"folder, and train with config.ema.snapshot_dtype='bfloat16' if it is of {part.dtype.name} and overflowed"
        )
      total = total + factor * values
    return np.asarray(total, np.float32)


def average(folder: str | os.PathLike, out: str | os.PathLike, *, sigma_rel: float, step: int | None = None) -> int:
  """Writes the run in `folder` to the new workdir `out` with another average of its parameters.

  The new run is sampled, evaluated, exported and taken as a teacher like any other; the optimizer's state and an
  adversary stay behind, so that it does not train on.

  Args:
    folder: workdir of a run that was trained with profiles, see `settings.optimizer.EmaSettings`.
    out: the new workdir.
    sigma_rel: width of the average, a share of the run.
    step: at which it ends, one of the snapshots'; None is the last.

  Returns:
    The step.

  Raises:
    ValueError: there are no snapshots, or no intact one of the step; they are of several runs, or not finite; the width
      cannot be; `out` holds a run.

  References:
    EDM2, arXiv:2312.02696, Sec. 3.
  """
  folder, out = expanded(folder), checked_folder(out, "out")
  settings = workdir.load_settings(folder)
  widths, place = settings.ema.profiles, f"{folder}/{workdir.AVERAGES}"
  steps = steps_of(absolute(place)) if widths else []
  if not steps:
    raise ValueError(
      f"{folder}: expected snapshots of averages, which a run with config.ema.profiles=(0.05, 0.10) and "
      "config.ema.snapshot_every leaves; this one has none"
    )
  if step is not None and step not in steps:
    raise ValueError(f"step: expected that of a snapshot, one of {steps}, got {step}")
  if workdir.has_checkpoint(out) or (epath.Path(out) / workdir.CONFIG).exists():
    raise ValueError(f"{out} holds a run already; give another --out")
  snapshots = _intact(absolute(place), [one for one in steps if step is None or one <= step], step)
  last = max(snapshots)
  if len({workdir.run_of(snapshot) for snapshot in snapshots.values()}) > 1:
    others = [one for one in snapshots if workdir.run_of(snapshots[one]) != workdir.run_of(snapshots[last])]
    raise ValueError(
      f"{place}: expected snapshots of one run, those of steps {others} are of another than that of step {last}; move "
      "those of either out of the folder"
    )
  taken = [(one, i) for one in snapshots for i in range(len(widths))]
  factors = reconstruction(
    np.array([widths[i] for _, i in taken]), np.array([one for one, _ in taken]), sigma_rel, last
  )
  opened = [snapshots[one].get(str(i), {}) for one, i in taken]
  if not opened[0] or any(one.keys() != opened[0].keys() for one in opened):
    raise ValueError(f"{place}: its snapshots are of different networks; they are not of one run")
  leaves = {tuple(path.split("/")): _Sum(path, [one[path] for one in opened], factors) for path in opened[0]}
  tree = unflatten_dict(leaves)
  inputs = read_inputs(folder)
  found: dict[str, str] = {}
  for name, key in (("teacher", "workdir"), ("weak", "weak_workdir")):
    given = settings.teacher and getattr(settings.teacher, key)
    if inputs is not None and given:
      with contextlib.suppress(ValueError):  # gone; who needs it will say so
        found[name] = locate(name, given, folder, inputs)
        settings = settings.changed("teacher", **{key: found[name]})
  with Lock(out, "pflow ema"):
    save_leaves(f"{out}/{workdir.CHECKPOINTS}", {"params": tree, "ema": tree}, step=last)
    workdir.claim(out, settings, None if inputs is None else inputs.moved(found))
  return last


def _intact(place: epath.Path, steps: Sequence[int], needed: int | None) -> dict[int, Snapshot]:
  """Opens the snapshots of these steps; a damaged one is left out and warned of, since any few make up an average.

  Raises:
    ValueError: all are damaged, or that of the step `needed` is.
  """
  snapshots: dict[int, Snapshot] = {}
  for step in steps:
    reason = damage_of(place / str(step))
    if reason is None:
      try:
        snapshots[step] = open_parts(place / str(step))
        continue
      except ValueError as error:
        reason = str(error)
    logger.warning("leaving out the damaged snapshot %s: %s", place / str(step), reason)
  if not snapshots or needed not in (None, *snapshots):
    way = f"ask for the step of one of {list(snapshots)}, or bring it" if snapshots else "bring one"
    at = f"that of step {max(steps)}" if needed is not None else "all of them"
    raise ValueError(f"{place}: expected intact snapshots, {at} is damaged; {way} back from a copy")
  return snapshots
