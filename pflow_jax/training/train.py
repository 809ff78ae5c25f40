"""`pflow train`: one loop for every objective."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import Array

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import Checkpointer, newest_step
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.lock import Lock, Unwritable
from pflow_jax.files.output import logged
from pflow_jax.mesh.distributed import is_first
from pflow_jax.settings.train import TrainSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.flops import count_flops
from pflow_jax.training.origins import inputs_of
from pflow_jax.training.rescue import rescue
from pflow_jax.training.sample import preview
from pflow_jax.training.state import TrainState
from pflow_jax.training.step import make_program
from pflow_jax.training.writer import MetricsWriter, Progress, parameter_table, progress

logger = logging.getLogger(__name__)


Picture = tuple[Callable[..., None], Callable[[data.Dataset], int]]
"""Draws samples, see `sample.preview`, and says how many there are to be of a data set."""


def train(
  config: Settings | Mapping[str, Any],
  folder: str | os.PathLike,
  *,
  force: bool = False,
  picture: Picture | None = None,
) -> TrainState:
  """Trains what `config` describes in the workdir `folder`; resumes a run that is already there.

  Args:
    config: of the run.
    folder: its workdir.
    force: take a workdir over in which another process trains.
    picture: what draws the samples of config.train.sample_every.

  Returns:
    The final state, or the one saved when SIGTERM, SIGHUP or Ctrl-C came.

  Raises:
    ValueError: the config or the folder does not fit.
    FloatingPointError: updates stay non-finite.
    OSError: the folder takes nothing more; Rescued if the state is saved elsewhere, as its message tells.
    TakenOver: another has taken the folder.
    Busy: another holds it that may have ended by the next try.
  """
  folder, settings = checked_folder(folder), Settings.of(config)
  length = settings.need("train")
  _ = settings.need("optimizer")
  lock = Lock(folder, "pflow train", force=force, hint="--force takes it over", active=is_first())
  lock.refuse_early()
  settings = workdir.pinned(folder, settings)
  experiment = build(settings)
  _ = experiment.dataset.num_records  # opens the data: what cannot be read is better said before any work
  inputs = inputs_of(settings, experiment.dataset, experiment.saved, folder)
  workdir.claim(folder, settings, inputs, write=False)
  program = make_program(experiment)
  layout = program.layout
  print(f"process {jax.process_index()} of {jax.process_count()}: a mesh of {layout.described()}", flush=True)
  sampler = None
  if length.sample_every and picture is not None:
    sampler = preview(experiment, layout, picture[0], picture[1](experiment.dataset))
  key_init, key_steps = (layout.everywhere(key) for key in jax.random.split(jax.random.key(settings.seed)))
  frozen = experiment.load_frozen(layout)
  # A run that is resumed has its own.
  start_params = () if newest_step(f"{folder}/{workdir.CHECKPOINTS}") is not None else experiment.start_params()
  if is_first():
    print("compiling the train step", flush=True)
  # Ahead of time: a later batch of another shape is an error, not a second compilation.
  traced = {tokens: program.trace(tokens) for tokens in experiment.dataset.lengths or (None,)}
  compiled = {tokens: one.lower().compile() for tokens, one in traced.items()}
  flops = {tokens: count_flops(one.jaxpr) for tokens, one in traced.items()}
  checkpointer = Checkpointer(
    f"{folder}/{workdir.CHECKPOINTS}",
    max_to_keep=length.keep_checkpoints,
    keep_period=length.keep_every or None,
  )
  # Only now: a config that does not compile leaves no trace. The lock outlasts the last save.
  with Interruption(checkpointer) as interruption, lock, logged(folder), checkpointer:
    workdir.claim(folder, settings, inputs, write=is_first())
    restored = checkpointer.restore(program.state)
    state, start = restored or (program.init(key_init, frozen, layout.place(start_params)), 0)
    if is_first():
      print(f"resuming {folder} from step {start}" if restored else parameter_table(state.params))
    if start >= length.steps:
      if is_first():
        print(f"{folder}: already trained for {start} of {length.steps} steps")
      return state
    iterator = data.batches(
      experiment.dataset,
      length.batch_size,
      seed=settings.seed,
      start=start,
      rows=layout.local_rows(length.batch_size),
      num_workers=length.num_workers,
    )
    try:
      with (
        MetricsWriter(
          folder,
          tensorboard=length.tensorboard,
          active=is_first(),
          resume_step=start,
          writing=lock.writing,
        ) as writer,
        progress(length.steps, start, settings.kind, not is_first()) as report,
        Profiler(length.profile, f"{folder}/profile") as profiler,
      ):
        meter = Meter(length, writer, report)
        for step in range(start + 1, length.steps + 1):
          # Nothing comes back from the devices but what `meter` fetches, which is an interval old. (On a CPU, which has
          # nothing to fetch from, the guard is silent.)
          with jax.transfer_guard_device_to_host("disallow"):
            profiler.before(step)
            batch = layout.shard_batch(next(iterator), length.batch_size)
            tokens = data.text_length(batch["cond"])
            with jax.transfer_guard("disallow"):
              state, metrics = compiled[tokens](state, frozen, batch, key_steps)
            profiler.after(step, metrics)
            meter.flush()  # the numbers of the steps before, while this one runs
            meter.add(step, metrics, flops[tokens])
            stop = interruption.requested(step)
          if stop or step == length.steps or _due(step, length.checkpoint_every):
            with meter.paused(), lock.writing():
              checkpointer.save(step, state)
          if sampler and _due(step, length.sample_every):
            with meter.paused(), lock.writing():
              full = experiment.complete(state.ema, frozen)
              writer.image(step, "samples", sampler(full, f"{folder}/samples/{step:07d}.png"))
          if stop:
            logger.warning("told to stop: saved step %d; the same command resumes", step)
            break
        meter.flush(final=True)
        with lock.writing():
          checkpointer.wait()
          if is_first() and checkpointer.latest_step() is None:
            raise OSError("the checkpoint that was saved last is gone")
    except Unwritable as error:
      raise rescue(folder, settings, inputs, state, error) from error
  return state


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


class Meter:
  """Collects the metrics of every step on the device and reports their means, one interval late.

  A row's rates, `images_per_second` and `tflops_per_second`, are of the time in which steps ran: all that passed since
  the row before but the pauses, `pause_seconds`, in which was saved or sampled. So the images of a row divided by their
  rate, plus its pause, are seconds on the clock, and those of all rows the time since the first step.
  """

  def __init__(self, settings: TrainSettings, writer: MetricsWriter, report: Progress):
    self._settings, self._writer, self._report = settings, writer, report
    self._flops = 0
    self._pending: list[dict[str, Array]] = []
    self._step, self._due = 0, False
    self._clock, self._pause = time.perf_counter(), 0.0

  def add(self, step: int, metrics: dict[str, Array], flops: int) -> None:
    """Takes a step's metrics without waiting for them, and its operations."""
    self._pending.append(metrics)
    self._flops += flops
    self._step = step
    self._due = _due(step, self._settings.log_every)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves what is done meanwhile out of the rates; the steps on their way are waited for before."""
    jax.block_until_ready(self._pending)
    start = time.perf_counter()
    yield
    self._pause += time.perf_counter() - start

  def flush(self, final: bool = False) -> None:
    """Writes the interval that is complete, if one is; `final` writes what there is.

    Raises: FloatingPointError after max_skipped non-finite updates in a row.
    """
    if not self._pending or not (self._due or final):
      return
    count, values = len(self._pending), jax.device_get(self._pending)
    now = time.perf_counter()
    elapsed, self._clock = now - self._clock - self._pause, now
    pause, self._pause = self._pause, 0.0
    flops, self._flops = self._flops, 0
    self._pending, self._due = [], False
    # A skipped step has no loss to speak of; its absence shows in `skipped`.
    finite = [v for v in values if not v["skipped_in_a_row"]] or values
    row = {name: sum(float(v[name]) for v in finite) / len(finite) for name in finite[0]}
    row["skipped"] = int(values[-1]["skipped"])
    row["skipped_in_a_row"] = max(int(v["skipped_in_a_row"]) for v in values)
    row["learning_rate"] = float(values[-1]["learning_rate"])
    row["images_per_second"] = count * self._settings.batch_size / elapsed
    row["tflops_per_second"] = flops / elapsed / 1e12
    row["pause_seconds"] = pause
    self._writer.write(self._step, row)
    self._report.update(self._step, row["loss"])
    if row["skipped_in_a_row"] >= self._settings.max_skipped:
      raise FloatingPointError(
        f"by step {self._step}, {row['skipped_in_a_row']} updates in a row were not finite and were skipped; the "
        "newest checkpoint is from before. Lower optimizer.learning_rate, or look at the data."
      )


class Profiler:
  """Traces the steps first to last of `window`, wherever a run is resumed; (0, 0) is none."""

  def __init__(self, window: tuple[int, int], folder: str):
    self._window, self._folder, self._active = window, folder, False

  def before(self, step: int) -> None:
    first, last = self._window
    if 0 < first <= step <= last and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, metrics: dict[str, Array]) -> None:
    if self._active and step >= self._window[1]:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self) -> None:
    if self._active:
      jax.profiler.stop_trace()
    self._active = False

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    try:
      self._stop()
    except Exception:
      if kind is None:  # else what is on its way came first
        raise


class Interruption:
  """Turns SIGTERM, SIGHUP and Ctrl-C into a request to stop at a step boundary, the same one in every process.

  A SIGHUP that is ignored, as by nohup, stays ignored.
  """

  def __init__(self, checkpointer: Checkpointer):
    self._checkpointer = checkpointer
    self._flag = threading.Event()
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Interruption:
    # A program that has joined, be it of one process, leaves SIGTERM to JAX's own service, which agrees on the step.
    numbers = [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      numbers.append(signal.SIGHUP)
    if threading.current_thread() is threading.main_thread():
      for number in numbers:
        self._previous[number] = signal.signal(number, self._note)
    return self

  def _note(self, number: int, frame: Any) -> None:
    if number == signal.SIGINT and self._flag.is_set():
      raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
    self._flag.set()
    if jax.distributed.is_initialized():
      os.kill(os.getpid(), signal.SIGTERM)

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """Whether to save `step` and stop."""
    if jax.distributed.is_initialized():
      return self._checkpointer.reached_preemption(step)
    return self._flag.is_set()
