"""What MkDocs does beside its own: pages from files at the top, and links to source files.

A page may link to any file of the project, as on GitHub. Those in `PAGES` become pages of the site; of any other file
the site shows the words of the link alone.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]+)?\)")


def on_files(files, config):
  for name, page in PAGES.items():
    files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
  return files


def on_page_markdown(markdown, **_):
  return LINK.sub(_inside, markdown)


def _inside(link):
  """The link as the site has it; one to a file that is not there stays, which a strict build refuses."""
  words, path, anchor = link.groups()
  if path in PAGES:
    return f"[{words}]({PAGES[path]}{anchor or ''})"
  return words if (ROOT / path).exists() else link[0]
