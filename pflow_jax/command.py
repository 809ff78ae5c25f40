"""What all commands share: usage, flags that several have, and mistakes in one line."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

USAGE = """usage: pflow COMMAND [flags]

  pflow train    --config configs/digits.py:teacher --workdir runs/teacher   train, or resume the run in the workdir
  pflow sample   --workdir runs/student --num 16 --nfe 1                     pictures and arrays from a run
  pflow evaluate --workdir runs/student                                      measure a student beside its teacher
  pflow merge    --workdir runs/adapters --out runs/merged                   a run with adapters as one without
  pflow compare  --config configs/compare/digits.py --workdir runs/compare   train and measure methods side by side
  pflow plan     --config configs/imagenet.py:gmflow --topology v5e-256      does it fit on these TPUs, and the cost
  pflow data     emoji                                                       fetch a data set that is not in a package
  pflow convert  --source FLUX.1-dev/transformer --out runs/flux             weights from PyTorch, or a run to PyTorch
  pflow cache    --prompts prompts.txt --model flux --encoders FLUX.1-dev --out prompts    embed prompts once

Every key of a config is a flag: --config.train.steps=100. `pflow COMMAND --help` lists a command's flags.
"""


def run_command(define: Callable, body: Callable, argv: list[str]) -> None:
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
  except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError) as error:
    # A config file is code of the user's: PFLOW_TRACEBACK shows where it failed.
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    fail(2, _one_line(error))
  if len(rest) > 1:
    fail(2, f"unexpected argument {rest[1]!r}; flags are given as --name value")
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  _cache_compilations()
  try:
    if "coordinator" in values:
      from pflow_jax.distributed import join

      join(values.coordinator, values.num_processes, values.process_id, timeout=values.join_timeout)
      if body.__name__ != "train":  # which alone asks JAX's handler whether it was told to stop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    body(values)
    if _among_others():
      from pflow_jax.distributed import finish

      finish()
  except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    mistake = isinstance(error, (ValueError, ArithmeticError, FileNotFoundError))
    fail(2, str(error)) if mistake else fail(1, f"{error}\n(set PFLOW_TRACEBACK=1 for the traceback)")
  except ImportError as error:
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    advice = f"{sys.executable} -m pip install it (gs://: gcsfs, then gcloud auth application-default login)"
    fail(2, str(error) if "pip install" in str(error) else f"{error}; {advice}")
  except KeyboardInterrupt as stopped:
    fail(130, str(stopped) or "stopped")


def fail(code: int, message: str) -> NoReturn:
  print(f"pflow: {message}", file=sys.stderr, flush=True)
  if _among_others():
    # Python's own exit would wait for the others, who wait for this process; they notice that it is gone.
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def stop(message: str) -> NoReturn:
  """Ends a run that all processes have agreed to stop: together, so that none takes another for dead."""
  print(f"pflow: {message}", file=sys.stderr, flush=True)
  sys.exit(130)


def _among_others() -> bool:
  """Whether this process has joined others; asked without starting JAX."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def define_join_flags(values) -> None:
  """How this process finds the others of its program, where JAX cannot know."""
  from absl import flags

  flags.DEFINE_string("coordinator", None, "host:port of process 0, a free port there", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "processes of this program", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("process_id", None, "which of them this one is", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("join_timeout", 300, "seconds to wait for the others", lower_bound=1, flag_values=values)


def define_teacher_flag(values) -> None:
  """Where the teacher of a run is."""
  from absl import flags

  flags.DEFINE_string("teacher", None, "workdir of the run's teacher, if it has moved", flag_values=values)


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


def mesh_sizes(sizes: list[str]) -> dict[str, int]:
  """{"data": 4} of --mesh=data=4."""
  from pflow_jax.sharding import AXES

  for size in sizes:
    axis, _, number = size.partition("=")
    if axis not in AXES or not number.lstrip("-").isdigit():
      raise ValueError(f"--mesh: expected sizes of {AXES} such as data=4,fsdp=64, got {size!r}")
  return {size.partition("=")[0]: int(size.partition("=")[2]) for size in sizes}
