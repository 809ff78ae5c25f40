"""The notebooks' first cell in an environment of Colab's releases. `make installs`, which needs an index of packages"""

import glob
import os
import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.notebooks import NOTEBOOKS, ROOT, read, tagged

COLAB = {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.21.1"}  # August 2026, Python 3.13
TPU = {"TPU_ACCELERATOR_TYPE": "v5e-1"}
VERSIONS = (
  "import importlib.metadata as m; print({n: m.version(n) for n in ('jax', 'jaxlib', 'libtpu')}, m.requires('jax'))"
)


def python313():
  """Python 3.13 on the path or of pyenv, or else this Python."""
  versions = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
  for one in (*glob.glob(f"{versions}/versions/3.13.*/bin/python3.13"), shutil.which("python3.13")):
    if one and subprocess.run([one, "--version"], capture_output=True).returncode == 0:
      return one
  return sys.executable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The package, built from a copy, which what was built here before does not get into."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in ("pflow_jax", "configs"):
    shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder / "source")
  command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "source"]
  subprocess.run(command, check=True)
  (built,) = folder.glob("*.whl")
  return built


class Runtime:
  """A notebook's machine: an environment, and processes of its Python."""

  def __init__(self, folder):
    subprocess.run([python313(), "-m", "venv", folder], check=True)
    self.python = folder / "bin" / "python"
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    self.env = inherited | {"JAX_PLATFORMS": "cpu"} | TPU

  def pip(self, *args):
    subprocess.run([self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *args], check=True)

  def run(self, code, **env):
    return subprocess.run([self.python, "-c", code], env=self.env | env, cwd="/", capture_output=True, text=True)


def test_colab_s_runtime_becomes_one_that_fits(wheel, tmp_path):
  runtime, cell = Runtime(tmp_path / "runtime"), tagged(read(NOTEBOOKS[0]), "install")
  runtime.pip(*(f"{name}=={version}" for name, version in COLAB.items()))

  # An old JAX is refused in one sentence.
  runtime.pip("--no-deps", str(wheel))
  refused = runtime.run("import pflow_jax")
  assert refused.returncode == 1
  assert re.match(
    r"ImportError: pflow_jax runs on jax 0\.\d+ to 0\.\d+, and 0\.7\.2 is installed: ", refused.stderr.splitlines()[-1]
  )

  # The cell installs, and asks for a restart: JAX was imported in this process.
  source = {"PFLOW_SOURCE": wheel.as_uri()}
  first = runtime.run(f"import jax\n{cell}", **source)
  assert "jax 0.7.2 was imported before" in first.stderr.splitlines()[-1], first.stderr
  assert "restart the runtime" in first.stderr.splitlines()[-1]

  # After the restart all fits, and the cell has nothing to install.
  versions = runtime.run(VERSIONS)
  assert versions.returncode == 0, versions.stderr
  found, _, needs = versions.stdout.partition("} ")
  found = dict(re.findall(r"'(\w+)': '([^']+)'", found))
  (libtpu,) = [Requirement(one) for one in re.findall(r"libtpu==[\d.*]+", needs)][:1]
  assert tuple(map(int, found["jax"].split(".")[:2])) >= (0, 10), found
  assert found["jaxlib"] == found["jax"], found
  assert libtpu.specifier.contains(found["libtpu"]), (found, str(libtpu))
  again = runtime.run(f"{cell}\nimport jax\nprint(pf.DiT.__name__, jax.devices())", PFLOW_SOURCE="file:///nowhere")
  assert again.returncode == 0, again.stderr
  assert "DiT [CpuDevice(id=0)]" in again.stdout
