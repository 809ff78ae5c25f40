"""The command line: whole commands, and what a mistake looks like."""

import pytest

from tests.programs import pflow


def test_train_sample_evaluate_one_step_at_a_time(tmp_path):
  teacher, student = tmp_path / "teacher", tmp_path / "student"
  run = pflow("train", "--config=configs/digits.py:teacher,quicktest", "--workdir", teacher)
  assert "head/proj_out/kernel" in run.stdout, "the parameter table"
  assert "3/3" in run.stdout
  flags = [f"--config.teacher.workdir={teacher}", "--config.train.steps=2", f"--workdir={student}"]
  pflow("train", "--config=configs/digits.py:gmflow,quicktest", *flags)
  run = pflow("evaluate", "--workdir", student, "--config.sample.nfe=(2, 3)")
  assert "student, 3 NFE" in run.stdout
  assert "student, 1 NFE" not in run.stdout
  run = pflow("sample", "--workdir", student, "--labels", "three", check=False)
  assert run.returncode == 2
  assert "there is no class 'three'" in run.stderr
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
    "config.optimizer.learning_rate: expected a number, got nan",
  ),
  "a size of zero": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.model.num_heads=0"],
    "config.model.num_heads: expected > 0, got 0",
  ),
  "an unknown dtype": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.model.dtype=float8"],
    "config.model.dtype: expected one of",
  ),
  "a comparison is no run": (
    ["train", "--config=configs/compare/digits.py", "--workdir=x"],
    "config.train: steps, batch_size must be set",
  ),
  "samples refused before training": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.evaluate.num_samples=-4"],
    "expected num_samples",
  ),
  "an unquoted table": (
    ["train", "--config=configs/digits.py", "--workdir=x", "--config.optimizer.rates=((head,0.1),)"],
    "rates: expected rows (pattern, factor)",
  ),
  "stray word": (["train", "--config=configs/digits.py", "--workdir=x", "now"], "'now'"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_end_in_a_message_without_a_traceback(name, tmp_path, monkeypatch, capsys):
  from pflow_jax.cli import main

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
  from pflow_jax.cli import main

  main([])
  shown = capsys.readouterr().out
  assert all(name in shown for name in ("train", "sample", "evaluate", "compare", "data"))

  main(["sample", "--help"])
  assert "--labels" in capsys.readouterr().out


def test_compare_passes_its_flags_on_and_says_what_failed(tmp_path, monkeypatch, capsys):
  from pflow_jax import compare
  from pflow_jax.cli import main

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
