"""New figures, and the check that they have something to show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pflow_jax.evaluation.figures.style import DPI, STYLE


def some(panels: Mapping[str, Any], name: str = "panels") -> Mapping[str, Any]:
  """Returns the panels; a ValueError says that there are none."""
  if not panels:
    raise ValueError(f"{name}: expected at least one entry, got none")
  return panels


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
  """Context with a new matplotlib Figure in this style; its size is in inches."""
  import matplotlib

  from pflow_jax.evaluation.figures.shown import ShownFigure

  with matplotlib.rc_context(STYLE):
    yield ShownFigure(figsize=(width, height), dpi=DPI, facecolor="white")
