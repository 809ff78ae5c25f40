"""Arrays from a file."""

import os

import numpy as np
import pytest

from pflow_jax import data


def write(path, **arrays):
  np.savez(path, **arrays)
  return f"npz:{path}"


def test_arrays_come_back_with_their_classes(tmp_path):
  x0, label = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1), np.array([0, 1, 2, 0, 1, 2])
  dataset = data.load(write(tmp_path / "a.npz", x0=x0, label=label, class_names=np.array(["cat", "dog", "owl"])))
  assert (dataset.shape, dataset.num_classes, dataset.class_names) == ((2, 2, 1), 3, ("cat", "dog", "owl"))
  got, labels = data.examples(dataset, 6)
  assert sorted(labels) == sorted(label)
  np.testing.assert_allclose(sorted(got.ravel()), sorted((x0 / 127.5 - 1).ravel()), atol=1e-6)
  unnamed = data.load(write(tmp_path / "b.npz", x0=x0, label=label))
  assert unnamed.class_names == ("0", "1", "2")
  assert data.load(write(tmp_path / "c.npz", x0=x0.astype(np.float32) / 24)).num_classes == 0


def test_splits_are_apart(tmp_path):
  name = write(tmp_path / "a.npz", x0=np.arange(10, dtype=np.float32).reshape(10, 1))
  parts = [data.examples(data.load(name, split=s, held_out=3), n)[0] for s, n in (("train", 7), ("test", 3))]
  assert sorted(np.concatenate(parts).ravel()) == list(range(10))


X0 = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    (
      {"images": X0},
      "expected the arrays x0, perhaps label and class_names, got \\['images'\\]; write one with np.savez",
    ),
    ({"x0": X0, "label": [0, 1]}, "label must be 3 integers, got int64 of shape \\(2,\\)"),
    ({"x0": X0, "label": [[0], [1], [2]]}, "label must be 3 integers"),
    ({"x0": X0, "label": 1}, "label must be 3 integers"),
    ({"x0": X0, "label": ["a", "b", "c"]}, "label must be 3 integers, got <U1"),
    ({"x0": X0, "label": [0.0, 1.0, 2.0]}, "label must be 3 integers, got float64"),
    ({"x0": X0, "label": [True, False, True]}, "label must be 3 integers, got bool"),
    ({"x0": X0, "label": [0, -1, 0]}, "labels must be at least 0, got -1"),
    ({"x0": X0, "label": [0, 2**31, 0]}, "expected 0 to 1,048,576 classes, got 2147483649"),
    ({"x0": X0, "label": np.array([0, 2**64 - 1, 0], np.uint64)}, "expected 0 to 1,048,576 classes"),
    ({"x0": X0, "class_names": ["a"]}, "1 class_names without labels"),
    ({"x0": X0, "label": [0, 1, 2], "class_names": ["a", "b"]}, "one class name each, got 0 to 2"),
    ({"x0": X0, "label": [0, 1, 1], "class_names": ["a", "a"]}, "must differ, got 2 times 'a'"),
    ({"x0": X0, "label": [0, 1, 1], "class_names": ["a", " "]}, "class_names must be words, got ' '"),
    ({"x0": X0, "label": [0, 1, 1], "class_names": [b"a", b"b"]}, "class_names must be strings .*, got '|S1' of shape"),
    ({"x0": X0, "label": [0, 1, 1], "class_names": "ab"}, "class_names must be strings"),
    ({"x0": np.float32(1), "label": [0]}, "x0 must be \\(n, \\*space, C\\).*got shape \\(\\)"),
    ({"x0": np.zeros((3, 0, 2))}, "sizes >= 1, got shape"),
    ({"x0": X0.astype(complex)}, "uint8 or floating, got complex128"),
    ({"x0": np.full((3, 2), 1e300)}, "not finite"),
    ({"x0": np.array([{"pickled": 1}], dtype=object)}, "'object', expected numbers or strings"),
  ],
)
def test_arrays_that_do_not_fit_are_told_in_one_sentence(tmp_path, arrays, message):
  with pytest.raises(ValueError, match=message) as caught:
    data.load(write(tmp_path / "a.npz", **arrays))
  assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe.npz")
  (tmp_path / "torn.npz").write_bytes(b"PK not a zip")
  for name, message in {"absent": "no such file", "pipe": "this is a pipe", "torn": "not a zip file"}.items():
    with pytest.raises(ValueError, match=message):
      data.load(f"npz:{tmp_path}/{name}.npz")


def test_other_ways_to_store_the_same_numbers_are_read(tmp_path):
  x0 = np.random.default_rng(0).normal(size=(5, 2, 2, 3)).astype(np.float16)
  for dtype in (">f8", "<f2", "<f4", "longdouble"):
    dataset = data.load(
      write(tmp_path / "a.npz", x0=np.asfortranarray(x0.astype(dtype)), label=np.arange(5, dtype=">u2"))
    )
    np.testing.assert_array_equal(dataset.records.x0, x0.astype(np.float32))
    assert dataset.records.x0.dtype == np.float32
    assert dataset.num_classes == 5


def test_pixels_that_nobody_scaled_are_refused(tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (4, 6, 6, 3))
  name = write(tmp_path / "a.npz", x0=pixels.astype(np.float32))
  with pytest.raises(
    ValueError, match=r"lie in \[[0-9]+, 25[0-9]\], like pixels; save them as uint8, .* or scale them"
  ):
    data.load(name)
  for x0 in (pixels.astype(np.uint8), pixels / 127.5 - 1, pixels / 255, rng.normal(size=(4, 6, 6, 4)) * 50):
    assert data.load(write(tmp_path / "a.npz", x0=x0)).num_records == 4
  for points in (pixels[:, 0, 0] * 1.0, pixels[:, 0] * 1.0):
    assert data.load(write(tmp_path / "a.npz", x0=points)).num_records == 4
