"""Where programs may write, and that all of them ask."""

import os
import pathlib

import pytest
from etils import epath

from pflow_jax.conversion.cache import cache
from pflow_jax.conversion.merge import merge
from pflow_jax.conversion.program import convert
from pflow_jax.evaluation.compare import compare
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.sample import sample
from pflow_jax.evaluation.text_to_image import sample_prompts
from pflow_jax.files.folders import absolute, checked_file, checked_folder, expanded, told_apart
from pflow_jax.settings.tree import Settings
from pflow_jax.training.train import train
from pflow_jax.training.workdir import load_config, pinned
from tests.programs import quick

PACKAGE = pathlib.Path(checked_folder.__code__.co_filename).parent
ADDRESSES = ("gs://", "gs:///", "gs://../x", "gs:/bucket/run", "http://host/run", "file:///tmp/run", "a://b", "C:/run")
UNREADABLE = ("a\\b", "a\0b", "a\udcff", "x" * 256, "/".join(["x" * 200] * 18))
OTHERS = ("/", "//", "/tmp/..", "~", "~/", "/etc/run", "/bin", "/dev/run", "/proc/run", "/usr", "/home", "/dev/shm")
ODD = (
  "runs/lr=[1e-3]",
  "a*b",
  "what?",
  "{a,b}",
  "50%25",
  "a#b",
  "a b",
  " a",
  "it's",
  '"a"',
  "ü-日本",
  "a\nb",
  "-x",
  "...",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  return tmp_path


@pytest.mark.parametrize("path", ["", " ", "\n", None, 3, b"x", *ADDRESSES, *UNREADABLE, *OTHERS])
def test_empty_odd_and_dangerous_paths_are_refused(path, folder):
  for checked in (checked_folder, checked_file):
    with pytest.raises(ValueError, match="^--there: ") as error:
      checked(path, "--there")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
  assert [child.name for child in folder.iterdir()] == ["home"]


@pytest.mark.parametrize("path", [PACKAGE, PACKAGE / "runs", PACKAGE.parent, "/tmp", "/usr/share"])
def test_folders_of_others_are_refused_by_any_name(path, folder, monkeypatch):
  monkeypatch.setenv("TMPDIR", "/usr/share")  # as one that is not the usual
  (folder / "link").symlink_to(path)
  for name in (path, f"{path}/", os.path.relpath(path), "link", f"{path}/x/.."):
    with pytest.raises(ValueError, match="holds other things"):
      checked_folder(name)


@pytest.mark.parametrize("path", [*ODD, ".", "runs/new", "/tmp/new", "/dev/shm/new", "../new"])
def test_what_may_be_written_is_returned_as_given(path, folder):
  (folder / "run").mkdir()
  os.chdir(folder / "run")
  assert checked_folder(path) == path
  assert checked_folder(pathlib.Path(path)) == str(pathlib.Path(path))
  assert list(folder.rglob("new")) == []


def test_a_home_is_found_and_a_slash_dropped(folder):
  for function in (expanded, checked_folder, checked_file):
    assert function("~/run") == f"{folder}/home/run"
  assert checked_folder("runs/a//") == expanded("runs/a/") == "runs/a"
  assert checked_folder("gs://bucket/run/") == "gs://bucket/run"
  with pytest.raises(ValueError, match="is nobody's home here; for a folder of that name give ./~nobody-x"):
    checked_folder("~nobody-x")
  assert checked_folder("./~nobody-x") == "./~nobody-x"


def test_what_is_there_already_must_be_a_folder_that_can_be_written(folder, monkeypatch):
  (folder / "file").touch()
  (folder / "loop").symlink_to("loop")
  (folder / "nowhere").symlink_to("missing")
  os.mkfifo(folder / "pipe")
  for path in ("file", "file/run", "pipe", "loop", "loop/run", "nowhere", "nowhere/run"):
    with pytest.raises(ValueError, match="expected a folder|leads nowhere"):
      checked_folder(path)
  for path in ("home", "pipe", "nowhere", "home/", "home/."):
    with pytest.raises(ValueError, match="expected the path of a file"):
      checked_file(path)
  assert checked_file("file") == "file"
  assert checked_file("home", ending=".png") == "home"
  monkeypatch.setattr(os, "access", lambda path, mode: path != str(folder))
  for checked in (checked_folder, checked_file):
    with pytest.raises(ValueError, match="cannot be written"):
      checked("new/run")


@pytest.mark.parametrize("name", ["lr=[1e-3]", "a*b", "what?"])
def test_the_name_of_a_folder_is_no_pattern(folder, name):
  for parent in (name, "lr=1", "a-b", "whatx"):
    (folder / parent / "part_0").mkdir(parents=True)
  found = list(absolute(folder / name).glob("part_*"))
  assert found == [epath.Path(folder / name / "part_0")]
  assert [type(path) for path in (found[0].parent, epath.Path(found[0]))] == [type(found[0])] * 2, "it stays literal"


def test_every_program_asks(folder):
  """Also from Python, and before it reads a config, data or weights."""
  config = quick("checkerboard", "teacher")
  programs = {
    "train": lambda path: train(config, path),
    "compare": lambda path: compare(config, path),
    "sample": lambda path: sample(config, "run", num=1, out=path),
    "sample --prompt": lambda path: sample_prompts(config, "run", ["a cat"], out=path),
    "evaluate": lambda path: evaluate(config, "run", out=path),
    "merge": lambda path: merge("run", path),
    "convert": lambda path: convert("model", path),
    "cache": lambda path: cache("prompts.txt", "minilm", path),
  }
  for name, program in programs.items():
    for path in ("", "/", "~", "gs://", f"{PACKAGE}/"):
      with pytest.raises(ValueError, match="^(workdir|out): ") as error:
        program(path)
      assert name
      assert len(str(error.value)) < 300
  for read in (
    load_config,
    lambda path: sample(config, path, num=1),
    lambda path: evaluate(config, path),
    lambda path: merge(path, "out"),
    lambda path: convert(path, "out"),
  ):
    with pytest.raises(ValueError, match="expected a path such as runs/mine, got ''"):
      read("")
  assert [child.name for child in folder.iterdir()] == ["home"]


@pytest.mark.parametrize(
  "args",
  [
    ["train", "--config=CONFIGS/checkerboard.py", "--workdir="],
    ["train", "--config=CONFIGS/checkerboard.py", "--workdir", ""],
    ["train", "--config=CONFIGS/checkerboard.py", "--workdir=/"],
    ["compare", "--config=CONFIGS/compare/digits.py:quicktest", "--workdir="],
    ["sample", "--workdir="],
    ["evaluate", "--workdir", ""],
    ["merge", "--workdir=run", "--out="],
    ["convert", "--source=run", "--out="],
    ["cache", "--prompts=p.txt", "--model=minilm", "--out="],
  ],
  ids=" ".join,
)
def test_a_mistake_on_the_command_line_is_one_sentence(args, folder, capsys):
  from pflow_jax.commands.cli import main

  args = [arg.replace("CONFIGS", str(PACKAGE.parent / "configs")) for arg in args]
  with pytest.raises(SystemExit) as exit_:
    main(args)
  assert exit_.value.code == 2
  assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["pflow:"]
  assert [child.name for child in folder.iterdir()] == ["home"]


def test_a_teacher_below_a_home_is_found_from_elsewhere(folder, monkeypatch):
  monkeypatch.setattr("pflow_jax.training.workdir.newest_step", lambda checkpoints: 7)
  config = quick("checkerboard", "gmflow", "~/teacher")
  teacher = pinned("run", Settings.of(config)).teacher
  assert (teacher.workdir, teacher.step) == (f"{folder}/home/teacher", 7)


@pytest.mark.parametrize(
  ("paths", "names"),
  [
    ([], []),
    (["/home/me/runs/a/"], ["a"]),
    (["runs/a", "runs/b"], ["a", "b"]),
    (["x/a", "y/a", "y/b"], ["x/a", "y/a", "y/b"]),
    (["a", "x/a"], ["a", "x/a"]),
    (["gs://one/a", "gs://two/a"], ["one/a", "two/a"]),
    (["x/a", "x/a/", "x/b"], ["a (1)", "a (2)", "b"]),
    (["", "a"], ["", "a"]),
  ],
)
def test_folders_are_told_apart(paths, names):
  assert told_apart(paths) == names
