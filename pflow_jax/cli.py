"""The command `pflow`: train, sample, evaluate, merge, compare, plan, data, convert, cache.

Exit codes: 0 done; 2 a mistake in the flags, the config or the files; 130 stopped from the keyboard or told to stop;
1 anything else, which another try may mend (launch/local.sh starts such a run again).
"""

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
  except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError) as error:
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
    _fail(2, str(error)) if mistake else _fail(1, f"{error}\n(set PFLOW_TRACEBACK=1 for the traceback)")
  except ImportError as error:
    if os.environ.get("PFLOW_TRACEBACK"):
      raise
    advice = f"{sys.executable} -m pip install it (gs://: gcsfs, then gcloud auth application-default login)"
    _fail(2, str(error) if "pip install" in str(error) else f"{error}; {advice}")
  except KeyboardInterrupt as stopped:
    _fail(130, str(stopped) or "stopped")


def _fail(code: int, message: str) -> NoReturn:
  print(f"pflow: {message}", file=sys.stderr, flush=True)
  if _among_others():
    # Python's own exit would wait for the others, who wait for this process; they notice that it is gone.
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _stop(message: str) -> NoReturn:
  """Ends a run that all processes have agreed to stop: together, so that none takes another for dead."""
  print(f"pflow: {message}", file=sys.stderr, flush=True)
  sys.exit(130)


def _among_others() -> bool:
  """Whether this process has joined others; asked without starting JAX."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _define_join_flags(values) -> None:
  """How this process finds the others of its program, where JAX cannot know."""
  from absl import flags

  flags.DEFINE_string("coordinator", None, "host:port of process 0, a free port there", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "processes of this program", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("process_id", None, "which of them this one is", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("join_timeout", 300, "seconds to wait for the others", lower_bound=1, flag_values=values)


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
    _define_join_flags(values)

  def train(values):
    from pflow_jax.train import train as run

    state = run(values.config, values.workdir)
    if int(state.step) < values.config.train.steps:
      _stop(f"stopped at step {int(state.step)}, which is saved; the same command resumes")

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
    flags.DEFINE_string("out", None, "path of the results without ending; of prompts, their folder", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated", flag_values=values)
    flags.DEFINE_string("prompts", None, ".txt, .jsonl or .csv with more of them", flag_values=values)
    flags.DEFINE_string("pipeline", None, "folder of the model whose encoders a prompt needs", flag_values=values)
    for side in ("height", "width"):
      flags.DEFINE_integer(side, None, "of a prompt's picture in pixels; default: as trained", flag_values=values)
    _define_join_flags(values)

  def sample(values):
    from pflow_jax.distributed import is_first
    from pflow_jax.sample import sample as run

    if values.prompt or values.prompts:
      _sample_prompts(values)
      return
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
    if is_first():
      print(f"wrote {picture} and {picture.with_suffix('.npz')}")

  _run(define, sample, argv)


def _sample_prompts(values) -> None:
  from pflow_jax.data import read_prompts
  from pflow_jax.distributed import is_first
  from pflow_jax.text_to_image import sample_prompts

  if values.labels:
    raise ValueError("--labels and --prompt: expected one of them")
  out = sample_prompts(
    values.config,
    values.workdir,
    [*values.prompt, *(read_prompts(values.prompts).texts if values.prompts else [])],
    pipeline=values.pipeline,
    height=values.height,
    width=values.width,
    nfe=values.nfe,
    seed=values.seed,
    which=values.which,
    out=values.out,
  )
  if is_first():
    print(f"wrote the pictures, overview.png and samples.npz in {out}")


def _evaluate(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    _define_run_flags(argv, values)
    flags.DEFINE_multi_string(
      "also", [], "workdir of another student of the same teacher; may be repeated", flag_values=values
    )
    flags.DEFINE_string("out", None, "folder of the results; default: <workdir>/evaluation", flag_values=values)
    _define_join_flags(values)

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


def _cache(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("prompts", None, ".txt, .jsonl or .csv, or data:emoji", flag_values=values)
    flags.DEFINE_enum("model", None, ["flux", "qwen_image", "minilm"], "that they are for", flag_values=values)
    flags.DEFINE_string("out", None, "folder for the embeddings", flag_values=values)
    flags.DEFINE_string("encoders", None, "folder of the model's pipeline; minilm needs none", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "prompts at a time", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_length", None, "tokens of a text; default: 512", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
      "shard_records", None, "prompts in a file; default: files of 4 GiB at most", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "that the encoders compute in", flag_values=values)
    flags.DEFINE_string("field", None, "that holds the prompt; default: prompt, text or caption", flag_values=values)
    flags.DEFINE_string(
      "latents", None, "field that names a .npy file with the latents of a prompt's image", flag_values=values
    )
    flags.mark_flags_as_required(["prompts", "model", "out"], flag_values=values)

  def cache(values):
    from pflow_jax.cache import cache as run

    options = {
      name: values[name].value for name in ("encoders", "batch_size", "max_length", "shard_records", "dtype", "field")
    }
    try:
      run(values.prompts, values.model, values.out, file_field=values.latents, **options)
    except KeyboardInterrupt as stopped:
      raise KeyboardInterrupt("stopped; the same command goes on where it was") from stopped

  _run(define, cache, argv)


def _convert(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("source", None, "workdir, folder of diffusers, or .safetensors or .pth", flag_values=values)
    flags.DEFINE_string("out", None, "new workdir, or for a run the new folder for PyTorch", flag_values=values)
    flags.DEFINE_string("base", None, "workdir of the teacher of an adapter from PyTorch", flag_values=values)
    flags.DEFINE_enum("which", "ema", ["ema", "params"], "averaged or last parameters of a run", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "default: as it is stored", flag_values=values)
    flags.DEFINE_float("max_shard_gb", 5.0, "size of a file for PyTorch, in 10^9 bytes", flag_values=values)
    flags.DEFINE_string("key", "", "of the state dict in a .pth file that has several", flag_values=values)
    flags.DEFINE_list("mesh", [], "fsdp=16: parts that lie together in the checkpoint", flag_values=values)
    flags.mark_flags_as_required(["source", "out"], flag_values=values)
    _define_join_flags(values)

  def convert(values):
    from pflow_jax.convert.program import convert as run

    try:
      run(
        values.source,
        values.out,
        base=values.base,
        which=values.which,
        dtype=values.dtype,
        max_shard_gb=values.max_shard_gb,
        key=values.key,
        mesh=_mesh_sizes(values.mesh),
      )
    except KeyboardInterrupt as stopped:
      raise KeyboardInterrupt("stopped; the same command goes on where it was") from stopped

  _run(define, convert, argv)


def _mesh_sizes(sizes: list[str]) -> dict[str, int]:
  """{"data": 4} of --mesh=data=4."""
  from pflow_jax.sharding import AXES

  for size in sizes:
    axis, _, number = size.partition("=")
    if axis not in AXES or not number.lstrip("-").isdigit():
      raise ValueError(f"--mesh: expected sizes of {AXES} such as data=4,fsdp=64, got {size!r}")
  return {size.partition("=")[0]: int(size.partition("=")[2]) for size in sizes}


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


def _plan(argv: list[str]) -> None:
  import jax
  from absl import flags
  from ml_collections import config_flags

  # Planning is done on this machine's CPU, whatever else it has; programs for other chips cannot be read back.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)

  def define(values):
    config_flags.DEFINE_config_file("config", None, "config file, with its variant after a colon", flag_values=values)
    flags.DEFINE_string("topology", None, "v5e:16x16, v5p:4x4x4, or a Cloud name, v5e-256", flag_values=values)
    flags.DEFINE_integer("slices", 1, "slices of that topology", lower_bound=1, flag_values=values)
    flags.DEFINE_list("mesh", [], "sizes, data=4,fsdp=64; default: the config's", flag_values=values)
    flags.DEFINE_integer("batch", None, "global batch size; default: the config's", lower_bound=1, flag_values=values)
    flags.DEFINE_bool(
      "fast", False, "compile in less time: the same memory, but time and traffic are overestimated", flag_values=values
    )
    flags.DEFINE_bool("search", True, "if it does not fit, look for what would", flag_values=values)
    flags.DEFINE_bool("sampling", True, "plan the sampler as well", flag_values=values)
    flags.DEFINE_bool("sweep", False, "compare all sizes of fsdp, compiled with --fast", flag_values=values)
    flags.DEFINE_string("json", None, "file for the report", flag_values=values)
    flags.mark_flags_as_required(["config", "topology"], flag_values=values)

  def plan(values):
    from pflow_jax import plan as planner
    from pflow_jax import plan_report

    config, where = values.config, planner.Slice(values.topology, values.slices)
    if values.slices > 1:
      config.mesh.slice = values.slices
    config.mesh.update(_mesh_sizes(values.mesh))
    if values.batch:
      config.train.batch_size = values.batch
    if values.json and not pathlib.Path(values.json).absolute().parent.is_dir():
      raise ValueError(f"--json: there is no folder for {values.json}")
    result: object
    if values.sweep:
      result = reports = planner.sweep(config, where)
      print(plan_report.as_table(reports))
    else:
      if planner.has_compiler():
        print(f"planning for {where.num_chips} chips; compiling takes a minute or a few", flush=True)
      result = report = planner.plan(config, where, fast=values.fast, search=values.search, sampling=values.sampling)
      print(plan_report.as_text(report))
    if values.json:
      plan_report.write_json(values.json, result)
      print(f"wrote {values.json}")

  _run(define, plan, argv)


COMMANDS = {
  "train": _train,
  "sample": _sample,
  "evaluate": _evaluate,
  "merge": _merge,
  "compare": _compare,
  "plan": _plan,
  "data": _data,
  "convert": _convert,
  "cache": _cache,
}
