"""What the README points at exists."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_links_and_pictures_exist():
  links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
  local = [link for link in links if "://" not in link]
  assert len(local) >= 3
  assert not [link for link in local if not (ROOT / link.partition("#")[0]).exists()]
