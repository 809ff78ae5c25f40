"""A matplotlib Figure that a notebook shows. Importing this module imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
  """A Figure that is a picture in a notebook, whether pyplot has been imported there or not."""

  def _repr_png_(self) -> bytes:
    file = io.BytesIO()
    self.savefig(file, format="png")
    return file.getvalue()
