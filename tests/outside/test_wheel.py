"""The release as it is downloaded: wheel and sdist, an environment of its own, the demo in an empty folder."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from tests.pages import ROOT, fences
from tests.test_pages import SMALLER

QUICK = ["tests/test_rooms.py", "tests/test_api.py", "tests/test_prose.py", "tests/test_release.py"]
RUN = [
  "train --config digits:teacher,quicktest --workdir runs/teacher",
  "train --config digits:gmflow,quicktest --workdir runs/student --config.teacher.workdir=runs/teacher",
  "evaluate --workdir runs/student",
  "sample --workdir runs/student --num 16 --labels 3,7 --seed 1",
  "convert --source runs/student --out student",
]


def run(*command, cwd=None, **env):
  clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
  done = subprocess.run(
    [*map(str, command)], cwd=cwd, env=clean | {"JAX_PLATFORMS": "cpu"} | env, capture_output=True, text=True
  )
  assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
  return done.stdout


@pytest.fixture(scope="module")
def files():
  """Files of the project: those that git has, and those that it does not ignore."""
  listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
  return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def release(tmp_path_factory, files):
  """Folder with sdist and wheel, built of a copy: what a build leaves behind is not in it."""
  folder = tmp_path_factory.mktemp("release")
  for name in files:
    (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / name, folder / "source" / name)
  run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
  return folder / "dist"


@pytest.fixture(scope="module")
def wheel(release):
  (path,) = release.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def metadata(wheel):
  with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def env(wheel, tmp_path_factory):
  """Folder of programs of a new environment with the wheel; what it depends on is that of this one."""
  folder = tmp_path_factory.mktemp("env")
  venv.create(folder, with_pip=True)
  bin_ = folder / "bin"
  run(bin_ / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
  site = pathlib.Path(run(bin_ / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
  (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return bin_


def test_the_index_would_take_it(release):
  run(sys.executable, "-m", "twine", "check", "--strict", *release.iterdir())


def test_the_wheel_is_complete_and_has_nothing_else(wheel, files):
  package = {name for name in files if name.startswith("pflow_jax/")}
  configs = {f"pflow_jax/{name}" for name in files if name.startswith("configs/")}
  with zipfile.ZipFile(wheel) as archive:
    found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
  assert found == package | configs
  assert {"pflow_jax/py.typed", "pflow_jax/__main__.py", "pflow_jax/configs/digits.py"} <= found


def test_the_sdist_is_the_project_whole(release, files):
  (path,) = release.glob("*.tar.gz")
  with tarfile.open(path) as archive:
    found = {member.name.partition("/")[2] for member in archive if member.isfile()}
  assert files - found == set()
  made = {name for name in found - files if not name.startswith("pflow_jax.egg-info/")}
  assert made == {"PKG-INFO", "setup.cfg"}


def test_tests_of_the_sdist_run_in_it(release, tmp_path):
  (path,) = release.glob("*.tar.gz")
  with tarfile.open(path) as archive:
    archive.extractall(tmp_path, filter="data")
  (folder,) = tmp_path.iterdir()
  run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK, cwd=folder, PYTHONPATH=str(folder))
  collected = run(sys.executable, "-m", "pytest", "--collect-only", "-qq", cwd=folder, PYTHONPATH=str(folder))
  assert len(collected.splitlines()) > 100


def test_the_description_has_links_that_work_elsewhere(metadata):
  """Absolute ones, each to a file of the project or a page of another."""
  text = metadata.get_payload()
  found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
  assert len(found) > 20
  assert not [link for link in found if not link.startswith("https://")]
  own = rf"https://(?:raw\.githubusercontent|github)\.com/pflow-jax/pflow_jax/(?:blob/)?v{metadata['Version']}/([^#]+)"
  paths = [match[1] for link in found if (match := re.match(own, link))]
  assert {"docs/images/digits.png", "docs/methods.md", "CONTRIBUTING.md"} <= set(paths)
  assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_metadata(metadata):
  assert metadata["License-Expression"] == "Apache-2.0"
  assert metadata["Requires-Python"] == ">=3.11"
  assert {"tpu", "cuda", "torch", "text", "hub", "docs", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_what_it_needs_is_on_the_index(env, wheel):
  run(env / "python", "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", wheel)


def test_the_demo_runs_in_an_empty_folder(env, metadata, tmp_path):
  where = run(env / "python", "-c", "import pflow_jax; print(pflow_jax.__file__)", cwd=tmp_path).strip()
  assert pathlib.Path(where).is_relative_to(env.parent)
  told = f"pflow {metadata['Version']} ("
  assert run(env / "pflow", "--version", cwd=tmp_path).startswith(told)
  assert run(env / "python", "-m", "pflow_jax", "--version", cwd=tmp_path).startswith(told)
  for line in RUN:
    run(env / "pflow", *line.split(), cwd=tmp_path)
  assert "student, 1 NFE" in (tmp_path / "runs/student/evaluation/evaluation.md").read_text()
  assert len(list((tmp_path / "runs/student/samples").glob("*.png"))) == 1
  assert f"pflow_jax {metadata['Version']}, jax" in (tmp_path / "student/README.md").read_text()


def test_the_twelve_lines_run_in_an_empty_folder(env, tmp_path):
  (block,) = (fence.text for fence in fences(ROOT / "README.md") if fence.language == "python")
  for pattern, small in SMALLER.items():
    block = re.sub(pattern, small, block)
  run(env / "python", "-c", block + "\nassert x.shape == (16, 8, 8, 1)\n", cwd=tmp_path, MPLBACKEND="agg")
  assert (tmp_path / "runs/s/config.json").exists()
