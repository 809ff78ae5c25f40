"""What a release says of itself: one version, workflows that can run, links that work on another page."""

import importlib.util
import re

import pytest
import yaml

import pflow_jax as pf
from tests.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def setup():
  """The module setup.py, which is not run to build anything."""
  import setuptools

  spec = importlib.util.spec_from_file_location("pflow_setup", ROOT / "setup.py")
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", lambda **metadata: module.__dict__.update(metadata=metadata))
    spec.loader.exec_module(module)
  return module


def test_all_tell_one_version(setup):
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  changes = re.findall(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
  assert setup.VERSION == setup.metadata["version"] == cited["version"] == changes[0]
  assert cited["license"] == setup.metadata["license_expression"]
  assert pf.__version__ in (setup.VERSION, "unknown")


@pytest.mark.parametrize(
  ("text", "elsewhere"),
  [
    ("[a](docs/a.md#b)", "[a]({blob}docs/a.md#b)"),
    ("![a](docs/a.png)", "![a]({raw}docs/a.png)"),
    ("[![a](docs/a.png)](docs/a.md)", "[![a]({raw}docs/a.png)]({blob}docs/a.md)"),
    ('<img src="docs/a.gif">', '<img src="{raw}docs/a.gif">'),
    ("[a](https://a.b/c) ![a](https://a.b/c.svg) [m](mailto:a@b.c)", None),
    ("[a](#b) `x[i](j)`-free text", "[a](#b) `x[i]({blob}j)`-free text"),
  ],
)
def test_links_and_pictures_are_those_of_the_release(setup, text, elsewhere):
  blob = f"{setup.URL}/blob/v{setup.VERSION}/"
  raw = blob.replace("github.com", "raw.githubusercontent.com").replace("/blob/", "/")
  assert setup.on_the_web(text) == (text if elsewhere is None else elsewhere.format(blob=blob, raw=raw))


def test_no_link_of_the_description_is_relative(setup):
  text = setup.metadata["long_description"]
  assert not [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_jobs_that_call_what_is_there(path):
  """Actions are pinned by a major tag or a branch that is meant for it; targets of make and paths exist."""
  workflow = yaml.safe_load(path.read_text())
  assert set(workflow) == {"name", True, "permissions", "jobs"} | (
    {"concurrency"} & set(workflow)
  )  # `on` is true in YAML 1.1
  assert workflow["permissions"] == {"contents": "read"}, "a job that needs more says so"
  targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
  for job in workflow["jobs"].values():
    assert job["runs-on"] == "ubuntu-latest"
    assert job["timeout-minutes"] <= 120
    for step in job["steps"]:
      assert ("uses" in step) != ("run" in step), step
      if "uses" in step:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step
      for name in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
        assert name in targets, name


def test_workflows_are_for_tests_docs_and_releases():
  assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]
  release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
  assert release[True] == {"push": {"tags": ["v*"]}}
  publish = release["jobs"]["publish"]
  assert publish["permissions"] == {"id-token": "write"}, "trusted publishing, without a password"
  assert publish["needs"] == "build"
