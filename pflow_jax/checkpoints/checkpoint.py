"""Checkpoints of the training state.

Layout: <directory>/<step>/{state, checksums.json}; the position in the data follows from the step. Orbax writes a step
into a temporary folder in the background and renames it when it is complete, so a killed process leaves the old or the
new checkpoint. Before the rename the files are opened as a restore would open them. Orbax does not check array data
(every flipped bit that was tried came back as a wrong number), so the rename carries a checksum of each file with it,
and restoring verifies them.
"""

from __future__ import annotations

import json
import logging
import pathlib
import re
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from pflow_jax.checkpoints.steps import STATE, in_short, leaves_of, newest_agreed, newest_intact, steps_of, storage
from pflow_jax.files.checksums import CHECKSUMS, checksums
from pflow_jax.files.folders import absolute, is_remote
from pflow_jax.mesh.distributed import agreed, is_first
from pflow_jax.mesh.sharding import Layout
from pflow_jax.networks.layers import CONSTANTS

PyTree = Any

logger = logging.getLogger(__name__)

UNFINISHED = ocp.path.step.TMP_DIR_SUFFIX  # ends the name of a step's folder while it is written
# An array that several devices hold is written in parts, one from each, where a part has at least so many bytes. Orbax
# cuts on the devices, one call a part, while the training waits. Of 256 devices, those of a kernel of 1 MiB still cut.
_MIN_SLICE = 1 << 12
_CENTURY = 100 * 365 * 86400  # seconds: Orbax takes them by a clock that may be set while it saves


def handlers_of(*leaves: tuple[type, ocp.type_handlers.TypeHandler]) -> ocp.CheckpointHandlerRegistry:
  """Returns the handlers of a checkpoint's parts, for a state of leaves of these types with these handlers."""
  registry = ocp.type_handlers.create_type_handler_registry(*leaves)
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  handlers.add(STATE, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
  return handlers


class Checkpointer:
  """Saves in the background, restores the newest checkpoint that is intact.

  Making one, or only restoring, writes nothing to disk. As a context manager, or with `close`, it completes the last
  save before the program ends.

  Args:
    directory: made at the first save; an object store's address (gs://...) works too, without checksums, because such
      stores keep their own.
    max_to_keep: newest checkpoints to keep; None keeps all.
    keep_period: also keep every step that is a multiple of this.
  """

  def __init__(
    self,
    directory: str | epath.PathLike,
    *,
    max_to_keep: int | None = 2,
    keep_period: int | None = None,
  ):
    if max_to_keep is not None and max_to_keep < 1:
      raise ValueError(f"max_to_keep must be >= 1, or None for all, got {max_to_keep}")
    self._directory = absolute(directory)
    self._max_to_keep = max_to_keep
    self._keep_period = keep_period
    self._handlers = handlers_of(
      (np.ndarray, ocp.type_handlers.NumpyHandler()),
      (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE)),
    )
    self._manager: ocp.CheckpointManager | None = None
    self._writing: int | None = None
    self._shapes: PyTree = None  # of the state that is being saved
    self._damaged: dict[int, str] = {}

  def save(self, step: int, state: PyTree, *, force: bool = False) -> bool:
    """Starts saving; blocks for the previous save and the copy to the host only.

    A step that is already saved is left as it is. Newer checkpoints that `restore` found damaged are first renamed to
    <step>.damaged, out of the way of the steps to come.

    Args:
      step: of the checkpoint.
      state: pytree of arrays; may be donated to the next training step right after.
      force: also save a step older than the newest checkpoint.

    Returns:
      whether a save was started.

    Raises:
      ValueError: for such an older step without `force`; the previous save has failed.
    """
    with storage(self._directory):
      manager = self._open()
      manager.wait_until_finished()  # `_writing` is its step; a failure shows now
    if step in manager.all_steps():
      return False
    newest = manager.latest_step()
    if newest is not None and step < newest and not force:
      raise ValueError(
        f"step {step} is older than the newest checkpoint, {newest}, in {self._directory}: remove "
        "the newer ones to go back, train in another folder, or pass force=True"
      )
    self._writing, self._shapes = step, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    items = {STATE: ocp.args.PyTreeSave(state)}
    with storage(self._directory):
      return manager.save(step, args=ocp.args.Composite(**items), force=force)

  def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, int] | None:
    """The newest intact checkpoint, or that of `step`; None where nothing has been saved.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct or arrays; its shardings place the arrays, else the first device.

    Returns:
      (state, step).

    Raises:
      ValueError: leaves differ in name, shape or dtype, all named; there is no such step, or none that is intact.
    """
    self.wait()
    found, damaged = newest_agreed(self._directory, step)
    self._damaged.update(damaged)
    if found is None:
      return None
    path = self._directory / str(found)
    target = jax.tree.map(_abstract, abstract_state)
    _check_leaves(target, leaves_of(path), path)
    with storage(path), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      state = reader.restore(path / STATE, args=ocp.args.StandardRestore(target))
    return state, found

  def clear_after(self, step: int) -> list[int]:
    """Makes room for a run that goes on from `step`, before its first save: later checkpoints are not of it.

    They are removed, since the run makes them again. From step 0 another run begins, and they may be all that is left
    of one: they are renamed to <step>.earlier, but in an object store, which cannot rename.

    Args:
      step: which the run has reached.

    Returns:
      the steps of those checkpoints, equal in all processes.
    """

    def compute() -> list[int]:
      later = [one for one in steps_of(self._directory) if one > step]
      for one in later:
        if step > 0 or is_remote(self._directory):
          (self._directory / str(one)).rmtree()
        else:
          self._rename(one, "earlier")
      return later

    with storage(self._directory):
      return agreed(compute)

  def all_steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending, less those found damaged."""
    self.wait()
    return [step for step in steps_of(self._directory) if step not in self._damaged]

  def latest_step(self) -> int | None:
    """The last of `all_steps`, None if there is none."""
    return max(self.all_steps(), default=None)

  def reached_preemption(self, step: int) -> bool:
    """Returns whether the job is told to stop; True in every process at the same step."""
    return ocp.multihost.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until the save in progress is complete, and raises its error if it has failed."""
    if self._manager is not None:
      with storage(self._directory):
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    if self._manager is not None:
      with storage(self._directory):
        self._manager.close()
      self._manager = None

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      self.close()
    except Exception as later:
      if error is None:
        raise
      logger.warning("the last save has failed as well: %s", in_short(later))  # the first error is already raised

  def _open(self) -> ocp.CheckpointManager:
    """Returns the manager; made at the first save, because it makes and tidies the folder."""
    if self._damaged:
      self._set_aside()
    if self._manager is None:
      keep = [ocp.checkpoint_managers.LatestN(self._max_to_keep)]
      if self._keep_period is not None:
        keep.append(ocp.checkpoint_managers.EveryNSteps(self._keep_period))
      options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # reading every step's metadata fails on a damaged one
        async_options=ocp.AsyncOptions(
          timeout_secs=_CENTURY,
          create_directories_asynchronously=False,  # else it waits for them, by that clock, for minutes
          post_finalization_callback=self._finish,
        ),
      )
      self._manager = ocp.CheckpointManager(self._directory, options=options, handler_registry=self._handlers)
    return self._manager

  def _finish(self) -> None:
    """Checks the files; Orbax calls it in the background, when all is written and before the rename."""
    path = self._written()
    try:
      _check_leaves(self._shapes, leaves_of(path), path)
    except ValueError as error:
      raise OSError(f"what was saved cannot be read back: {error}") from error
    if not is_remote(path):
      self._write_checksums()

  def _write_checksums(self) -> None:
    path = pathlib.Path(self._written())
    (path / CHECKSUMS).write_text(json.dumps(checksums(path), indent=1))

  def _written(self) -> epath.Path:
    """The folder of the save in progress."""
    final = self._directory / str(self._writing)
    temporary = self._directory / (final.name + UNFINISHED)
    return temporary if temporary.exists() else final

  def _set_aside(self) -> None:
    if is_first():
      for step in self._damaged:
        self._rename(step, "damaged")
    multihost_utils.sync_global_devices("pflow_jax.checkpoints.checkpoint: damaged set aside")
    self._damaged.clear()
    if self._manager is not None:
      self._manager.reload()

  def _rename(self, step: int, why: str) -> None:
    aside = self._directory / f"{step}.{why}"
    while aside.exists():
      aside = aside.with_name(aside.name + "+")
    (self._directory / str(step)).rename(aside)


def load_params(
  directory: str | epath.PathLike,
  *,
  which: Literal["ema", "params"] = "ema",
  step: int | None = None,
  layout: Layout | None = None,
  dtype: Any = None,
) -> PyTree:
  """Loads the parameters (or their average) of a checkpoint alone; the model need not be known.

  Args:
    directory: the folder given to Checkpointer.
    which: "ema" or "params".
    step: None for the newest intact checkpoint.
    layout: places them on the devices, each of which is given its part alone; None loads them to the host.
    dtype: of floating leaves; None is as saved.

  Returns:
    nested dict of NumPy arrays, or with a `layout` of global arrays.

  Raises:
    ValueError: there is no checkpoint, step or part of this name, or none that is intact; the layout does not fit.
  """
  path, item = saved_part(directory, which, step)
  as_saved = {which: _as_dtype(item[which], dtype)}
  if layout is None:
    args = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), as_saved)
  else:
    place = lambda leaf, sharding: ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype)
    args = jax.tree.map(place, as_saved, layout.shardings(as_saved))
  with storage(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    restored = reader.restore(
      path / STATE,
      args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
    )
  return restored[which]


def params_shapes(
  directory: str | epath.PathLike,
  *,
  which: Literal["ema", "params"] = "ema",
  step: int | None = None,
  dtype: Any = None,
) -> PyTree:
  """Shapes and dtypes of the arrays of `load_params`; errors as there."""
  item = saved_part(directory, which, step)[1][which]
  return _as_dtype(item, dtype)


def saved_part(directory: str | epath.PathLike, which: str, step: int | None) -> tuple[epath.Path, dict[str, Any]]:
  """Folder of a checkpoint, and {which: description of its leaves}; errors as of `load_params`."""
  directory = absolute(directory)
  found, _ = newest_intact(directory, step)
  if found is None:
    raise ValueError(
      f"no checkpoint in {directory}: expected folders named by their step; train first, or give "
      "the checkpoints folder of a run"
    )
  path = directory / str(found)
  saved = leaves_of(path)
  if which not in saved:
    raise ValueError(f"{path}: which must be one of {sorted(saved)}, got {which!r}")
  return path, {which: saved[which]}


def _as_dtype(tree: PyTree, wanted: Any) -> PyTree:
  """Shapes of a tree whose floating leaves get another dtype; the constants of a network keep theirs."""

  def one(keys: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    kept = wanted is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or re.fullmatch(CONSTANTS, path)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else jnp.dtype(wanted))

  return jax.tree_util.tree_map_with_path(one, tree)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(target: PyTree, saved: PyTree, path: epath.Path) -> None:
  """Raises ValueError that names the leaves that differ; Orbax would cast them silently."""

  def describe(tree):
    return {
      jax.tree_util.keystr(keys, simple=True, separator="/"): f"{np.dtype(x.dtype)}{list(x.shape)}"
      for keys, x in jax.tree_util.tree_leaves_with_path(tree)
    }

  expected, got = describe(target), describe(saved)
  differing = [
    f"\n  {name}: expected {expected.get(name, 'no such leaf')}, got {got.get(name, 'none')}"
    for name in sorted(expected | got)
    if expected.get(name) != got.get(name)
  ]
  if differing:
    raise ValueError(
      f"the checkpoint {path} does not fit the state of this run, {len(differing)} leaves differ:"
      f"{''.join(differing)}\nuse the model and optimizer settings it was saved with, or another folder"
    )
