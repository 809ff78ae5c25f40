"""`pflow compare`: methods side by side, with one teacher, its data and network, and one budget of training compute.

A comparison is a ConfigDict, such as configs/compare/digits.py makes:

* teacher: dict(config="path/of/config.py:variant", overrides=dict(train=dict(steps=...))), the latter optional.
* weak: the same for a weaker teacher, if a method needs one (autoguidance).
* flops: operations that every student is trained with, its teacher's evaluations included; see `step_flops`.
* methods: a tuple of the arguments of `evaluation.compare_plan.Method`.

Runs live in <workdir>/seed<S>/<run>, and finished runs are not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import pydantic

from pflow_jax.evaluation.compare_plan import Run, plan, read_methods
from pflow_jax.evaluation.compare_report import TEACHER, write_report
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.files import foreign
from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import checked_folder
from pflow_jax.files.lock import Lock
from pflow_jax.files.progress import progress
from pflow_jax.settings.sections import refuse_unknown
from pflow_jax.settings.tree import Settings
from pflow_jax.training.step import step_flops
from pflow_jax.training.train import train

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class _Row:
  """The numbers of an evaluation's row that the table shows: a measure, perhaps with its standard error."""

  name: str
  nfe: int
  images_per_second: Annotated[float, pydantic.Field(gt=0)]
  alignment_ratio: float | tuple[float, float] = 0.0
  fd_ratio: float | tuple[float, float] = 0.0
  diversity_ratio: float | tuple[float, float] = 0.0
  recall: float | tuple[float, float] = 0.0


@dataclasses.dataclass(frozen=True)
class _Result:
  """A run's result in its folder, as far as the report reads it."""

  spent: dict[str, float]
  rows: tuple[_Row, ...] = ()
  num_samples: int = 0
  data: str = ""
  features: str = ""
  device: str = ""


def compare(
  config: Mapping[str, Any], folder: str | os.PathLike, *, seeds: Sequence[int] = (0,), only: Sequence[str] = ()
) -> dict[str, Any]:
  """Trains and evaluates the missing runs of the comparison in `folder`; writes compare.json, .md and .png there.

  A run that fails is reported in the table and tried again by the next call.

  Args:
    config: of the comparison.
    folder: of its runs and its table.
    seeds: one teacher and one student of every method for each.
    only: methods to work on, with the runs that they start from; the table shows the others as far as they are
      finished.

  Returns:
    the content of compare.json.

  Raises:
    ValueError: the comparison does not fit; it is raised before any work.
    KeyboardInterrupt: the program is told to stop.
  """
  folder = checked_folder(folder)
  methods = read_methods(config)
  refuse_unknown(dict.fromkeys(only), list(methods), "only")
  plans = {seed: plan(config, seed) for seed in dict.fromkeys(seeds)}
  roots = {seed: pathlib.Path(folder) / f"seed{seed}" for seed in plans}
  results = {
    seed: {run.name: result for run in runs if (result := _finished(run, roots[seed]))} for seed, runs in plans.items()
  }

  def write() -> dict[str, Any]:
    runs = [
      {"seed": seed, "run": run.name, "method": run.method, "nfe": run.nfe} | results[seed][run.name]
      for seed in plans
      for run in plans[seed]
      if run.name in results[seed]
    ]
    titles = {name: method.title or name for name, method in methods.items()}
    return write_report(pathlib.Path(folder), config["flops"], titles, runs)

  todo = [
    (seed, run)
    for seed, runs in plans.items()
    for run in _in_order(run for run in runs if run.method in (only or methods))
  ]
  with (
    _stopped_by_signals(),
    Lock(folder, "pflow compare"),
    progress(len(todo), 0, "compare", unit="runs") as report,
  ):
    for i, (seed, run) in enumerate(todo, 1):
      report.update(i - 1)
      done = run.name in results[seed]
      report.say(f"run {i} of {len(todo)}: seed {seed}, {run.name}{', finished before' if done else ''}")
      if not done:
        try:
          results[seed][run.name] = _attempt(run, roots[seed], results[seed])
        except KeyboardInterrupt as stopped:
          where = f" ({stopped})" if str(stopped) else ""
          raise KeyboardInterrupt(
            f"stopped in run {i} of {len(todo)}: seed {seed}, {run.name}{where}; the same command goes on"
          ) from stopped
        write()
    report.update(len(todo))
    return write()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
  """Context that turns SIGTERM, and SIGHUP unless ignored, into KeyboardInterrupt; a training saves instead."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt

  numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
  previous = {number: signal.signal(number, stop) for number in numbers}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _in_order(runs: Iterable[Run]) -> list[Run]:
  """Returns `runs` and all runs that they need, each once and after those."""
  ordered: dict[str, Run] = {}

  def add(run: Run) -> None:
    for needed in run.needs.values():
      add(needed)
    ordered.setdefault(run.name, run)

  for run in runs:
    add(run)
  return list(ordered.values())


def _finished(run: Run, root: pathlib.Path) -> dict[str, Any] | None:
  """Reads the result of an earlier call, if it is of exactly this run."""
  path = root / run.name / RESULT
  if not path.exists():
    return None
  try:
    saved = foreign.read_json(path)
    if _of_today(saved.get("described")) != run.described():
      return None
    foreign.parse_json(json.dumps(saved.get("result")), _Result, where=str(path))
    return saved["result"]
  except ValueError as error:
    print(f"{path} cannot be read ({error}): the run is looked at again", flush=True)
    return None


def _of_today(described: Any) -> Any:
  """Returns a result's description of its run with the present names of keys."""
  if not isinstance(described, dict) or set(described) != {"config", "flops", "needs"}:
    return described
  needs = {key: _of_today(needed) for key, needed in described["needs"].items()}
  return {**described, "config": Settings.of(described["config"], quiet=True).plain(), "needs": needs}


def _attempt(run: Run, root: pathlib.Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the result of `run` and keeps it in its folder; the result of an error is not kept."""
  failed = [needed.name for needed in run.needs.values() if "error" in results[needed.name]]
  if failed:
    return {"error": f"it needs {failed[0]}, which failed"}
  try:
    result = _train_and_evaluate(run, root, results)
  except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
    print(f"{run.name} failed: {error}", flush=True)
    return {"error": f"{type(error).__name__}: {error}"}
  text = json.dumps({"described": run.described(), "result": result}, indent=2)
  write_atomically(root / run.name / RESULT, text + "\n")
  return result


def _train_and_evaluate(run: Run, root: pathlib.Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  settings, folder = run.settings, root / run.name
  for key, needed in run.needs.items():
    section, name = key.split(".")
    settings = settings.changed(section, **{name: str(root / needed.name)})
  flops = step_flops(settings)
  if run.flops is not None:
    settings = settings.changed("train", steps=affordable_steps(run.flops, flops))
  steps = settings.need("train").steps
  print(f"{run.name}: {steps:,} steps of {flops:.3g} operations, {steps * flops:.3g} in all", flush=True)
  state = train(settings, folder, picture=(save_picture, preview_size))
  if int(state.step) < steps:
    raise KeyboardInterrupt(f"{folder}: stopped at step {int(state.step)} of {steps}")
  # Cost of this run without the teacher's; the other runs that it needs are counted once in a method.
  spent = {run.name: steps * flops}
  for needed in run.needs.values():
    spent |= results[needed.name]["spent"] if needed.method != TEACHER else {}
  report = evaluate(settings, folder) if run.nfe else {}
  return {"steps": steps, "step_flops": flops, "flops": steps * flops, "spent": spent, **report}


def affordable_steps(budget: float, flops: float) -> int:
  """Whole optimizer steps of `flops` operations each within `budget`.

  Raises:
    ValueError: the budget is below one step.
  """
  steps = int(budget // flops)
  if steps < 1:
    raise ValueError(f"config.flops: a step takes {flops:.3g} operations, expected a budget of at least that: {budget}")
  return steps
