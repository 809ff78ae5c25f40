"""Arrays from a file."""

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
  assert data.load(write(tmp_path / "c.npz", x0=x0.astype(np.float32))).num_classes == 0


def test_splits_are_apart(tmp_path):
  name = write(tmp_path / "a.npz", x0=np.arange(10, dtype=np.float32).reshape(10, 1))
  parts = [data.examples(data.load(name, split=s, held_out=3), n)[0] for s, n in (("train", 7), ("test", 3))]
  assert sorted(np.concatenate(parts).ravel()) == list(range(10))


def test_what_does_not_fit_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no such file"):
    data.load(f"npz:{tmp_path}/absent.npz")
  (tmp_path / "torn.npz").write_bytes(b"PK not a zip")
  with pytest.raises(ValueError, match="not a readable"):
    data.load(f"npz:{tmp_path}/torn.npz")
  with pytest.raises(ValueError, match="expected x0"):
    data.load(write(tmp_path / "a.npz", images=np.zeros((3, 2))))
  with pytest.raises(ValueError, match="not a readable"):
    data.load(write(tmp_path / "o.npz", x0=np.array([{"pickled": 1}], dtype=object)))
