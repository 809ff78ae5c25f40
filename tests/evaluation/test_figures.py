"""Figures show what they were given, and refuse what they cannot show; they become files whole or not at all."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pflow_jax.evaluation.figures import (
  captioned_images,
  curve_panels,
  curves,
  image_grid,
  save,
  scatter_panels,
  to_png,
  trajectory_plot,
)
from pflow_jax.evaluation.figures.curves import _styles
from pflow_jax.evaluation.figures.lettering import fitted


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
    (["automobile", "airplane", "fire truck"], 2),
    (["Smileys & Emotion", "People & Body", "Animals & Nature"], 2),
    (["antidisestablishmentarianism"] * 3, 1),
    (["x" * 10**6, "$\\frac$", "\x1b[2J\n\ud800"], 1),
  ):
    columns, got = of_columns(labels)
    assert {0, 1, 2} == set(columns // 102), labels  # of 96 pixels, 6 apart
    assert (columns % 102 < 98).all(), labels
    assert got == height + 20 * (lines - 1)


def test_labels_are_made_to_fit_and_are_cut_last():
  assert fitted(["cat", "dog"], 96) == (["cat", "dog"], 9.0)
  texts, size = fitted(["cat", "automobile"], 96)
  assert texts == ["cat", "automobile"]
  assert 5.5 < size < 9
  assert fitted(["cat", "a small red bird"], 96)[0] == ["cat", "a small\nred bird"]
  texts, size = fitted(["x" * 10**6, "\x1b\n\ud800"], 96)
  assert size == 5.5
  assert texts[0].endswith("x…")
  assert len(texts[0]) < 20
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
  assert rows.max() < 0.65 * height  # the upper
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


def test_lines_beyond_the_colours_are_told_apart():
  styles = _styles([f"method {i}" for i in range(14)])
  assert len({tuple(sorted(style.items())) for style in styles.values()}) == 14


@pytest.mark.parametrize(
  ("draw", "match"),
  [
    (lambda: trajectory_plot(np.zeros((5, 2)), {"a": np.zeros((4, 2))}), "steps >= 2"),
    (lambda: trajectory_plot(np.zeros((5, 2)), {"a": np.zeros((1, 4, 2))}), "steps >= 2"),
    (lambda: trajectory_plot(np.zeros((5, 3)), {"a": np.zeros((2, 4, 2))}), "data: expected points"),
    (lambda: trajectory_plot(np.zeros((5, 2)), {}), "at least one"),
    (lambda: scatter_panels({"a": np.zeros((5, 3))}), "points"),
    (lambda: scatter_panels({}), "at least one"),
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
