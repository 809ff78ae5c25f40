"""Figures show what they were given, and refuse what they cannot show; they become files whole or not at all."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pflow_jax.evaluation import plot
from pflow_jax.evaluation.figures import (
  captioned_images,
  curve_panels,
  curves,
  image_animation,
  image_grid,
  save,
  scatter_panels,
  to_png,
  trajectory_plot,
)
from pflow_jax.evaluation.figures.canvas import drawing
from pflow_jax.evaluation.figures.lettering import MAX_LETTERS, fitted, text_width
from pflow_jax.evaluation.figures.motion import _Scene
from pflow_jax.evaluation.figures.palette import COLOURS, INK, METHODS, places, styles
from tests.evaluation.colour import lab, srgb_to_linear
from tests.programs import ROOT, load_module


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def _pixels(figure):
  with Image.open(io.BytesIO(to_png(figure))) as image:
    return np.asarray(image.convert("RGB")).astype(int)


def _colours(figure):
  return {tuple(colour) for colour in np.unique(_pixels(figure).reshape(-1, 3), axis=0)}


def test_a_figure_becomes_a_file_in_a_new_folder(tmp_path, rng):
  figure = scatter_panels({"a": rng.normal(size=(50, 2))})
  save(figure, tmp_path / "deep" / "picture.png")
  with Image.open(tmp_path / "deep" / "picture.png") as image:
    assert image.format == "PNG"
    assert image.size == tuple(np.rint(figure.get_size_inches() * 200).astype(int))
  assert [path.name for path in (tmp_path / "deep").iterdir()] == ["picture.png"]


def test_image_grid_shows_every_pixel_as_a_sharp_square():
  # 24 shades, none of which text or background has, each of an own colour.
  ramp = np.linspace(-0.9, 0.9, 24)
  image = np.stack([ramp, -ramp, np.full(24, -1.0)], axis=-1).reshape(1, 4, 6, 3)
  figure = image_grid({"teacher": image, "student": image}, title="Samples", scale=10)
  pixels = _pixels(figure).reshape(-1, 3)
  for colour in np.rint((image.astype(np.float32) + 1) * 127.5).astype(int).reshape(-1, 3):
    assert np.sum((pixels == colour[None, :]).all(axis=1)) == 2 * 10 * 10


def test_image_grid_clips_and_draws_non_finite_values_grey():
  x = np.stack([np.full((8, 8, 3), v) for v in ([5, -5, -5], [np.nan] * 3)])
  figure = image_grid({"": x})
  assert {(255, 0, 0), (128, 128, 128)} <= _colours(figure)


def test_image_grid_has_room_for_labels_titles_and_columns(rng):
  x = rng.uniform(-1, 1, size=(3, 8, 8, 1))
  sizes = {}
  for name, kwargs in {
    "plain": {},
    "title": {"title": "a title"},
    "columns": {"column_labels": ["0", "1", "2"]},
  }.items():
    figure = image_grid({"teacher, 128 steps": x}, **kwargs)
    sizes[name] = _pixels(figure).shape[:2]
  assert sizes["title"][0] > sizes["plain"][0] + 30
  assert sizes["columns"][0] > sizes["plain"][0] + 30
  figure = image_grid({"a": x})
  assert _pixels(figure).shape[1] < sizes["plain"][1] - 100


def test_long_rows_of_an_image_grid_go_on_below():
  """Every image is there, in reading order, in blocks of all rows; labels have room above each block."""
  shades = np.linspace(-0.9, 0.9, 5)
  x = np.broadcast_to(np.stack([shades, -shades, np.full(5, -1.0)], -1)[:, None, None], (5, 8, 8, 3))
  colours = np.rint((x[:, 0, 0].astype(np.float32) + 1) * 127.5).astype(int)
  figure = image_grid({"a": x, "b": x}, scale=4, columns=2, column_labels=["label"] * 5)
  places = [np.argwhere((_pixels(figure) == colour).all(-1)) for colour in colours]
  assert [len(place) for place in places] == [2 * 32 * 32] * 5
  (tops, lefts), bottoms = np.array([place.min(0) for place in places]).T, [place.max(0)[0] for place in places]
  assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
  assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]
  assert tops[2] - bottoms[0] > 30


def test_long_column_labels_are_shown_within_their_columns():
  def of_columns(labels):
    """Where there is ink above each of 3 white images, and the height of the picture."""
    figure = image_grid({"": np.ones((3, 8, 8, 3))}, column_labels=labels)
    ink = _pixels(figure).min(axis=2) < 200
    columns = np.flatnonzero(ink.any(axis=0)) - 24  # the margin
    return columns, ink.shape[0]

  _, height = of_columns(["1", "2", "3"])
  for labels, lines in (
    (["automobile", "airplane", "fire truck"], 1),
    (["Smileys & Emotion", "People & Body", "Animals & Nature"], 3),
    (["antidisestablishmentarianism"] * 3, 3),
    (["x" * 10**6, "$\\frac$", "\x1b[2J\n\ud800"], 10),
  ):
    columns, got = of_columns(labels)
    assert {0, 1, 2} == set(columns // 102), labels  # of 96 pixels, 6 apart
    assert (columns % 102 < 98).all(), labels
    assert got == height + 25 * (lines - 1)


def test_labels_are_made_to_fit_and_no_letter_is_lost():
  assert fitted(["cat", "dog"], 96) == (["cat", "dog"], 9.0)
  texts, size = fitted(["cat", "automobile"], 96)
  assert texts == ["cat", "automobile"]
  assert 5.5 < size < 9
  assert fitted(["cat", "a small red bird"], 96)[0] == ["cat", "a small\nred bird"]
  long = ["family: man, woman, girl, boy", "antidisestablishmentarianism and pneumonoultramicroscopicsilico"]
  texts, size = fitted(long, 96)
  assert ["".join(text.split()) for text in texts] == ["".join(text.split()) for text in long]
  assert all(text_width(line, size) <= 97 for text in texts for line in text.split("\n"))
  texts, size = fitted(["x" * 10**6, "\x1b\n\ud800"], 96)
  assert size == 5.5
  assert len(texts[0].replace("\n", "")) == MAX_LETTERS
  assert texts[0].endswith("x…")
  assert texts[1] == "???"
  assert fitted([], 96) == ([], 9.0)


def test_names_that_are_no_mathematics_are_drawn(rng):
  name = "runs/$\\frac$"
  to_png(image_grid({name: np.ones((1, 8, 8, 3))}, title=name))
  points = rng.normal(size=(9, 2))
  to_png(scatter_panels({name: points}, title=name))
  to_png(trajectory_plot(points, {name: np.stack([points, points])}, title=name))


def test_image_grid_refuses_wrong_shapes(rng):
  x = rng.uniform(size=(3, 8, 8, 1))
  for rows in ({"a": x[..., 0]}, {"a": x, "b": x[:2]}, {"a": x.repeat(2, axis=-1)}):
    with pytest.raises(ValueError, match="1 or 3"):
      image_grid(rows)
  with pytest.raises(ValueError, match="at least one row"):
    image_grid({})
  with pytest.raises(ValueError, match="column_labels: expected 3"):
    image_grid({"a": x}, column_labels=["0"])
  with pytest.raises(ValueError, match="scale"):
    image_grid({"a": x}, scale=-1)


def test_captioned_images_are_whole_pixels_in_rows(rng):
  shades = np.linspace(-0.9, 0.9, 5).reshape(5, 1, 1, 1) * np.array([1.0, -1.0, 0.5])
  captions = ["a", "a rather long description of what is to be seen", "", "b", "two red cats"]
  figure = captioned_images(np.broadcast_to(shades, (5, 8, 6, 3)), captions, columns=2, side=64)
  pixels = _pixels(figure)
  assert pixels.shape[1] < pixels.shape[0], "three rows of two"
  for shade in np.rint((shades.astype(np.float32) + 1) * 127.5).astype(int).reshape(5, 3):
    assert np.sum((pixels == shade).all(axis=-1)) == 64 * 48
  figure = captioned_images(rng.uniform(-1, 1, (1, 512, 1024, 1)), ["$x_$"], side=64)  # no mathematics
  assert _pixels(figure).shape[1] == 64 + 2 * 24


def test_captioned_images_refuse_wrong_shapes(rng):
  with pytest.raises(ValueError, match="1 or 3"):
    captioned_images(rng.uniform(size=(3, 8, 8)), ["a"] * 3)
  with pytest.raises(ValueError, match="captions: expected 3"):
    captioned_images(rng.uniform(size=(3, 8, 8, 1)), ["a"])


def test_trajectory_plot_over_the_data(rng):
  t = np.linspace(1, 0, 9)[:, None, None]
  states = t * rng.normal(size=(1, 20, 2)) + (1 - t) * rng.uniform(-2, 2, size=(1, 20, 2))
  points = rng.uniform(-2, 2, size=(5000, 2))
  figure = trajectory_plot(points, {"teacher": states, "student": states}, title="Paths")
  height, width = _pixels(figure).shape[:2]
  assert 1.5 < width / height < 2.0  # two squares and a heading
  colours = _colours(figure)
  assert (213, 94, 0) in colours  # an end point
  assert any(b > r + 30 for r, _, b in colours)  # the density


def test_density_is_drawn_the_right_way_up(rng):
  states = np.full((2, 1, 2), -1.0)  # the panel reaches from here to the points
  figure = trajectory_plot(rng.uniform(0, 1, size=(100_000, 2)), {"": states})
  blue = _pixels(figure)[..., 2] - _pixels(figure)[..., 0] > 30
  rows, columns = np.nonzero(blue)
  height, width = blue.shape
  assert rows.min() < 0.2 * height
  assert (rows < 0.55 * height).sum() > 20 * (rows >= 0.55 * height).sum()  # the upper, a legend is below
  assert columns.min() > 0.45 * width  # right quarter


def test_scatter_panels_share_limits_and_show_where_samples_are(rng):
  data = rng.uniform(-1, 1, size=(20_000, 2))
  right = np.abs(data) * np.array([[1.0, -1.0]])  # the lower right quarter
  figure = scatter_panels({"data": data, "student": right}, bins=20)
  pixels = _pixels(figure)
  height, width = pixels.shape[:2]
  bright = pixels[:, width // 2 :].sum(axis=-1) > 250
  panel = bright[int(0.2 * height) : int(0.92 * height), int(0.05 * width) : int(0.47 * width)]
  h, w = panel.shape
  assert panel[: h // 3].mean() < 0.02
  assert panel[-h // 3 :, -w // 3 :].mean() > 0.95


def test_curves_are_drawn():
  n = 2.0 ** np.arange(8)
  for series in ({"euler": (n, 1 / n)}, {"euler": (n, 1 / n), "ab2": (n, 1 / n**2)}):
    colours = _colours(curves(series, xlabel="substeps", ylabel="error", title="Work and precision"))
    assert (0, 114, 178) in colours
    assert ((213, 94, 0) in colours) == ("ab2" in series)
  to_png(curves({"a": ([0, 1], [-1, 1])}, xlabel="", ylabel="", xscale="linear", yscale="linear"))


def test_curve_panels_give_a_label_one_look_and_one_legend():
  reference, one, two = ([1, 2, 4, 8], [3.0, 1.8, 1.0, 0.5]), ([1, 2], [0.6, 0.5]), ([1, 2, 4], [0.9, 0.8, 0.7])
  panels = {"alignment": {"teacher": reference, "one": one}, "FD": {"teacher": reference, "two": two}}
  figure = curve_panels(panels, xlabel="NFE", dashed=("teacher",))
  pixels = _pixels(figure)
  width = pixels.shape[1]
  columns = {
    name: np.nonzero((pixels == np.array(colour)[None, None, :]).all(axis=2).any(axis=0))[0]
    for name, colour in (("one", (0, 114, 178)), ("two", (213, 94, 0)))
  }
  legend = 0.72 * width
  assert columns["one"].min() < width / 3
  assert not np.any((columns["one"] > 0.4 * width) & (columns["one"] < legend)), "not in the second panel"
  assert 0.4 * width < columns["two"].min() < legend, "where the next colour is the next label's"
  assert all(c.max() > legend for c in columns.values()), "both in the legend"


def test_many_methods_have_a_column_each_over_the_others_in_grey():
  nfe = [1, 2, 4, 8]
  titles = [title for _, title, _ in METHODS if title != "ArcFlow"]
  series = {title: (nfe, np.linspace(1, 0.5, 4) + i, np.full(4, 0.1)) for i, title in enumerate(titles)}
  panels = {"alignment\n(lower is better)": {"teacher": (nfe, [9, 5, 3, 2])} | series, "FD": series}
  figure = curve_panels(panels, xlabel="NFE", dashed=("teacher",), note="bars: over 3 seeds")
  columns = [axes for axes in figure.axes if axes.get_title(loc="left")]
  assert [axes.get_title(loc="left").replace("\n", " ") for axes in columns] == titles
  for axes, title in zip(columns, titles, strict=True):
    colours = [line.get_color() for line in axes.lines if len(line.get_xdata()) == 4]
    assert colours.count(styles([title])[title]["color"]) == 1
    assert colours.count("#c9ced3") == len(titles) - 1
    assert colours.count(INK) == 1, "the teacher is in all"
    assert axes.collections, "bars"
  texts = [text.get_text() for text in figure.texts]
  assert "teacher: black dashes; grey: the other methods; bars: over 3 seeds" in texts
  rows = -(-len(titles) // figure.axes[0].get_gridspec().ncols)
  assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == [*panels] * rows
  assert_nothing_overlaps(figure)


def test_bars_have_the_length_of_the_deviation():
  figure = curve_panels({"a": {"one": ([1, 2], [1.0, 2.0], [0.25, 0.5])}}, xlabel="")
  (bars,) = [one for one in figure.axes[0].collections if len(one.get_segments()) == 2]
  assert [[y for _, y in part] for part in bars.get_segments()] == [[0.75, 1.25], [1.5, 2.5]]
  figure = curve_panels({"a": {"one": ([1, 2], [1.0, 2.0])}}, xlabel="")
  assert not figure.axes[0].collections


def assert_nothing_overlaps(figure):
  """All texts of a figure lie within it and beside one another."""
  to_png(figure)  # lays it out
  boxes = {text: text.get_window_extent() for text in _drawn_texts(figure)}
  width, height = figure.get_size_inches() * figure.dpi
  for text, box in boxes.items():
    assert -1 <= box.x0 <= box.x1 <= width + 1, text.get_text()
    assert -1 <= box.y0 <= box.y1 <= height + 1, text.get_text()
    for other, its in boxes.items():
      over = min(box.x1, its.x1) - max(box.x0, its.x0), min(box.y1, its.y1) - max(box.y0, its.y0)
      assert other is text or min(over) < 2, (text.get_text(), other.get_text())


def _drawn_texts(figure):
  """Texts of a figure that are drawn; matplotlib keeps labels of ticks beyond the limits of their axes."""
  beyond = set()
  for axes in figure.axes:
    its = axes.get_window_extent()
    for axis, low, high, at in ((axes.xaxis, its.x0, its.x1, 0), (axes.yaxis, its.y0, its.y1, 1)):
      for tick in axis.get_major_ticks() + axis.get_minor_ticks():
        if (
          not axes.get_visible()
          or not low - 1 <= tick.label1.get_window_extent().get_points()[:, at].mean() <= high + 1
        ):
          beyond |= {tick.label1, tick.label2}
  texts = figure.findobj(matplotlib.text.Text)
  hidden = {text for axes in figure.axes if not axes.get_visible() for text in axes.findobj(matplotlib.text.Text)}
  return [text for text in texts if text.get_visible() and text.get_text().strip() and text not in beyond | hidden]


# Simulations of Machado, Oliveira and Fernandes (2009), https://doi.org/10.1109/TVCG.2009.113, severity 1, linear RGB.
SIGHTS = {
  "all cones": np.eye(3),
  "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
  "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_twelve_colours_and_black_are_told_apart_with_any_sight(sight):
  linear = srgb_to_linear(np.array([matplotlib.colors.to_rgb(one) for one in (*COLOURS, INK)]))
  seen = lab(np.clip(linear @ np.array(SIGHTS[sight]).T, 0, 1))
  distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 1e9 * np.eye(len(seen))
  assert len(COLOURS) == 12
  assert distances.min() > 16, "of 100 between black and white; Okabe and Ito's have 17.9 with deuteranopia"
  white = lab(np.ones((1, 3)))
  assert np.linalg.norm(seen - white, axis=-1).min() > 25, "and from paper"


def test_a_method_has_its_colour_in_every_figure():
  alone = styles(["AYF-LMD"])["AYF-LMD"]["color"]
  assert (
    styles(["mine", "π-Flow, GMFlow", "AYF-LMD"])["AYF-LMD"]["color"]
    == alone
    == styles(["ayf_lmd"])["ayf_lmd"]["color"]
  )
  found = places(["mine", "π-Flow, DX", "yours"])
  assert len(set(found.values())) == 3
  assert found["mine"] == 0
  ten = [title for _, title, _ in METHODS if title != "ArcFlow"]
  assert len({look["color"] for look in styles([*ten, "mine", "yours"]).values()}) == 12
  assert {name for name, _, _ in METHODS} == {method["name"] for method in compared().methods}
  assert {method["title"] for method in compared().methods} <= {title for _, title, _ in METHODS}


def compared():
  """The comparison of configs/compare/digits.py."""
  return load_module(ROOT / "configs" / "compare" / "digits.py").get_config()


def test_lines_beyond_the_colours_are_told_apart():
  looks = styles([f"method {i}" for i in range(20)])
  assert len({tuple(sorted(style.items())) for style in looks.values()}) == 20


def test_rows_have_their_notes_beside_them():
  x = np.zeros((2, 8, 8, 1))
  rows, notes = {"teacher, 128 steps": x, "student": x}, {"teacher, 128 steps": "reference", "student": "0.077"}
  figure = image_grid(
    rows,
    title="A title",
    caption="What is to be seen. " * 20,
    notes=notes,
    notes_title="error",
    column_labels=["1", "2"],
  )
  assert_nothing_overlaps(figure)
  places = {text.get_text(): text.get_window_extent() for text in figure.texts}
  right = figure.axes[0].get_window_extent().x1
  for label, note in notes.items():
    assert places[note].x0 > right
    assert abs(places[note].y0 + places[note].y1 - places[label].y0 - places[label].y1) < 8, "on one height"
  assert places["reference"].y0 > places["0.077"].y1
  assert places["error"].y0 > places["reference"].y1


def test_trajectories_have_a_legend(rng):
  path = np.cumsum(rng.normal(size=(5, 9, 2)), axis=0)
  for panels in ({"a": path}, {"a": path, "b": path}):
    figure = trajectory_plot(path[0], panels)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["start: noise, t = 1", "path", "end: sample, t = 0", "density of the data"]
    assert_nothing_overlaps(figure)
    assert legend.get_window_extent().y1 < min(axes.get_window_extent().y0 for axes in figure.axes)


def _frames(animation):
  """Frames of a GIF as (frames, height, width, 3), and the milliseconds that each is shown."""
  with Image.open(io.BytesIO(animation.gif)) as image:
    assert image.format == "GIF"
    assert image.info["loop"] == 0
    shown = []
    for i in range(image.n_frames):
      image.seek(i)
      shown.append((np.asarray(image.convert("RGB")).astype(int), image.info["duration"]))
  return np.stack([one for one, _ in shown]), [time for _, time in shown]


def test_an_animation_goes_from_noise_to_data_and_counts_evaluations(tmp_path):
  black, white = np.full((1, 2, 8, 8, 1), -1.0), np.full((1, 2, 8, 8, 1), 1.0)
  paths = {"teacher": np.linspace(black, white, 9)[:, 0], "student": np.concatenate([black, white])}
  animation = image_animation(paths, {"teacher": 8, "student": 1}, title="A title", frames=5, side=16)
  frames, times = _frames(animation)
  assert len(frames) == 5
  assert times[0] > 500
  assert times[-1] > 2000
  assert (frames[:, 0, 0] == 255).all(), "the paper is white"
  # Both rows go through the same greys, up to the colours of a GIF, from black to white.
  rows = [frames[:, top, 26, 0] for top in _tops(frames[0])]
  assert len(rows) == 2
  np.testing.assert_allclose(rows[0], rows[1], atol=6)
  assert (np.diff(rows[0]) > 0).all()
  assert (rows[0][0], rows[0][-1]) == (0, 255)
  # Of marks the teacher gets more from frame to frame; the student has one, at the start.
  blue = lambda frame: (np.abs(frame - np.array([0, 114, 178])).max(axis=-1) < 40).any(axis=0)
  marked = [np.flatnonzero(blue(frame[:, : frames.shape[2] - 220])) for frame in frames]
  assert marked[0].max() < marked[2].max() < marked[4].max(), "its policy goes on"
  animation.save(tmp_path / "deep" / "a.gif")
  assert (tmp_path / "deep" / "a.gif").read_bytes() == animation.gif
  assert animation._repr_html_().startswith('<img alt="animation" src="data:image/gif;base64,R0lGOD')


def _tops(frame):
  """Rows of pixels in which images begin: black from the margin on."""
  dark = (frame[:, 24:40].max(axis=-1) < 8).all(axis=1)
  return np.flatnonzero(dark[1:] & ~dark[:-1]) + 4


@pytest.mark.parametrize(
  ("part", "counts"), [(0.0, (0, 0, 0)), (0.01, (2, 1, 1)), (0.5, (64, 1, 2)), (0.51, (66, 1, 3)), (1.0, (128, 1, 4))]
)
def test_evaluations_are_made_where_their_segments_start(part, counts):
  states = np.zeros((2, 1, 8, 8, 1), np.float32)
  evaluations = {"teacher": 128, "one": 1, "four": 4}
  with drawing(1, 1) as figure:
    scene = _Scene(figure, dict.fromkeys(evaluations, states), evaluations, None, 8)
    scene.at(part, 1.0)
  for (label, total), count in zip(evaluations.items(), counts, strict=True):
    _, marks, _, number, _ = scene.moving[label]
    start, end = scene.ends
    np.testing.assert_allclose((marks.get_xdata() - start) / (end - start), np.arange(count) / total, atol=1e-9)
    assert number.get_text() == str(count)
  assert scene.clock.get_text() == f"t = {1 - part:.2f}"
  assert_nothing_overlaps(figure)


def test_a_notebook_says_how_many_evaluations_a_path_has():
  x = np.zeros((5, 2, 8, 8, 4))
  with pytest.raises(ValueError, match=r"expected names of paths, \['a'\], got \['b'\]"):
    plot.animation({"a": x}, {"b": 1})
  assert plot.animation(x[:, :1], 2, seconds=0.5).gif[:3] == b"GIF"


@pytest.mark.parametrize(
  ("draw", "match"),
  [
    (lambda: trajectory_plot(np.zeros((5, 2)), {"a": np.zeros((4, 2))}), "steps >= 2"),
    (lambda: trajectory_plot(np.zeros((5, 2)), {"a": np.zeros((1, 4, 2))}), "steps >= 2"),
    (lambda: trajectory_plot(np.zeros((5, 3)), {"a": np.zeros((2, 4, 2))}), "data: expected points"),
    (lambda: trajectory_plot(np.zeros((5, 2)), {}), "at least one"),
    (lambda: scatter_panels({"a": np.zeros((5, 3))}), "points"),
    (lambda: scatter_panels({}), "at least one"),
    (lambda: image_animation({}, {}), "at least one"),
    (lambda: image_animation({"a": np.zeros((4, 2, 8, 8))}, {"a": 1}), r"steps \+ 1 >= 2, n, H, W"),
    (lambda: image_animation({"a": np.zeros((1, 2, 8, 8, 1))}, {"a": 1}), r"steps \+ 1 >= 2, n, H, W"),
    (lambda: image_animation({"a": np.zeros((4, 2, 8, 8, 1))}, {}), "evaluations: expected a number of at least 1 for"),
    (lambda: image_animation({"a": np.zeros((4, 2, 8, 8, 1))}, {"a": 0}), "evaluations: expected a number of at least"),
    (lambda: image_animation({"a": np.zeros((4, 2, 8, 8, 1))}, {"a": 1}, frames=1), "at least 2 frames"),
    (lambda: image_animation({"a": np.zeros((4, 2, 8, 8, 1))}, {"a": 1}, seconds=0), "more than 0 seconds"),
    (lambda: image_animation({"a": np.zeros((4, 2, 8, 8, 1))}, {"a": 1}, seconds=1e9), "600 at most"),
    (lambda: curves({"a": ([1, 2], [1])}, xlabel="", ylabel=""), "one shape"),
    (lambda: curves({"a": ([0, 2], [1, 2])}, xlabel="", ylabel=""), "x has values"),
    (lambda: curves({"a": ([1, 2], [1, np.nan])}, xlabel="", ylabel=""), "y has values"),
    (lambda: curves({}, xlabel="", ylabel=""), "at least one"),
    (lambda: curve_panels({}, xlabel=""), "at least one"),
    (lambda: curve_panels({"a": {}}, xlabel=""), "at least one"),
    (lambda: curve_panels({"a": {"b": ([1, 2], [1, 0])}}, xlabel=""), "y has values"),
  ],
)
def test_wrong_shapes_are_refused(draw, match):
  with pytest.raises(ValueError, match=match):
    draw()


def test_global_style_is_left_alone():
  with matplotlib.rc_context({"font.size": 17.0}):
    to_png(scatter_panels({"a": np.random.default_rng(0).normal(size=(50, 2))}))
    assert matplotlib.rcParams["font.size"] == 17.0


def test_import_does_not_load_matplotlib():
  code = "import sys, pflow_jax.evaluation.figures; sys.exit('matplotlib' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
