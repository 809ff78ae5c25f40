"""Keepers of a training's states, metrics and pictures: memory alone, or a workdir."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.checkpoints.steps import newest_step, steps_of
from pflow_jax.checkpoints.stream import open_parts
from pflow_jax.files.folders import absolute
from pflow_jax.files.lock import Lock, Unwritable
from pflow_jax.files.output import logged
from pflow_jax.mesh.distributed import agreed, is_first
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.inputs import Inputs
from pflow_jax.training.rescue import rescue
from pflow_jax.training.state import TrainState
from pflow_jax.training.weights_biases import check_installed
from pflow_jax.training.writer import MetricsWriter

logger = logging.getLogger(__name__)


class Keeper:
  """Keeps metrics in memory, and nothing else; a context that the training runs in."""

  name = "this run"
  is_resumed = False

  def __init__(self) -> None:
    self._rows: list[dict[str, float]] = []

  @property
  def history(self) -> dict[str, np.ndarray]:
    """The metrics so far by name, and "step": arrays with one entry an interval."""
    names = list(dict.fromkeys(name for row in self._rows for name in row))
    return {name: np.array([row.get(name, np.nan) for row in self._rows]) for name in names}

  def restore(self, shapes: TrainState) -> tuple[TrainState, int] | None:
    """Restores the state to go on from and its step; None where there is none."""
    del shapes
    return None

  def logging(self, start: int) -> contextlib.AbstractContextManager[Any]:
    """A context in which `metrics` and `picture` are called, from step `start` on."""
    del start
    return contextlib.nullcontext()

  def metrics(self, step: int, row: dict[str, float]) -> None:
    """Keeps the metrics of an interval that ends with `step`."""
    self._rows.append({"step": step, **row})

  def picture(self, step: int, draw: Callable[[str], str]) -> None:
    """Keeps a picture, which `draw` writes to the path that it is given; one that fails is warned of."""

  def save(self, step: int, state: TrainState) -> None:
    """Keeps a state."""

  def snapshot(self, step: int, profiles: Any) -> None:
    """Keeps the averages that others are made of."""

  def finish(self) -> None:
    """Waits until all is kept."""

  def stopped(self, step: int) -> str:
    """Message of a run that is told to stop."""
    return f"step {step} is the last"

  def lost(self, state: TrainState, error: Unwritable) -> Exception:
    """Error to raise when nothing more can be kept."""
    del state
    return error

  def reached_preemption(self, step: int) -> bool:
    """Returns whether the processes of this program have agreed to stop at `step`."""
    del step
    return False

  def __enter__(self) -> Keeper:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    pass


class WorkdirKeeper(Keeper):
  """Keeps config, inputs, checkpoints, metrics and pictures in a folder that it holds the lock of.

  Args:
    folder: the workdir.
    settings: of the run.
    inputs: of the run, its data and models.
    lock: of the folder, not yet held.
  """

  def __init__(self, folder: str | os.PathLike, settings: Settings, inputs: Inputs, lock: Lock):
    super().__init__()
    self.name = str(folder)
    self._settings, self._inputs, self._lock = settings, inputs, lock
    self._length = settings.need("train")
    check_installed(self._length.wandb)
    self._checkpointer = Checkpointer(
      f"{folder}/{workdir.CHECKPOINTS}",
      max_to_keep=self._length.keep_checkpoints,
      keep_period=self._length.keep_every or None,
    )
    self._averages = Checkpointer(f"{folder}/{workdir.AVERAGES}", max_to_keep=None)
    self._run = np.zeros(0, np.uint8)  # goes with its snapshots; drawn once the run holds the folder
    self._writer: MetricsWriter | None = None
    self._exits = contextlib.ExitStack()

  @property
  def is_resumed(self) -> bool:  # type: ignore[override]
    return newest_step(f"{self.name}/{workdir.CHECKPOINTS}") is not None

  def restore(self, shapes: TrainState) -> tuple[TrainState, int] | None:
    workdir.claim(self.name, self._settings, self._inputs, write=is_first())
    restored = self._checkpointer.restore(shapes)
    start = restored[1] if restored else 0
    with self._lock.writing():
      if later := self._averages.clear_after(start):
        fate = "set aside" if start == 0 else "removed"
        logger.warning("%s starts from step %d: its snapshots of averages at %s are %s", self.name, start, later, fate)
      self._run = np.frombuffer(bytes.fromhex(agreed(lambda: _run_of(f"{self.name}/{workdir.AVERAGES}"))), np.uint8)
    return restored

  @contextlib.contextmanager
  def logging(self, start: int):
    with MetricsWriter(
      self.name,
      tensorboard=self._length.tensorboard,
      wandb=self._length.wandb,
      config=self._settings.plain(),
      active=is_first(),
      resume_step=start,
      writing=self._lock.writing,
    ) as self._writer:
      yield

  def metrics(self, step: int, row: dict[str, float]) -> None:
    super().metrics(step, row)
    assert self._writer is not None
    self._writer.write(step, row)

  def picture(self, step: int, draw: Callable[[str], str]) -> None:
    assert self._writer is not None
    self._lock.check()
    try:
      path = draw(f"{self.name}/samples/{step:07d}.png")
    except Exception as error:  # of memory, a decoder, the disk; what stops a training too is met by its next save
      if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        raise  # the others may wait for what this process did not do
      reason = str(error).partition("\n")[0] or type(error).__name__
      logger.warning("no picture of samples at step %d, the training goes on: %s", step, reason)
      return
    with self._lock.writing():
      self._writer.image(step, "train/samples", path)

  def save(self, step: int, state: TrainState) -> None:
    with self._lock.writing():
      self._checkpointer.save(step, state)

  def snapshot(self, step: int, profiles: Any) -> None:
    dtype = self._settings.ema.snapshot_dtype
    trees, finite = _narrow({str(i): tree for i, tree in enumerate(profiles)}, dtype)
    flags = jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
    lost = [jax.tree_util.keystr(keys[1:], simple=True, separator="/") for keys, flag in flags if not flag]
    if lost:
      logger.warning(
        "the snapshot of step %d is of no use: config.ema.snapshot_dtype=%r cannot hold %s; a run with 'bfloat16' can",
        *(step, dtype, ", ".join(dict.fromkeys(lost))),
      )
    with self._lock.writing():
      self._averages.save(step, {**trees, workdir.RUN: self._run})

  def finish(self) -> None:
    with self._lock.writing():
      self._averages.wait()
      self._checkpointer.wait()
      if is_first() and self._checkpointer.latest_step() is None:
        raise OSError("the checkpoint that was saved last is gone")

  def stopped(self, step: int) -> str:
    return f"saved step {step}; the same command resumes"

  def lost(self, state: TrainState, error: Unwritable) -> Exception:
    return rescue(self.name, self._settings, self._inputs, state, error)

  def reached_preemption(self, step: int) -> bool:
    return self._checkpointer.reached_preemption(step)

  def __enter__(self) -> WorkdirKeeper:
    # The lock outlasts the last save.
    with contextlib.ExitStack() as stack:
      for one in (self._lock, logged(self.name), self._averages, self._checkpointer):
        stack.enter_context(one)
      self._exits = stack.pop_all()
    return self

  def __exit__(self, kind, error, trace):
    return self._exits.__exit__(kind, error, trace)


@functools.partial(jax.jit, static_argnames="dtype")
def _narrow(trees: Any, dtype: str) -> tuple[Any, Any]:
  """Returns the trees in another dtype, and whether each leaf is finite in it."""
  narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), trees)
  return narrow, jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), narrow)


def _run_of(place: str) -> str:
  """Returns the name, in hexadecimal digits, of the run whose snapshots are in a folder; a new one if none is."""
  folder = absolute(place)
  for step in reversed(steps_of(folder)):
    with contextlib.suppress(ValueError, OSError):  # a damaged one; those before it are of the same run
      return workdir.run_of(open_parts(folder / str(step)))
  return uuid.uuid4().hex
