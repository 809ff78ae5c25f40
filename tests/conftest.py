"""Test setting: eight CPU devices, float64 where a test asks for it, no silent broadcasting."""

import fnmatch
import gc
import os

from tests.xla import flags

# Tracing makes objects by the million: to look for cycles among them as often as Python does by default takes an eighth
# of the time of a test that compiles a training step.
gc.set_threshold(50_000, 10, 10)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if flags(8) not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags(8)}".strip()

import pathlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


# What waits more than it computes, then what runs whole programs; small files fill the end of both workers.
ORDER = ("test_processes.py", "test_*.py", "training/*", "commands/*", "evaluation/*", "conversion/*", "*")


def pytest_collection_modifyitems(items):
  name = lambda item: str(item.path.relative_to(pathlib.Path(__file__).parent))
  items.sort(key=lambda item: next(i for i, pattern in enumerate(ORDER) if fnmatch.fnmatch(name(item), pattern)))


@pytest.fixture
def golden():
  """Returns a loader: golden("gm_policy") -> dict of NumPy arrays (see golden/README.md)."""

  def load(name):
    with np.load(GOLDEN / f"{name}.npz") as data:
      return dict(data)

  return load


@pytest.fixture(scope="session", autouse=True)
def signals():
  """Processes that a test starts hear the signals that it sends, also where this one was told to ignore them."""
  from tests.programs import let_processes_hear

  let_processes_hear()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """The runs of all tests share their compiled programs, in this process and in those it starts."""
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.getbasetemp().parent / "xla")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  # By default the many that take less than a second are not kept.
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """A file's compiled programs go with it. Each is mapped into memory in parts, of which Linux allows 65,530: beyond
  them, a program that is compiled ends the process."""
  yield
  jax.clear_caches()


@pytest.fixture
def float32():
  """The programs as they run: without float64 and with JAX's own broadcasting rules."""
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory):
  """Workdir of a tiny teacher on digits, trained for three steps."""
  from pflow_jax.training.train import train
  from tests.programs import quick

  folder = tmp_path_factory.mktemp("teacher")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    train(quick("digits", "teacher"), folder)
  return folder


@pytest.fixture(scope="session")
def student_run(tmp_path_factory, teacher_run):
  """Workdir of a tiny GMFlow student of `teacher_run`."""
  from pflow_jax.training.train import train
  from tests.programs import quick

  folder = tmp_path_factory.mktemp("student")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    train(quick("digits", "gmflow", teacher_run), folder)
  return folder


@pytest.fixture
def bucket(monkeypatch):
  """gs://bucket in memory: what the package does there, though not Google's own ways."""
  from etils.epath import backend
  from fsspec.implementations.memory import MemoryFileSystem

  class Store(MemoryFileSystem):
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(str(path).removeprefix("gs:/"))

  monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: Store())
  return "gs://bucket/run"
