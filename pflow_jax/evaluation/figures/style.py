"""The look that all figures share, and the one place where a figure becomes a file.

Matplotlib is imported inside the functions and used without pyplot, so no display, backend or global style is touched.
"""

from __future__ import annotations

import io
import os
from typing import Any

from etils import epath

from pflow_jax.evaluation.figures.palette import INK, MUTED
from pflow_jax.files.atomic import write_atomically

DPI = 200
FONT = 9.0  # points
STYLE: Any = {
  "font.family": "sans-serif",
  "font.size": FONT,
  "text.color": INK,
  "axes.labelcolor": INK,
  "axes.edgecolor": MUTED,
  "axes.titlesize": 10,
  "axes.titlepad": 7,
  "axes.linewidth": 0.7,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
  "xtick.labelcolor": INK,
  "ytick.labelcolor": INK,
}


def to_png(figure: Any) -> bytes:
  """Returns a matplotlib Figure as a PNG of its own resolution."""
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi="figure")
  return file.getvalue()


def save(figure: Any, path: str | os.PathLike) -> None:
  """Writes a matplotlib Figure as a PNG, whole or not at all; its folder is made.

  Args:
    figure: a result of the other functions.
    path: of this machine or of an object store (gs://...).
  """
  file = epath.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(file, to_png(figure))
