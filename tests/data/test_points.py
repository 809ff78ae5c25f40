"""The checkerboard against its exact density."""

import numpy as np
import pytest

from pflow_jax import data


def density_of(points):
  """Density at points (..., 2): 1/8 in a black square, else 0."""
  cell = np.floor(np.asarray(points))
  inside = np.all((cell >= -2) & (cell < 2), axis=-1)
  return np.where(inside & (cell.sum(axis=-1) % 2 == 0), 1 / 8, 0.0)


def test_density_integrates_to_one():
  edge = (np.arange(80) + 0.5) / 80 * 6 - 3
  grid = np.stack(np.meshgrid(edge, edge, indexing="ij"), axis=-1)
  density = density_of(grid)
  np.testing.assert_allclose(density.sum() * (6 / 80) ** 2, 1.0, rtol=0.03)
  assert set(np.unique(density)) == {0.0, 1 / 8}
  assert density_of(np.array([2.5, 0.5])) == 0  # black by parity, off the board


def test_points_follow_the_density():
  dataset = data.load("checkerboard")
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((2,), 0, None)
  x0 = next(data.batches(dataset, 80_000, seed=0))["x0"]
  assert np.all(density_of(x0) == 1 / 8)
  # Quarters of the black squares: 32 equal cells, 2,500 points each, 5 standard deviations.
  cells = np.unique(np.floor(x0 * 2), axis=0, return_counts=True)[1]
  assert len(cells) == 32
  assert np.all(np.abs(cells - 2500) < 250)
  np.testing.assert_allclose(x0.std(axis=0), np.sqrt(4 / 3), rtol=0.01)


def test_only_the_train_split_exists():
  with pytest.raises(ValueError, match="only split is 'train'"):
    data.load("checkerboard", split="test")
