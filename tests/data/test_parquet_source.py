"""Images in parquet files, as the Hugging Face Hub has them."""

import builtins
import json
import pickle
import threading

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from pflow_jax import data
from pflow_jax.data import parquet_source
from tests.data.adm_pictures import encoded, pixels

NAMES = ["cat", "dog", "owl"]


def picture(number):
  return encoded(Image.new("RGB", (9, 12), (number, 100, 200)))


def write(path, rows, names=NAMES, labels=None, image=None):
  """A file as the Hub has it, two rows a group."""
  images = [{"bytes": picture(i), "path": f"n{i}.png"} for i in rows] if image is None else image
  table = pa.table({"image": images, "label": [i % 3 for i in rows] if labels is None else labels})
  about = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
  pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path, row_group_size=2)


@pytest.fixture
def hub(tmp_path):
  write(tmp_path / "train-00000.parquet", range(3))
  write(tmp_path / "train-00001.parquet", range(3, 8))
  return tmp_path


def test_rows_are_pictures_with_classes_and_names(hub):
  dataset = data.load(f"parquet:{hub}", image_size=4)
  assert (dataset.shape, dataset.num_records, dataset.class_names) == ((4, 4, 3), 8, tuple(NAMES))
  source = pickle.loads(pickle.dumps(dataset.records.source))
  for row in (7, 0, 3, 2, 6):
    got, label = source.read(row)
    assert (got[0, 0].tolist(), label, source.common_name(row)) == ([row, 100, 200], row % 3, f"n{row}.png")
  assert [source.key(row) for row in (0, 2, 3)] == [
    f"train-0000{key}" for key in ("0.parquet:0", "0.parquet:2", "1.parquet:0")
  ]
  assert source.labels.tolist() == [row % 3 for row in range(8)]
  assert next(data.batches(dataset, 5, seed=0))["x0"].shape == (5, 4, 4, 3)
  assert data.load(f"parquet:{hub}/train-00001.parquet", image_size=4, label_key=None).num_classes == 0


def test_the_crop_of_adm(tmp_path, golden):
  images = [{"bytes": encoded(Image.fromarray(pixels(53, 37))), "path": None}]
  write(tmp_path / "a.parquet", range(1), image=images)
  source = data.load(f"parquet:{tmp_path}", image_size=16, crop="adm").records.source
  np.testing.assert_array_equal(source.read(0)[0], golden("adm_center_crop")["wide"])
  assert source.key(0) == source.common_name(0) == "a.parquet:0"


def test_files_of_one_name_in_several_folders_have_keys_of_their_own(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    write(tmp_path / name / "0000.parquet", range(1), image=[{"bytes": picture(1), "path": None}])
  source = data.load(f"parquet:{tmp_path}/*/0000.parquet", image_size=4).records.source
  assert [source.key(row) for row in (0, 1)] == ["a/0000.parquet:0", "b/0000.parquet:0"]
  assert source.content(0) == source.content(1)


def test_a_column_of_bytes_and_classes_by_number(tmp_path):
  table = pa.table({"jpg": [picture(1), picture(2)], "cls": pa.array([4, 0], pa.int32())})
  pq.write_table(table, tmp_path / "a.parquet")
  dataset = data.load(f"parquet:{tmp_path}", image_size=4, image_key="jpg", label_key="cls")
  assert (dataset.num_classes, dataset.class_names[4]) == (5, "4")
  assert [dataset.records.source.label(row) for row in (0, 1)] == [4, 0]


def test_a_row_group_is_read_once_by_threads_that_go_through_it(hub, monkeypatch):
  read, lock, once = [], threading.Lock(), pq.ParquetFile.read_row_group

  def counted(self, group, columns):
    with lock:
      read.append((self.metadata.num_rows, group))
    return once(self, group, columns=columns)

  monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
  source = data.load(f"parquet:{hub}", image_size=4).records.source
  threads = [threading.Thread(target=source.read, args=(row,)) for row in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(read) == len(set(read)) == 5
  monkeypatch.setattr(parquet_source, "_KEPT", 2)
  source.read(5)
  source.read(7)
  del read[:]
  for row in (7, 5, 0, 5, 0):  # of the first group, which has gone
    source.read(row)
  assert read == [(3, 0)]


def test_refusals(hub, monkeypatch):
  def refused(message, path=hub, **options):
    with pytest.raises(ValueError, match=message) as caught:
      data.load(f"parquet:{path}", image_size=4, **options)
    assert "\n" not in str(caught.value)

  refused("expected a column 'img' of bytes, there is none; choose image_key= from", image_key="img")
  refused("expected a column 'label' of bytes, it has int64", image_key="label")
  refused("there is no column 'class'; choose label_key=", label_key="class")
  refused(r"expected classes in \[0, 2\), got 0 to 2", num_classes=2)
  refused("expected split='train'", split="validation")
  write(hub / "none.parquet", range(2), labels=[0, None])
  refused("expected whole numbers in the column 'label', got .* with 1 gaps", hub / "none.parquet")
  write(hub / "test.parquet", range(2), labels=[-1, -1], names=[])
  refused(r"expected classes in \[0, 0\), got -1 to -1", hub / "test.parquet")
  write(hub / "gap.parquet", range(2), image=[{"bytes": None, "path": "/etc/passwd"}] * 2)
  source = data.load(f"parquet:{hub}/gap.parquet", image_size=4).records.source
  with pytest.raises(ValueError, match="there are no bytes of an image"):
    source.read(0)
  whole = (hub / "train-00000.parquet").read_bytes()
  (hub / "cut.parquet").write_bytes(whole[: len(whole) // 2])
  refused(r"cut\.parquet cannot be read as parquet", hub / "cut.parquet")
  (hub / "cut.parquet").unlink()
  monkeypatch.setattr(
    parquet_source, "check_memory", lambda what, nbytes, advice: (_ for _ in ()).throw(ValueError(what))
  )
  refused("row group 0")


def test_without_pyarrow_it_says_what_to_install(hub, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **options):
    if name.startswith("pyarrow"):
      raise ImportError(name)
    return real(name, *args, **options)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ImportError, match="pip install pyarrow"):
    data.load(f"parquet:{hub}", image_size=4)
