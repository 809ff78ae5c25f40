"""Model folders that are written a tensor at a time: their form, and what a stopped conversion leaves."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from pflow_jax.torch_io.shards import JOURNAL, ModelFolder, Planned, plan_shards
from pflow_jax.torch_io.tensors import INDEX, WEIGHTS, open_tensors

NAMES = [f"layer.{i}" for i in range(6)]


def values(name, dtype=np.float32):
  return (np.arange(10) + 100 * NAMES.index(name)).astype(dtype).reshape(2, 5)


def planned(dtype=np.float32):
  return [Planned(name, (2, 5), np.dtype(dtype)) for name in NAMES]


def model(folder, **changes):
  return ModelFolder(folder, **({"config": {"a": 1}, "tensors": planned(), "source": "x", "max_bytes": 100} | changes))


def test_one_file_or_shards_with_an_index(tmp_path):
  model(tmp_path / "one", max_bytes=10**6, metadata={"policy_config": "{}"}).write(values)
  assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", WEIGHTS]
  with safe_open(tmp_path / "one" / WEIGHTS, "np") as file:
    assert file.metadata() == {"format": "pt", "source": "x", "policy_config": "{}"}
  model(tmp_path / "many").write(values)
  names = sorted(p.name for p in (tmp_path / "many").iterdir())
  shards = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  assert names == sorted([*shards, INDEX, "config.json"])
  assert json.loads((tmp_path / "many" / INDEX).read_text())["metadata"]["total_size"] == 240
  assert json.loads((tmp_path / "many" / "config.json").read_text()) == {"a": 1}
  for folder in ("one", "many"):
    tensors = open_tensors(tmp_path / folder)
    assert {name: tensors.read(name).tolist() for name in NAMES} == {name: values(name).tolist() for name in NAMES}


def test_no_file_is_larger_than_asked_and_wide_dtypes_come_first():
  tensors = [Planned("b", (3,), np.dtype(ml_dtypes.bfloat16)), *planned(), Planned("big", (50,), np.dtype("f4"))]
  shards = plan_shards(tensors, 100)
  sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
  assert all(size <= 100 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
  order = [tensor for shard in shards for tensor in shard]
  assert [t.dtype.itemsize for t in order] == [4] * 7 + [2]
  assert sorted(t.name for t in order) == sorted(t.name for t in tensors)


class Stop(Exception):
  pass


def stopping(after, seen):
  """values, until `after` tensors were made."""

  def produce(name):
    if len(seen) == after:
      raise Stop
    seen.append(name)
    return values(name)

  return produce


def test_a_stopped_conversion_goes_on_with_the_files_that_are_complete(tmp_path):
  seen = []
  with pytest.raises(Stop):
    model(tmp_path).write(stopping(5, seen))
  left = sorted(p.name for p in tmp_path.iterdir())
  assert left == [JOURNAL, *(f"diffusion_pytorch_model-0000{i}-of-00003.safetensors.partial" for i in (1, 2, 3))]
  assert not model(tmp_path).is_complete()
  again, reported = [], []
  model(tmp_path).write(stopping(99, again), reported.append)
  assert again == NAMES[4:]
  assert sum(reported) == 240
  assert model(tmp_path).is_complete()
  assert not list(tmp_path.glob("*partial*"))
  tensors = open_tensors(tmp_path)
  assert all(np.array_equal(tensors.read(name), values(name)) for name in NAMES)


def test_a_file_that_was_damaged_meanwhile_is_written_again(tmp_path):
  with pytest.raises(Stop):
    model(tmp_path).write(stopping(5, []))
  file = tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors.partial"
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  again = []
  model(tmp_path).write(stopping(99, again))
  assert again == [*NAMES[:2], *NAMES[4:]]
  assert np.array_equal(open_tensors(tmp_path).read(NAMES[1]), values(NAMES[1]))


def test_a_stop_among_the_last_renames_is_no_loss(tmp_path, monkeypatch):
  target = model(tmp_path)
  monkeypatch.setattr(ModelFolder, "_write_json", failing_for(INDEX, ModelFolder._write_json))
  with pytest.raises(Stop):
    target.write(values)
  assert not (tmp_path / "config.json").exists()
  monkeypatch.undo()
  again = []
  target.write(stopping(99, again))
  assert again == []
  assert target.is_complete()


def failing_for(stop_name, write):
  def failing(self, name, value):
    if name == stop_name:
      raise Stop
    write(self, name, value)

  return failing


def test_another_model_is_left_alone(tmp_path):
  model(tmp_path / "done").write(values)
  before = {p.name: p.read_bytes() for p in (tmp_path / "done").iterdir()}
  other = dataclasses.replace(model(tmp_path / "done"), source="y")
  with pytest.raises(ValueError, match="give another --out"):
    other.is_complete()
  assert {p.name: p.read_bytes() for p in (tmp_path / "done").iterdir()} == before
  with pytest.raises(Stop):
    model(tmp_path / "part").write(stopping(1, []))
  with pytest.raises(ValueError, match="was not finished"):
    dataclasses.replace(other, folder=tmp_path / "part").is_complete()
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / WEIGHTS).write_bytes(b"x")
  with pytest.raises(ValueError, match="give another --out"):
    model(tmp_path / "foreign").is_complete()
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file"):
    model(tmp_path / "file").is_complete()


def test_what_was_not_planned_is_not_written(tmp_path):
  with pytest.raises(RuntimeError, match=r"layer\.0: planned"):
    model(tmp_path).write(lambda name: values(name, np.float16))
