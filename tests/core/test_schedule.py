"""Schedule and flow time, and the student's grid, against the PyTorch release."""

import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.core.schedule import (
  dynamic_shift,
  sample_segment,
  segment_grid,
  segment_length,
  shift_time,
  unshift_time,
)


def test_time_shift_matches_the_release(golden):
  file = golden("time_warp")
  r = file["in_raw"]
  for m in (0.5, 1.0, 3.2):
    np.testing.assert_allclose(shift_time(r, m), file[f"out_warp_{m}"], rtol=1e-9)
    np.testing.assert_allclose(unshift_time(r, m), file[f"out_unwarp_{m}"], rtol=1e-9)
  for tokens in (256, 1024, 4096, 8100):
    m = dynamic_shift(tokens)
    np.testing.assert_allclose(m, file[f"out_dynshift_{tokens}"], rtol=1e-9)
    np.testing.assert_allclose(shift_time(r, m), file[f"out_warp_dyn_{tokens}"], rtol=1e-9)


def test_shift_is_inverted_and_keeps_the_ends():
  r = np.linspace(0.0, 1.0, 11)
  for m in (0.3, 1.0, 6.0):
    np.testing.assert_allclose(unshift_time(shift_time(r, m), m), r, atol=1e-15)
    np.testing.assert_allclose(shift_time(np.array([0.0, 1.0]), m), [0.0, 1.0], atol=1e-15)


def test_dynamic_shift_passes_through_its_two_points():
  line = dict(base=(100, 0.2), top=(900, 1.0))
  np.testing.assert_allclose([dynamic_shift(n, **line) for n in (100, 500, 900)], np.exp([0.2, 0.6, 1.0]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("final_scale", [1.0, 0.5])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_segment_draw_matches_the_release(golden, nfe, final_scale, dtype):
  file, name = golden("sample_t"), f"n{nfe}_f{final_scale}"
  # The file holds schedule times, one less the uniform draws, and both sides of boundaries among them.
  uniform = jnp.asarray(1 - file["in_raw_t"].astype(dtype))
  r, length = sample_segment(uniform, nfe, final_scale)
  assert r.dtype == length.dtype == dtype
  np.testing.assert_allclose(r, file[f"out_raw_src_{name}"], rtol=1e-6)
  np.testing.assert_allclose(length, file[f"out_seg_{name}"], rtol=1e-6)
  np.testing.assert_allclose(shift_time(r, file["in_shift"]), file[f"out_sigma_src_{name}"], rtol=1e-6)


@pytest.mark.parametrize("final_scale", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_draws_are_the_segments_of_the_grid_as_often_as_they_are_long(nfe, final_scale):
  grid = segment_grid(nfe, final_scale)
  lengths = -np.diff(grid)
  assert len(grid) == nfe + 1
  assert (grid[0], grid[-1]) == (1.0, 0.0)
  np.testing.assert_allclose(lengths[:-1], segment_length(nfe, final_scale))
  if nfe > 1:
    np.testing.assert_allclose(lengths[-1], final_scale * lengths[0])
  uniform = (jnp.arange(20_000) + 0.5) / 20_000
  r, length = sample_segment(uniform, nfe, final_scale)
  for source, expected in zip(grid[:-1], lengths, strict=True):
    here = np.abs(np.asarray(r) - source) < 1e-9
    np.testing.assert_allclose(here.mean(), expected, atol=1e-3)
    np.testing.assert_allclose(np.asarray(length)[here], expected)


def test_bad_grids_are_refused():
  for nfe in (0, -1, 2.0, True, "2"):
    with pytest.raises(ValueError, match="nfe must be an integer of at least 1, got"):
      segment_grid(nfe)
  for final_scale in (0.0, 1.2, float("nan")):
    with pytest.raises(ValueError, match="final_scale must lie in .*got"):
      segment_length(2, final_scale)
