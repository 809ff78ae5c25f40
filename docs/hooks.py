"""What MkDocs does beside its own: pages from files at the top and from notebooks, and links to source files.

A page may link to any file of the project, as on GitHub. Those in `PAGES` become pages of the site; of any other file
the site shows the words of the link alone. A notebook is a page with the outputs of its last run by
`make notebooks FULL=1`, which takes too long for every build; without such a run it is a page of text and code.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]+)?\)")
COLAB = "https://colab.research.google.com/github/pflow-jax/pflow_jax/blob/main/notebooks/"
BADGE = re.compile(rf"\[!\[Open in Colab\]\([^)]*\)\]\(({COLAB}[^)]*)\)")
# Links of notebooks, which Colab shows alone: to each other, to pages and to pictures.
ELSEWHERE = (
  (re.compile(rf"(?<!Open in Colab\])\({COLAB}(\w+)\.ipynb\)"), r"(\1.md)"),
  (re.compile(r"\(https://github\.com/pflow-jax/pflow_jax/blob/main/docs/(\w+\.md)"), r"(../\1"),
  (re.compile(r"\(https://raw\.githubusercontent\.com/pflow-jax/pflow_jax/main/docs/(images/[^)]+)\)"), r"(../\1)"),
)


def on_files(files, config):
  for name, page in PAGES.items():
    files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    page, pictures = page_of(path, ROOT / "build" / "notebooks" / path.name)
    files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
    for name, content in pictures.items():
      files.append(File.generated(config, f"notebooks/{name}", content=content))
  return files


def on_page_markdown(markdown, page=None, **_):
  # Those of a notebook's page lead to pages already.
  return markdown if page is not None and page.file.src_uri.startswith("notebooks/") else LINK.sub(_inside, markdown)


def page_of(path, executed):
  """A notebook as Markdown, and its pictures by name; with outputs if the executed copy has the same cells."""
  import nbformat
  from nbconvert import MarkdownExporter

  notebook = nbformat.read(path, as_version=4)
  has_outputs = False
  if executed.exists():
    run = nbformat.read(executed, as_version=4)
    has_outputs = [cell.source for cell in run.cells] == [cell.source for cell in notebook.cells]
    notebook = run if has_outputs else notebook
  for cell in notebook.cells:
    if cell.cell_type == "markdown":
      text = BADGE.sub(r"[Open in Colab](\1)", cell.source)
      for pattern, target in ELSEWHERE:
        text = pattern.sub(target, text)
      cell.source = text
  if not has_outputs:
    notebook.cells[0].source += "\n\nThis page has its text and its code; the pictures come when it runs."
  text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem, "output_files_dir": ""})
  return text, {name.lstrip("/"): content for name, content in resources["outputs"].items()}


def _inside(link):
  """The link as the site has it; one to a file that is not there stays, which a strict build refuses."""
  words, path, anchor = link.groups()
  if path in PAGES:
    return f"[{words}]({PAGES[path]}{anchor or ''})"
  return words if (ROOT / path).exists() else link[0]
