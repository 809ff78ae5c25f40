"""Pictures of the page: a row's samples side by side, all rows as one PNG, ways from noise to data as SVG."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from pflow_jax.evaluation import figures
from pflow_jax.evaluation.figures import palette
from pflow_jax.page.drawing import Drawn, Way

TILE = 112  # pixels of a small picture's longer side on the page, at least; they grow by whole pixels
GAP = 6  # pixels between pictures
PAD, LINE = 24, 30  # pixels around the pictures of a file, and of a line there
PANEL = 560  # pixels of a panel of points
FEW = 16  # evaluations that are marked on a way
COLUMNS = 8  # pictures side by side; more continue below
PAPER = "#ffffff"
COLOURS = palette.COLOURS[:6]  # of students: those that are seen on dark too


@dataclasses.dataclass(frozen=True)
class Grid:
  """Places of a row's samples in its picture.

  Attributes:
    shape: (H, W) of a sample.
    count: samples.
  """

  shape: tuple[int, int]
  count: int

  @property
  def scale(self) -> int:
    """Pixels of the picture for a sample's pixel, along each axis."""
    return max(1, -(-TILE // max(self.shape)))

  @property
  def columns(self) -> int:
    """Samples side by side."""
    return min(COLUMNS, self.count)

  @property
  def cell(self) -> tuple[int, int]:
    """Height and width of a sample and the gap behind it."""
    return self.shape[0] * self.scale + GAP, self.shape[1] * self.scale + GAP

  def at(self, x: int, y: int) -> tuple[int, tuple[int, int]] | None:
    """Returns the sample at a pixel of the picture, and its own pixel (row, column); None between samples."""
    height, width = self.cell
    (row, down), (column, right) = divmod(y, height), divmod(x, width)
    index = row * self.columns + column
    outside = min(x, y) < 0 or column >= self.columns or index >= self.count
    if outside or down >= height - GAP or right >= width - GAP:
      return None
    return index, (down // self.scale, right // self.scale)


def strip_of(pictures: np.ndarray) -> tuple[Image.Image, Grid]:
  """Lays out pictures (n, H, W, 1 or 3) in about [-1, 1], clear between them."""
  pixels = figures.to_bytes(pictures)
  pixels = pixels.repeat(3 // pixels.shape[-1], axis=-1)
  grid = Grid((pixels.shape[1], pixels.shape[2]), len(pixels))
  height, width = grid.cell
  canvas = np.zeros((-(-grid.count // grid.columns) * height - GAP, grid.columns * width - GAP, 4), np.uint8)
  for i, one in enumerate(pixels.repeat(grid.scale, axis=1).repeat(grid.scale, axis=2)):
    top, left = i // grid.columns * height, i % grid.columns * width
    canvas[top : top + height - GAP, left : left + width - GAP, :3] = one
    canvas[top : top + height - GAP, left : left + width - GAP, 3] = 255
  return Image.fromarray(canvas), grid


def limit_of(points: np.ndarray) -> float:
  """Returns half the side of the square around the origin that shows points (..., 2), but for a few far off."""
  size = np.abs(points[np.isfinite(points)])
  return 1.1 * float(np.quantile(size, 0.999)) if size.size else 1.0


def panel_of(points: np.ndarray, limit: float, colour: str) -> Image.Image:
  """Draws points (n, 2) in the square [-limit, limit] on both axes, clear between them."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(PANEL / 100, PANEL / 100), dpi=100)
  axes = figure.add_axes((0, 0, 1, 1), xlim=(-limit, limit), ylim=(-limit, limit))
  axes.set_axis_off()
  axes.scatter(points[:, 0], points[:, 1], s=7, color=colour, alpha=0.75, linewidths=0)
  file = io.BytesIO()
  figure.savefig(file, transparent=True)
  return Image.open(file)


def nearest_point(points: np.ndarray, limit: float, x: int, y: int) -> int:
  """Returns the index of the point that is nearest to a pixel of the panel of `panel_of`."""
  at = np.array([x, PANEL - 1 - y]) / (PANEL - 1) * 2 * limit - limit
  return int(np.argmin(np.sum((np.nan_to_num(points, nan=np.inf) - at) ** 2, axis=-1)))


def colours_of(is_teacher: Sequence[bool]) -> list[str]:
  """Returns a colour for every row, grey for teachers."""
  students = [i for i, teacher in enumerate(is_teacher) if not teacher]
  own = {i: COLOURS[k % len(COLOURS)] for k, i in enumerate(students)}
  return [own.get(i, palette.MUTED) for i in range(len(is_teacher))]


def sheet(images: Sequence[Image.Image], captions: Sequence[str], settings: Mapping[str, Any]) -> bytes:
  """Draws pictures with captions, one below another, as a PNG that has the settings as JSON in a tEXt chunk.

  Args:
    images: one a row.
    captions: their lines.
    settings: kept in the file under "parameters".
  """
  from PIL import ImageDraw, ImageFont

  font = ImageFont.load_default(16)
  width = max([*(image.width for image in images), *(int(font.getlength(text)) for text in captions)]) + 2 * PAD
  height = PAD + sum(image.height + LINE + PAD for image in images)
  canvas = Image.new("RGB", (width, height), PAPER)
  pen, top = ImageDraw.Draw(canvas), PAD
  for image, text in zip(images, captions, strict=True):
    pen.text((PAD, top), text, palette.INK, font)
    canvas.paste(image, (PAD, top + LINE), image)
    top += LINE + image.height + PAD
  about = PngImagePlugin.PngInfo()
  about.add_text("parameters", json.dumps(settings))
  file = io.BytesIO()
  canvas.save(file, "PNG", pnginfo=about, optimize=True)
  return file.getvalue()


def download_link(png: bytes, name: str) -> str:
  """Returns HTML of a link that saves a PNG; the file is in the link, so nothing stays on the server."""
  address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
  return f'<a class="save" download="{name}" href="{address}">Download PNG</a>'


def cost_of(drawn: Drawn) -> str:
  """Returns a line on the cost of a row's samples."""
  evaluations = f"{drawn.evaluations:,} evaluation{'s' * (drawn.evaluations > 1)}"
  batch = f"; {drawn.batch_size:,} at a time" if drawn.batch_size > 1 else ""
  compiled = f"; compiled in {drawn.compiled:.1f} s before" if drawn.compiled else ""
  return f"{evaluations}, {_unit(drawn.seconds)} a sample{batch}{compiled}"


def value_of(states: np.ndarray, pixel: tuple[int, int]) -> np.ndarray:
  """Returns the value of a pixel on its way (steps + 1,): grey, the mean of red, green and blue, or first latent.

  Args:
    states: of one sample (steps + 1, H, W, C).
    pixel: (row, column).
  """
  value = states[:, pixel[0], pixel[1]]
  return value.mean(axis=-1) if value.shape[-1] == 3 else value[:, 0]


def value_chart(
  ways: Sequence[Way],
  pixel: tuple[int, int],
  shape: tuple[int, int],
  names: Sequence[str],
  colours: Sequence[str],
) -> str:
  """Draws the value of a pixel over flow time, a line a row, as SVG; dots are evaluations of the network.

  Args:
    ways: of one sample.
    pixel: (row, column) in the picture.
    shape: (H, W) of the picture; of latents, the pixel is that of the latents beneath it.
    names: of the rows.
    colours: of the rows.
  """
  y, x = (at * ways[0].states.shape[2 + i] // shape[i] for i, at in enumerate(pixel))
  with _figure(8.6, 3.0) as figure:
    axes = figure.add_subplot()
    for i, (way, name, colour) in enumerate(zip(ways, names, colours, strict=True)):
      values = value_of(way.states[:, 0], (y, x))
      axes.plot(way.times, values, color=colour, lw=1.8, ls="--" if colour in colours[:i] else "-", label=name)
      if way.nfe <= FEW:
        marks = slice(0, -1, (len(values) - 1) // way.nfe)
        axes.plot(way.times[marks], values[marks], "o", color=colour, ms=6, mec=_INK, mew=0.8)
    axes.set(xlim=(1.02, -0.02), xlabel="flow time t: noise at 1, data at 0", ylabel="value of the pixel")
    axes.grid(color=_INK, alpha=0.12, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return _svg(figure, f"Value of pixel {pixel} over flow time")


def way_panels(ways: Sequence[Way], names: Sequence[str], colours: Sequence[str]) -> str:
  """Draws the ways of points, a panel a row, as SVG: the first one in colour, the others faint."""
  limit = limit_of(ways[0].states)
  with _figure(2.9 * len(ways), 3.1) as figure:
    panels = figure.subplots(1, len(ways), squeeze=False)[0]
    for axes, way, name, colour in zip(panels, ways, names, colours, strict=True):
      thin = slice(None, None, max(1, (len(way.states) - 1) // 32))
      axes.plot(*np.moveaxis(way.states[thin, 1:], -1, 0), color=_INK, alpha=0.2, lw=0.7)
      axes.plot(*way.states[-1, 1:].T, ".", color=_INK, alpha=0.35, ms=3)
      chosen = way.states[:, 0]
      axes.plot(*chosen.T, color=colour, lw=2.2)
      axes.plot(*chosen[0], "o", color=colour, mfc="none", mew=1.6)
      axes.plot(*chosen[-1], "o", color=colour)
      axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
      axes.set_title(name, fontsize=10)
    return _svg(figure, "Ways of points from noise to data")


_INK = "#010203"  # stands for the colour of the page's text, which is light or dark


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
  """Context with a Figure of inches, whose letters are the page's own."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  style: Any = {"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif"}
  style |= {name: _INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
  with rc_context(style):
    yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, title: str) -> str:
  """Returns a figure as SVG that fills its place on the page."""
  file = io.StringIO()
  figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
  drawing = file.getvalue()
  head, rest = drawing[drawing.index("<svg") :].replace(_INK, "currentColor").split(">", 1)
  head = re.sub(r' height="[\d.]+pt"| width="[\d.]+pt"', "", head)
  return f'{head} role="img" aria-label="{title}">{rest}'


def _unit(seconds: float) -> str:
  return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
