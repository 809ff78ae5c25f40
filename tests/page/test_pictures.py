"""Pictures of the page: where a click falls, what a PNG keeps, and drawings that take the page's colour."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from pflow_jax.page import pictures
from pflow_jax.page.drawing import Drawn, Way
from pflow_jax.page.pictures import PANEL, Grid


@pytest.mark.parametrize(("shape", "count", "scale"), [((8, 8), 8, 14), ((8, 4), 20, 14), ((200, 100), 3, 1)])
def test_every_pixel_of_a_strip_is_found_again(shape, count, scale):
  rng = np.random.default_rng(0)
  x0 = rng.uniform(-1, 1, (count, *shape, 3))
  image, grid = pictures.strip_of(x0)
  assert (grid, grid.scale) == (Grid(shape, count), scale)
  pixels = np.asarray(image)
  seen = set()
  for y in range(0, image.height, 3):
    for x in range(0, image.width, 3):
      found = grid.at(x, y)
      assert (found is None) == (pixels[y, x, 3] == 0), (x, y)
      if found is not None:
        index, (row, column) = found
        np.testing.assert_allclose(pixels[y, x, :3] / 127.5 - 1, x0[index, row, column], atol=0.005)
        seen.add(index)
  assert seen == set(range(count))
  assert [grid.at(*place) for place in ((-1, 0), (0, -1), (10**9, 0), (0, 10**9))] == [None] * 4


def test_the_settings_are_in_the_file():
  image, _ = pictures.strip_of(np.zeros((2, 8, 8, 1)))
  told = {"prompt": "ein Käfer ✓ <b>", "seeds": [3], "temperature": None}
  link = pictures.download_link(pictures.sheet([image, image], ["a", "b"], told), "x.png")
  png = base64.b64decode(re.search(r'download="x.png" href="data:image/png;base64,([^"]+)"', link)[1])
  assert b"tEXtparameters\0" in png
  read = Image.open(io.BytesIO(png))
  assert json.loads(read.text["parameters"]) == told
  assert read.getpixel((pictures.PAD + 1, pictures.PAD + pictures.LINE + 1)) == (128, 128, 128)


def test_a_click_on_a_panel_finds_the_point():
  points = np.random.default_rng(0).uniform(-2, 2, (50, 2))
  points[7] = np.nan
  limit = 2.5
  for i in (0, 20, 49):
    x, y = (points[i] + limit) / (2 * limit) * (PANEL - 1)
    assert pictures.nearest_point(points, limit, round(x), round(PANEL - 1 - y)) == i
  panel = np.asarray(pictures.panel_of(points[:1], limit, "#D55E00"))
  assert panel.shape == (PANEL, PANEL, 4)
  y, x = np.argwhere(panel[..., 3] > 0).mean(axis=0)
  assert pictures.nearest_point(np.array([[9, 9], points[0]]), limit, round(x), round(y)) == 1
  np.testing.assert_allclose((points[0] + limit) / (2 * limit) * (PANEL - 1), [x, PANEL - 1 - y], atol=1)
  assert pictures.limit_of(np.full((3, 2), np.inf)) == 1.0


def test_costs_are_words():
  told = pictures.cost_of(Drawn(np.zeros(1), 256, 0.01234, 8, 2.04))
  assert told == "256 evaluations, 12.3 ms a sample; 8 at a time; compiled in 2.0 s before"
  assert pictures.cost_of(Drawn(np.zeros(1), 1, 2.5, 1, 0.0)) == "1 evaluation, 2.5 s a sample"


def test_the_chart_of_a_pixel_has_a_line_a_row_and_a_dot_an_evaluation():
  ways = [Way(np.linspace(1, 0, 5), np.zeros((5, 1, 4, 4, 2)), nfe) for nfe in (1, 4, 2)]
  drawing = pictures.value_chart(ways, (63, 0), (64, 64), ["a<b", "$few_$", "c"], ["#111111", "#222222", "#111111"])
  assert drawing.startswith("<svg")
  assert "a&lt;b" in drawing
  assert "$few_$" in drawing
  assert "currentColor" in drawing
  assert "#010203" not in drawing
  assert "stroke-dasharray" in drawing, "the second of a colour is dashed"
  assert 'xlink:href="http' not in drawing
  assert len(re.findall(r"<use [^>]*style=\"fill: #222222", drawing)) == 4
  values = pictures.value_of(np.arange(24.0).reshape(2, 2, 2, 3), (0, 1))
  np.testing.assert_array_equal(values, [4, 16])


def test_panels_of_ways():
  states = np.random.default_rng(0).normal(size=(9, 5, 2))
  drawing = pictures.way_panels([Way(np.linspace(1, 0, 9), states, 1)] * 2, ["one", "two"], ["#111111", "#222222"])
  assert ">one<" in drawing
  assert ">two<" in drawing
