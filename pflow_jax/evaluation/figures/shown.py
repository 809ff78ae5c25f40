"""A matplotlib Figure that a notebook shows. Importing this module imports matplotlib."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pflow_jax.evaluation.figures.style import STYLE, to_png


class ShownFigure(Figure):
  """A Figure that is a picture in a notebook, whether pyplot has been imported there or not."""

  def draw(self, renderer: Any) -> None:
    # Ticks are made when a figure is drawn, which may be long after its function has returned.
    with matplotlib.rc_context(STYLE):
      super().draw(renderer)

  def _repr_png_(self) -> bytes:
    return to_png(self)
