"""What is on the pages, README and docs/*.md among them: fences, commands, words set as code, links."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
TOP = ("README", "CONTRIBUTING", "SECURITY")
PAGES = [*(ROOT / f"{name}.md" for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Fence:
  """A fenced block.

  Attributes:
    where: page and line, for messages.
    language: after the opening fence.
    text: its lines.
  """

  where: str
  language: str
  text: str

  @property
  def commands(self) -> list[list[str]]:
    """The words of its commands, without comments."""
    found = []
    for line in self.text.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      while "&&" in words:
        end = words.index("&&")
        found.append(words[:end])
        words = words[end + 1 :]
      found.append(words)
    return [words for words in found if words]


def fences(page: pathlib.Path) -> list[Fence]:
  """The fenced blocks of a page, in order."""
  text = page.read_text()
  return [
    Fence(f"{page.name}, line {text.count(chr(10), 0, match.start()) + 1}", match[1], match[2])
    for match in _FENCE.finditer(text)
  ]


def spans(page: pathlib.Path) -> list[str]:
  """What a page sets as code within its lines."""
  text = _FENCE.sub("", page.read_text())
  return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def links(page: pathlib.Path) -> list[tuple[str, str]]:
  """Paths and anchors of a page's links and pictures that are not on the web."""
  targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text()))
  return [target.partition("#")[::2] for target in targets if "://" not in target]
