"""Latents in array_record shards: round trip, shapes without the data, and refusals."""

import json
import logging
import os
import pathlib
import pickle
from statistics import NormalDist

import grain
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from pflow_jax import data
from pflow_jax.data import shards
from pflow_jax.data.latent_parts import Totals
from pflow_jax.data.latent_shards import LatentFolder, write_latents
from pflow_jax.data.latents import INFO, Info, _normal_quantiles
from pflow_jax.data.records import Draws, _grain_rows

RNG = np.random.default_rng(0)
X0 = RNG.normal(size=(11, 4, 4, 2)).astype(np.float16)
LABEL = RNG.integers(0, 5, 11)


@pytest.fixture
def folder(tmp_path):
  path = str(tmp_path / "latents")
  batches = [(X0[:4], LABEL[:4]), (X0[4:], LABEL[4:])]
  assert write_latents(path, batches, num_classes=5, shard_size=4) == 11
  return path


def test_round_trip_over_shards(folder):
  dataset = data.load(f"latents:{folder}")
  assert (dataset.shape, dataset.num_classes, dataset.num_records) == ((4, 4, 2), 5, 11)
  x0, label = data.examples(dataset, 11, seed=0)
  order = np.lexsort(x0.reshape(11, -1).T)
  expected = np.lexsort(X0.astype(np.float32).reshape(11, -1).T)
  np.testing.assert_array_equal(x0[order], X0[expected].astype(np.float32))
  np.testing.assert_array_equal(label[order], LABEL[expected])
  batch = next(data.batches(pickle.loads(pickle.dumps(dataset)), 4, seed=1, rows=np.array([1, 3])))
  assert batch["x0"].shape == (2, 4, 4, 2)


def test_texts_of_latents_can_be_the_condition(tmp_path, monkeypatch):
  from pflow_jax.conversion import cache as program
  from tests.encoders import StubEncoder

  monkeypatch.setattr(program, "load_encoder", lambda *args, **options: StubEncoder("minilm"))
  path, texts = str(tmp_path / "latents"), [f"text {i}" for i in range(11)]
  write_latents(path, [(X0, LABEL)], num_classes=5, class_names="abcde", texts=texts)
  program.cache(f"data:latents:{path}", "minilm", tmp_path / "names")
  dataset = data.load(f"latents:{path}", embeddings=str(tmp_path / "names"))
  assert (dataset.texts, dataset.num_classes, dataset.class_names) == (tuple(texts), 0, ())
  batch = dataset.records.take(np.array([7, 2]))
  np.testing.assert_array_equal(batch["x0"], X0[[7, 2]].astype(np.float32))
  want = np.stack([StubEncoder("minilm").one(texts[i])[1] for i in (7, 2)])
  np.testing.assert_array_equal(batch["cond"]["pooled"], want)


def test_shapes_are_known_without_the_data(tmp_path):
  dataset = data.load(f"latents:{tmp_path}/none", shape=(32, 32, 4), num_classes=1000)
  assert (dataset.shape, dataset.num_classes) == ((32, 32, 4), 1000)
  with pytest.raises(ValueError, match="there are no latents"):
    data.batches(dataset, 8, seed=0)
  with pytest.raises(ValueError, match="no info.json; write the latents, or give shape="):
    data.load(f"latents:{tmp_path}/none")


def test_refusals(folder, tmp_path):
  with pytest.raises(ValueError, match=r"has shape and num_classes \(\(4, 4, 2\), 5\), got \(\(8, 8, 2\), None\)"):
    data.load(f"latents:{folder}", shape=(8, 8, 2))
  with pytest.raises(ValueError, match="holds shards already; give"):
    write_latents(folder, [(X0, LABEL)], num_classes=5)
  with pytest.raises(ValueError, match="labels must lie in"):
    write_latents(str(tmp_path / "bad"), [(X0, LABEL + 5)], num_classes=5)
  with pytest.raises(ValueError, match="no records"):
    write_latents(str(tmp_path / "empty"), [], num_classes=5)
  with pytest.raises(ValueError, match="split"):
    data.load(f"latents:{folder}", split="all")
  with pytest.raises(ValueError, match="values that are not finite, or not in float16"):
    write_latents(str(tmp_path / "large"), [(X0.astype(np.float32) * 1e6, LABEL)], num_classes=5)


@pytest.mark.parametrize(
  ("info", "message"),
  [
    ({"shape": [4]}, "num_classes: field required"),
    ({"shape": [], "num_classes": 5}, "shape: .*at least 1 item"),
    ({"shape": [4, 0, 2], "num_classes": 5}, "shape.1: .*greater than 0, got 0"),
    ({"shape": ["4", 4.0, True], "num_classes": 5}, "shape.0: .*got '4'; shape.1: .*got 4.0; shape.2: .*got True"),
    ({"shape": [10**9] * 3, "num_classes": 5}, r"an example of shape \(1000000000, .*: takes .* of memory"),
    ({"shape": [4, 4, 2], "num_classes": 10**9}, "expected 0 to 1,048,576 classes, got 1000000000"),
    ({"shape": [4, 4, 2], "num_classes": 5, "num_records": 12}, "expected 12 records, got 11; copy them again"),
    ({"shape": [4, 4, 1], "num_classes": 5}, r"record [0-9]+ has 68 bytes, shape \(4, 4, 1\) has 36"),
    ({"shape": [4, 4, 2], "num_classes": 1}, r"record [0-9]+ has the label [1-4], which is not in \[0, 1\)"),
  ],
)
def test_a_folder_that_says_something_else_of_its_records_is_refused(folder, info, message):
  (pathlib.Path(folder) / INFO).write_text(json.dumps(info))
  with pytest.raises(ValueError, match=message):
    data.examples(data.load(f"latents:{folder}"), 11)


def test_shards_that_are_damaged_are_named_and_none_is_skipped(folder):
  shards = sorted(pathlib.Path(folder).glob("*.array_record"))
  whole = shards[1].read_bytes()

  def refused(message):
    with pytest.raises(ValueError, match=message) as caught:
      data.examples(data.load(f"latents:{folder}"), 11)
    assert "\n" not in str(caught.value)

  shards[1].write_bytes(whole[:-100])  # for the library it has no records
  refused(r"00001\.array_record cannot be read: ")
  shards[1].write_bytes(b"")
  refused(r"00001\.array_record cannot be read: .*at least 64KB")
  shards[1].write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
  refused(r"record [0-9]+ cannot be read: Corrupted Riegeli/records file")
  shards[1].unlink()
  refused("expected 11 records, got 7; copy them again")
  os.mkfifo(shards[1])
  refused("expected a file, this is a pipe")
  shards[1].unlink()
  shards[1].symlink_to("/dev/zero")
  refused("expected a file, this is a device")


def test_a_disk_that_fails_is_not_taken_for_a_damaged_file(folder, monkeypatch):
  dataset = data.load(f"latents:{folder}")
  assert dataset.num_records == 11

  def fail(row):
    raise RuntimeError("pread() failed: Input/output error; reading 00000.array_record")

  monkeypatch.setattr(
    dataset.records.source._opened.records._records.__class__, "__getitem__", lambda self, row: fail(row)
  )
  with pytest.raises(OSError, match=r"record [0-9]+ cannot be read: pread\(\) failed: Input/output error"):
    data.examples(dataset, 2)


def test_folders_of_older_versions_are_read(tmp_path):
  """They were compressed, and info.json had shape and number of classes alone."""
  writer = ArrayRecordWriter(f"{tmp_path}/00000.array_record", "group_size:1")
  for x0, label in zip(X0, LABEL, strict=True):
    writer.write(np.int32(label).tobytes() + x0.tobytes())
  writer.close()
  (tmp_path / INFO).write_text(json.dumps({"shape": [4, 4, 2], "num_classes": 5}))
  dataset = data.load(f"latents:{tmp_path}")
  batch = dataset.records.take(np.arange(11))
  np.testing.assert_array_equal(batch["x0"], X0.astype(np.float32))
  np.testing.assert_array_equal(batch["cond"], LABEL)
  assert dataset.scaling is None


def test_info_has_what_the_records_have(folder):
  info = json.loads((pathlib.Path(folder) / INFO).read_text())
  assert info.keys() == {"shape", "num_classes", "num_records", "mean", "std"}
  wide = X0.astype(np.float64)
  np.testing.assert_allclose(info["mean"], wide.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(info["std"], wide.std((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(data.load(f"latents:{folder}").scaling.std, wide.std(), rtol=1e-12)


def test_the_order_of_batches_is_that_of_runs_of_older_versions(folder):
  dataset = data.load(f"latents:{folder}")
  source = dataset.records.source
  stream = grain.MapDataset.source(source).seed(7).shuffle().repeat()  # as it was: record by record
  batches = data.batches(dataset, 8, seed=7, start=1, rows=np.array([0, 3, 7]))
  for i in (1, 2, 3):
    expected = [stream[8 * i + row] for row in (0, 3, 7)]
    batch = next(batches)
    np.testing.assert_array_equal(batch["x0"], [record["x0"] for record in expected])
    np.testing.assert_array_equal(batch["cond"], [record["label"] for record in expected])


# ---- Moments

SHIFT, SCALE = (0.5, -1.0), (0.25, 2.0)


def write_moments(path, *, mirrored=False, n=6, shape=(4, 4, 2), seed=0, mean=1.0, std=(0.0, 1.0)):
  """A folder of moments; returns them, (n, views, 2, *shape) float16."""
  rng = np.random.default_rng(seed)
  views = 1 + mirrored
  values = np.stack([mean * rng.normal(size=(n, views, *shape)), rng.uniform(*std, (n, views, *shape))], axis=2)
  values = values.astype(np.float16)
  info = Info(shape, 3, moments=True, mirrored=mirrored, shift=SHIFT, scale=SCALE)
  folder = LatentFolder(path, info, n, shard_records=4)
  assert folder.claim()
  for number in folder.todo():
    with folder.writing(number) as shard:
      rows = folder.rows(number)
      shard.add(values[rows.start : rows.stop], np.arange(n)[rows.start : rows.stop] % 3)
  folder.finish()
  return values.astype(np.float64)


def drawn(dataset, epochs, seed=0):
  """x0 of every record in so many epochs, (n, epochs, *shape), as if they came in their order."""
  count = dataset.num_records
  draws = [Draws(seed, np.arange(count * epoch, count * (epoch + 1), dtype=np.uint64)) for epoch in range(epochs)]
  return np.stack([dataset.records.take(np.arange(count), one)["x0"] for one in draws], axis=1).astype(np.float64)


def test_what_is_drawn_of_moments_has_their_mean_and_standard_deviation(tmp_path):
  """Each number of each record, in 400 epochs: z-scores of means and of variances have unit variance themselves."""
  values = write_moments(tmp_path / "z", mean=30.0, std=(0.5, 1.0))[:, 0]
  dataset = data.load(f"latents:{tmp_path}/z")
  count = 400
  x0 = drawn(dataset, count)
  mean, std = (values[:, 0] - SHIFT) * SCALE, values[:, 1] * SCALE
  z = (x0.mean(1) - mean) / std * np.sqrt(count)
  assert abs(z.mean()) < 5 / np.sqrt(z.size)
  np.testing.assert_allclose(z.std(), 1, atol=5 / np.sqrt(2 * z.size))
  ratio = (x0.var(1, ddof=1) / std**2 - 1) * np.sqrt((count - 1) / 2)
  assert abs(ratio.mean()) < 5 / np.sqrt(z.size)
  noise = (x0 - mean[:, None]) / std[:, None]
  np.testing.assert_allclose((noise**4).mean(), 3, atol=5 * np.sqrt(96 / noise.size))  # as of a normal distribution
  assert len(np.unique(noise[:, :, 0, 0, 0])) > 0.99 * noise.shape[0] * count, "another one each time"
  pairs = (noise[:, :-1] * noise[:, 1:]).mean()  # of two epochs
  assert abs(pairs) < 5 / np.sqrt(noise.size)


def test_noise_is_of_the_quantiles_of_a_normal_distribution():
  values = _normal_quantiles().astype(np.float64)
  np.testing.assert_allclose([values.mean(), values.var(), (values**4).mean()], [0, 1, 3], atol=1e-3)
  np.testing.assert_allclose(values[[0, 2**15, -1]], [-4.325, 0, 4.325], atol=1e-3)
  expected = [NormalDist().cdf(value) for value in values[::97]]
  np.testing.assert_allclose(expected, (np.arange(2**16)[::97] + 0.5) / 2**16, atol=1e-5)


def test_without_drawing_a_record_is_its_mean(tmp_path):
  values = write_moments(tmp_path / "z", mirrored=True)
  dataset = data.load(f"latents:{tmp_path}/z")
  expected = (values[:, 0, 0] - SHIFT) * SCALE
  np.testing.assert_allclose(dataset.records.take(np.arange(6))["x0"], expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(dataset.records.source[3]["x0"], expected[3], rtol=1e-6, atol=1e-6)
  assert data.fingerprint(dataset) == data.fingerprint(data.load(f"latents:{tmp_path}/z"))


def test_picture_and_mirror_image_are_read_equally_often_and_independently(tmp_path):
  values = write_moments(tmp_path / "z", mirrored=True, mean=30.0, std=(0.0, 0.01))
  dataset = data.load(f"latents:{tmp_path}/z")
  expected = (values[:, :, 0] - SHIFT) * SCALE
  errors = np.abs(drawn(dataset, 500)[:, :, None] - expected[:, None]).mean((3, 4, 5))  # record, epoch, side
  assert errors.min(-1).max() < 0.1
  sides = errors.argmin(-1).T  # (epochs, records)
  np.testing.assert_allclose(sides.mean(), 0.5, atol=5 * 0.5 / np.sqrt(sides.size))
  centred = sides - 0.5
  assert np.abs(centred.T @ centred / 500 - np.eye(6) / 4).max() < 5 * 0.25 / np.sqrt(500)
  assert abs((centred[1:] * centred[:-1]).mean()) < 5 * 0.25 / np.sqrt(sides.size)


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone(tmp_path):
  write_moments(tmp_path / "z", mirrored=True)
  dataset = data.load(f"latents:{tmp_path}/z")
  take = lambda start, **options: next(data.batches(dataset, 8, start=start, **{"seed": 3, **options}))["x0"]
  positions = np.arange(8, 16)
  drawn = dataset.records.take(_grain_rows(6, 3, positions), Draws(3, positions.astype(np.uint64)))
  np.testing.assert_array_equal(take(1), drawn["x0"])
  whole = [take(start, num_threads=0) for start in range(4)]
  copied = pickle.loads(pickle.dumps(dataset))  # as for a worker process
  np.testing.assert_array_equal(next(data.batches(copied, 8, seed=3, start=2))["x0"], whole[2])
  np.testing.assert_array_equal(take(2, rows=np.array([1, 6]), num_threads=4), whole[2][[1, 6]])
  stream = data.batches(dataset, 8, seed=3, num_threads=16)
  np.testing.assert_array_equal([next(stream)["x0"] for _ in range(4)], whole)
  assert not np.array_equal(take(2, seed=4), whole[2])
  one, two = (data.examples(dataset, 6, seed=5)[0] for _ in range(2))
  np.testing.assert_array_equal(one, two)


def test_another_scale_may_be_given_to_moments_and_is_measured_anew(tmp_path, folder):
  values = write_moments(tmp_path / "z", std=(0.0, 0.1))[:, 0]
  dataset = data.load(f"latents:{tmp_path}/z", shift=(1.0,), scale=(3.0, -2.0))
  raw = (values[:, 0] - 1.0) * np.array([3.0, -2.0])
  np.testing.assert_allclose(dataset.records.take(np.arange(6))["x0"], raw, rtol=1e-6, atol=1e-6)
  assert (dataset.scaling.shift, dataset.scaling.scale) == ((1.0, 1.0), (3.0, -2.0))
  noise = np.square(values[:, 1] * [3.0, -2.0]).mean((0, 1, 2))
  np.testing.assert_allclose(dataset.scaling.std**2, raw.var() + noise.mean(), rtol=1e-9)
  own = data.load(f"latents:{tmp_path}/z").scaling
  raw = (values[:, 0] - SHIFT) * SCALE
  np.testing.assert_allclose(own.std**2, raw.var() + np.square(values[:, 1] * SCALE).mean(), rtol=1e-9)
  with pytest.raises(ValueError, match=r"scale: expected 1 or 2 numbers, one a channel, got \(1.0, 2.0, 3.0\)"):
    data.load(f"latents:{tmp_path}/z", scale=(1.0, 2.0, 3.0))
  with pytest.raises(ValueError, match="shift, scale: are for moments; these records are of x0"):
    data.load(f"latents:{folder}", scale=(1.0,))


def test_latents_far_from_unit_variance_are_told(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    write_latents(str(tmp_path / "raw"), [(X0.astype(np.float32) * 6, LABEL)], num_classes=5)
    data.load(f"latents:{tmp_path}/raw")
  assert "a standard deviation of 6.0" in caplog.text
  assert "where flow models take about 1: write them anew with the scale of their autoencoder" in caplog.text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"moments": True, "shift": [], "scale": []}, "expected shift and scale of moments"),
    ({"scale": [1.0, 0.0]}, "expected shift and scale of moments, numbers of which no scale is 0"),
    ({"shift": [1.0]}, "shift: expected 2 numbers, one a channel, got 1"),
    ({"mirrored": True}, r"record [0-9]+ has 132 bytes, shape \(4, 4, 2\) has 260"),
    ({"moments": False}, r"record [0-9]+ has 132 bytes, shape \(4, 4, 2\) has 68"),
    ({"std": ["x"]}, "std.0: "),
  ],
)
def test_a_folder_of_moments_that_says_something_else_is_refused(tmp_path, change, message):
  write_moments(tmp_path / "z")
  info = json.loads((tmp_path / "z" / INFO).read_text())
  (tmp_path / "z" / INFO).write_text(json.dumps(info | change))
  with pytest.raises(ValueError, match=message):
    data.examples(data.load(f"latents:{tmp_path}/z"), 6)


def test_moments_are_not_kept_in_memory(tmp_path):
  values = write_moments(tmp_path / "z")
  (tmp_path / "z" / "texts.json").write_text(json.dumps([f"text {i}" for i in range(len(values))]))
  with pytest.raises(ValueError, match="is drawn of while it is read; leave out embeddings="):
    data.load(f"latents:{tmp_path}/z", embeddings="names")


# ---- Writing in parts


def test_totals_of_parts_are_those_of_the_whole():
  info = Info((4, 4, 2), 5, moments=True, shift=SHIFT, scale=SCALE)
  values = RNG.normal(size=(7, 1, 2, 4, 4, 2)).astype(np.float16)
  parts = Totals.of(info, values[:3]) + Totals() + Totals.of(info, values[3:])
  for got, expected in zip(parts.measured(info), Totals.of(info, values).measured(info), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def begin(path, **changes):
  info = Info((4, 4, 2), 5, **{"made": {"keys": "abc"}, **changes})
  return LatentFolder(path, info, 11, shard_records=4)


def fill(folder, numbers):
  for number in numbers:
    with folder.writing(number) as shard:
      rows = folder.rows(number)
      shard.add(X0[rows.start : rows.stop][:, None, None], LABEL[rows.start : rows.stop])


def contents(path):
  return {one.name: one.read_bytes() for one in sorted(path.iterdir())}


def test_a_shard_with_an_index_and_without_its_records_is_not_complete(tmp_path, monkeypatch):
  """As a machine that died may leave it, unless its disk had all before the file had its name."""
  path, events = tmp_path / "00000.array_record", []
  real = os.fsync
  monkeypatch.setattr(os, "fsync", lambda number: events.append(path.exists()) or real(number))
  with shards.writing(path) as write:
    for _ in range(40):
      write(bytes(range(256)) * 32)
  assert events == [False, True], "the content before, the name after"
  assert shards.is_complete(path, 40)
  whole = path.read_bytes()
  path.write_bytes(whole[:200] + bytes(7800) + whole[8000:])
  assert shards.num_records(path) == 40
  assert not shards.is_complete(path, 40)


def test_a_folder_that_was_begun_is_gone_on_with_and_ends_the_same(tmp_path):
  whole = begin(tmp_path / "whole")
  assert whole.claim()
  fill(whole, whole.todo())
  assert whole.finish(texts=[f"text {i}" for i in range(11)]).num_records == 11
  assert sorted(contents(tmp_path / "whole")) == [
    *(f"{number:05d}.{ending}" for number in range(3) for ending in ("array_record", "part.json")),
    "info.json",
    "texts.json",
  ]
  path = tmp_path / "stopped"
  part = begin(path)
  assert part.claim()
  fill(part, [2, 0])

  def stopped():
    with part.writing(1) as shard:
      shard.add(X0[:2, None, None], LABEL[:2])
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stopped()
  assert not list(path.glob("*00001*"))
  for name in ("00001.array_record.partial", "00001.part.json.123.partial", "info.json.123.partial"):
    (path / name).write_bytes(b"left by one that was killed")
  (path / "00002.array_record").write_bytes((path / "00002.array_record").read_bytes()[:-9])
  (path / "00002.part.json").write_text((path / "00002.part.json").read_text())
  with pytest.raises(ValueError, match=r"there is no info\.json"):
    data.load(f"latents:{path}")
  again = begin(path)
  assert again.claim()
  assert again.todo() == [1, 2]
  fill(again, [1, 2])
  again.finish(texts=[f"text {i}" for i in range(11)])
  assert contents(path) == contents(tmp_path / "whole")
  assert not begin(path).claim(), "it is complete"


def test_a_folder_of_other_things_is_left_alone(tmp_path):
  path = tmp_path / "z"
  begin(path).claim()
  before = contents(path)
  with pytest.raises(ValueError, match="holds other latents; give another folder, or remove it:\n  keys: it has 'abc'"):
    begin(path, made={"keys": "other"}).claim()
  with pytest.raises(ValueError, match="mirrored: it has False, this run True"):
    begin(path, mirrored=True).claim()
  assert contents(path) == before
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("precious")
  with pytest.raises(ValueError, match="is not empty; give a new folder"):
    begin(tmp_path / "mine").claim()
  with pytest.raises(
    ValueError, match="shard_records: expected at most 100,000 shards|expected at most 100,000 shards"
  ):
    LatentFolder(path, Info((4, 4, 2), 5), 10**6, shard_records=1)


def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path):
  folder = begin(tmp_path / "z")
  folder.claim()
  fill(folder, [0, 1])
  with folder.writing(2) as shard:  # none of them can be read, so it is no file
    for row in folder.rows(2):
      shard.leave_out(row, f"broken {row}")
  assert folder.todo() == []
  info = folder.finish([f"n/{i}.png" for i in range(11)], [f"text {i}" for i in range(11)])
  assert (info.num_records, info.unreadable) == (8, 3)
  text = (tmp_path / "z" / "unreadable.txt").read_text()
  assert text == "n/8.png: broken 8\nn/9.png: broken 9\nn/10.png: broken 10\n"
  dataset = data.load(f"latents:{tmp_path}/z")
  assert dataset.texts == tuple(f"text {i}" for i in range(8))
  np.testing.assert_array_equal(dataset.records.take(np.arange(8))["x0"], X0[:8].astype(np.float32))
  none = begin(tmp_path / "none")
  none.claim()
  for number in none.todo():
    with none.writing(number) as shard:
      for row in none.rows(number):
        shard.leave_out(row, "broken")
  with pytest.raises(ValueError, match="none of 11 pictures could be read"):
    none.finish()


def test_a_shard_takes_its_own_values_alone(tmp_path):
  folder = begin(tmp_path / "z")
  folder.claim()

  def refused(values, label, message):
    with pytest.raises(ValueError, match=message), folder.writing(0) as shard:
      shard.add(values, label)
    assert folder.todo() == [0, 1, 2]

  refused(X0[:2], LABEL[:2], r"expected values \(n, \(1, 1, 4, 4, 2\)\)")
  refused(X0[:2, None, None], LABEL[:2] + 5, r"labels must lie in \[0, 5\)")
  refused(np.full((1, 1, 1, 4, 4, 2), np.inf, np.float16), LABEL[:1], "values that are not finite, or not in float16")


def test_the_size_is_told_and_a_disk_without_room_refused(tmp_path, monkeypatch, capsys):
  import shutil

  folder = LatentFolder(tmp_path / "z", Info((32, 32, 4), 5), 600, shard_records=300)
  folder.claim()
  folder.check_room(folder.todo())
  told = capsys.readouterr().out
  assert "latents of 600 pictures, 32 x 32 x 4, in 2 shards, " in told
  size = float(told.split(" MB to write")[0].split("; ")[-1]) * 1e6
  for number in folder.todo():
    with folder.writing(number) as shard:
      shard.add(np.zeros((300, 1, 1, 32, 32, 4), np.float16), np.zeros(300, np.int32))
  actual = sum(file.stat().st_size for file in (tmp_path / "z").glob("*.array_record"))
  assert actual <= size < 1.1 * actual
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
  folder.check_room([])
  with pytest.raises(
    ValueError, match=r"needs .* MB, and its disk has 10 B left; give a folder on another, or leave out"
  ):
    folder.check_room([1])
