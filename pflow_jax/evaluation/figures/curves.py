"""Pictures of numbers: lines in one panel, or in several with one legend."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.figures.canvas import drawing, some
from pflow_jax.evaluation.figures.palette import GRID, INK, MUTED, PALE, styles

Array = np.ndarray
Series = Mapping[str, Sequence[ArrayLike]]
"""Label -> (x (n,), y (n,)), or (x, y, deviation of y (n,)), n >= 1."""
Lines = Mapping[str, tuple[Array, Array, Array]]

CROSSING = 5  # lines that share a panel; more get a panel each
ABREAST = 5  # such panels side by side
TITLE = 26  # characters that fit above one of them


def curves(
  series: Series,
  *,
  xlabel: str,
  ylabel: str,
  title: str | None = None,
  xscale: str = "log",
  yscale: str = "log",
  markers: bool = True,
) -> Any:
  """Lines in one panel, such as error against work; log-log unless `xscale` or `yscale` is "linear".

  Args:
    series: label -> (x (n,), y (n,)), n >= 1; a third array draws bars of that half length.
    xlabel: of the axis.
    ylabel: of the axis.
    title: above the panel.
    xscale: "log" or "linear".
    yscale: "log" or "linear".
    markers: whether the points are marked.

  Raises:
    ValueError: for other shapes, or a value that an axis cannot show.
  """
  lines = _lines(series, xscale, yscale)
  with drawing(5.4, 3.6) as figure:
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = figure.add_subplot()
    looks = {k: look if markers else look | dict(marker="") for k, look in styles(list(lines)).items()}
    _draw_lines(axes, lines, looks, xscale, yscale)
    _format(axes, lines, yscale)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if any(series):
      axes.legend(frameon=False, handlelength=1.8, labelspacing=0.35)
    if title:
      axes.set_title(title, loc="left")
  return figure


def curve_panels(
  panels: Mapping[str, Series], *, xlabel: str, dashed: Sequence[str] = (), note: str | None = None
) -> Any:
  """Log-log lines of several measures, a panel each; a label looks the same in all of them.

  Up to CROSSING labels share the panels, side by side, with one legend. More get small multiples: a column for each
  label, its lines in colour over those of all others in grey.

  Args:
    panels: title -> label -> (x (n,), y (n,)), n >= 1; a third array draws bars of that half length.
    xlabel: of all panels.
    dashed: labels of references, drawn in black dashes.
    note: below the panels, such as what the bars are.

  Raises:
    ValueError: for other shapes, or a value that is not positive.
  """
  drawn = {title: _lines(series, "log", "log") for title, series in some(panels).items()}
  labels = list(dict.fromkeys(label for lines in drawn.values() for label in lines))
  looks = styles(labels, dashed)
  own = [label for label in labels if label not in dashed]
  return (_side_by_side if len(own) <= CROSSING else _multiples)(drawn, looks, own, xlabel, note)


def _side_by_side(drawn: Mapping[str, Lines], looks: Any, own: Sequence[str], xlabel: str, note: str | None) -> Any:
  """Draws a panel for each measure, with all lines, and one legend."""
  with drawing(0.3 + 3.3 * len(drawn) + 2.0, 3.8 + 0.25 * bool(note)) as figure:
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
      handles |= _draw_lines(axes, lines, looks)
      _format(axes, lines)
      axes.set_title(title, loc="left")
      axes.set_xlabel(xlabel)
    figure.legend(
      [handles[label] for label in looks],
      list(looks),
      loc="outside right upper",
      frameon=False,
      handlelength=2.4,
    )
    if note:
      figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=MUTED)
  return figure


def _multiples(drawn: Mapping[str, Lines], looks: Any, own: Sequence[str], xlabel: str, note: str | None) -> Any:
  """Draws a column of panels for each label, one a measure, over the other labels' lines in grey."""
  abreast = min(ABREAST, -(-len(own) // -(-len(own) // ABREAST)))  # rows of about one length
  blocks = -(-len(own) // abreast)
  references = [label for label in looks if label not in own]
  with drawing(0.6 + 1.95 * abreast, blocks * (1.6 * len(drawn) + 0.35) + 0.7) as figure:
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.06, hspace=0.04, wspace=0.03)
    grid = figure.subplots(blocks * len(drawn), abreast, squeeze=False, sharex=True, sharey="row")
    for i, (title, lines) in enumerate(drawn.items()):
      for block in range(blocks):
        row = grid[block * len(drawn) + i]
        for axes, label in zip(row, own[block * abreast :], strict=False):
          for other, (x, y, _) in lines.items():
            if other in own and other != label:
              axes.plot(x, y, color=PALE, lw=0.9, zorder=1)
          _draw_lines(axes, {k: lines[k] for k in (*references, label) if k in lines}, looks)
          if i == 0:
            axes.set_title(
              textwrap.fill(label, TITLE, break_on_hyphens=False), loc="left", fontsize=9, color=INK, parse_math=False
            )
        row[0].set_ylabel(title, fontsize=8)
        for axes in row:
          _format(axes, lines)
          axes.tick_params(labelsize=7.5)
    for column in grid.T:
      used = [axes for axes in column if axes.lines]
      used[-1].tick_params(labelbottom=True)
      for axes in column[len(used) :]:
        axes.set_visible(False)
    key = f"{', '.join(references)}: black dashes; " if references else ""
    text = f"{key}grey: the other methods" + (f"; {note}" if note else "")
    figure.supxlabel(f"{xlabel}\n", fontsize=9)
    figure.text(0.01, 0.06 / figure.get_figheight(), text, fontsize=8, color=MUTED, va="bottom")
  return figure


def _lines(series: Series, xscale: str, yscale: str) -> Lines:
  """Returns the series as arrays, which the axes can show."""
  lines = {}
  for label, (x, y, *more) in some(series, "series").items():
    line = x, y, dy = np.asarray(x, float), np.asarray(y, float), np.asarray(more[0] if more else np.zeros(len(y)))
    if x.ndim != 1 or x.shape != y.shape or x.shape != dy.shape or not len(x):
      raise ValueError(f"series[{label!r}]: expected x and y of one shape (n,), got {x.shape} and {y.shape}")
    for name, values, kind in (("x", x, xscale), ("y", y, yscale)):
      if not np.isfinite(values).all() or (kind == "log" and values.min() <= 0):
        raise ValueError(f"series[{label!r}]: {name} has values that a {kind} axis cannot show; drop them")
    lines[label] = line
  return lines


def _draw_lines(
  axes: Any, lines: Lines, looks: Mapping[str, dict[str, Any]], xscale: str = "log", yscale: str = "log"
) -> dict[str, Any]:
  """Draws the lines, with bars where a deviation is known; returns each label's line."""
  axes.set(xscale=xscale, yscale=yscale)
  drawn = {}
  for label, (x, y, dy) in lines.items():
    if dy.any():
      # On a logarithmic axis a bar that reaches zero has no end.
      low = np.minimum(dy, 0.9 * np.abs(y)) if yscale == "log" else dy
      axes.errorbar(x, y, (low, dy), fmt="none", ecolor=looks[label]["color"], elinewidth=1.1, capsize=2.2, zorder=2)
    drawn[label] = axes.plot(x, y, label=label, lw=1.5, zorder=3, **looks[label])[0]
  return drawn


def _format(axes: Any, lines: Lines, yscale: str = "log") -> None:
  """Sets ticks and grid of axes that show `lines`."""
  from matplotlib.ticker import LogLocator

  ticks = np.unique(np.concatenate([x for x, *_ in lines.values()]))
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
