"""Commands that are run in this process, up to where they would compile or write."""

from __future__ import annotations

import contextlib
import io
import pathlib
from typing import Any

import pytest

from pflow_jax.commands.cli import main
from pflow_jax.evaluation import compare, evaluate, sample
from pflow_jax.planning import plan
from pflow_jax.training import experiment, step, train
from tests.fuzz.cases import limited

SECONDS = 120  # of a busy machine


class Border(BaseException):
  """What was given has been looked at, and the work would begin."""


def stop_at_border(patch: pytest.MonkeyPatch) -> None:
  """Has every command end where its work would begin."""

  def border(*_: Any, **__: Any) -> Any:
    raise Border

  def without_compiler() -> str:
    raise plan.NoCompiler("none")

  patch.setattr(step.Program, "trace", border)
  patch.setattr(sample, "in_batches", border)
  patch.setattr(evaluate, "teacher_samplers", border)
  patch.setattr(compare, "_in_order", border)
  patch.setattr(plan, "find_compiler", without_compiler)
  patch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # a command would set it for this process


def build_once(patch: pytest.MonkeyPatch) -> None:
  """Has what commands build of a config, or read of a run, be built once for every config."""

  def once(module: Any, name: str) -> None:
    original, built = getattr(module, name), {}

    def build(config: Any, *arguments: Any, **options: Any) -> Any:
      key = f"{config}{sorted(options.items())}"  # the rest is made of these
      if key not in built:
        built[key] = original(config, *arguments, **options)
      return built[key]

    patch.setattr(module, name, build)

  for module in (train, sample, evaluate, plan):
    once(module, "build")
  once(train, "make_program")
  once(plan, "make_program")
  patch.setattr(experiment.Experiment, "load", lambda *_, **__: {})
  patch.setattr(experiment.Experiment, "load_frozen", lambda *_, **__: {})


def problem_of(*arguments: Any, codes: tuple[int, ...] = (0, 2)) -> str | None:
  """What is wrong with how a command ends; None if it does its work, or says in one sentence why not."""

  said = io.StringIO()
  code: Any = 0
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
      limited(lambda: main([str(argument) for argument in arguments]), SECONDS)
  except SystemExit as end:
    code = end.code
  except Border:
    pass
  except BaseException as error:
    return f"{type(error).__name__}: {str(error)[:300]}"
  text = said.getvalue()
  if code not in codes or "Traceback" in text or "a bug of" in text:
    return f"code {code}: {text[:500]}"
  if code and (text.count("pflow: ") != 1 or not 20 < len(text) < 3000):
    return f"no sentence: {text[:500]!r}"
  return None


def tree(folder: pathlib.Path) -> set[str]:
  """All that is in a folder."""
  return {str(path) for path in folder.rglob("*")}
