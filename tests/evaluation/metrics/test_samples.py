"""Alignment, diversity and accuracy against closed forms."""

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import accuracy, alignment_errors, diversity


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_alignment_errors_are_those_of_pairs():
  reference = np.zeros((2, 2, 2, 1))
  samples = reference.copy()
  samples[0] = 3.0  # RMSE 3
  samples[1, 0, 0] = 2.0  # one axis of four off by 2: RMSE 1
  np.testing.assert_allclose(alignment_errors(samples, reference), [3.0, 1.0])
  assert not np.any(alignment_errors(samples, samples))


def test_alignment_refuses_unpaired_and_diverged_samples():
  with pytest.raises(ValueError, match="same noise"):
    alignment_errors(np.zeros((3, 2)), np.zeros((4, 2)))
  with pytest.raises(ValueError, match="1 of 3 samples are not finite"):
    alignment_errors(np.array([[0.0], [np.nan], [1.0]]), np.zeros((3, 1)))


def test_diversity_is_the_mean_rms_distance_of_pairs_within_a_class():
  samples = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
  labels = np.array([0, 0, 0, 1, 1, 2])
  first = (5 + 5 + 10) / 3 / np.sqrt(2)
  np.testing.assert_allclose(diversity(samples, labels), (first + 1.0) / 2)
  assert diversity(np.ones((4, 8, 8, 1)), np.zeros(4, int)) == 0


def test_diversity_of_more_than_one_block(rng):
  x = rng.normal(size=(1500, 64))
  # RMS distance of two unit Gaussians: sqrt(2) (1 - 1 / (4 D)).
  expected = np.sqrt(2) * (1 - 1 / 256)
  np.testing.assert_allclose(diversity(x, np.zeros(1500, int)), expected, rtol=2e-3)


def test_diversity_refuses_single_samples_and_wrong_labels():
  with pytest.raises(ValueError, match="at least two samples"):
    diversity(np.zeros((3, 2)), np.arange(3))
  with pytest.raises(ValueError, match="one per sample"):
    diversity(np.zeros((3, 2)), np.zeros(2, int))


def test_accuracy():
  assert accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
  with pytest.raises(ValueError, match="equal shapes"):
    accuracy([1, 2], [1])
