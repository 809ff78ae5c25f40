"""Common parts of all commands: usage, shared flags, and errors in one line."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
  from absl import flags
  from ml_collections import ConfigDict

from pflow_jax.commands.compilations import cache_compilations
from pflow_jax.commands.flags import MAX_SEED, call_with_flags, define_flags, positional, words_of
from pflow_jax.files.foreign import may_pass
from pflow_jax.files.nearest import nearest
from pflow_jax.files.output import without_tracebacks
from pflow_jax.settings.renamed import renewed_flag

USAGE = """usage: pflow COMMAND [flags]

  pflow train    --config configs/digits.py:teacher --workdir runs/teacher   train, or resume the run in the workdir
  pflow sample   --workdir runs/student --num 16 --nfe 1                     pictures and arrays from a run
  pflow evaluate --workdir runs/student                                      measure a student beside its teacher
  pflow plot     runs/student runs/other --metric loss --out curves.png      curves of runs, here and in a picture
  pflow merge    --workdir runs/adapters --out runs/merged                   a run with adapters as one without
  pflow ema      --workdir runs/teacher --sigma_rel 0.05                     a run with another average, made afterwards
  pflow compare  --config configs/compare/digits.py --workdir runs/compare   train and measure methods side by side
  pflow plan     --config configs/imagenet.py:gmrepa_1nfe --topology v5e-256 does it fit on these TPUs, and the cost
  pflow data     emoji                                                       fetch a data set that is not in a package
  pflow convert  --source FLUX.1-dev/transformer --out runs/flux             weights from PyTorch, or a run to PyTorch
  pflow push     --folder student --repo USER/NAME                           an export to the Hugging Face Hub
  pflow latents  --images folder:photos --autoencoder taesd/taef1 --out z    encode pictures once
  pflow reference --images photos --features inception.pt --out photos.npz   what samples are compared with, made once
  pflow cache    --prompts prompts.txt --model minilm --out prompts          embed prompts once
  pflow demo     --workdir runs/student --workdir runs/other                 a page in the browser: runs side by side

Every key of a config is a flag: --config.train.steps=100. `pflow COMMAND --help` lists a command's flags, and with
--config FILE, or --workdir of a run, every key with its value. `pflow --version` prints the version.

A config file is a program, which runs with your rights: read one that is not yours before you name it.
"""
CONFIG_HELP = "config file, a Python program that is executed; its variant after a colon"


class ConfigSource(NamedTuple):
  """Source of a command's config, every key of which is a flag of its own, --config.key.

  Attributes:
    flag: its value names the config.
    read: that value -> the config.
    describe: a config, or None without a value -> the text of --help on its keys.
  """

  flag: str
  read: Callable[[str], ConfigDict]
  describe: Callable[[ConfigDict | None], str]


def run_command(
  function: Callable, argv: list[str], source: Callable[[], ConfigSource] | None = None, joins: bool = False
) -> None:
  """Parses `argv` with the flags of a function, see `commands.flags.define_flags`, and calls it.

  `one_sentence` handles its errors.

  Args:
    function: the command.
    argv: its arguments.
    source: returns the source of its argument `config`.
    joins: whether several processes can run it together.
  """
  from absl import flags, logging
  from ml_collections import config_flags

  source_of = None if source is None else source()
  values, name = flags.FlagValues(), f"pflow {function.__name__}"
  try:
    if any(re.match("--?flagfile(=|$)", argument) for argument in argv):
      raise ValueError("--flagfile: files of flags are not read; give the flags themselves")
    define_flags(function, values)
    if joins:
      define_join_flags(values)
    argv = [_underscored(argument, values) for argument in argv]
    config, is_file = None, source_of is not None and source_of.flag == "config"
    if source_of is not None:
      given, others = _taken(argv, source_of.flag)
      config = None if given is None else _read(source_of, given)
      others = [renewed_flag(argument) for argument in others]
      argv = others if is_file else [*others, *([] if given is None else [f"--{source_of.flag}={given}"])]
    asks_for_help = not {"-h", "--help"}.isdisjoint(argv)
    if is_file and (config is None or asks_for_help):
      flags.DEFINE_string("config", None, CONFIG_HELP, required=True, flag_values=values)
    if asks_for_help:
      own = positional(function)
      told = f"\n{name} {own.upper()}...: {words_of(function)[own]}\n" if own else ""
      print(USAGE, told, f"\nFlags of {name}:\n", values.get_help(include_special_flags=False), sep="")
      print(source_of.describe(config) if source_of else "")
      return
    if config is not None:
      config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[name, *argv])
    rest = _parsed(values, [name, *argv], config)
  except Exception as error:  # an error in flags, or in the config that they change, must not restart the run
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    fail(2, _one_line(error))
  words = rest[1:]
  if words and positional(function) is None:
    fail(2, f"unexpected argument {words[0]!r}; flags are given as --name value")
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().addFilter(without_tracebacks)
  cache_compilations()
  if joins:
    from pflow_jax.mesh.distributed import join

    join(values.coordinator, values.num_processes, values.process_id, timeout=values.join_timeout)
    if function.__name__ != "train":  # `train` alone asks JAX's handler whether it was told to stop
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
  call_with_flags(function, values, words)
  if _among_others():
    from pflow_jax.mesh.distributed import finish

    finish()


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
  """Context that ends the program with one sentence and the right code for any error; see `cli` for the codes."""
  try:
    yield
  except KeyboardInterrupt as stopped:
    fail(130, str(stopped) or "stopped")
  except Exception as error:
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    fail(*_verdict(error))


@contextlib.contextmanager
def resumable() -> Iterator[None]:
  """Context of work that the same command goes on with, and says so when it is stopped."""
  try:
    yield
  except KeyboardInterrupt as stopped:
    raise KeyboardInterrupt("stopped; the same command goes on where it was") from stopped


def _verdict(error: Exception) -> tuple[int, str]:
  """Returns the exit code for an error, and the sentence."""
  text, more = str(error), "(set PFLOW_TRACEBACK=1 for the traceback)"
  if isinstance(error, ImportError):
    advice = f"{sys.executable} -m pip install it (gs://: gcsfs, then gcloud auth application-default login)"
    return 2, text if "pip install" in text else f"{text}; {advice}"
  if isinstance(error, (ValueError, ArithmeticError)):
    return 2, text
  if isinstance(error, OSError):
    return 1 if error.errno is None or may_pass(error) else 2, f"{text}\n{more}"
  if isinstance(error, RecursionError):
    return 2, f"something that was given is nested too deeply ({text})\n{more}"
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    first = next(iter(text.splitlines()), "")
    return 1, f"out of memory; lower the batch size, or raise config.train.accumulation or config.mesh.fsdp ({first})"
  if isinstance(error, RuntimeError):
    return 1, f"{text}\n{more}"
  first = next(iter(text.splitlines()), "")
  return 1, f"a bug of pflow_jax, or of a library: {type(error).__name__}: {first}\n{more}"


def fail(code: int, message: str) -> NoReturn:
  """Prints one message on stderr and ends the program with `code`."""
  # A foreign value may be of any length, and hold codes that steer the terminal.
  message = "".join(sign if sign == "\n" or sign.isprintable() else ascii(sign)[1:-1] for sign in message)
  message = re.sub(r"\S{300,}", lambda m: f"{m[0][:200]}...", message)
  print(f"pflow: {message}", file=sys.stderr, flush=True)
  if _among_others():
    # Python's own exit would wait for the other processes, which wait for this one; they notice that it is gone.
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def stop(message: str) -> NoReturn:
  """Ends a run that all processes have agreed to stop; they end together, so that none takes another for dead."""
  print(f"pflow: {message}", file=sys.stderr, flush=True)
  sys.exit(130)


def _among_others() -> bool:
  """Returns whether this process has joined others, without starting JAX."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def define_join_flags(values) -> None:
  """Defines the flags by which this process finds the others of its program, if JAX cannot."""
  from absl import flags

  flags.DEFINE_string("coordinator", None, "host:port of process 0, a free port there", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "processes of this program", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("process_id", None, "which of them this one is", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("join_timeout", 300, "seconds to wait for the others", lower_bound=1, flag_values=values)


def _read(source: ConfigSource, given: str) -> ConfigDict:
  try:
    return source.read(given)
  except ValueError as error:
    raise ValueError(f"--{source.flag}: {error}") from error


def _parsed(values: flags.FlagValues, argv: list[str], config: ConfigDict | None) -> list[str]:
  """Gives flags their values, and returns the other arguments.

  Raises:
    ValueError: a flag is unknown, with the nearest known one, or missing.
  """
  from absl import flags

  try:
    return values(argv)
  except flags.UnrecognizedFlagError as error:
    known = {name: name for name in values}
    for section, keys in config.items() if config is not None else ():
      known |= {key: f"config.{section}.{key}" for key in keys if key not in known} if hasattr(keys, "keys") else {}
    near = nearest(error.flagname, known)
    hint = f"; did you mean --{known[near[0]]}?" if near else "; `--help` lists them"
    raise ValueError(f"there is no flag --{error.flagname}{hint}") from error
  except flags.IllegalFlagValueError as error:
    if missing := re.findall(r"flag --(\w+)=None: ", str(error)):
      raise ValueError(f"{' and '.join(f'--{name}' for name in missing)} must be given") from error
    raise


def _one_line(error: Exception) -> str:
  # KeyErrors print their message quoted, line breaks and all.
  text = str(error).strip("'\"").replace("\\n", ". ").replace("\\'", "'")
  return f"the config has no key {text}" if isinstance(error, (AttributeError, KeyError)) else text


def _underscored(argument: str, known: flags.FlagValues) -> str:
  """Returns a flag that is written with hyphens, --preview-autoencoder, with the underscores of its name."""
  name, equals, value = argument.partition("=")
  plain = name.removeprefix("--").replace("-", "_")
  return f"--{plain}{equals}{value}" if name.startswith("--") and plain in known else argument


def _taken(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
  """Returns the value of a flag, the last one if it is given several times, and the other arguments."""
  value, others, rest = None, [], iter(argv)
  for argument in rest:
    name, equals, text = argument.partition("=")
    if name in (f"--{flag}", f"-{flag}"):
      value = text if equals else next(rest, "")
    else:
      others.append(argument)
  return value, others


def mesh_sizes(sizes: list[str]) -> dict[str, int]:
  """Parses --mesh=data=4 to {"data": 4}."""
  from pflow_jax.core.batches import AXES

  for size in sizes:
    axis, _, number = size.partition("=")
    if axis not in AXES or not re.fullmatch("-?[0-9]{1,9}", number):
      raise ValueError(f"--mesh: expected sizes of {AXES} such as data=4,fsdp=64, got {size!r}")
  return {size.partition("=")[0]: int(size.partition("=")[2]) for size in sizes}


def options(texts: list[str]) -> dict[str, Any]:
  """Parses --option=size=64 to {"size": 64}; a value that is no Python literal is a text."""
  found: dict[str, Any] = {}
  for text in texts:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
      raise ValueError(f"option: expected key=value, got {text!r}")
    try:
      found[name] = {"true": True, "false": False}[value] if value in ("true", "false") else ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name] = value
  return found


def whole_numbers(flag: str, texts: list[str]) -> list[int]:
  """Parses a list of seeds.

  Raises:
    ValueError: the list is empty, or has an entry that is no number from 0 to MAX_SEED.
  """
  if not texts or not all(re.fullmatch("[0-9]{1,10}", text) and int(text) <= MAX_SEED for text in texts):
    raise ValueError(
      f"{flag}: expected whole numbers from 0 to {MAX_SEED}, separated by commas, got {','.join(texts)!r}"
    )
  return [int(text) for text in texts]
