"""The command `pflow`: train, sample, evaluate, merge, compare, data.

Exit codes: 0 done; 2 a mistake in the flags, the config or the files; 130 stopped from the keyboard or told to stop;
1 anything else, which another try may mend (launch/local.sh starts such a run again).
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

USAGE = """usage: pflow COMMAND [flags]

  pflow train    --config configs/digits.py:teacher --workdir runs/teacher   train, or resume the run in the workdir
  pflow sample   --workdir runs/student --num 16 --nfe 1                     pictures and arrays from a run
  pflow evaluate --workdir runs/student                                      measure a student beside its teacher
  pflow merge    --workdir runs/adapters --out runs/merged                   a run with adapters as one without
  pflow compare  --config configs/compare/digits.py --workdir runs/compare   train and measure methods side by side
  pflow data     emoji                                                       fetch a data set that is not in a package

Every key of a config is a flag: --config.train.steps=100. `pflow COMMAND --help` lists a command's flags.
"""


def main(argv: list[str] | None = None) -> None:
  """Runs one command; the entry point of the console script."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(USAGE)
    return
  command, rest = argv[0], argv[1:]
  if command not in COMMANDS:
    _fail(2, f"there is no command {command!r}\n\n{USAGE}")
  COMMANDS[command](rest)


def _run(define: Callable, body: Callable, argv: list[str]) -> None:
  """Parses `argv` with the flags that `define` makes and calls `body(flags)`; mistakes end in one line."""
  from absl import flags, logging

  values = flags.FlagValues()
  sys.argv = [f"pflow {body.__name__}", *argv]  # config flags look for their overrides there
  try:
    if {"-h", "--help"} & set(argv):
      define(values)
      print(f"{USAGE}\nFlags of pflow {body.__name__}:\n{values.get_help()}")
      return
    define(values)
    rest = values(sys.argv)
    if "config" in values:
      _ = values.config.to_dict  # a config file that could not be read says so when it is used
  except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
    # A config file is code of the user's: PFLOW_TRACEBACK shows where it failed.
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    _fail(2, _one_line(error))
  if len(rest) > 1:
    _fail(2, f"unexpected argument {rest[1]!r}; flags are given as --name value")
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  _cache_compilations()
  try:
    body(values)
  except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    mistake = isinstance(error, (ValueError, ArithmeticError, FileNotFoundError))
    _fail(2, str(error)) if mistake else _fail(1, f"{error}\n(set PFLOW_TRACEBACK=1 for the traceback)")
  except KeyboardInterrupt as stopped:
    _fail(130, str(stopped) or "stopped")


def _fail(code: int, message: str) -> NoReturn:
  print(f"pflow: {message}", file=sys.stderr)
  sys.exit(code)


def _one_line(error: Exception) -> str:
  # KeyErrors print their message quoted, line breaks and all.
  text = str(error).strip("'\"").replace("\\n", ". ").replace("\\'", "'")
  if "Traceback" in text:  # of a config file that raised; its last line is the error
    text = text.strip().splitlines()[-1]
  return f"the config has no key {text}" if isinstance(error, (AttributeError, KeyError)) else text


def _cache_compilations() -> None:
  """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR moves the folder."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(base / "pflow_jax" / "xla"))


def _train(argv: list[str]) -> None:
  from absl import flags
  from ml_collections import config_flags

  def define(values):
    config_flags.DEFINE_config_file("config", None, "config file, with its variant after a colon", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)

  def train(values):
    from pflow_jax.train import train as run

    state = run(values.config, values.workdir)
    if int(state.step) < values.config.train.steps:
      _fail(130, f"stopped at step {int(state.step)}, which is saved; the same command resumes")

  _run(define, train, argv)


def _define_run_flags(argv: list[str], values) -> None:
  """--workdir, and --config.key for every key of the config that the run was started with."""
  from absl import flags
  from ml_collections import config_flags

  from pflow_jax.workdir import load_config

  flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
  flags.mark_flag_as_required("workdir", flag_values=values)
  given = [
    a.split("=", 1)[-1] if "=" in a else b
    for a, b in zip(argv, [*argv, ""][1:], strict=True)
    if a.lstrip("-").split("=")[0] == "workdir"
  ]
  if given and given[-1]:
    config = load_config(given[-1])
    config_flags.DEFINE_config_dict("config", config, "config of the run", flag_values=values)


def _sample(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    _define_run_flags(argv, values)
    flags.DEFINE_integer("num", 16, "number of samples", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
      "nfe",
      None,
      "network evaluations; default: those of the config",
      lower_bound=1,
      flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "seed of the noise", lower_bound=0, flag_values=values)
    flags.DEFINE_list(
      "labels",
      None,
      "classes by number, separated by commas; default: all in turn",
      flag_values=values,
    )
    flags.DEFINE_enum("which", "ema", ["ema", "params"], "averaged or last parameters", flag_values=values)
    flags.DEFINE_string("out", None, "path of the results without ending", flag_values=values)

  def sample(values):
    from pflow_jax.sample import sample as run

    if values.labels and not all(label.isdigit() for label in values.labels):
      raise ValueError(f"--labels: expected class numbers separated by commas, got {','.join(values.labels)!r}")
    labels = [int(label) for label in values.labels] if values.labels else None
    picture = run(
      values.config,
      values.workdir,
      num=values.num,
      nfe=values.nfe,
      seed=values.seed,
      labels=labels,
      which=values.which,
      out=values.out,
    )
    print(f"wrote {picture} and {picture.with_suffix('.npz')}")

  _run(define, sample, argv)


def _evaluate(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    _define_run_flags(argv, values)
    flags.DEFINE_multi_string(
      "also", [], "workdir of another student of the same teacher; may be repeated", flag_values=values
    )
    flags.DEFINE_string("out", None, "folder of the results; default: <workdir>/evaluation", flag_values=values)

  def evaluate(values):
    from pflow_jax.evaluate import evaluate as run

    run(values.config, values.workdir, others=values.also, out=values.out)

  _run(define, evaluate, argv)


def _compare(argv: list[str]) -> None:
  from absl import flags
  from ml_collections import config_flags

  def define(values):
    config_flags.DEFINE_config_file("config", None, "comparison, such as configs/compare/digits.py", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of all runs and the table", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "seeds, separated by commas; each has its own teacher", flag_values=values)
    flags.DEFINE_list("only", [], "methods to work on, separated by commas; default: all", flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)

  def compare(values):
    from pflow_jax.compare import compare as run

    if not values.seeds or not all(seed.isdigit() for seed in values.seeds):
      raise ValueError(f"--seeds: expected whole numbers separated by commas, got {','.join(values.seeds)!r}")
    report = run(values.config, values.workdir, seeds=[int(seed) for seed in values.seeds], only=values.only)
    print(f"wrote {values.workdir}/compare.md, compare.json and compare.png")
    failed = [f"seed {run['seed']}, {run['run']}" for run in report["runs"] if "error" in run]
    if failed:
      _fail(2, f"failed, and tried again by the same command: {'; '.join(failed)}")

  _run(define, compare, argv)


def _data(argv: list[str]) -> None:
  if argv != ["emoji"]:
    _fail(2, "usage: pflow data emoji")
  from pflow_jax.data import fetch_emoji

  try:
    print(f"emoji are in {fetch_emoji()}")
  except (ValueError, RuntimeError) as error:
    _fail(2, str(error))


def _merge(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("workdir", None, "folder of a run with adapters", flag_values=values)
    flags.DEFINE_string("out", None, "folder of the new run", flag_values=values)
    flags.mark_flags_as_required(["workdir", "out"], flag_values=values)

  def merge(values):
    from pflow_jax.merge import merge as run

    step = run(values.workdir, values.out)
    print(f"wrote {values.out}: step {step} of {values.workdir}, its adapters merged")

  _run(define, merge, argv)


COMMANDS = {
  "train": _train,
  "sample": _sample,
  "evaluate": _evaluate,
  "merge": _merge,
  "compare": _compare,
  "data": _data,
}
