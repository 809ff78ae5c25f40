"""Pictures that are kept: none is lost before it is on the disk, what is missing is told, and so is room."""

import numpy as np
import pytest
from PIL import Image

from pflow_jax import data
from pflow_jax.evaluation.protocol import kept
from pflow_jax.evaluation.protocol.parts import Parts
from pflow_jax.files import atomic
from tests.evaluation.stub_network import StubNetwork

COUNT, SIZE = 10, 4
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
LABELS = np.arange(COUNT, dtype=np.int32)


def filled(folder, keep="npz", numbers=range(3)):
  parts = Parts(folder, {}, count=COUNT, size=SIZE)
  for number in numbers:
    rows = parts.rows_of(number)
    seen = PICTURES[rows.start : rows.stop]
    arrays = {"label": LABELS[rows.start : rows.stop]} | ({"pictures": seen} if keep == "npz" else {})
    save = lambda place, seen=seen, rows=rows: kept.save_pngs(seen, rows.start, place)
    parts.write(number, arrays, save if keep == "png" else None)
  return parts


def test_pictures_are_on_the_disk_before_their_parts_lose_them(tmp_path, monkeypatch):
  parts, synced = filled(tmp_path), []
  monkeypatch.setattr(atomic, "sync", lambda path: synced.append((path.name, parts.has("pictures"))))
  assert kept.gather(parts, "npz") == ""
  assert synced == [("samples.npz.partial", True), (tmp_path.name, True)]
  with np.load(tmp_path / "samples.npz") as file:
    np.testing.assert_array_equal(file["arr_0"], PICTURES)
    np.testing.assert_array_equal(file["arr_1"], LABELS)
  assert not list(tmp_path.rglob("pictures.npy"))
  assert kept.gather(parts, "npz") == "", "it is whole"


def test_a_file_that_is_gone_or_cut_short_is_told(tmp_path):
  parts = filled(tmp_path)
  kept.gather(parts, "npz")
  file = tmp_path / "samples.npz"
  content = file.read_bytes()
  for cut in (b"", content[: len(content) // 2], content[:-1]):
    file.write_bytes(cut)
    assert "samples.npz is not there any more, or not whole" in kept.gather(parts, "npz")
  file.unlink()
  assert "is not there any more" in kept.gather(filled(tmp_path, numbers=[1]), "npz")
  assert (tmp_path / "part_00001" / "pictures.npy").exists(), "what was drawn again is not thrown away"


def test_pictures_of_a_part_that_is_drawn_again_take_their_place(tmp_path):
  parts = filled(tmp_path)
  kept.gather(parts, "npz")
  assert kept.gather(filled(tmp_path, numbers=[1]), "npz") == ""
  assert not list(tmp_path.rglob("pictures.npy"))
  with np.load(tmp_path / "samples.npz") as file:
    np.testing.assert_array_equal(file["arr_0"], PICTURES)


def test_a_folder_of_pictures_has_all_or_says_so(tmp_path):
  parts = filled(tmp_path, keep="png")
  assert kept.gather(parts, "png") == ""
  files = sorted((tmp_path / "samples").iterdir())
  assert [file.name for file in files] == [f"{i:06}.png" for i in range(COUNT)]
  with Image.open(files[7]) as picture:
    np.testing.assert_array_equal(picture, PICTURES[7])
  files[3].unlink()
  assert "samples has 9 of 10 pictures" in kept.gather(parts, "png")


@pytest.mark.parametrize(
  ("keep", "numbers", "pictures"), [("none", [], 0), ("png", [], 10), ("npz", [], 20), ("npz", [0, 1], 12)]
)
def test_room_is_for_what_is_yet_to_be_written(tmp_path, keep, numbers, pictures):
  (tmp_path / "unrelated").write_bytes(bytes(10**6))
  dataset = data.from_arrays(np.zeros((4, 8, 8, 3), np.float32))
  parts = filled(tmp_path / "1", keep, numbers)
  rows = COUNT - SIZE * len(numbers)
  needed = kept.bytes_of_samples([parts], dataset, StubNetwork(6, 4), keep)
  assert needed == rows * 4 * (6 + 4 + 1) + pictures * 8 * 8 * 3
  done = filled(tmp_path / "2", keep)
  if keep == "npz":
    kept.gather(done, keep)
  assert kept.bytes_of_samples([parts, done], dataset, StubNetwork(6, 4), keep) == needed
