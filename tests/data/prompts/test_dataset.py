"""Sets of prompts: folders of embeddings, what is known of them without the data, emoji with names, random ones."""

import itertools
import json
import os
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.data.prompts.dataset import with_embeddings
from pflow_jax.data.prompts.records import INDEX, TABLE, Fields, Index, PromptSource
from tests.encoders import StubEncoder
from tests.prompt_folders import PROMPTS, SHAPE, write


def test_a_record_is_read_as_it_was_written():
  rng = np.random.default_rng(0)
  record = {
    "text": rng.normal(size=(5, 7)).astype(ml_dtypes.bfloat16),
    "pooled": rng.normal(size=3).astype(np.float32),
    "x0": rng.normal(size=(2, 3, 1)).astype(np.float32),
  }
  for names in itertools.chain.from_iterable(itertools.combinations(record, n) for n in (1, 2, 3)):
    has = lambda name, value, names=names: value if name in names else type(value)()
    fields = Fields(has("text", 7), pooled_width=has("pooled", 3), shape=has("x0", (2, 3, 1)))
    packed = fields.pack("ein Füßchen", {name: record[name] for name in names})
    assert len(packed) == fields.sizes(5 if "text" in names else 0) + len("ein Füßchen".encode())
    prompt, got = fields.unpack(packed)
    assert prompt == "ein Füßchen"
    assert set(got) == set(names)
    for name in names:
      want = record[name].astype(np.float16) if name == "x0" else record[name]
      np.testing.assert_array_equal(got[name].astype(np.float32), want.astype(np.float32))
  np.testing.assert_array_equal(fields.sizes(np.array([0, 2])), [4 + 12 + 12, 4 + 12 + 12 + 28])


def test_an_index_is_read_as_it_was_written():
  index = Index("flux", Fields(4, False, 3, (2, 2, 1)), 8, 8, 10, 3, {"template": "<|x|>\n{}", "dtype": "float32"})
  assert Index.from_json(index.as_json()) == index
  assert index.num_shards == 4


def test_batches_with_latents_in_buckets(tmp_path):
  folder = write(tmp_path / "prompts")
  dataset = data.load(f"prompts:{folder}", buckets=(12, 4))
  assert (dataset.shape, dataset.num_classes, dataset.lengths, dataset.has_x0) == (SHAPE, 0, (4, 12), True)
  assert dataset.num_records == 6
  dataset = pickle.loads(pickle.dumps(dataset))
  encoder, rows = StubEncoder(max_length=16), set()
  for batch in itertools.islice(data.batches(dataset, 2, seed=0), 6):
    cond, length = batch["cond"], data.text_length(batch["cond"])
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cond)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), dataset.cond_shapes(2, length))
    assert batch["x0"].dtype == np.float32
    for row, text, mask in zip(batch["x0"][:, 0, 0, 0].astype(int), cond["text"], cond["mask"], strict=True):
      rows.add(row)
      want, _ = encoder.one(PROMPTS[row])
      assert length == (4 if len(want) <= 4 else 12)
      np.testing.assert_array_equal(text[mask], want[:length])
      assert mask.sum() == min(len(want), length)
      assert not text[~mask].any()
  assert rows == set(range(6))
  x0, cond = data.examples(dataset, 6)
  assert x0.shape == (6, *SHAPE)
  assert cond["mask"].shape == (6, 12)


def test_no_bucket_is_longer_than_needed(tmp_path):
  folder = write(tmp_path / "prompts")
  lengths = lambda *buckets: data.load(f"prompts:{folder}", buckets=buckets).lengths
  assert lengths(64, 4, 32, 128) == (4, 32)
  assert lengths(16, 17) == (16,)
  assert lengths(4, 8) == (4, 8)


def test_what_a_prompt_was_cut_to_is_pinned(tmp_path):
  options = dict(name=f"prompts:{write(tmp_path / 'prompts')}", buckets=(4, 16))
  assert data.pinned(options) == options | dict(max_length=16)
  assert data.load(**data.pinned(options)).lengths == (4, 16)
  with pytest.raises(ValueError, match="texts of up to 16 tokens, got max_length=77"):
    data.load(**options, max_length=77)
  (tmp_path / "prompts").rename(tmp_path / "prompts_test")
  assert data.pinned(options | dict(split="test"))["max_length"] == 16
  for elsewhere in (dict(name="prompts:/nowhere", model="flux"), dict(name="digits")):
    assert data.pinned(elsewhere) == elsewhere


def test_worker_processes_give_the_same_batches(tmp_path):
  dataset = data.load(f"prompts:{write(tmp_path / 'prompts')}", buckets=(4, 12))
  assert dataset.num_records == 6, "opened here before it goes to another process"
  want = list(itertools.islice(data.batches(dataset, 2, seed=0), 5))
  iterator = data.batches(dataset, 2, seed=0, start=1, num_workers=1)
  for batch in want[1:]:
    got = next(iterator)
    assert got["cond"]["text"].dtype == ml_dtypes.bfloat16
    jax.tree.map(np.testing.assert_array_equal, got, batch)
  iterator.close()


def test_prompts_alone(tmp_path):
  folder = write(tmp_path / "prompts", "flux", shape=None)
  with pytest.raises(ValueError, match=r"has no latents; give shape="):
    data.load(f"prompts:{folder}")
  dataset = data.load(f"prompts:{folder}", shape=(8, 8, 16))
  assert (dataset.shape, dataset.has_x0, dataset.lengths) == ((8, 8, 16), False, (16,))
  batch = next(data.batches(dataset, 4, seed=0))
  assert batch.keys() == {"cond"}
  assert batch["cond"].keys() == {"text", "pooled"} == dataset.cond_shapes(4).keys() == dataset.null_cond.keys()
  assert data.examples(dataset, 2)[0] is None
  assert {k: v.shape for k, v in dataset.cond_shapes(4).items()} == {"text": (4, 16, 6), "pooled": (4, 4)}


def test_the_empty_prompt_is_padded_to_the_longest_text(tmp_path):
  folder = write(tmp_path / "prompts")
  for buckets, length in ((None, 16), ((2, 9), 9), ((40,), 40)):
    dataset = data.load(f"prompts:{folder}", buckets=buckets)
    null = dataset.null_cond
    assert {k: (v.shape, v.dtype) for k, v in null.items()} == {
      k: (v.shape[1:], v.dtype) for k, v in dataset.cond_shapes(3).items()
    }
    text, _ = StubEncoder().one("")
    assert (len(text), length, null["mask"].sum()) == (1, dataset.lengths[-1], 1)
    np.testing.assert_array_equal(null["text"][null["mask"]], text)
    assert not null["text"][1:].any()
  with pytest.raises(ValueError, match=r"expected a text length of \(40,\), got 16"):
    dataset.cond_shapes(3, 16)
  folder = write(tmp_path / "without", null=False)
  assert data.load(f"prompts:{folder}").null_cond is None


def test_a_run_can_be_planned_without_the_data(tmp_path):
  with pytest.raises(ValueError, match=r"no index.json; write the prompts with `pflow cache`, or give model="):
    data.load(f"prompts:{tmp_path}/none", shape=SHAPE)
  flux = data.load(f"prompts:{tmp_path}/none", model="flux", shape=(128, 128, 16))
  shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in flux.cond_shapes(2).items()}
  assert shapes == {"text": ((2, 512, 4096), "bfloat16"), "pooled": ((2, 768), "float32")}
  assert (flux.shape, flux.has_x0, flux.null_cond["text"].shape) == ((128, 128, 16), True, (512, 4096))
  qwen = data.load(f"prompts:{tmp_path}/none", model="qwen_image", shape=SHAPE, buckets=(128, 512))
  assert qwen.lengths == (128, 512)
  cut = data.load(f"prompts:{tmp_path}/none", model="flux", shape=SHAPE, buckets=(256,), max_length=256)
  assert cut.lengths == (256,)
  shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in qwen.cond_shapes(2, 128).items()}
  assert shapes == {"text": ((2, 128, 3584), "bfloat16"), "mask": ((2, 128), "bool")}
  for use in (lambda: qwen.num_records, lambda: data.batches(qwen, 2, seed=0)):
    with pytest.raises(ValueError, match="there are no prompts; write them with `pflow cache`"):
      use()


def test_refusals(tmp_path):
  folder = write(tmp_path / "prompts")
  flux = write(tmp_path / "flux", "flux")
  minilm = write(tmp_path / "minilm", "minilm")
  for name, options, message in (
    (folder, {"shape": (8, 8, 2)}, r"has latents of shape \(4, 4, 2\), got shape=\(8, 8, 2\)"),
    (folder, {"model": "flux"}, "is of prompts for qwen_image, got model='flux'"),
    (folder, {"model": "sd3"}, "model must be one of"),
    (folder, {"buckets": (0, 4)}, "at least 1, got \\(0, 4\\)"),
    (folder, {"split": "all"}, "split must be"),
    (folder, {"split": "test"}, "prompts_test: there is no index.json"),
    (flux, {"buckets": (8, 16)}, "attends to padding, so all texts have 16 tokens"),
    (minilm, {"buckets": (8,)}, "no texts to put in buckets"),
    ("gs://bucket/prompts", {}, "mount the bucket"),
    (tmp_path / "none", {"model": "flux", "shape": SHAPE, "max_length": 2 * 10**9}, "tokens: takes .* of memory"),
    (tmp_path / "none", {"model": "flux", "shape": (10**9,) * 3}, "an example of shape .*: takes .* of memory"),
  ):
    with pytest.raises(ValueError, match=message):
      data.load(f"prompts:{name}", **options)
  assert data.load(f"prompts:{flux}", buckets=(16,)).lengths == (16,)
  (tmp_path / "prompts" / "00004.array_record").rename(tmp_path / "gone")
  with pytest.raises(ValueError, match="expected 2 shards, got 1"):
    _ = data.load(f"prompts:{folder}").num_records
  (tmp_path / "flux" / TABLE).write_bytes(b"damaged")
  with pytest.raises(ValueError, match=r"index.npz cannot be read"):
    data.batches(data.load(f"prompts:{flux}"), 2, seed=0)
  index = json.loads((tmp_path / "minilm" / INDEX).read_text())
  (tmp_path / "minilm" / INDEX).write_text(json.dumps(index | {"num_records": 5}))
  with pytest.raises(ValueError, match="expected 5 records, got 6"):
    _ = data.load(f"prompts:{minilm}").num_records
  (tmp_path / "minilm" / INDEX).write_text("{}")
  with pytest.raises(ValueError, match="index.json cannot be read"):
    data.load(f"prompts:{minilm}")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_records": 0}, "num_records: .*greater than 0, got 0"),
    ({"shard_records": 0}, "shard_records: .*greater than 0, got 0"),
    ({"num_records": 6.0, "longest": "16"}, "longest: .*got '16'; num_records: .*got 6.0"),
    ({"model": "sd3"}, r"model: expected one of \['flux', 'minilm', 'qwen_image'\], got 'sd3'"),
    ({"fields": 3}, "fields: .*got 3"),
    ({"fields": {"text_width": -1}}, "fields.text_width: .*got -1"),
    ({"fields": {"shape": [0]}}, "fields.shape.0: .*greater than 0, got 0"),
    ({"fields": {"text_width": 6, "masked": 1}}, "fields.masked: .*got 1"),
    (
      {"longest": 10**12},
      r"expected max_length of up to 32768 tokens and longest of no more, got 16 and 1000000000000",
    ),
    ({"longest": 3}, "expected texts of 0 to 3 tokens as in index.json, got"),
    ({"fields": {"text_width": 7, "masked": True, "shape": [4, 4, 2]}}, "record [0-9]+: [0-9]+ bytes cannot hold"),
    ({"extra": 1, "made": []}, "made: .*got \\[\\]"),
  ],
)
def test_an_index_that_says_something_else_is_refused(tmp_path, change, message):
  folder = write(tmp_path / "prompts", null=False)
  path = tmp_path / "prompts" / INDEX
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match=message) as caught:
    next(data.batches(data.load(f"prompts:{folder}"), 6, seed=0, num_threads=0))
  assert "\n" not in str(caught.value)


def test_files_of_prompts_that_are_damaged_are_named(tmp_path):
  folder = write(tmp_path / "prompts")

  def damaged(name, content, message):
    path = tmp_path / "prompts" / name
    kept = path.read_bytes()
    path.unlink()
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      next(data.batches(data.load(f"prompts:{folder}"), 6, seed=0))
    path.unlink()
    path.write_bytes(kept)

  with np.load(tmp_path / "prompts" / TABLE) as table:
    length, known = table["length"], table["hash"]
  save = lambda **arrays: lambda path: np.savez(path, **arrays)
  damaged(TABLE, save(length=length), "expected the arrays length and hash")
  damaged(TABLE, save(length=length[:5], hash=known), "expected 6 records as in index.json")
  damaged(TABLE, save(length=length * 1.0, hash=known), "expected 6 records as in index.json, got .*float64")
  damaged(TABLE, save(length=-length, hash=known), "expected texts of 0 to 16 tokens")
  damaged(TABLE, os.mkfifo, "this is a pipe")
  damaged(INDEX, b"[]", "index.json cannot be read")
  damaged(INDEX, os.mkfifo, "this is a pipe")
  damaged("null.record", b"\xff" * 9, "null.record: 9 bytes cannot hold a record")
  damaged("null.record", b"", "null.record: 0 bytes cannot hold a record")
  damaged("00004.array_record", b"\0" * 70_000, "00004.array_record cannot be read")
  damaged("00004.array_record", os.mkfifo, "this is a pipe")


def test_records_that_are_damaged_are_refused():
  fields = Fields(text_width=2, pooled_width=1, shape=(2,))
  whole = fields.pack("a", {"text": np.ones((3, 2)), "pooled": np.ones(1), "x0": np.ones(2)})
  assert fields.unpack(whole)[0] == "a"
  for data_ in (b"", whole[:3], whole[:-2], b"\xff\xff\xff\x7f" + whole[4:], b"\xff\xff\xff\xff" + whole[4:]):
    with pytest.raises(ValueError, match="bytes cannot hold a record of Fields"):
      fields.unpack(data_)
  with pytest.raises(ValueError, match="utf-8"):
    fields.unpack(whole[:-1] + b"\xff")


def test_names_are_the_condition_of_images_in_memory(tmp_path):
  texts = ("the dog", "a", "the dog", "two red cats")
  x0 = np.arange(4.0)[:, None, None, None] * np.ones((1, 2, 2, 1))
  images = data.from_arrays(x0, np.arange(4) % 2, class_names=("x", "y"), texts=texts, name="emoji")
  dataset = with_embeddings(images, write(tmp_path / "minilm", "minilm", shape=None))
  assert (dataset.num_classes, dataset.class_names, dataset.texts, dataset.lengths) == (0, (), texts, ())
  assert dataset.has_x0
  encoder = StubEncoder("minilm")
  want = np.stack([encoder.one(text)[1] for text in texts])
  batch = next(data.batches(dataset, 4, seed=0))
  assert batch["cond"].keys() == {"pooled"} == dataset.cond_shapes(4).keys()
  assert data.text_length(batch["cond"]) is None
  np.testing.assert_array_equal(batch["cond"]["pooled"], want[batch["x0"][:, 0, 0, 0].astype(int)])
  np.testing.assert_array_equal(dataset.null_cond["pooled"], encoder.one("")[1])
  x0, cond = data.examples(dataset, 3)
  np.testing.assert_array_equal(cond["pooled"], want[x0[:, 0, 0, 0].astype(int)])
  assert with_embeddings(images, write(tmp_path / "flux", "flux", shape=None)).cond_shapes(1).keys() == {"pooled"}
  with pytest.raises(ValueError, match=r'expected prompts with "pooled" embeddings, got those for qwen_image'):
    with_embeddings(images, write(tmp_path / "qwen"))
  with pytest.raises(ValueError, match=r'"pooled" embeddings, got no prompts; write them with `pflow cache`'):
    with_embeddings(images, str(tmp_path / "none"))
  folder = write(tmp_path / "few", "minilm", shape=None, prompts=["a", "b"])
  with pytest.raises(ValueError, match=r"emoji.*: 2 texts are not there: 'the dog', 'two red cats'"):
    with_embeddings(images, folder)


def test_a_prompt_is_found_by_its_text_not_by_a_hash_alone(tmp_path, monkeypatch):
  folder = write(tmp_path / "minilm", "minilm", shape=None)
  monkeypatch.setattr("pflow_jax.data.prompts.records.prompt_hashes", lambda prompts: np.zeros(len(prompts), np.uint64))
  index = data.load(f"prompts:{folder}", shape=SHAPE).records.source.index
  source = PromptSource(folder, index)
  source._table = lambda name: np.zeros(6, np.uint64)
  monkeypatch.setattr("pflow_jax.data.prompts.dataset.PromptSource", lambda folder, index: source)
  images = data.from_arrays(np.ones((1, 2, 2, 1)), texts=("another",), name="emoji")
  with pytest.raises(ValueError, match="1 texts are not there: 'another'"):
    with_embeddings(images, folder)


@pytest.mark.parametrize(
  ("options", "shapes"),
  [
    ({"model": "flux", "text": (6, 12), "pooled": 10}, {"text": (2, 6, 12), "pooled": (2, 10)}),
    ({"model": "qwen_image", "text": (6, 12)}, {"text": (2, 6, 12), "mask": (2, 6)}),
    ({"model": "minilm"}, {"pooled": (2, 384)}),
  ],
)
def test_random_prompts(options, shapes):
  dataset = data.load("synthetic_prompts", shape=(8, 8, 16), **options)
  batch = next(data.batches(dataset, 2, seed=0))
  assert {name: leaf.shape for name, leaf in batch["cond"].items()} == shapes
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in dataset.cond_shapes(2).items()} == {
    name: (leaf.shape, leaf.dtype) for name, leaf in batch["cond"].items()
  }
  assert (batch["x0"].shape, batch["x0"].dtype) == ((2, 8, 8, 16), np.float32)
  assert dataset.null_cond.keys() == shapes.keys()
  same = next(data.batches(data.load("synthetic_prompts", shape=(8, 8, 16), **options), 2, seed=0))
  np.testing.assert_array_equal(batch["x0"], same["x0"])
  test = data.load("synthetic_prompts", shape=(8, 8, 16), split="test", **options)
  assert (next(data.batches(test, 2, seed=0))["x0"] != batch["x0"]).all()
  if "mask" in shapes:
    _, cond = data.examples(dataset, 64)
    assert set(cond["mask"].sum(1)) == set(range(1, 7))
    assert not cond["text"][~cond["mask"]].any()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"model": "sd3"}, "one of"),
    ({"model": "minilm", "text": (6, 12)}, "of which minilm lacks one"),
    ({"model": "qwen_image", "pooled": 3}, "of which qwen_image lacks one"),
    ({"text": (0, 3)}, "sizes >= 1"),
    ({"split": "all"}, "split must be"),
    ({"num_records": 10**9}, "num_records=1000000000: takes .* of memory"),
    ({"text": (10**9, 10**9)}, "num_records=64: takes .* of memory"),
  ],
)
def test_random_prompts_that_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    data.load("synthetic_prompts", **options)


def test_class_sets_have_labels_for_conditions():
  digits = data.load("digits")
  assert (digits.null_cond, digits.lengths, digits.has_x0) == (10, (), True)
  shape = digits.cond_shapes(4)
  assert (shape.shape, shape.dtype) == ((4,), np.int32)
  assert data.text_length(np.zeros(4)) is None
