"""The command `pflow`: train, sample, evaluate, merge, compare, plan, data, convert, cache.

Exit codes: 0 done; 2 what another try would only repeat: a mistake in the flags, the config or the files, a workdir
that another has taken over, or that takes nothing more of a run, which is saved elsewhere; 130 stopped from the
keyboard or told to stop; 1 anything else, which another try may mend (launch/local.sh starts such a run again): memory,
storage, other processes and machines, and what nobody has thought of. All but 0 come with one sentence on stderr.
"""

from __future__ import annotations

import io
import pathlib
import re
import sys

from pflow_jax.commands.cli_files import cache_command, convert_command, data_command, merge_command
from pflow_jax.commands.command import (
  MAX_SEED,
  USAGE,
  ConfigSource,
  define_join_flags,
  define_teacher_flag,
  fail,
  mesh_sizes,
  one_sentence,
  run_command,
  stop,
  whole_numbers,
)
from pflow_jax.files.output import logged_tracebacks, tolerant_output


def main(argv: list[str] | None = None) -> None:
  """Runs one command; the entry point of the console script."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer letters than a table or a prompt has
      stream.reconfigure(errors="backslashreplace")
  with tolerant_output(), logged_tracebacks(), one_sentence():
    _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
  if any(re.search("[\ud800-\udfff]", argument) for argument in argv):
    raise ValueError("the command line: expected text in UTF-8; where it is, set PYTHONUTF8=1, and rename it elsewhere")
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(USAGE)
    return
  command, rest = argv[0], argv[1:]
  if command not in COMMANDS:
    fail(2, f"there is no command {command!r}\n\n{USAGE}")
  COMMANDS[command](rest)


def _train(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("workdir", None, "folder of the run", required=True, flag_values=values)
    flags.DEFINE_bool(
      "force", False, "take the workdir over from another process that trains in it", flag_values=values
    )
    define_teacher_flag(values)
    define_join_flags(values)

  def train(values):
    from pflow_jax.evaluation.sample import preview_size, save_picture
    from pflow_jax.files.lock import TakenOver
    from pflow_jax.settings.tree import Settings
    from pflow_jax.training.origins import use_teacher
    from pflow_jax.training.rescue import Rescued
    from pflow_jax.training.train import train as run

    settings = use_teacher(Settings.of(values.config), values.teacher)
    try:
      state = run(settings, values.workdir, force=values.force, picture=(save_picture, preview_size))
    except (Rescued, TakenOver) as error:
      # Another try would begin anew where nothing can be saved, or, with --force, take the workdir back.
      raise ValueError(str(error)) from error
    if int(state.step) < settings.need("train").steps:
      stop(f"stopped at step {int(state.step)}, which is saved; the same command resumes")

  run_command(define, train, argv, _config_file())


def _config_file() -> ConfigSource:
  """--config names a Python file."""
  from pflow_jax.settings.config_file import read_config_file

  return ConfigSource("config", read_config_file, _describe)


def _config_of_run(converted: bool) -> ConfigSource:
  """--workdir names a run, whose config it is; `converted`: perhaps a teacher that was converted, not trained here."""
  from pflow_jax.training.workdir import load_config, load_settings

  def read(folder: str):
    settings = load_settings(folder)
    if settings.converted and not converted:
      raise ValueError(f"{folder} holds a converted teacher, which has no data to compare with; evaluate its student")
    if not settings.data:
      raise ValueError(f"{folder} was converted before such teachers could be sampled; convert it again")
    return load_config(folder)

  return ConfigSource("workdir", read, _describe)


def _describe(config) -> str:
  from pflow_jax.commands.config_help import describe

  return describe(config)


def _sample(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("workdir", None, "folder of the run", required=True, flag_values=values)
    flags.DEFINE_integer("num", None, "number of samples; default: 16", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
      "nfe",
      None,
      "network evaluations; default: those of the config",
      lower_bound=1,
      flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "seed of the noise", lower_bound=0, upper_bound=MAX_SEED, flag_values=values)
    flags.DEFINE_list(
      "labels",
      None,
      "classes by name or number, separated by commas; default: all in turn",
      flag_values=values,
    )
    flags.DEFINE_enum("which", "ema", ["ema", "params"], "averaged or last parameters", flag_values=values)
    flags.DEFINE_string("out", None, "path of the results without ending; of prompts, their folder", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated", flag_values=values)
    flags.DEFINE_string("prompts", None, ".txt, .jsonl or .csv with more of them", flag_values=values)
    flags.DEFINE_string("pipeline", None, "folder of the model whose encoders a prompt needs", flag_values=values)
    for side in ("height", "width"):
      flags.DEFINE_integer(side, None, "of a prompt's picture in pixels; default: as trained", flag_values=values)
    define_teacher_flag(values)
    define_join_flags(values)

  def sample(values):
    from pflow_jax.evaluation.sample import sample as run
    from pflow_jax.mesh.distributed import is_first

    if values.prompt or values.prompts:
      _sample_prompts(values)
      return
    of_prompts = [f"--{name}" for name in ("pipeline", "height", "width") if values[name].value is not None]
    if of_prompts:
      raise ValueError(f"{', '.join(of_prompts)}: of pictures of prompts; give --prompt or --prompts too")
    num = values.num or 16
    picture = run(
      values.config,
      values.workdir,
      num=num,
      nfe=values.nfe,
      seed=values.seed,
      labels=values.labels,
      which=values.which,
      teacher=values.teacher,
      out=values.out,
    )
    if is_first():
      print(f"wrote {num} samples: {picture} and {picture.with_suffix('.npz')}")

  run_command(define, sample, argv, _config_of_run(converted=True))


def _sample_prompts(values) -> None:
  from pflow_jax.data import read_prompts
  from pflow_jax.evaluation.text_to_image import SHOWN, sample_prompts
  from pflow_jax.mesh.distributed import is_first

  for name in ("labels", "num"):
    if values[name].value is not None:
      raise ValueError(f"--{name} and --prompt: expected one of them")
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
    teacher=values.teacher,
    out=values.out,
  )
  if is_first():
    print(f"wrote the pictures, overview.png (of {SHOWN} at most) and samples.npz in {out}")


def _evaluate(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("workdir", None, "folder of the run", required=True, flag_values=values)
    flags.DEFINE_multi_string(
      "also", [], "workdir of another student of the same teacher; may be repeated", flag_values=values
    )
    flags.DEFINE_string("out", None, "folder of the results; default: <workdir>/evaluation", flag_values=values)
    define_teacher_flag(values)
    define_join_flags(values)

  def evaluate(values):
    from pflow_jax.evaluation.evaluate import evaluate as run

    run(values.config, values.workdir, others=values.also, teacher=values.teacher, out=values.out)

  run_command(define, evaluate, argv, _config_of_run(converted=False))


def _compare(argv: list[str]) -> None:
  from absl import flags

  def define(values):
    flags.DEFINE_string("workdir", None, "folder of all runs and the table", required=True, flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "seeds, separated by commas; each has its own teacher", flag_values=values)
    flags.DEFINE_list("only", [], "methods to work on, separated by commas; default: all", flag_values=values)

  def compare(values):
    from pflow_jax.evaluation.compare import compare as run

    report = run(values.config, values.workdir, seeds=whole_numbers("--seeds", values.seeds), only=values.only)
    print(f"wrote {values.workdir}/compare.md, compare.json and compare.png")
    failed = [f"seed {run['seed']}, {run['run']}" for run in report["runs"] if "error" in run]
    if failed:
      fail(2, f"failed, and tried again by the same command: {'; '.join(failed)}")

  run_command(define, compare, argv, _config_file())


def _plan(argv: list[str]) -> None:
  import jax
  from absl import flags

  # Planning is done on this machine's CPU, whatever else it has; programs for other chips cannot be read back.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)

  def define(values):
    flags.DEFINE_string(
      "topology", None, "v5e:16x16, v5p:4x4x4, or a Cloud name, v5e-256", required=True, flag_values=values
    )
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

  def plan(values):
    from pflow_jax.files.folders import checked_file
    from pflow_jax.planning import plan as planner
    from pflow_jax.planning import report as plan_report
    from pflow_jax.settings.tree import Settings

    settings, where = Settings.of(values.config), planner.Slice(values.topology, values.slices)
    sizes = ({"slice": values.slices} if values.slices > 1 else {}) | mesh_sizes(values.mesh)
    settings = settings.changed("mesh", **sizes)
    if values.batch:
      settings = settings.changed("train", batch_size=values.batch)
    if values.json is not None and not pathlib.Path(checked_file(values.json, "--json")).absolute().parent.is_dir():
      raise ValueError(f"--json: there is no folder for {values.json}")
    result: object
    if values.sweep:
      result = reports = planner.sweep(settings, where)
      print(plan_report.as_table(reports))
    else:
      if planner.has_compiler():
        print(f"planning for {where.num_chips} chips; compiling takes a minute or a few", flush=True)
      result = report = planner.plan(settings, where, fast=values.fast, search=values.search, sampling=values.sampling)
      print(plan_report.as_text(report))
    if values.json:
      plan_report.write_json(values.json, result)
      print(f"wrote {values.json}")

  run_command(define, plan, argv, _config_file())


COMMANDS = {
  "train": _train,
  "sample": _sample,
  "evaluate": _evaluate,
  "merge": merge_command,
  "compare": _compare,
  "plan": _plan,
  "data": data_command,
  "convert": convert_command,
  "cache": cache_command,
}
