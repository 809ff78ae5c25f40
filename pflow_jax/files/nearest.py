"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.5  # least share of letters in common: "imageneet" finds "imagenet", "xyz" nothing


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
  """Returns up to `count` of the known names that are like `name`, the most alike first; case is ignored."""
  folded = {other.casefold(): other for other in known}
  return [folded[other] for other in difflib.get_close_matches(name.casefold(), folded, count, CUTOFF)]


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
  """Returns the end of an error message: "; did you mean 'imagenet'?", or `otherwise` where no name is near."""
  found = nearest(name, known)
  return f"; did you mean {found[0]!r}?" if found else otherwise
