"""`pflow train`: one loop for every objective."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax import Array
from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.checkpoints.checkpoint import Checkpointer, newest_step
from pflow_jax.evaluation.evaluate import EvaluateSettings
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.lock import Lock, Unwritable
from pflow_jax.files.output import logged
from pflow_jax.mesh.distributed import is_first
from pflow_jax.settings.sections import call, check_sections
from pflow_jax.training import sample, workdir
from pflow_jax.training.experiment import SECTIONS, build
from pflow_jax.training.flops import count_flops
from pflow_jax.training.origins import inputs_of
from pflow_jax.training.rescue import rescue
from pflow_jax.training.state import TrainState
from pflow_jax.training.step import TrainSettings, make_program
from pflow_jax.training.writer import MetricsWriter, Progress, parameter_table, progress

logger = logging.getLogger(__name__)


def train(config: ConfigDict, folder: str | os.PathLike, *, force: bool = False) -> TrainState:
  """Trains what `config` describes in the workdir `folder`; resumes a run that is already there.

  Args:
    force: take a workdir over in which another process trains.
  Returns: the final state, or the one saved when SIGTERM, SIGHUP or Ctrl-C came.
  Raises: ValueError for a config or a folder that does not fit; FloatingPointError when updates stay non-finite;
    OSError when the folder takes nothing more, Rescued if the state is saved elsewhere, as its message tells; TakenOver
    when another has taken the folder; Busy when another holds it that may have ended by the next try.
  """
  folder = checked_folder(folder)
  check_sections(config, SECTIONS, required=("data", "model", "policy", "objective"))
  settings = call(TrainSettings, "train", config.get("train", {}))
  lock = Lock(folder, "pflow train", force=force, hint="--force takes it over", active=is_first())
  lock.refuse_early()
  workdir.pin(folder, config)
  experiment = build(config)
  _ = experiment.dataset.num_records  # opens the data: what cannot be read is better said before any work
  # Later commands read these from the run's config: better refused now than after the training.
  call(sample.SampleSettings, "sample", config.get("sample", {}))
  call(EvaluateSettings, "evaluate", config.get("evaluate", {}))
  inputs = inputs_of(config, experiment.dataset, experiment.saved, folder)
  workdir.claim(folder, config, inputs, write=False)
  program = make_program(config, experiment)
  layout = program.layout
  print(f"process {jax.process_index()} of {jax.process_count()}: a mesh of {layout.described()}", flush=True)
  sampler = sample.preview(experiment, config, layout) if settings.sample_every else None
  key_init, key_steps = (layout.everywhere(key) for key in jax.random.split(jax.random.key(config.get("seed", 0))))
  frozen = experiment.load_frozen(layout)
  # A run that is resumed has its own.
  start_params = () if newest_step(f"{folder}/{workdir.CHECKPOINTS}") is not None else experiment.start_params()
  if is_first():
    print("compiling the train step", flush=True)
  # Ahead of time: a later batch of another shape is an error, not a second compilation.
  traced = {length: program.trace(length) for length in experiment.dataset.lengths or (None,)}
  compiled = {length: one.lower().compile() for length, one in traced.items()}
  flops = {length: count_flops(one.jaxpr) for length, one in traced.items()}
  checkpointer = Checkpointer(
    f"{folder}/{workdir.CHECKPOINTS}",
    max_to_keep=settings.keep_checkpoints,
    keep_period=settings.keep_every or None,
  )
  # Only now: a config that does not compile leaves no trace. The lock outlasts the last save.
  with Interruption(checkpointer) as interruption, lock, logged(folder), checkpointer:
    workdir.claim(folder, config, inputs, write=is_first())
    restored = checkpointer.restore(program.state)
    state, start = restored or (program.init(key_init, frozen, layout.place(start_params)), 0)
    if is_first():
      print(f"resuming {folder} from step {start}" if restored else parameter_table(state.params))
    if start >= settings.steps:
      if is_first():
        print(f"{folder}: already trained for {start} of {settings.steps} steps")
      return state
    iterator = data.batches(
      experiment.dataset,
      settings.batch_size,
      seed=config.get("seed", 0),
      start=start,
      rows=layout.local_rows(settings.batch_size),
      num_workers=settings.num_workers,
    )
    try:
      with (
        MetricsWriter(
          folder,
          tensorboard=settings.tensorboard,
          active=is_first(),
          resume_step=start,
          writing=lock.writing,
        ) as writer,
        progress(settings.steps, start, str(config.objective.kind), not is_first()) as report,
        Profiler(settings.profile, f"{folder}/profile") as profiler,
      ):
        meter = Meter(settings, writer, report)
        for step in range(start + 1, settings.steps + 1):
          # Nothing comes back from the devices but what `meter` fetches, which is an interval old. (On a CPU, which has
          # nothing to fetch from, the guard is silent.)
          with jax.transfer_guard_device_to_host("disallow"):
            profiler.before(step)
            batch = layout.shard_batch(next(iterator), settings.batch_size)
            length = data.text_length(batch["cond"])
            with jax.transfer_guard("disallow"):
              state, metrics = compiled[length](state, frozen, batch, key_steps)
            profiler.after(step, metrics)
            meter.flush()  # the numbers of the steps before, while this one runs
            meter.add(step, metrics, flops[length])
            stop = interruption.requested(step)
          if stop or step == settings.steps or _due(step, settings.checkpoint_every):
            with meter.paused(), lock.writing():
              checkpointer.save(step, state)
          if sampler and _due(step, settings.sample_every):
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
      raise rescue(folder, config, inputs, state, error) from error
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
