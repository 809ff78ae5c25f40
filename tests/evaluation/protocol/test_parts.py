"""Parts of arrays in a folder: whole or missing, and refused where they are of something else."""

import numpy as np
import pytest

from pflow_jax.evaluation.protocol.parts import Parts

ABOUT = {"seed": 0}


def filled(folder, numbers, count=10, size=4):
  parts = Parts(folder, ABOUT, count=count, size=size)
  for number in numbers:
    rows = np.array(parts.rows_of(number), np.float32)
    parts.write(number, {"x": rows[:, None] * np.ones(3, np.float32), "label": rows.astype(np.int32)})
  return parts


def test_rows_are_those_of_all_parts_in_their_order(tmp_path):
  parts = filled(tmp_path, [2, 0, 1])
  assert parts.missing() == []
  assert parts.rows("x").shape == (10, 3)
  np.testing.assert_array_equal(parts.rows("label")[0:10], np.arange(10))
  assert (parts.has("x"), parts.has("y")) == (True, False)


def test_what_is_missing_is_told_until_it_is_made(tmp_path):
  parts = filled(tmp_path, [1])
  assert parts.missing() == [0, 2]
  with pytest.raises(ValueError, match=r"parts \[0, 2\] are missing"):
    parts.rows("x")
  assert filled(tmp_path, [0, 2]).missing() == []


def test_what_was_removed_is_told(tmp_path):
  parts = filled(tmp_path, [0, 1, 2])
  parts.remove("x")
  assert parts.missing() == []
  with pytest.raises(ValueError, match="some parts have no x any more; name another folder"):
    parts.rows("x")


def test_a_part_that_is_cut_short_is_missing(tmp_path):
  parts = filled(tmp_path, [0, 1, 2])
  file = tmp_path / "part_00001" / "x.npy"
  file.write_bytes(file.read_bytes()[:-1])
  assert parts.missing() == [1]
  (tmp_path / "part_00000" / "x.npy").write_bytes(b"")
  assert parts.missing() == [0, 1]
  assert filled(tmp_path, [0, 1]).missing() == []


def test_a_part_that_fails_leaves_nothing(tmp_path):
  parts = Parts(tmp_path, ABOUT, count=4, size=4)

  def full(folder):
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space left"):
    parts.write(0, {"x": np.zeros(4)}, full)
  assert parts.missing() == [0]
  assert [path.name for path in tmp_path.iterdir()] == ["about.json"]


def test_parts_of_something_else_are_refused(tmp_path):
  filled(tmp_path, [0])
  with pytest.raises(ValueError, match="seed 0, not 1; name another folder"):
    Parts(tmp_path, {"seed": 1}, count=10, size=4).check()
  with pytest.raises(ValueError, match="rows 10, not 12"):
    Parts(tmp_path, ABOUT, count=12, size=4).check()
  (tmp_path / "about.json").write_text('{"seed": 0, "rows": 10, "rows of a part": 4}')
  with pytest.raises(ValueError, match="of another version of pflow_jax; name another folder, or remove this one"):
    Parts(tmp_path, ABOUT, count=10, size=4).check()


def test_a_setting_that_differs_is_named(tmp_path):
  sections = {"sample": {"h": 0.0, "substeps": 8}, "seed": 0}
  Parts(tmp_path, sections, count=4, size=4).write(0, {"x": np.zeros(4)})
  Parts(tmp_path, sections, count=4, size=4).check()
  with pytest.raises(ValueError, match=r"made of sample\.h 0\.0, not 0\.5; sample\.substeps 8, not None; name"):
    Parts(tmp_path, {"sample": {"h": 0.5}, "seed": 0}, count=4, size=4).check()
