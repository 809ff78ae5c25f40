"""Known names that a wrong one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.5  # of the share of letters in common: "imageneet" finds "imagenet", "xyz" nothing


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
  """Returns up to `count` of the known names that are like `name`, the most alike first; case does not count."""
  folded = {other.casefold(): other for other in known}
  return [folded[other] for other in difflib.get_close_matches(name.casefold(), folded, count, CUTOFF)]


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
  """Returns what an error message goes on with: "; did you mean 'imagenet'?", or `otherwise` where no name is near."""
  found = nearest(name, known)
  return f"; did you mean {found[0]!r}?" if found else otherwise
