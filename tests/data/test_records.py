"""The stream of shuffled epochs."""

import grain
import numpy as np
import pytest

from pflow_jax.data.records import Draws, _grain_rows, stream_rows


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


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (7, 3), (1000, 2**32 - 1), (1_281_167, 0)])
def test_records_of_files_come_in_grain_s_order(count, seed):
  stream = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
  positions = np.array([0, 1, 5, 6, 7, 999, 1000, 10 * count + 3, 2**40 - 1])
  np.testing.assert_array_equal(_grain_rows(count, seed, positions), [stream[int(one)] for one in positions])


def test_numbers_of_an_example_depend_on_its_place_alone():
  def draw(seed, *positions):
    return [one.random_raw(3) for one in Draws(seed, np.array(positions, np.uint64)).streams()]

  whole = draw(5, 0, 1, 2**63 + 7)
  np.testing.assert_array_equal(draw(5, 2**63 + 7, 1), whole[:0:-1])
  np.testing.assert_array_equal(np.random.Philox(key=np.array([5, 1], np.uint64)).random_raw(3), whole[1])
  assert len(np.unique([*whole, *draw(6, 0, 1)])) == 15
