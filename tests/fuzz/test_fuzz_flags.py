"""Every flag of every command with values that nobody should give: one sentence, and nothing is written."""

import re

import pytest

from tests.fuzz.commands import build_once, problem_of, stop_at_border, tree
from tests.fuzz.seeds_workdirs import write_runs
from tests.programs import ROOT

VALUES = (
  *("", " ", "-1", "0", "1e400", "nan", "9" * 5000, "\x00", "é", "\udcff", "[", "../..", "/dev/null", "x" * 5000),
  *("\x1b[2J", "²", "(1, 2"),
)
BOARD = f"--config={ROOT}/configs/checkerboard.py:teacher,quicktest"
COMMANDS = {
  "train": [BOARD, "--workdir=new"],
  "sample": ["--workdir=student", "--out=out"],
  "evaluate": ["--workdir=student", "--out=out"],
  "plot": ["student", "--out=out"],
  "merge": ["--workdir=student", "--out=out"],
  "compare": [f"--config={ROOT}/configs/compare/checkerboard.py:quicktest", "--workdir=new"],
  "plan": [BOARD, "--topology=v5e-1", "--nosampling"],
  "convert": ["--source=missing.safetensors", "--out=out"],
  "reference": ["--images=missing", "--features=missing.pt", "--out=out.npz"],
  "cache": ["--prompts=missing.txt", "--model=minilm", "--out=out"],
}
KEYS = ("train.steps", "train.profile", "sample.nfe", "data.name", "model.width", "optimizer.rates", "seed", "policy")

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PFLOW_DATA_DIR", str(tmp_path))
  stop_at_border(monkeypatch)
  build_once(monkeypatch)
  return tmp_path


def flags_of(command, capsys):
  from pflow_jax.commands.cli import main

  main([command, "--help"])
  return re.findall(r"^ +--(?:\[no\])?(\w+):", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_values_of_flags_end_in_a_sentence(command, folder, capsys):
  if any("student" in argument for argument in COMMANDS[command]):
    write_runs(folder)
  flags = flags_of(command, capsys)
  assert len(flags) > 1
  if command == "train":
    flags += [f"config.{key}" for key in KEYS]
  before, wrong = tree(folder), []
  for flag in flags:
    for value in VALUES:
      others = [argument for argument in COMMANDS[command] if not argument.startswith(f"--{flag}=")]
      if problem := problem_of(command, *others, f"--{flag}={value}"):
        wrong.append(f"--{flag}={value!r:.20}: {problem}")
  assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:12])
  assert tree(folder) == before


@pytest.mark.parametrize("words", [["x"], ["--"], ["emoji", "x"], ["--help", "x"], ["emoji\x00"], [""], ["é"]])
@pytest.mark.parametrize("command", ["data", "trian", "", "--", "\x00"])
def test_hostile_words_end_in_a_sentence(command, words, folder):
  assert problem_of(command, *words) is None
