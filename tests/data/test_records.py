"""The stream of shuffled epochs."""

import numpy as np
import pytest

from pflow_jax.data.records import stream_rows


def test_an_epoch_holds_every_row_once_and_epochs_differ():
  first, second = (stream_rows(50, 3, epoch * 50 + np.arange(50)) for epoch in (0, 1))
  np.testing.assert_array_equal(np.sort(first), np.arange(50))
  np.testing.assert_array_equal(np.sort(second), np.arange(50))
  assert not np.array_equal(first, second)


def test_seeds_differ():
  assert not np.array_equal(stream_rows(50, 3, np.arange(50)), stream_rows(50, 4, np.arange(50)))


@pytest.mark.parametrize("size", [1, 7, 10, 23, 64])
def test_any_cut_of_the_stream_is_the_same_stream(size):
  whole = stream_rows(10, 0, np.arange(5 * size))
  parts = [stream_rows(10, 0, i * size + np.arange(size)) for i in range(5)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_shuffle_is_uniform_over_positions():
  where = [np.flatnonzero(stream_rows(4, seed, np.arange(4)) == 0)[0] for seed in range(2000)]
  np.testing.assert_allclose(np.bincount(where, minlength=4) / 2000, 0.25, atol=0.04)


def test_scattered_positions_over_epochs():
  whole = stream_rows(10, 0, np.arange(100))
  positions = np.array([3, 4, 17, 40, 41, 99])
  np.testing.assert_array_equal(stream_rows(10, 0, positions), whole[positions])
