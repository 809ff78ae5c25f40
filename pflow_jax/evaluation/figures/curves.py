"""Pictures of numbers: lines in one panel, or in several with one legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.figures.canvas import drawing, some
from pflow_jax.evaluation.figures.style import COLOURS, GRID, INK, MARKERS

Array = np.ndarray


def curves(
  series: Mapping[str, tuple[ArrayLike, ArrayLike]],
  *,
  xlabel: str,
  ylabel: str,
  title: str | None = None,
  xscale: str = "log",
  yscale: str = "log",
) -> Any:
  """Lines with markers, such as error against work; log-log unless `xscale` or `yscale` is "linear".

  Args:
    series: label -> (x (n,), y (n,)), n >= 1.

  Raises:
    ValueError: for other shapes, or a value that a logarithmic axis cannot show.
  """
  lines = _lines(series, xscale, yscale)
  with drawing(5.4, 3.6) as figure:
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = figure.add_subplot()
    _draw_lines(axes, lines, xscale=xscale, yscale=yscale)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if any(series):
      axes.legend(frameon=False, handlelength=1.8, labelspacing=0.35)
    if title:
      axes.set_title(title, loc="left")
  return figure


def curve_panels(
  panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
  *,
  xlabel: str,
  dashed: Sequence[str] = (),
) -> Any:
  """Panels of log-log lines side by side, titled, with one legend: a label looks the same in all of them.

  Args:
    panels: title -> label -> (x (n,), y (n,)), n >= 1.
    xlabel: of all panels.
    dashed: labels of references, drawn in black dashes.

  Raises:
    ValueError: for other shapes, or a value that is not positive.
  """
  drawn = {title: _lines(series, "log", "log") for title, series in some(panels).items()}
  labels = list(dict.fromkeys(label for lines in drawn.values() for label in lines))
  styles = _styles([label for label in labels if label not in dashed])
  styles |= {label: dict(color=INK, ls="--", marker="o", ms=4.5, mfc="white") for label in labels if label in dashed}
  with drawing(0.3 + 3.3 * len(drawn) + 2.0, 3.8) as figure:
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
      handles |= _draw_lines(axes, lines, styles)
      axes.set_title(title, loc="left")
      axes.set_xlabel(xlabel)
    figure.legend(
      [handles[label] for label in labels], labels, loc="outside right upper", frameon=False, handlelength=2.4
    )
  return figure


Lines = Mapping[str, tuple[Array, Array]]


def _lines(series: Mapping[str, tuple[ArrayLike, ArrayLike]], xscale: str, yscale: str) -> Lines:
  """Returns the series as arrays, which the axes can show."""
  lines = {k: (np.asarray(x, float), np.asarray(y, float)) for k, (x, y) in some(series, "series").items()}
  for label, (x, y) in lines.items():
    if x.ndim != 1 or x.shape != y.shape or not len(x):
      raise ValueError(f"series[{label!r}]: expected x and y of one shape (n,), got {x.shape} and {y.shape}")
    for name, values, kind in (("x", x, xscale), ("y", y, yscale)):
      if not np.isfinite(values).all() or (kind == "log" and values.min() <= 0):
        raise ValueError(f"series[{label!r}]: {name} has values that a {kind} axis cannot show; drop them")
  return lines


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Marker and colour of each line; those beyond the colours take them again, with another marker, hollow."""
  styles = {}
  for i, label in enumerate(labels):
    again, j = divmod(i, len(COLOURS))
    colour, marker = COLOURS[j], MARKERS[(j + again) % len(MARKERS)]
    fill = dict(mfc="white", mec=colour, mew=1.2) if again else dict(mec="white", mew=0.6)
    styles[label] = dict(marker=marker, ms=7.5 if marker in "P*" else 4.5, color=colour, **fill)
  return styles


def _draw_lines(
  axes: Any, lines: Lines, styles: Mapping[str, dict[str, Any]] | None = None, *, xscale="log", yscale="log"
) -> dict[str, Any]:
  """Draws the lines and formats the axes; returns each label's line."""
  from matplotlib.ticker import LogLocator

  styles = styles or _styles(list(lines))
  drawn = {label: axes.plot(x, y, label=label, lw=1.5, **styles[label])[0] for label, (x, y) in lines.items()}
  axes.set(xscale=xscale, yscale=yscale)
  ticks = np.unique(np.concatenate([x for x, _ in lines.values()]))
  if len(ticks) <= 10:  # few values, such as 1, 2, 4 evaluations, get a tick each
    axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axes.set_xticks([], minor=True)
  low, high = axes.get_ylim()
  if yscale == "log" and high < 100 * low:  # powers of ten alone would leave the axis bare
    digits = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
  axes.grid(True, color=GRID, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(which="both", length=0, pad=4)
  return drawn
