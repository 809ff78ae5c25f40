"""The classifier learns real digits in seconds, and comes back from disk the same or not at all."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from pflow_jax.evaluation.features import Classifier, pixel_features, train_classifier


@pytest.fixture(scope="module")
def digits():
  data = load_digits()
  x = (data.images[..., None] / 8 - 1).astype(np.float32)
  order = np.random.default_rng(0).permutation(len(x))
  return x[order], data.target[order]


@pytest.fixture(scope="module")
def classifier(digits):
  x, labels = digits
  return train_classifier(x[:1500], labels[:1500], 10, steps=150)


def test_learns_digits(classifier, digits):
  x, labels = (array[1500:] for array in digits)
  assert np.mean(classifier.predict(x) == labels) > 0.97


def test_features_have_the_documented_shape_and_dtype(classifier, digits):
  x = digits[0][:300]  # more than one batch, and not a multiple of it
  features, labels = classifier.features(x), classifier.predict(x)
  assert (features.shape, features.dtype) == ((300, 48), np.float32)
  assert (labels.shape, labels.dtype) == ((300,), np.int32)
  assert all(p.dtype == np.float32 for p in jax.tree.leaves(classifier.params))
  np.testing.assert_allclose(classifier.features(x[290:]), features[290:], rtol=1e-4, atol=1e-4)
  assert features.std(axis=0).min() > 1e-2  # none is dead


def test_classes_lie_apart_in_feature_space(classifier, digits):
  x, labels = digits
  features = classifier.features(x)
  means = np.stack([features[labels == c].mean(axis=0) for c in range(10)])
  within = np.sqrt(np.mean(np.sum((features - means[labels]) ** 2, axis=1)))
  apart = np.linalg.norm(means[:, None] - means[None, :], axis=-1)[~np.eye(10, dtype=bool)]
  assert apart.min() > within


def test_training_repeats_with_its_seed(digits):
  x, labels = digits[0][:300], digits[1][:300]
  features, same, other = (train_classifier(x, labels, 10, steps=20, seed=seed).features(x) for seed in (0, 0, 1))
  np.testing.assert_array_equal(same, features)
  assert not np.allclose(other, features)


def test_other_image_shapes():
  rng = np.random.default_rng(0)
  labels = np.arange(16) % 2
  x = rng.normal(size=(16, 17, 20, 3)).astype(np.float32)
  trained = train_classifier(x, labels, 2, steps=1, batch_size=8)
  assert trained.features(x).shape == (16, 48)
  assert trained.image_shape == (17, 20, 3)


def test_save_and_load_give_identical_features(classifier, digits, tmp_path):
  path = tmp_path / "deep" / "classifier.npz"
  classifier.save(path)
  loaded = Classifier.load(path, image_shape=(8, 8, 1), num_classes=10)
  assert [p.name for p in path.parent.iterdir()] == ["classifier.npz"]
  np.testing.assert_array_equal(loaded.features(digits[0]), classifier.features(digits[0]))
  assert (loaded.image_shape, loaded.num_classes, loaded.num_features) == ((8, 8, 1), 10, 48)


def test_load_refuses_a_classifier_of_other_data(classifier, tmp_path):
  path = tmp_path / "classifier.npz"
  classifier.save(path)
  with pytest.raises(ValueError, match=r"image_shape: expected \(28, 28, 1\), got \(8, 8, 1\)"):
    Classifier.load(path, image_shape=(28, 28, 1))
  with pytest.raises(ValueError, match="num_classes: expected 5, got 10"):
    Classifier.load(path, num_classes=5)


def test_load_refuses_damaged_files(classifier, tmp_path):
  path = tmp_path / "classifier.npz"
  with pytest.raises(ValueError, match="there is no such file"):
    Classifier.load(path)
  classifier.save(path)
  whole = path.read_bytes()
  middle = len(whole) // 2
  flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
  for damaged in (b"", b"not a zip", whole[:middle], whole[:-30], flipped):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="delete it to have one trained anew"):
      Classifier.load(path)


def test_load_names_every_wrong_array(classifier, tmp_path):
  path = tmp_path / "classifier.npz"
  classifier.save(path)
  with np.load(path) as data:
    arrays = dict(data)
  arrays["Dense_0/bias"] = arrays["Dense_0/bias"][:-1]
  arrays["Conv_0/bias"] = arrays["Conv_0/bias"].astype(float)
  np.savez(path, **arrays)
  with pytest.raises(
    ValueError, match=r"Conv_0/bias: expected float32 .* float64 .*Dense_0/bias: expected float32 \(48,"
  ):
    Classifier.load(path)
  arrays["extra"] = arrays.pop("Conv_0/bias")
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match="expected the arrays about and Conv_0/bias and"):
    Classifier.load(path)
  path.unlink()
  with path.open("wb") as file:
    file.truncate(2**40)
  with pytest.raises(ValueError, match="expected at most"):
    Classifier.load(path)
  np.savez(path, params=np.zeros(3))
  with pytest.raises(ValueError, match="not a readable classifier"):
    Classifier.load(path)
  np.save(tmp_path / "array.npy", np.zeros(3))
  with pytest.raises(ValueError, match="not a readable classifier"):
    Classifier.load(tmp_path / "array.npy")


def test_training_refuses_bad_input(digits):
  x, labels = digits[0][:20], digits[1][:20]
  with pytest.raises(ValueError, match="pixel_features"):
    train_classifier(x, labels, 0)
  with pytest.raises(ValueError, match="labels: expected 0 to 4"):
    train_classifier(x, labels, 5)
  with pytest.raises(ValueError, match="labels: expected integers"):
    train_classifier(x, labels[:-1], 10)
  with pytest.raises(ValueError, match="labels: expected integers"):
    train_classifier(x, labels * 1.0, 10)
  with pytest.raises(ValueError, match="x: expected images"):
    train_classifier(x[..., 0], labels, 10)
  with pytest.raises(ValueError, match="at least 8x8"):
    train_classifier(x[:, :7], labels, 10)


def test_features_refuse_other_images(classifier):
  with pytest.raises(ValueError, match="x: expected images"):
    classifier.features(np.zeros((3, 8, 8, 3), np.float32))


def test_pixel_features_flatten():
  x = np.arange(24.0).reshape(2, 2, 2, 3)
  features = pixel_features(x)
  assert features.dtype == np.float32
  np.testing.assert_array_equal(features, x.reshape(2, 12))
  with pytest.raises(ValueError, match="expected samples"):
    pixel_features(np.zeros(3))
