"""Pictures of samples and measurements: every function returns a Figure, and writes a PNG if it is given a path.

Matplotlib is imported inside the functions and used without pyplot, so no display, backend or
global style is touched.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pflow_jax.evaluation.densities import Limits, ceiling, density_image, points_of, show_density, square_limits
from pflow_jax.evaluation.lettering import DPI, FONT, fitted, text_width

Array = np.ndarray

_INK, _MUTED, _GRID = "#1f2328", "#6e7781", "#e3e6e9"
# Okabe and Ito's colours: told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_STYLE: Any = {
  "font.family": "sans-serif",
  "font.size": FONT,
  "text.color": _INK,
  "axes.labelcolor": _INK,
  "axes.edgecolor": _MUTED,
  "axes.titlesize": 10,
  "axes.titlepad": 7,
  "axes.linewidth": 0.7,
  "xtick.color": _MUTED,
  "ytick.color": _MUTED,
  "xtick.labelcolor": _INK,
  "ytick.labelcolor": _INK,
}


def to_bytes(x: Array) -> Array:
  """Images of any shape in [-1, 1] (clipped; not finite becomes mid-grey) as uint8."""
  return np.rint((np.nan_to_num(np.clip(x, -1, 1), nan=0.0) + 1) * 127.5).astype(np.uint8)


def image_grid(
  path: str | os.PathLike | None,
  rows: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
  column_labels: Sequence[str] | None = None,
  scale: int | None = None,
  columns: int | None = None,
) -> Any:
  """Labelled rows of images; column i of every row is meant to come from the same noise.

  Args:
    path: of the PNG, or None.
    rows: label -> images (n, H, W, C) in [-1, 1] (clipped; not finite becomes mid-grey), C 1 or 3, one shape for all.
    title: above the rows.
    column_labels: n texts above the columns, such as the class; long ones get smaller letters and two lines, and
      are cut if they still do not fit.
    scale: pixels of the picture for each pixel of an image, nearest neighbour; by default images get about 96 wide.
    columns: images side by side, the others continue below; by default all.

  Raises:
    ValueError: for other shapes.
  """
  if not rows:
    raise ValueError("rows: expected at least one row of images, got none")
  images = {label: np.asarray(x, np.float32) for label, x in rows.items()}
  shape = next(iter(images.values())).shape
  for label, x in images.items():
    if x.ndim != 4 or x.shape != shape or x.shape[-1] not in (1, 3) or x.size == 0:
      raise ValueError(
        f"rows[{label!r}]: expected (n, H, W, 1 or 3), the same for all rows, got {x.shape} beside {shape}"
      )
  count, height, width = shape[:3]
  if column_labels is not None and len(column_labels) != count:
    raise ValueError(f"column_labels: expected {count}, one per column, got {len(column_labels)}")
  scale = scale or max(1, round(96 / width))
  if scale < 1:
    raise ValueError(f"scale: expected a whole number >= 1, got {scale}")

  columns = min(columns or count, count)
  gap = max(4, width * scale // 16)
  cell_h, cell_w = height * scale + gap, width * scale + gap
  # The figure is laid out in whole pixels, so that every pixel of an image is a sharp square.
  pad, line = 24, 40
  names, size = fitted(column_labels or (), width * scale)
  head = line + max((name.count("\n") for name in names), default=0) * line // 2
  between = head if column_labels is not None else 2 * gap  # blocks of all rows
  block, blocks = len(images) * cell_h - gap + between, -(-count // columns)
  canvas = np.full((blocks * block - between, columns * cell_w - gap, 3), 255, np.uint8)
  for i, x in enumerate(images.values()):
    x = to_bytes(x).repeat(scale, axis=1).repeat(scale, axis=2)
    for j in range(count):
      top, left = j // columns * block + i * cell_h, j % columns * cell_w
      canvas[top : top + height * scale, left : left + width * scale] = x[j]

  texts = [text_width(label) for label in images]
  margin = max(texts) + pad if any(images) else 0
  top = (line + pad // 2 if title else 0) + (head if column_labels is not None else 0)
  total_w = pad + margin + canvas.shape[1] + pad
  total_w = max(total_w, text_width(title, 11) + 2 * pad if title else 0)
  total_h = pad + top + canvas.shape[0] + pad
  with _figure(path, total_w / DPI, total_h / DPI) as figure:
    left, bottom = pad + margin, pad
    box = (left / total_w, bottom / total_h, canvas.shape[1] / total_w, canvas.shape[0] / total_h)
    axes = figure.add_axes(box)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for i, label in enumerate(list(images) * blocks):
      down = i // len(images) * block + i % len(images) * cell_h
      y = bottom + canvas.shape[0] - down - height * scale / 2
      figure.text((left - pad * 0.75) / total_w, y / total_h, label, ha="right", va="center", parse_math=False)
    for j, text in enumerate(names):
      x, y = left + j % columns * cell_w + width * scale / 2, canvas.shape[0] - j // columns * block + head * 0.45
      figure.text(
        x / total_w, (bottom + y) / total_h, text, size=size, ha="center", va="center", color=_MUTED, parse_math=False
      )
    if title:
      figure.text(pad / total_w, 1 - (pad + line / 2) / total_h, title, va="center", fontsize=11, parse_math=False)
  return figure


def captioned_images(
  path: str | os.PathLike | None, images: ArrayLike, captions: Sequence[str], *, columns: int = 4, side: int = 256
) -> Any:
  """Images in reading order, each above its caption, of two lines at most.

  Args:
    path: of the PNG, or None.
    images: (n, H, W, C) in [-1, 1] (clipped; not finite becomes mid-grey), C 1 or 3.
    captions: n texts.
    columns: images a row.
    side: pixels of an image's longer side; smaller images grow by whole pixels (nearest neighbour), larger ones shrink.

  Raises:
    ValueError: for other shapes.
  """
  import textwrap

  from PIL import Image

  x = np.asarray(images, np.float32)
  if x.ndim != 4 or x.shape[-1] not in (1, 3) or x.size == 0:
    raise ValueError(f"images: expected (n, H, W, 1 or 3), got {x.shape}")
  if len(captions) != len(x):
    raise ValueError(f"captions: expected {len(x)}, one per image, got {len(captions)}")
  pixels = to_bytes(x).repeat(3 // x.shape[-1], axis=-1)
  longest = max(x.shape[1:3])
  if longest > side:
    size = tuple(max(1, round(n * side / longest)) for n in (x.shape[2], x.shape[1]))
    pixels = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.LANCZOS)) for one in pixels])
  else:
    pixels = pixels.repeat(side // longest, axis=1).repeat(side // longest, axis=2)

  height, width = pixels.shape[1:3]
  pad, line = 24, 32
  columns = min(columns, len(pixels))
  letters = max(1, int(width / (text_width("n" * 20) / 20)))
  wrapped = [textwrap.fill(text, letters, max_lines=2, placeholder=" …", break_long_words=False) for text in captions]
  cell_w, cell_h = width + pad, height + pad + line * (1 + max(text.count("\n") for text in wrapped))
  total_w, total_h = pad + columns * cell_w, pad + -(-len(pixels) // columns) * cell_h
  canvas = np.full((total_h, total_w, 3), 255, np.uint8)
  corners = [(pad + i // columns * cell_h, pad + i % columns * cell_w) for i in range(len(pixels))]
  for (top, left), one in zip(corners, pixels, strict=True):
    canvas[top : top + height, left : left + width] = one
  with _figure(path, total_w / DPI, total_h / DPI) as figure:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for (top, left), text in zip(corners, wrapped, strict=True):
      x_text, y_text = (left + width / 2) / total_w, 1 - (top + height + line / 4) / total_h
      figure.text(x_text, y_text, text, ha="center", va="top", color=_MUTED, parse_math=False)
  return figure


def trajectory_plot(
  path: str | os.PathLike | None,
  data: ArrayLike,
  panels: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
) -> Any:
  """Trajectories of 2-D points over the data's density, one square panel per method.

  All panels show the square around all trajectories and points.

  Args:
    path: of the PNG, or None.
    data: points (N, 2), drawn as a histogram.
    panels: label -> states (steps, n, 2), steps >= 2, from noise to data; a ring marks the start, a dot the end.
    title: above the panels.

  Raises:
    ValueError: for other shapes.
  """
  paths = {label: np.asarray(x, np.float64) for label, x in _some(panels).items()}
  for label, x in paths.items():
    if x.ndim != 3 or x.shape[0] < 2 or x.shape[-1] != 2 or x.size == 0:
      raise ValueError(f"panels[{label!r}]: expected (steps >= 2, n, 2), got {x.shape}")
  points = points_of(data, "data")
  limits = square_limits([points, *(x.reshape(-1, 2) for x in paths.values())])
  image = density_image(points, limits, bins=100)
  with _square_panels(path, list(paths), limits, title) as all_axes:
    for axes, x in zip(all_axes, paths.values(), strict=True):
      show_density(axes, image, limits)
      axes.plot(x[..., 0], x[..., 1], color=_INK, linewidth=0.55, alpha=0.55, solid_capstyle="round")
      axes.scatter(*x[0].T, s=9, facecolors="white", edgecolors=_MUTED, linewidths=0.6, zorder=3)
      axes.scatter(*x[-1].T, s=10, color=_COLOURS[1], linewidths=0, zorder=4)
  return all_axes[0].figure


def scatter_panels(
  path: str | os.PathLike | None,
  panels: Mapping[str, ArrayLike],
  *,
  title: str | None = None,
  bins: int = 120,
) -> Any:
  """2-D samples (n, 2) as density histograms side by side, with common limits and a common colour scale.

  The limits are those of the first panel (the data, say), so that outliers of another do not shrink it.

  Raises:
    ValueError: for other shapes.
  """
  points = {label: points_of(x, f"panels[{label!r}]") for label, x in _some(panels).items()}
  limits = square_limits([next(iter(points.values()))])
  images = [density_image(x, limits, bins) for x in points.values()]
  top = ceiling(images[0])
  with _square_panels(path, list(points), limits, title) as all_axes:
    for axes, image in zip(all_axes, images, strict=True):
      show_density(axes, image, limits, "magma", top)
  return all_axes[0].figure


def curves(
  path: str | os.PathLike | None,
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
  with _figure(path, 5.4, 3.6) as figure:
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
  path: str | os.PathLike | None,
  panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
  *,
  xlabel: str,
  dashed: Sequence[str] = (),
) -> Any:
  """Panels of log-log lines side by side, titled, with one legend: a label looks the same in all of them.

  Args:
    path: of the PNG, or None.
    panels: title -> label -> (x (n,), y (n,)), n >= 1.
    xlabel: of all panels.
    dashed: labels of references, drawn in black dashes.

  Raises:
    ValueError: for other shapes, or a value that is not positive.
  """
  drawn = {title: _lines(series, "log", "log") for title, series in _some(panels).items()}
  labels = list(dict.fromkeys(label for lines in drawn.values() for label in lines))
  styles = _styles([label for label in labels if label not in dashed])
  styles |= {label: dict(color=_INK, ls="--", marker="o", ms=4.5, mfc="white") for label in labels if label in dashed}
  with _figure(path, 0.3 + 3.3 * len(drawn) + 2.0, 3.8) as figure:
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
  lines = {k: (np.asarray(x, float), np.asarray(y, float)) for k, (x, y) in _some(series, "series").items()}
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
    again, j = divmod(i, len(_COLOURS))
    colour, marker = _COLOURS[j], _MARKERS[(j + again) % len(_MARKERS)]
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
  axes.grid(True, color=_GRID, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(which="both", length=0, pad=4)
  return drawn


def _some(panels: Mapping[str, Any], name: str = "panels") -> Mapping[str, Any]:
  if not panels:
    raise ValueError(f"{name}: expected at least one entry, got none")
  return panels


@contextlib.contextmanager
def _figure(path: str | os.PathLike | None, width: float, height: float) -> Iterator[Any]:
  """A matplotlib Figure in this module's style; saved to `path`, unless it is None, when the block ends well."""
  import matplotlib

  from pflow_jax.evaluation.shown import ShownFigure

  with matplotlib.rc_context(_STYLE):
    figure = ShownFigure(figsize=(width, height), dpi=DPI, facecolor="white")
    yield figure
    if path is not None:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
      figure.savefig(path, format="png", dpi=DPI)


@contextlib.contextmanager
def _square_panels(
  path: str | os.PathLike | None, names: Sequence[str], limits: Limits, title: str | None
) -> Iterator[list[Any]]:
  """Square axes side by side, one for each name, without ticks and with the same limits."""
  side, gap, head = 2.4, 0.12, 0.6 if title else 0.3
  width, height = len(names) * (side + gap) + gap, side + head + gap
  with _figure(path, width, height) as figure:
    all_axes = []
    for i, name in enumerate(names):
      box = ((gap + i * (side + gap)) / width, gap / height, side / width, side / height)
      axes = figure.add_axes(box)
      axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
      axes.spines[:].set_color(_GRID)
      axes.set_title(name, parse_math=False)
      all_axes.append(axes)
    if title:
      figure.text(gap / width, 1 - 0.18 / height, title, va="center", fontsize=11, parse_math=False)
    yield all_axes
