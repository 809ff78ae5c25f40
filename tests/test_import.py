"""`import pflow_jax` refuses a JAX that it does not run on, in one sentence."""

import re
import sys
import types
from importlib import metadata

import pytest

from pflow_jax.files import versions as installed_versions
from tests.pages import ROOT

FITS = {"jax": "0.10.2", "jaxlib": "0.10.1", "numpy": "2.4.6", "libtpu": "0.0.42.1", "jax-cuda12-plugin": "0.10.2"}


@pytest.fixture
def installed(monkeypatch):
  """Pretends that these versions are installed, and that these modules of other versions are imported."""

  def pretend(versions, loaded=()):
    def version(name):
      if name not in versions:
        raise metadata.PackageNotFoundError(name)
      return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"', "numpy>=2.0"])
    for name in ("jax", "numpy"):
      monkeypatch.delitem(sys.modules, name, raising=False)
    for name, number in dict(loaded).items():
      monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__version__=number))

  return pretend


@pytest.mark.parametrize(
  ("versions", "loaded", "message"),
  [
    (
      {"jax": "0.7.2", "jaxlib": "0.7.2"},
      {},
      r"runs on jax 0\.10 to 0\.12, and 0\.7\.2 is installed: .*pip install -U",
    ),
    ({"jax": "1.0"}, {}, r"and 1\.0 is installed"),
    ({"jaxlib": "0.7.2"}, {}, r"jaxlib 0\.7\.2 is installed beside jax 0\.10\.2"),
    ({"jax-cuda12-plugin": "0.7.2"}, {}, r"jax-cuda12-plugin 0\.7\.2 is installed beside jax"),
    ({"jax-cuda13-plugin": "0.9.0"}, {}, r"jax-cuda13-plugin 0\.9\.0 is installed beside jax"),
    ({"libtpu": "0.0.21.1"}, {}, r"libtpu 0\.0\.21\.1 is installed beside jax 0\.10\.2, which needs 0\.0\.42"),
    ({}, {"jax": "0.7.2"}, r"jax 0\.7\.2 was imported before 0\.10\.2 was installed: restart the runtime"),
    ({}, {"numpy": "2.0.2"}, r"numpy 2\.0\.2 was imported before 2\.4\.6 was installed: restart"),
  ],
)
def test_what_does_not_fit_is_refused(installed, versions, loaded, message):
  installed(FITS | versions, loaded)
  with pytest.raises(ImportError, match=message) as refused:
    installed_versions.check_jax()
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
  "versions",
  [FITS, FITS | {"libtpu": "0.0.43.1", "jax": "0.10.3.dev20261001"}, {"jax": "0.12.1", "jaxlib": "0.12.1"}, {}],
)
def test_what_fits_is_taken(installed, versions):
  installed(versions, {"jax": versions["jax"]} if versions else {})
  installed_versions.check_jax()


def test_the_check_asks_for_the_releases_that_are_installed_with_the_package():
  asked = re.search(r'^JAX = ">=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text(), re.M)
  (first, last) = installed_versions.JAX
  assert (first, (last[0], last[1] + 1)) == tuple(tuple(map(int, bound.split("."))) for bound in asked.groups())
