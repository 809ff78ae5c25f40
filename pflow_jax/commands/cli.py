"""The command `pflow`: train, sample, evaluate, plot, merge, ema, compare, plan, data, convert, push, latents,
reference, cache, demo.

Exit codes; all but 0 come with one sentence on stderr:

* 0: done.
* 1: another try may succeed, and launch/local.sh starts such a run again: an error of memory, storage, other processes
  or machines, or an unexpected one.
* 2: another try would fail again: a mistake in the flags, the config or the files, a workdir that another process has
  taken over, or a full one whose run is saved elsewhere.
* 130: stopped from the keyboard, or told to stop.
"""

from __future__ import annotations

import functools
import io
import platform
import re
import sys
from collections.abc import Callable

from pflow_jax.commands import programs
from pflow_jax.commands.command import USAGE, ConfigSource, fail, one_sentence, run_command
from pflow_jax.commands.ema import ema
from pflow_jax.commands.evaluate import evaluate
from pflow_jax.commands.reference import reference
from pflow_jax.files.output import logged_tracebacks, tolerant_output
from pflow_jax.files.versions import version_of


def main(argv: list[str] | None = None) -> None:
  """Runs one command; the entry point of the console script."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters of a table or a prompt
      stream.reconfigure(errors="backslashreplace")
  with tolerant_output(), logged_tracebacks(), one_sentence():
    _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
  if any(re.search("[\ud800-\udfff]", argument) for argument in argv):
    raise ValueError("the command line: expected text in UTF-8; where it is, set PYTHONUTF8=1, and rename it elsewhere")
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(USAGE)
    return
  if argv[0] in ("--version", "version"):
    print(f"pflow {version_of('pflow-jax')} (jax {version_of('jax')}, Python {platform.python_version()})")
    return
  command, rest = argv[0], argv[1:]
  if command not in COMMANDS:
    fail(2, f"there is no command {command!r}\n\n{USAGE}")
  COMMANDS[command](rest)


def _config_file() -> ConfigSource:
  """Source of a config that --config names, a Python file."""
  from pflow_jax.settings.config_file import read_config_file

  return ConfigSource("config", read_config_file, _describe)


def _config_of_run() -> ConfigSource:
  """Source of the config of a run that --workdir names."""
  from pflow_jax.training.workdir import load_config, load_settings

  def read(folder: str):
    if not load_settings(folder).data:
      raise ValueError(f"{folder} was converted before such teachers could be sampled; convert it again")
    return load_config(folder)

  return ConfigSource("workdir", read, _describe)


def _describe(config) -> str:
  from pflow_jax.commands.config_help import describe

  return describe(config)


def _plan(argv: list[str]) -> None:
  import jax

  # A plan is made on this machine's CPU, whatever else it has; programs for other chips cannot be read back.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  run_command(programs.plan, argv, source=_config_file, joins=False)


def _data(argv: list[str]) -> None:
  if argv in (["-h"], ["--help"]):
    print(USAGE)
    return
  if argv != ["emoji"]:
    fail(2, "usage: pflow data emoji")
  from pflow_jax.data import fetch_emoji

  try:
    print(f"emoji are in {fetch_emoji()}")
  except (ValueError, RuntimeError) as error:
    fail(2, str(error))


def _command(function: Callable, source: Callable[[], ConfigSource] | None = None, joins: bool = True) -> Callable:
  return functools.partial(run_command, function, source=source, joins=joins)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
  "train": _command(programs.train, _config_file),
  "sample": _command(programs.sample, _config_of_run),
  "evaluate": _command(evaluate, _config_of_run),
  "reference": _command(reference, joins=False),
  "plot": _command(programs.plot, joins=False),
  "merge": _command(programs.merge, joins=False),
  "ema": _command(ema, joins=False),
  "compare": _command(programs.compare, _config_file, joins=False),
  "plan": _plan,
  "data": _data,
  "convert": _command(programs.convert),
  "push": _command(programs.push, joins=False),
  "latents": _command(programs.latents),
  "cache": _command(programs.cache, joins=False),
  "demo": _command(programs.demo, joins=False),
}
