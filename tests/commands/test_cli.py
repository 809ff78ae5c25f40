"""The command line: whole commands, and what a mistake looks like."""

import errno
import io
import platform
import pwd
import subprocess
import sys

import jax
import pytest

import pflow_jax as pf
from pflow_jax.commands import cli
from pflow_jax.commands.command import USAGE
from pflow_jax.commands.compilations import cache_compilations
from pflow_jax.commands.flags import as_flags
from pflow_jax.files import foreign
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from tests.programs import pflow, quick


@pytest.mark.usefixtures("float32")
@pytest.mark.slow
def test_train_sample_evaluate_one_step_at_a_time(tmp_path, capsys):
  teacher, student = tmp_path / "teacher", tmp_path / "student"
  run = pflow("train", "--config=configs/digits.py:teacher,quicktest", "--workdir", teacher)
  assert "head/proj_out/kernel" in run.stdout, "the parameter table"
  assert "3/3" in run.stdout
  flags = [f"--config.teacher.workdir={teacher}", "--config.train.steps=2", f"--workdir={student}"]
  pflow("train", "--config=configs/digits.py:gmflow,quicktest", *flags)
  run = pflow("evaluate", "--workdir", student, "--config.sample.nfe=(2, 3)")
  assert "student, 3 NFE" in run.stdout
  assert "student, 1 NFE" not in run.stdout
  with pytest.raises(SystemExit) as exit_:
    cli.main(["sample", f"--workdir={student}", "--labels=three"])
  assert exit_.value.code == 2
  assert "there is no class 'three'" in capsys.readouterr().err
  run = pflow("sample", "--workdir", student, "--num", 4, "--nfe", 2, "--labels", "3,5", "--out", tmp_path / "s")
  assert (tmp_path / "s.png").exists()
  assert (tmp_path / "s.npz").exists()


MISTAKES = {
  "no command": (["trian"], "no command 'trian'"),
  "no workdir": (["train", "--config=configs/digits.py"], "workdir"),
  "no config": (["train", "--workdir=x"], "config"),
  "unknown flag": (["sample", "--workdir=x", "--nun=3"], "pflow"),
  "unknown variant": (["train", "--config=configs/digits.py:techer", "--workdir=x"], "'teacher'"),
  "misspelt key": (["train", "--config=configs/digits.py", "--workdir=x", "--config.train.stepps=1"], "steps"),
  "key of another objective": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.objective.nfe=2"],
    "no key nfe",
  ),
  "no such file": (["train", "--config=configs/nope.py", "--workdir=x"], "configs/nope.py"),
  "wrong type": (["train", "--config=configs/digits.py", "--workdir=x", "--config.train.steps=many"], "steps"),
  "no teacher": (["train", "--config=configs/digits.py:gmflow", "--workdir=x"], "train a teacher first"),
  "no run": (["evaluate", "--workdir=/nonexistent"], "pflow train"),
  "unknown method": (
    ["compare", "--config=configs/compare/digits.py:quicktest", "--workdir=x", "--only=dx,gmflw"],
    "'gmflw'; did you mean 'gmflow'",
  ),
  "seeds that are no numbers": (
    ["compare", "--config=configs/compare/digits.py:quicktest", "--workdir=x", "--seeds=0,one"],
    "whole numbers",
  ),
  "a config that is no comparison": (["compare", "--config=configs/digits.py", "--workdir=x"], "no key 'data'"),
  "no such comparison": (["compare", "--config=configs/nope.py", "--workdir=x"], "configs/nope.py"),
  "no flags": (["sample"], "workdir"),
  "not a number": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.optimizer.learning_rate=nan"],
    "config.optimizer.learning_rate: expected a finite number, got nan",
  ),
  "a size of zero": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.model.num_heads=0"],
    "config.model.num_heads: expected > 0 and at most 1,000,000, got 0",
  ),
  "an unknown dtype": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.model.dtype=float8"],
    "config.model.dtype: expected one of",
  ),
  "a comparison is no run": (
    ["train", "--config=configs/compare/digits.py", "--workdir=x"],
    "config has no key 'flops'",
  ),
  "samples refused before training": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.evaluate.num_samples=-4"],
    "expected num_samples",
  ),
  "an unquoted table": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.optimizer.rates=((head,0.1),)"],
    "config.optimizer.rates: 0: input should be a valid tuple",
  ),
  "the key of a section": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--steps=3"],
    "--config.train.steps?",
  ),
  "a flag that is nearly one": (["sample", "--workdr=x"], "there is no flag --workdr; did you mean --workdir?"),
  "two flags missing": (["train"], "--workdir and --config must be given"),
  "no value": (["train", "--workdir=x", "--config"], "--config: '': expected a Python file"),
  "a page of nothing": (["demo"], "--workdir must be given"),
  "a workdir that is called so": (["train", "--workdir", "flagfile_runs/a"], "--config must be given"),
  "a file of flags": (["train", "--flagfile=/dev/zero"], "files of flags are not read"),
  "a pattern that is none": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.mesh.rules=(('(', ()),)"],
    "config.mesh: ",
  ),
  "more steps than are counted": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.train.steps=1" + "0" * 30],
    "config.train.steps: expected a whole number below 2^31",
  ),
  "a million processes that read": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.train.num_workers=1000000"],
    "config.train.num_workers=1000000: takes 95.37 TiB of memory, this machine has 8 GiB",
  ),
  "a batch that fits nowhere": (
    ["train", "--config=configs/checkerboard.py", "--workdir=x", "--config.train.batch_size=2000000000"],
    "config.train.batch_size=2000000000: takes ",
  ),
  "a network that fits nowhere": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.model.width=1000000"],
    "config.model: what is trained, the teacher and a batch: takes ",
  ),
  "a network of a million layers": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.model.depth=1000000"],
    "config.model.depth: expected > 0 and at most 1,000, got 1000000",
  ),
  "a mesh of a million devices": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.mesh.data=1000000"],
    "config.mesh: expected sizes whose product is the number of devices",
  ),
  "a seed that JAX would cut": (
    ["compare", "--config=configs/compare/digits.py:quicktest", "--workdir=x", "--seeds=0,4294967296"],
    "--seeds: expected whole numbers from 0 to 4294967295",
  ),
  "a warm-up longer than the run": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.train.steps=50"],
    "set --config.optimizer.warmup_steps=5, or --config.train.steps higher",
  ),
  "infinite samples": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.sample.temperature=1e400"],
    "config.sample.temperature: expected a finite number, got inf",
  ),
  "stray word": (["train", "--config=configs/digits.py", "--workdir=x", "now"], "'now'"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_end_in_a_message_without_a_traceback(name, tmp_path, monkeypatch, capsys):
  from pflow_jax.commands.cli import main

  monkeypatch.setattr(foreign, "machine_memory", lambda: 2**33)  # bytes; nothing of the like is made here
  args, expected = MISTAKES[name]
  args = [a.replace("--workdir=x", f"--workdir={tmp_path}/x") for a in args]
  with pytest.raises(SystemExit) as exit_:
    main(args)
  assert exit_.value.code == 2
  shown = capsys.readouterr().err
  assert expected in shown
  assert "Traceback" not in shown
  assert not (tmp_path / "x").exists()


def test_help_names_the_commands(capsys):
  from pflow_jax.commands.cli import main

  main([])
  shown = capsys.readouterr().out
  assert all(name in shown for name in ("train", "sample", "evaluate", "compare", "data"))

  main(["sample", "--help"])
  assert "--labels" in capsys.readouterr().out


def test_the_version_is_told_without_jax():
  code = "import sys; from pflow_jax.commands.cli import main; main(['--version']); assert 'jax' not in sys.modules"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert run.stdout == f"pflow {pf.__version__} (jax {jax.__version__}, Python {platform.python_version()})\n", (
    run.stderr
  )


def test_the_package_is_the_command():
  run = subprocess.run([sys.executable, "-m", "pflow_jax"], capture_output=True, text=True)
  assert (run.returncode, run.stdout) == (0, f"{USAGE}\n")
  run = subprocess.run([sys.executable, "-m", "pflow_jax", "trian"], capture_output=True, text=True)
  assert run.returncode == 2
  assert run.stderr.startswith("pflow: there is no command 'trian'")


def test_help_of_a_config_lists_its_keys_with_their_owners_words(capsys, tmp_path):
  cli.main(["train", "--config=configs/digits.py:gmflow", "--help"])
  shown = capsys.readouterr().out
  assert "a Python program that is executed" in shown
  assert "--config.train.steps=4000  int: optimizer steps of the whole run." in shown
  assert "--config.teacher.workdir  (not set)  str | None: folder of its run." in shown
  assert "objective, see pflow_jax.core.objectives.imitation.Imitation" in shown
  assert "--config.head.num_components=16  int: K." in shown
  workdir.claim(tmp_path, Settings.of(quick("digits", "gmflow"), converted=True))
  cli.main(["sample", f"--workdir={tmp_path}", "--help"])
  assert "--config.sample.batch_size=64  int: samples at a time." in capsys.readouterr().out
  cli.main(["compare", "--config=configs/compare/digits.py", "--help"])
  assert "--config.flops=4000000000000.0" in capsys.readouterr().out


def test_help_without_a_config_lists_the_sections(capsys):
  cli.main(["train", "--help"])
  shown = capsys.readouterr().out
  assert "A config file is a program" in shown
  assert "train: steps, batch_size, accumulation" in shown
  assert "mlp: width, depth, dtype, time_scale" in shown
  assert "prompts: split, model, shape" in shown


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config():\n  return foo\n", "config.py, line 2: NameError: name 'foo' is not defined"),
    ("def get_config(:\n", "config.py, line 1: SyntaxError: invalid syntax"),
    ("def get_config():\n  return 3\n", "expected a ConfigDict from get_config, got 3"),
  ],
)
@pytest.mark.parametrize("name", ["train", "plan", "compare"])
def test_a_config_file_that_fails_ends_in_a_sentence(name, text, message, tmp_path, capsys):
  (tmp_path / "config.py").write_text(text)
  flags = {"plan": ["--topology=v5e-8"]}.get(name, [f"--workdir={tmp_path}/x"])
  with pytest.raises(SystemExit) as exit_:
    cli.main([name, f"--config={tmp_path}/config.py", *flags])
  shown = capsys.readouterr().err
  assert exit_.value.code == 2
  assert message in shown
  assert shown.count("\n") == 1


@pytest.mark.parametrize(
  ("error", "code", "message"),
  [
    (ValueError("what to change"), 2, "pflow: what to change\n"),
    (FloatingPointError("not finite"), 2, "pflow: not finite\n"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 2, "No such file or directory: 'a'"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "Permission denied: 'a'"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "File name too long"),
    (OSError(errno.ENOSPC, "No space left on device", "a"), 1, "No space left on device"),
    (ConnectionResetError("reset by peer"), 1, "reset by peer"),
    (RuntimeError("try again"), 1, "try again"),
    (MemoryError("Unable to allocate 7 PiB"), 1, "out of memory; lower the batch size"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 7 PiB\n  at 0x1\n"), 1, "(RESOURCE_EXHAUSTED: 7 PiB)\n"),
    (RecursionError("maximum recursion depth"), 2, "nested too deeply"),
    (ImportError("No module named 'gcsfs'"), 2, "-m pip install"),
    (KeyError("a"), 1, "a bug of pflow_jax, or of a library: KeyError: 'a'"),
    (AssertionError(), 1, "AssertionError"),
    (TypeError("line\nline"), 1, "TypeError: line\n(set PFLOW_TRACEBACK=1"),
    (KeyboardInterrupt(), 130, "pflow: stopped\n"),
    (ValueError("\x1b[2J\u202e" + "x" * 5000), 2, "\\x1b[2J\\u202exxx"),
  ],
)
def test_whatever_is_raised_ends_in_a_sentence_and_the_right_code(error, code, message, monkeypatch, capsys):
  def fails(argv):
    raise error

  monkeypatch.setitem(cli.COMMANDS, "data", fails)
  with pytest.raises(SystemExit) as exit_:
    cli.main(["data"])
  shown = capsys.readouterr().err
  assert exit_.value.code == code
  assert message in shown
  assert shown.startswith("pflow: ")
  assert len(shown) < 400


def test_a_terminal_that_knows_no_such_letter_gets_its_number(monkeypatch):
  monkeypatch.setitem(cli.COMMANDS, "data", lambda argv: print("1.00 ± 0.02"))
  written = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
  cli.main(["data"])
  sys.stdout.flush()
  assert written.getvalue() == b"1.00 \\xb1 0.02\n"


def test_arguments_that_are_no_text_are_refused(capsys):
  with pytest.raises(SystemExit) as exit_:
    cli.main(["sample", "--workdir=caf\udce9"])
  assert exit_.value.code == 2
  assert "expected text in UTF-8" in capsys.readouterr().err


def test_a_user_without_a_name_or_a_home_keeps_no_compiled_programs(monkeypatch):
  def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

  monkeypatch.setattr(pwd, "getpwuid", nobody)
  for name in ("HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.config, "update", lambda *given: pytest.fail(f"set {given}"))
  monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
  cache_compilations()


def test_compare_passes_its_flags_on_and_says_what_failed(tmp_path, monkeypatch, capsys):
  from pflow_jax.commands.cli import main
  from pflow_jax.evaluation import compare

  calls, runs = [], [{"seed": 2, "run": "dx/nfe1", "error": "ValueError: x"}, {"seed": 2, "run": "dx/nfe2"}]
  monkeypatch.setattr(compare, "compare", lambda *args, **kw: calls.append((args, kw)) or {"runs": runs})
  args = ["compare", "--config=configs/compare/digits.py:quicktest", f"--workdir={tmp_path}", "--config.flops=5e7"]
  with pytest.raises(SystemExit) as exit_:
    main([*args, "--seeds=2,3", "--only=dx"])
  assert exit_.value.code == 2
  shown = capsys.readouterr().err
  assert "seed 2, dx/nfe1" in shown
  assert "nfe2" not in shown
  ((config, folder), options) = calls.pop()
  assert config.flops == 5e7
  assert ",quicktest" in config.teacher.config
  assert (folder, options) == (str(tmp_path), {"seeds": [2, 3], "only": ["dx"]})
  runs.clear()
  main(args)
  assert calls[0][1] == {"seeds": [0], "only": []}


@pytest.mark.parametrize(
  ("message", "told"),
  [
    ("height, width: too large", "--height, --width: too large"),
    ("out: expected a folder: none is there", "--out: expected a folder: none is there"),
    ("config: it has no key", "config: it has no key"),
    ("depth: no flag", "depth: no flag"),
    ("height, depth: not both are flags", "height, depth: not both are flags"),
    ("--out: said so already", "--out: said so already"),
    ("a sentence", "a sentence"),
  ],
)
def test_a_message_about_an_argument_names_the_flag(message, told):
  assert as_flags(message, ("config", "height", "width", "out")) == told


def test_a_flag_may_be_written_with_hyphens(capsys):
  with pytest.raises(SystemExit):
    cli.main(
      ["train", "--config", "configs/digits.py:teacher", "--preview-autoencoder", "taesd/taef2", "--no-such-flag=1"]
    )
  assert "there is no flag --no-such-flag" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main(["convert", "--source", "a", "--out=b", "--max-shard-gb=many"])
  assert "max_shard_gb" in capsys.readouterr().err
