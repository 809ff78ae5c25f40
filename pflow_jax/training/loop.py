"""The loop of a training: its steps, their metrics, and requests to stop."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array

from pflow_jax import data
from pflow_jax.files.lock import Unwritable
from pflow_jax.files.progress import Progress, progress
from pflow_jax.mesh.distributed import is_first
from pflow_jax.settings.train import TrainSettings
from pflow_jax.training.flops import count_flops
from pflow_jax.training.keeping import Keeper
from pflow_jax.training.noise_levels import SUMS, means_by_time
from pflow_jax.training.state import TrainState
from pflow_jax.training.step import Program
from pflow_jax.training.usage import Usage

logger = logging.getLogger(__name__)


def fit(
  program: Program,
  keeper: Keeper,
  frozen: Any,
  start_params: Callable[[], Any],
  draw: Callable[[Any, str], str] | None = None,
  *,
  draw_every: int = 0,
  bar: bool = True,
) -> TrainState:
  """Trains from where the keeper stands to the end, or until told to stop.

  Args:
    program: the step, on its mesh.
    keeper: keeps states and metrics.
    frozen: the teacher's parameters, on the devices.
    start_params: returns the parameters to start from, () for the method's own; a resumed run does not call it.
    draw: draws a picture of samples, (all parameters, path) -> path; None draws none.
    draw_every: steps between two pictures, 0 for none.
    bar: whether to report progress.

  Returns:
    The last state.

  Raises:
    FloatingPointError: updates stay non-finite.
    Exception: the keeper's, for a place that takes nothing more.
  """
  settings = program.experiment.settings
  with progress(settings.need("train").steps, 0, settings.kind, not (bar and is_first())) as report:
    return _fit(program, keeper, frozen, start_params, draw if draw_every else None, draw_every, report)


def _fit(
  program: Program,
  keeper: Keeper,
  frozen: Any,
  start_params: Callable[[], Any],
  draw: Callable[[Any, str], str] | None,
  draw_every: int,
  report: Progress,
) -> TrainState:
  experiment, layout = program.experiment, program.layout
  settings, length = experiment.settings, experiment.settings.need("train")
  key_init, key_steps = (layout.everywhere(key) for key in jax.random.split(jax.random.key(settings.seed)))
  start_values = () if keeper.is_resumed else start_params()
  report.say("compiling the train step")
  # Ahead of time: a later batch of another shape is an error, not a second compilation.
  traced = {tokens: program.trace(tokens) for tokens in experiment.dataset.lengths or (None,)}
  compiled = {tokens: one.lower().compile() for tokens, one in traced.items()}
  flops = {tokens: count_flops(one.jaxpr) for tokens, one in traced.items()}
  report.say("")
  # The keeper is entered after compiling: a config that does not compile leaves no file.
  with Interruption(keeper) as interruption, keeper:
    restored = keeper.restore(program.state)
    state, start = restored or (program.init(key_init, frozen, layout.place(start_values)), 0)
    if restored:
      report.say(f"resuming {keeper.name} from step {start}")
    report.update(start)
    if start >= length.steps:
      report.say(f"{keeper.name}: already trained for {start} of {length.steps} steps")
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
      with keeper.logging(start), Profiler(length.profile, f"{keeper.name}/profile") as profiler:
        meter = Meter(length, keeper.metrics, report, Usage(list(layout.mesh.devices.flat)))
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
            with meter.paused():
              keeper.save(step, state)
          if state.profiles is not None and (step == length.steps or _due(step, settings.ema.snapshot_every)):
            with meter.paused():
              keeper.snapshot(step, state.profiles)
          if draw and _due(step, draw_every):
            with meter.paused():
              keeper.picture(step, functools.partial(draw, experiment.complete(state.ema, frozen)))
          if stop:
            logger.warning("told to stop: %s", keeper.stopped(step))
            break
        meter.flush(final=True)
        keeper.finish()
    except Unwritable as error:
      raise keeper.lost(state, error) from error
  return state


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


class Meter:
  """Collects the metrics of every step on the device and reports their means, one interval late.

  A row's rates, `images_per_second` and `tflops_per_second`, are of the time in which steps ran: the time since the row
  before without the pauses for saving and sampling, `pause_seconds`. So the images of a row divided by their rate, plus
  its pause, are seconds on the clock, and those of all rows the time since the first step. The loss by noise level is
  the mean over all examples of the row's steps in a part of flow time.
  """

  def __init__(
    self,
    settings: TrainSettings,
    write: Callable[[int, dict[str, float]], None],
    report: Progress,
    usage: Usage,
  ):
    self._settings, self._write, self._report, self._usage = settings, write, report, usage
    self._flops = 0
    self._pending: list[dict[str, Any]] = []  # arrays
    self._ready = 0  # of those pending, the steps that are known to be done
    self._step, self._due = 0, False
    self._clock, self._pause = time.perf_counter(), 0.0

  def add(self, step: int, metrics: dict[str, Array], flops: int) -> None:
    """Adds a step's metrics, without waiting for them, and its operations."""
    self._pending.append(metrics)
    self._flops += flops
    self._step = step
    self._due = _due(step, self._settings.log_every)
    while self._ready < len(self._pending) and self._pending[self._ready]["loss"].is_ready():
      self._ready += 1
    self._report.update(step - len(self._pending) + self._ready)  # what has been computed, which is less than was asked

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Context that is left out of the rates; it waits for the steps in progress first."""
    jax.block_until_ready(self._pending)
    start = time.perf_counter()
    yield
    self._pause += time.perf_counter() - start

  def flush(self, final: bool = False) -> None:
    """Writes the interval that is complete, if one is; `final` writes an incomplete one too.

    Raises:
      FloatingPointError: after max_skipped non-finite updates in a row.
    """
    if not self._pending or not (self._due or final):
      return
    count, values = len(self._pending), jax.device_get(self._pending)
    now = time.perf_counter()
    elapsed, self._clock = now - self._clock - self._pause, now
    pause, self._pause = self._pause, 0.0
    flops, self._flops = self._flops, 0
    self._pending, self._ready, self._due = [], 0, False
    # A skipped step has no finite loss; `skipped` counts it.
    finite = [v for v in values if not v["skipped_in_a_row"]] or values
    row = {name: sum(float(v[name]) for v in finite) / len(finite) for name in finite[0] if name != SUMS}
    if SUMS in finite[0]:
      row |= means_by_time([v[SUMS] for v in finite])
    row["skipped"] = int(values[-1]["skipped"])
    row["skipped_in_a_row"] = max(int(v["skipped_in_a_row"]) for v in values)
    row["learning_rate"] = float(values[-1]["learning_rate"])
    row["images_per_second"] = count * self._settings.batch_size / elapsed
    row["tflops_per_second"] = flops / elapsed / 1e12
    row["pause_seconds"] = pause
    row |= self._usage.share(flops / elapsed) | self._usage.memory()
    self._write(self._step, row)
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
    """Starts the trace before the first step of the window."""
    first, last = self._window
    if 0 < first <= step <= last and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, metrics: dict[str, Array]) -> None:
    """Ends the trace after the last step of the window."""
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
      if kind is None:  # else the error in flight came first
        raise


class Interruption:
  """Turns SIGTERM, SIGHUP and Ctrl-C into a request to stop at a step boundary, the same one in every process.

  A SIGHUP that is ignored, as by nohup, stays ignored.
  """

  def __init__(self, keeper: Keeper):
    self._keeper = keeper
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
    """Returns whether to save `step` and stop."""
    if jax.distributed.is_initialized():
      return self._keeper.reached_preemption(step)
    return self._flag.is_set()
