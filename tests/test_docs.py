"""The site of the pages is built, strictly: every public name is on it, and nothing is loaded from elsewhere."""

import base64
import importlib.util
import os
import re
import subprocess
import sys

import nbformat
import pytest

import pflow_jax
from tests.notebooks import NOTEBOOKS
from tests.pages import PAGES, ROOT, links

# Tags of HTML that have no attributes on these pages.
TAGS = re.compile(
  "a|b|body|br|code|dd|del|div|dl|dt|em|g|h[1-6r]|head|i|li|ol|p|pre|s|span|strong|su[bp]|summary|svg|"
  "table|tbody|td|th|thead|title|tr|ul"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
  env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
  run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  return folder


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site):
  for page in PAGES:
    if page.parent.name == "docs":
      assert (site / page.stem / "index.html").exists() or page.name == "index.md", page
  for file in site.rglob("*.html"):
    loaded = re.findall(
      r"""<(?:script|img)[^>]*src="([^"]+)|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)""", file.read_text()
    )
    assert not [one for one in loaded if "//" in "".join(one) and not one[0].startswith("data:")], file


def test_every_public_name_is_in_the_reference(site):
  written = set(re.findall(r'<h\d id="([\w.]+)"', (site / "api" / "index.html").read_text()))
  names = {f"pflow_jax.{name}" for name in dir(pflow_jax)}
  assert names - written == {"pflow_jax.data"}, "its functions are there one by one"
  assert "pflow_jax.data.load" in written
  assert "pflow_jax.Run.sample" in written, "methods with their arguments"


def test_no_word_of_a_text_is_taken_for_a_tag(site):
  """As <path> would be, which a browser does not show."""
  for file in site.rglob("*.html"):
    bare = set(re.findall(r"<([a-z]+)>", re.sub(r"<(script|style).*?</\1>", "", file.read_text(), flags=re.S)))
    assert not [tag for tag in bare if not TAGS.fullmatch(tag)], file


def test_files_at_the_top_are_pages_and_other_files_are_named(site):
  start = (site / "index.html").read_text()
  assert 'href="security/"' in start
  assert "configs/digits.py</a>" not in (site / "data" / "index.html").read_text()
  assert 'id="what-listens"' in (site / "security" / "index.html").read_text()


@pytest.fixture(scope="module")
def hooks():
  spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_notebook_is_a_page_with_its_own_links(site):
  for path in NOTEBOOKS:
    page = (site / "notebooks" / path.stem / "index.html").read_text()
    assert re.search(rf'href="https://colab[^"]*/{path.name}"[^>]*>Open in Colab', page), path
    assert "colab-badge" not in page
    assert not re.search(r'href="https://github.com/pflow-jax/pflow_jax/blob/main/docs', page), path
  assert 'href="../quickstart/"' in (site / "notebooks" / "flux" / "index.html").read_text()


def test_a_notebook_has_the_outputs_of_a_run_of_the_same_cells(hooks, tmp_path):
  code = nbformat.v4.new_code_cell("1 + 1")
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), code])
  nbformat.write(notebook, tmp_path / "a.ipynb")
  page, pictures = hooks.page_of(tmp_path / "a.ipynb", tmp_path / "executed.ipynb")
  assert "the pictures come when it runs" in page
  assert pictures == {}
  code.outputs = [nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(b"picture").decode()})]
  nbformat.write(notebook, tmp_path / "executed.ipynb")
  page, pictures = hooks.page_of(tmp_path / "a.ipynb", tmp_path / "executed.ipynb")
  ((name, content),) = pictures.items()
  assert content == b"picture"
  assert f"({name})" in page
  assert "come when it runs" not in page
  code.source = "2 + 2"
  nbformat.write(notebook, tmp_path / "executed.ipynb")
  assert hooks.page_of(tmp_path / "a.ipynb", tmp_path / "executed.ipynb")[1] == {}


def test_a_link_to_no_file_stays_for_the_strict_build_to_refuse(hooks):
  page = "[a](../setup.py) [b](../SECURITY.md#x) [c](../nope.py) [d](api.md)"
  assert hooks.on_page_markdown(page) == "a [b](security.md#x) [c](../nope.py) [d](api.md)"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_exist(page):
  """As they are on GitHub, relative to the page; anchors are those of headings."""
  for path, anchor in links(page):
    target = page.parent / path if path else page
    assert target.exists(), path
    if anchor:
      headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
      assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_readme_is_short_and_leads_to_every_guide():
  linked = {path for path, _ in links(ROOT / "README.md")}
  guides = {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"}
  assert {path for path in guides - linked if not re.search("/(compare|plan)_", path)} == set()
  assert len((ROOT / "README.md").read_text().splitlines()) <= 160
