"""Inception score and kernel distance against closed forms, and on what they refuse."""

import numpy as np
import pytest

from pflow_jax.evaluation.metrics import Joined, inception_score, kernel, kernel_distance, whole_kernel_distance
from tests.evaluation.metrics.sliced import Sliced


def test_inception_score_of_sure_and_unsure_samples():
  sure = 1000.0 * np.eye(10)[np.arange(200) % 10]  # probabilities of 0 and 1
  np.testing.assert_allclose(inception_score(sure), (10.0, 0.0), atol=1e-9)
  np.testing.assert_allclose(inception_score(np.ones((200, 10))), (1.0, 0.0), atol=1e-12)


def test_inception_score_takes_parts_in_order():
  logits = 1000.0 * np.eye(4)[np.repeat([0, 1, 2, 3], 50)]  # sorted by class
  np.testing.assert_allclose(inception_score(logits, splits=4), (1.0, 0.0), atol=1e-9)
  np.testing.assert_allclose(inception_score(logits, splits=1).mean, 4.0)
  got = inception_score(np.concatenate([logits, np.zeros((200, 4))]), splits=2)
  np.testing.assert_allclose(got, (2.5, 1.5))


def test_inception_score_streams_and_refuses_fewer_samples_than_parts():
  logits = np.random.default_rng(0).normal(size=(9001, 5)).astype(np.float32)
  assert inception_score(Sliced(logits), splits=2) == inception_score(logits, splits=2)
  with pytest.raises(ValueError, match="expected 1 <= splits <= 9, the number of samples, got 10"):
    inception_score(logits[:9])


def _mmd(x, y):
  """Unbiased MMD² of all pairs, in float64."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
  others = lambda a: (k(a, a).sum() - np.trace(k(a, a))) / (len(a) * (len(a) - 1))
  return others(x) + others(y) - 2 * k(x, y).mean()


@pytest.mark.parametrize("block", [64, 2048])
def test_whole_kernel_distance_is_that_of_all_pairs(block, monkeypatch):
  monkeypatch.setattr(kernel, "_BLOCK", block)
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(300, 16)) + 0.3, 1.1 * rng.normal(size=(201, 16))
  np.testing.assert_allclose(whole_kernel_distance(x, y), _mmd(x, y), rtol=1e-5)
  np.testing.assert_allclose(whole_kernel_distance(Sliced(x), Sliced(y)), _mmd(x, y), rtol=1e-5)


def test_parts_are_one_set_of_rows(tmp_path):
  x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
  np.save(tmp_path / "shard.npy", x[30:70])
  joined = Joined([x[:30], np.load(tmp_path / "shard.npy", mmap_mode="r"), x[70:70], x[70:]])
  assert joined.shape == x.shape
  for start, end in ((0, 100), (10, 20), (29, 31), (30, 70), (69, 71), (99, 200), (5, 5), (50, 10)):
    np.testing.assert_array_equal(joined[start:end], x[start:end])
  assert kernel_distance(joined, x, subset_size=50) == kernel_distance(x, x, subset_size=50)
  with pytest.raises(ValueError, match=r"parts \(n, \*axes\) of the same axes, got \[\(2,\), \(3,\)\]"):
    Joined([x, x[:, :2]])
  with pytest.raises(ValueError, match="got none"):
    Joined([])
  with pytest.raises(ValueError, match="one after another, got every 2"):
    joined[::2]


def test_kernel_distance_has_no_bias():
  rng = np.random.default_rng(0)
  few = [whole_kernel_distance(*rng.normal(size=(2, 20, 4))) for _ in range(300)]
  assert abs(np.mean(few)) < 3 * np.std(few) / 300**0.5
  # With F = 1 the kernel is 1 + 3xy + 3x²y² + x³y³, and MMD² the squares of what the moments differ by.
  m = 0.5
  first, second, third = m, m * m + 1, m**3 + 3 * m
  expected = third**2 + 3 * (second - 1) ** 2 + 3 * first**2
  x, y = rng.normal(size=(4000, 1)) + m, rng.normal(size=(4000, 1))
  np.testing.assert_allclose(whole_kernel_distance(x, y), expected, rtol=0.1)


def test_kernel_distance_repeats_with_its_seed():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 200, 8))
  settings = dict(num_subsets=5, subset_size=50)
  assert kernel_distance(x, y, **settings) == kernel_distance(x, y, **settings)
  assert kernel_distance(x, y, **settings) != kernel_distance(x, y, seed=1, **settings)


def test_kernel_distance_refuses_bad_sizes():
  x = np.zeros((100, 4))
  with pytest.raises(ValueError, match="at least 1 subset of 2 to 90 samples, got 100 of 1000; draw more"):
    kernel_distance(x, x[:90])
  with pytest.raises(ValueError, match="fake: expected 4 features"):
    kernel_distance(x, x[:, :3])
  with pytest.raises(ValueError, match="at least 2 samples of both sets, got 100 and 1"):
    whole_kernel_distance(x, x[:1])
