"""Animations from noise to images, with the network evaluations that each sampler has made so far."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from pflow_jax.core.schedule import shift_time
from pflow_jax.evaluation.figures.canvas import drawing, some
from pflow_jax.evaluation.figures.images import to_bytes
from pflow_jax.evaluation.figures.lettering import wrapped
from pflow_jax.evaluation.figures.palette import INK, MUTED, PALE, styles
from pflow_jax.evaluation.figures.style import DPI
from pflow_jax.files.atomic import write_atomically

Array = np.ndarray
LONGEST = 600  # seconds; a GIF has 16 bits for the hundredths of a second of a picture


@dataclasses.dataclass(frozen=True)
class Animation:
  """An animated picture, which a notebook shows.

  Attributes:
    gif: its bytes.
  """

  gif: bytes

  def save(self, path: str | os.PathLike) -> None:
    """Writes the GIF, whole or not at all; its folder is made."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, self.gif)

  def __repr__(self) -> str:
    return f"Animation({len(self.gif) / 1024:,.0f} KiB)"

  def _repr_html_(self) -> str:
    return f'<img alt="animation" src="data:image/gif;base64,{base64.b64encode(self.gif).decode()}">'


def image_animation(
  paths: Mapping[str, ArrayLike],
  evaluations: Mapping[str, int],
  *,
  title: str | None = None,
  shift: float = 1.0,
  seconds: float = 4.0,
  frames: int = 49,
  side: int = 64,
) -> Animation:
  """Rows of images that emerge from noise, each over a time line with a mark for every network evaluation so far.

  Args:
    paths: label -> states (steps + 1, n, H, W, C) from noise to data, about [-1, 1], C 1 or 3; n, H, W, C the same for
      all, and even in schedule time.
    evaluations: label -> network evaluations of the whole path, made at even schedule times.
    title: above the rows.
    shift: of the schedule, for the clock.
    seconds: from noise to data; the end is shown for another two and a half.
    frames: pictures from noise to data.
    side: pixels of an image's longer side, about.

  Raises:
    ValueError: for other shapes or numbers.
  """
  rows = _checked(paths, evaluations)
  if frames < 2 or not 0 < seconds <= LONGEST:
    raise ValueError(
      f"expected at least 2 frames and more than 0 seconds, {LONGEST} at most, got {frames} and {seconds}"
    )
  scale = max(1, round(side / max(next(iter(rows.values())).shape[2:4])))
  with drawing(1, 1) as figure:
    scene = _Scene(figure, rows, evaluations, title, scale)
    # Most is to be seen near the data: the clock slows down.
    pictures = [scene.at(1 - (1 - i / (frames - 1)) ** 1.6, shift) for i in range(frames)]
  return Animation(_gif(pictures, seconds / frames))


class _Scene:
  """The figure of an animation, whose moving parts are drawn anew for each of its times.

  Args:
    figure: an empty figure; it gets its size here.
    rows: states of each label.
    evaluations: network evaluations of each label.
    title: above the rows.
    scale: pixels of the picture for each pixel of an image.
  """

  def __init__(
    self, figure: Any, rows: Mapping[str, Array], evaluations: Mapping[str, int], title: str | None, scale: int
  ):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    self.rows, self.evaluations, self.scale = rows, evaluations, scale
    _, count, height, width, _ = next(iter(rows.values())).shape
    self.cell = width * scale + 6
    pad, strip, under, gap, line = 24, height * scale, 72, 12, 32
    self.left, length = pad, max(count * self.cell - 6, 420)
    margin = 190  # of the number of evaluations
    self.width = pad + length + margin + pad
    told = wrapped(title, self.width - 2 * pad, 11).split("\n") if title else []
    names = {label: wrapped(label, length) for label in rows}
    above = line * (1 + max(name.count("\n") for name in names.values())) + 6  # of the images, for their label
    head = pad + 38 * len(told) + line
    self.height = head + len(rows) * (gap + above + strip + under)
    self.paper = FigureCanvasAgg(figure)
    figure.set_size_inches(self.width / DPI, self.height / DPI)
    self.canvas = np.full((self.height, self.width, 3), 255, np.uint8)
    self.axes = figure.add_axes((0, 0, 1, 1))
    self.axes.set_axis_off()
    self.image = self.axes.imshow(self.canvas, interpolation="nearest", aspect="auto")
    self.tops = {label: head + gap + above + i * (gap + above + strip + under) for i, label in enumerate(rows)}
    self.ends = self.left, self.left + length
    self.moving: dict[str, Any] = {}
    looks = styles(list(rows), [label for label in rows if label.startswith("teacher")])

    def write(x: float, y: float, text: str, **options: Any) -> Any:
      return self.axes.text(x, y, text, **(dict(va="center", parse_math=False, color=INK) | options))

    for i, text in enumerate(told):
      write(pad, pad + 12 + 38 * i, text, fontsize=11)
    self.clock = write(pad, head - line / 2, "", fontsize=9, color=MUTED)
    for label, top in self.tops.items():
      colour, line = looks[label]["color"], top + strip + 20
      write(pad, top - 8, names[label], fontsize=9, color=colour, va="bottom", linespacing=1.1)
      self.axes.plot(self.ends, (line, line), color=PALE, lw=1.0, solid_capstyle="butt")
      write(self.ends[0], line + 26, "noise, t = 1", fontsize=6.5, color=MUTED)
      write(self.ends[1], line + 26, "t = 0, data", fontsize=6.5, color=MUTED, ha="right")
      middle, x = top + strip / 2, self.ends[1] + 34
      unit = f"network\nevaluation{'s' * (evaluations[label] != 1)}"
      write(x, middle + 36, unit, fontsize=7.5, color=MUTED, va="top")
      self.moving[label] = (
        self.axes.plot([], [], color=colour, lw=1.6, solid_capstyle="butt")[0],
        self.axes.plot([], [], color=colour, ls="", marker="|", ms=8, mew=1.1)[0],
        self.axes.plot([], [], color=colour, ls="", marker="o", ms=4)[0],
        write(x, middle - 4, "", fontsize=24, color=colour, va="center"),
        line,
      )

  def at(self, part: float, shift: float) -> Array:
    """Draws the scene after a part of the schedule's time, from 0 to 1; returns (height, width, 3), uint8."""
    start, end = self.ends
    now = start + part * (end - start)
    self.clock.set_text(f"t = {float(shift_time(1 - part, shift)):.2f}")
    for label, x in self.rows.items():
      self._place(_between(x, part), self.tops[label])
      path, marks, head, number, line = self.moving[label]
      total = self.evaluations[label]
      done = 0 if part == 0 else min(total, math.ceil(part * total - 1e-9))
      path.set_data((start, now), (line, line))
      marks.set_data(start + np.arange(done) / total * (end - start), np.full(done, line))
      head.set_data((now,), (line,))
      number.set_text(f"{done:,}")
    self.image.set_data(self.canvas)
    self.paper.draw()
    return np.array(self.paper.buffer_rgba())[..., :3]

  def _place(self, x: Array, top: int) -> None:
    """Puts images (n, H, W, C) on the canvas."""
    pixels = to_bytes(x).repeat(self.scale, axis=1).repeat(self.scale, axis=2)
    for j, one in enumerate(pixels):
      left = self.left + j * self.cell
      self.canvas[top : top + one.shape[0], left : left + one.shape[1]] = one


def _between(states: Array, part: float) -> Array:
  """Returns the states (steps + 1, ...) after a part of the steps, linear between two of them."""
  place = part * (len(states) - 1)
  low = min(int(place), len(states) - 2)
  return states[low] + (place - low) * (states[low + 1] - states[low])


def _checked(paths: Mapping[str, ArrayLike], evaluations: Mapping[str, int]) -> dict[str, Array]:
  """Returns the states as arrays of one shape but for their number, with their evaluations known."""
  rows = {label: np.asarray(x, np.float32) for label, x in some(paths, "paths").items()}
  shape = next(iter(rows.values())).shape
  for label, x in rows.items():
    if x.ndim != 5 or len(x) < 2 or x.shape[1:] != shape[1:] or x.shape[-1] not in (1, 3) or x.size == 0:
      raise ValueError(
        f"paths[{label!r}]: expected states (steps + 1 >= 2, n, H, W, 1 or 3), (n, H, W, C) the same for all, got "
        f"{x.shape} beside {shape}"
      )
    if label not in evaluations or evaluations[label] < 1:
      raise ValueError(f"evaluations: expected a number of at least 1 for {label!r}, got {dict(evaluations)}")
  return rows


def _gif(pictures: list[Array], seconds: float) -> bytes:
  """Returns pictures (height, width, 3), uint8, as a GIF that begins again; first and last are held."""
  from PIL import Image

  # One palette for all frames, so that what stands still is stored once. Its last colour is the paper's, which the
  # quantization, whose steps are coarse, would miss.
  sheet = Image.fromarray(np.concatenate(pictures[:: max(1, len(pictures) // 6)]))
  colours = sheet.quantize(127, method=Image.Quantize.MEDIANCUT)
  frames = []
  for picture in pictures:
    places = np.array(Image.fromarray(picture).quantize(palette=colours, dither=Image.Dither.NONE))
    places[(picture == 255).all(axis=-1)] = 127
    frames.append(Image.fromarray(places))
    frames[-1].putpalette([*(colours.getpalette() or ())[: 3 * 127], 255, 255, 255])
  step = max(20, round(seconds * 100) * 10)  # milliseconds; GIF counts hundredths of a second
  durations = [700, *[step] * (len(frames) - 2), 2500]
  file = io.BytesIO()
  frames[0].save(
    file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True, disposal=1
  )
  return file.getvalue()
