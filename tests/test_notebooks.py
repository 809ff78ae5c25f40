"""How the notebooks are kept: without outputs, with one first cell; and what that cell installs."""

import fnmatch
import re
import subprocess
import sys
import types

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, ROOT, SMALL, assigned, read, tagged, tags, with_settings

COLAB = "https://colab.research.google.com/github/pflow-jax/pflow_jax/blob/main/notebooks/"
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@by_name
def test_it_is_kept_without_outputs_and_in_one_form(path):
  """`jupyter nbconvert --clear-output --inplace notebooks/*.ipynb` brings it there."""
  notebook = read(path)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    assert re.fullmatch(r"[a-z][a-z0-9-]*", cell.id), (
      f"{cell.id}: a cell's id is a word of ours, so that diffs are small"
    )
    assert set(cell.metadata) <= {"tags"}, cell.id
    if cell.cell_type == "code":
      assert (cell.outputs, cell.execution_count) == ([], None), cell.id
  assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
  assert path.read_text() == nbformat.writes(notebook, indent=1) + "\n"


@by_name
def test_the_badge_opens_it_in_colab(path):
  assert f"({COLAB}{path.name})" in read(path).cells[0].source


@by_name
def test_links_to_this_project_lead_somewhere(path):
  text = "".join(cell.source for cell in read(path).cells)
  hosts = r"(?:colab[\w.]+/github|github\.com|raw\.githubusercontent\.com)"
  for target in re.findall(rf"https://{hosts}/pflow-jax/pflow_jax/(?:blob/)?main/([^)#\s]+)", text):
    assert (ROOT / target).exists(), target


def test_all_begin_with_the_same_cell_and_have_settings_that_are_shrunk():
  assert {path.stem for path in NOTEBOOKS} == set(SMALL)
  assert len({tagged(read(path), "install") for path in NOTEBOOKS}) == 1
  for path in NOTEBOOKS:
    first = next(cell for cell in read(path).cells if cell.cell_type == "code")
    assert tags(first) == {"install"}
    assert set(SMALL[path.stem]) <= assigned(tagged(read(path), "settings"))
    with pytest.raises(ValueError, match="the notebook has no"):
      with_settings(read(path), {"no_such_setting": 1})


def test_the_start_and_the_readme_link_to_every_notebook():
  for page in ("README.md", "docs/index.md"):
    assert set(re.findall(rf"{re.escape(COLAB)}(\w+)\.ipynb", (ROOT / page).read_text())) == set(SMALL)


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """Runs the first cell on a pretended machine; returns what it asks pip for."""

  def run(nvidia="command not found", devices=(), plugin=False, importable=False, **env):
    asked = []

    def call(command, **_):
      if command[1] == "-c":
        return types.SimpleNamespace(returncode=0 if importable else 1)
      assert command[:4] == [sys.executable, "-m", "pip", "install"]
      asked.append(command[-1])

    for name in ("COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE", "TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY", "PFLOW_SOURCE"):
      monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "run", call)
    monkeypatch.setattr(subprocess, "getoutput", lambda command: nvidia)
    monkeypatch.setattr("glob.glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if plugin else None)
    exec(tagged(read(NOTEBOOKS[0]), "install"), {})
    return asked

  return run


SMI = "| NVIDIA-SMI 580.82.07   Driver Version: 580.82.07   CUDA Version: {} |"


@pytest.mark.parametrize(
  ("options", "extra"),
  [
    (dict(), ""),
    (dict(nvidia="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."), ""),
    (dict(nvidia=SMI.format("12.4")), "[cuda]"),
    (dict(nvidia=SMI.format("13.0")), "[cuda13]"),
    (dict(nvidia=SMI.format("13.0"), plugin=True), "[cuda]"),
    (dict(devices=["/dev/vfio/0"]), "[tpu]"),
    (dict(devices=["/dev/accel0"]), "[tpu]"),
    (dict(TPU_ACCELERATOR_TYPE="v5e-1"), "[tpu]"),
  ],
)
def test_the_first_cell_asks_for_what_the_machine_has(machine, options, extra):
  assert machine(**options) == [f"pflow-jax{extra} @ git+https://github.com/pflow-jax/pflow_jax"]


def test_the_first_cell_does_nothing_where_all_is_there(machine):
  assert machine(importable=True, nvidia=SMI.format("12.4")) == []
