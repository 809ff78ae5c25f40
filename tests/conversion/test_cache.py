"""`pflow cache`: what is written, that a kill changes nothing, and what is refused."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.commands import programs
from pflow_jax.conversion import cache as program
from pflow_jax.conversion.cache import cache
from pflow_jax.data.prompts.records import MODELS, Fields, PromptSource, prompt_hashes, read_index
from pflow_jax.families.encoders import Encoder
from pflow_jax.families.family import Family
from pflow_jax.families.qwen_image.encoder import QwenImageEncoder
from pflow_jax.families.registry import FAMILIES
from pflow_jax.files.lock import LOCK
from tests import encoders
from tests.encoders import StubEncoder
from tests.programs import ROOT, environment

PROMPTS = [f"prompt {'x' * (n % 7)} {n}" for n in range(11)]


@pytest.fixture
def stub(monkeypatch):
  """Puts a StubEncoder of the model that is asked for in place of the real one, and returns the last."""
  made = []

  def load(model, folder, *, max_length, dtype):
    del folder, dtype
    made.append(StubEncoder(model, max_length or 12))
    return made[-1]

  monkeypatch.setattr(program, "load_encoder", load)
  return lambda: made[-1]


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("\n".join([*PROMPTS[:4], "", *PROMPTS[2:], "   "]))
  return str(path)


def contents(folder):
  """Every file of a folder by name, its bytes."""
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_another_process_writes_is_left_alone(stub, prompts, tmp_path, monkeypatch):
  def other(*args):
    with pytest.raises(ValueError, match="is being written by 'pflow cache'"):
      cache(prompts, "minilm", tmp_path / "out")
    raise KeyboardInterrupt

  write = program._write_shards
  monkeypatch.setattr(program, "_write_shards", other)
  with pytest.raises(KeyboardInterrupt):
    cache(prompts, "minilm", tmp_path / "out")
  monkeypatch.setattr(program, "_write_shards", write)
  cache(prompts, "minilm", tmp_path / "out")
  assert not (tmp_path / "out" / LOCK).exists()


class Vector(Encoder):
  """An encoder from outside, whose weights are one file of its folder."""

  model, pooled_width = "vector", 4

  def arrays(self, prompts):
    return {"pooled": np.tile(np.load(self.folder / "encoder" / "weights.npy"), (len(prompts), 1))}


def test_other_weights_of_an_encoder_from_outside_are_noticed(tmp_path, monkeypatch):
  monkeypatch.setitem(FAMILIES, "vector", Family("vector", encoder=Vector))
  monkeypatch.setitem(MODELS, "vector", Fields(pooled_width=4))
  for number, name in enumerate(("a", "b", "c")):
    (tmp_path / name / "encoder").mkdir(parents=True)
    np.save(tmp_path / name / "encoder" / "weights.npy", np.full(4, float(number % 2)))
  write = lambda name: cache(["one", "two"], "vector", tmp_path / "a" / "prompts", encoders=str(tmp_path / name))
  index = write("a")
  with pytest.raises(ValueError, match="holds other prompts.*\n *encoders_digest: it has"):
    write("b")
  (tmp_path / "a" / "vae").mkdir()
  (tmp_path / "a" / "vae" / "config.json").write_text("{}")
  assert write("a") == index  # neither its prompts nor its autoencoder are the encoder's
  assert write("c").made["encoders_digest"] == index.made["encoders_digest"]
  assert Vector(".", 0, "float32").digest() == "Vector"


@pytest.mark.parametrize("model", ["flux", "qwen_image", "minilm"])
def test_records_are_what_the_encoder_gives(stub, prompts, tmp_path, model, capsys):
  out = tmp_path / "out"
  index = cache(prompts, model, out, batch_size=2, shard_records=5)
  assert "11 prompts (2 blank and 2 repeated left out)" in capsys.readouterr().out
  assert sorted(path.name for path in out.iterdir()) == [
    "00000.array_record",
    "00001.array_record",
    "00002.array_record",
    "index.json",
    "index.npz",
    "null.record",
  ]
  assert read_index(str(out)) == index
  assert (index.model, index.num_records, index.made["encoders_digest"]) == (model, 11, "stub")
  encoder, source = stub(), PromptSource(str(out), index)
  np.testing.assert_array_equal(source.text_lengths, encoder.text_lengths(PROMPTS))
  np.testing.assert_array_equal(source.find([*reversed(PROMPTS), "another"]), [*range(10, -1, -1), -1])
  for row, prompt in enumerate(PROMPTS):
    text, pooled = encoder.one(prompt)
    stored, record = source.read(row)
    assert stored == prompt
    assert record.keys() == {n for n, has in (("text", model != "minilm"), ("pooled", model != "qwen_image")) if has}
    if "text" in record:
      assert record["text"].dtype == "bfloat16"
      assert record["text"].tobytes() == text.tobytes()
    if "pooled" in record:
      np.testing.assert_array_equal(record["pooled"], pooled)
  null = data.load(f"prompts:{out}", shape=(2, 2, 1)).null_cond
  text, pooled = encoder.one("")
  if "text" in null:
    np.testing.assert_array_equal(null["text"][: len(text)], text)
    assert not null["text"][len(text) :].any()
  if "pooled" in null:
    np.testing.assert_array_equal(null["pooled"], pooled)


KILLED = """
import os, sys
from pflow_jax.commands import programs
from pflow_jax.conversion import cache as program
from tests.encoders import StubEncoder
encoder = StubEncoder(fail_at=int(sys.argv[1]), fail=lambda: os._exit(9))
program.load_encoder = lambda *args, **options: encoder
program.cache(sys.argv[2], "qwen_image", sys.argv[3], batch_size=2, shard_records=4)
"""


def test_a_killed_run_goes_on_and_ends_the_same(stub, prompts, tmp_path, capsys):
  out, whole = tmp_path / "out", tmp_path / "whole"
  cache(prompts, "qwen_image", whole, batch_size=2, shard_records=4)
  # The calls: the empty prompt, two batches a shard, two of the last; killed in the second shard.
  command = [sys.executable, "-c", KILLED, "5", prompts, str(out)]
  assert subprocess.run(command, cwd=ROOT, env=environment()).returncode == 9
  assert (out / "00000.array_record").exists()
  assert not (out / "00001.array_record").exists()
  with pytest.raises(ValueError, match=r"there is no index\.json"):
    data.load(f"prompts:{out}")
  kept = (out / "00000.array_record").stat().st_mtime_ns
  (out / "00001.array_record").write_bytes(b"cut short by a full disk")
  shutil.copy(whole / "00001.array_record", out / "00002.array_record")  # whole, of a record too many
  capsys.readouterr()
  cache(prompts, "qwen_image", out, batch_size=2, shard_records=4)
  assert "going on after 4 prompts" in capsys.readouterr().out
  assert stub().calls == 4
  assert (out / "00000.array_record").stat().st_mtime_ns == kept
  assert contents(out) == contents(whole)
  cache(prompts, "qwen_image", out, batch_size=2, shard_records=4)
  assert stub().calls == 0
  assert "is complete: 11 records" in capsys.readouterr().out


def test_a_folder_of_other_prompts_is_left_alone(stub, prompts, tmp_path):
  out = tmp_path / "out"
  cache(prompts, "qwen_image", out, shard_records=4)
  before = contents(out)
  for change, named in (
    ({"model": "flux"}, "model: it has 'qwen_image', this run 'flux'"),
    ({"max_length": 9}, "max_length: it has 12, this run 9"),
    ({"shard_records": 5}, "shard_records: it has 4, this run 5"),
  ):
    options = {"model": "qwen_image", "shard_records": 4, **change}
    with pytest.raises(ValueError, match=f"holds other prompts; give another folder[^~]*{named}"):
      cache(prompts, out=out, **options)
  (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[1:], PROMPTS[0]]))
  with pytest.raises(ValueError, match="prompts_digest: it has"):
    cache(prompts, "qwen_image", out, shard_records=4)
  assert contents(out) == before
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("precious")
  with pytest.raises(ValueError, match="is not empty; give a new folder"):
    cache(prompts, "qwen_image", tmp_path / "mine")


def test_the_size_is_told_and_a_full_disk_refused(stub, prompts, tmp_path, monkeypatch, capsys):
  path = tmp_path / "many.txt"
  path.write_text("\n".join(f"{n} {'long ' * 40}" for n in range(3000)))
  cache(str(path), "flux", tmp_path / "flux", max_length=100, batch_size=500, shard_records=1500)
  told = capsys.readouterr().out
  assert "3,000 records (text of 100 x 6, pooled 4) in 2 shards, " in told
  size = float(told.split(" MB to write")[0].split("; ")[-1]) * 1e6
  actual = sum(file.stat().st_size for file in (tmp_path / "flux").glob("*.array_record"))
  assert actual <= size < 1.2 * actual
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
  with pytest.raises(ValueError, match="out needs [0-9]+ kB, and its disk has 10 B left"):
    cache(prompts, "qwen_image", tmp_path / "out")
  assert not list((tmp_path / "out").glob("*.array_record*"))


def test_latents_beside_the_prompts(stub, tmp_path):
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(3, 4, 6, 2)).astype(np.float32)
  (tmp_path / "latents").mkdir()
  for n, values in enumerate(latents):
    np.save(tmp_path / "latents" / f"{n}.npy", values)
  rows = [("a cat", 0), ("a dog", 1), ("a cat", 2), ("a cat", 0)]
  lines = [json.dumps({"caption": text, "latents": f"latents/{n}.npy"}) for text, n in rows]
  path = tmp_path / "prompts.jsonl"
  path.write_text("\n".join(lines))
  index = cache(str(path), "qwen_image", tmp_path / "out", batch_size=2, latents="latents")
  assert (index.num_records, index.fields.shape) == (3, (4, 6, 2))
  source = PromptSource(str(tmp_path / "out"), index)
  for row in range(3):
    prompt, record = source.read(row)
    assert prompt == rows[row][0]
    np.testing.assert_array_equal(record["x0"], latents[row].astype(np.float16))
  dataset = data.load(f"prompts:{tmp_path}/out")
  assert dataset.has_x0
  batch = next(data.batches(dataset, 3, seed=0))
  assert (batch["x0"].shape, batch["x0"].dtype) == ((3, 4, 6, 2), "float32")
  assert dataset.null_cond.keys() == {"text", "mask"}

  def refused(change, message):
    change()
    with pytest.raises(ValueError, match=message):
      cache(str(path), "qwen_image", tmp_path / "other", batch_size=2, latents="latents")
    shutil.rmtree(tmp_path / "other", ignore_errors=True)

  save = lambda values: np.save(tmp_path / "latents" / "2.npy", values)
  refused(lambda: save(latents[2] * 1e6), r"prompts.jsonl, line 3: .*2.npy has values that are not finite, or not in")
  refused(lambda: save(latents[2, :3]), r"prompts.jsonl, line 3: expected x0 of shape \(4, 6, 2\) as in the first")
  refused(lambda: save(np.ones((4, 6, 2), int)), r"line 3: expected floating x0")
  refused(lambda: save(np.array([[[None]]])), r"line 3 to 3: .*2.npy cannot be read: it is an array of 'object'")
  refused((tmp_path / "latents" / "2.npy").unlink, r"prompts.jsonl, line 3: .*2.npy: there is no such file")
  refused(lambda: os.mkfifo(tmp_path / "latents" / "2.npy"), r"line 3: .*2.npy: expected a file, this is a pipe")
  refused(lambda: (tmp_path / "latents" / "0.npy").write_bytes(b"no"), r"line 1 to 1: .*0.npy cannot be read")


def test_a_folder_that_is_a_file_or_not_its_own_is_left_alone(stub, prompts, tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match="^out: expected a folder, .*file.* is none"):
    cache(prompts, "minilm", tmp_path / "file")
  (tmp_path / "out").mkdir()
  os.mkfifo(tmp_path / "out" / "index.json")
  with pytest.raises(ValueError, match="index.json.*expected a file, this is a pipe"):
    cache(prompts, "minilm", tmp_path / "out")


def test_a_shard_that_is_no_file_is_not_opened(stub, prompts, tmp_path):
  out = tmp_path / "out"
  cache(prompts, "qwen_image", out, shard_records=4)
  shutil.move(out / "index.json", out / "index.json.partial")
  (out / "00001.array_record").unlink()
  os.mkfifo(out / "00001.array_record")
  cache(prompts, "qwen_image", out, shard_records=4)  # made anew, in its place
  assert (out / "00001.array_record").is_file()


def test_images_go_through_the_pipeline_s_autoencoder(stub, tmp_path, monkeypatch):
  (tmp_path / "prompts.csv").write_text("prompt,image\na cat,1.png\na dog,2.png\n")
  for n in (1, 2):
    (tmp_path / f"{n}.png").touch()
  asked = []

  def read(paths, size):
    asked.append(size)
    return np.stack([np.full((2, 2, 3), float(path.stem)) for path in paths])

  monkeypatch.setattr(program, "load_autoencoder", lambda folder: types.SimpleNamespace(folder=folder, read=read))
  options = dict(images="image", encoders=tmp_path / "pipeline", height=16, width=8)
  index = cache(tmp_path / "prompts.csv", "minilm", tmp_path / "out", **options)  # paths are texts or path objects
  assert set(asked) == {(16, 8)}
  source = PromptSource(str(tmp_path / "out"), index)
  assert [source.read(row)[1]["x0"].mean() for row in range(2)] == [1, 2]


def test_the_command_has_the_function_s_arguments():
  flags, own = (inspect.signature(one).parameters for one in (programs.cache, cache))
  assert {name: one.default for name, one in flags.items()} == {name: one.default for name, one in own.items()}


def test_texts_of_a_data_set(stub, tmp_path, monkeypatch):
  texts = ("cat", "dog", "cat")
  dataset = data.from_arrays(np.arange(12.0).reshape(3, 2, 2, 1), texts=texts, name="emoji")
  monkeypatch.setattr(data, "load", lambda name: dataset)
  out = str(tmp_path / "out")
  index = cache("data:emoji", "minilm", out)
  np.testing.assert_array_equal(PromptSource(out, index)._table("hash"), prompt_hashes(["cat", "dog"]))
  monkeypatch.setattr(data, "load", lambda name: data.from_arrays(np.ones((3, 2)), name="digits"))
  with pytest.raises(ValueError, match="data:digits: the data set has no texts"):
    cache("data:digits", "minilm", tmp_path / "other")


def test_texts_of_a_list(stub, tmp_path):
  texts = ["a cat", "two dogs", " ", "a cat", "", "a red bird"]
  index = cache(texts, "qwen_image", tmp_path / "list")
  assert index.num_records == 3
  (tmp_path / "file.txt").write_text("a cat\ntwo dogs\na red bird\n")
  cache(str(tmp_path / "file.txt"), "qwen_image", tmp_path / "file")
  for name in ("null.record", "00000.array_record", "index.json"):
    assert (tmp_path / "list" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
  with pytest.raises(ValueError, match="prompts: expected at least one text, got none"):
    cache(["", " "], "qwen_image", tmp_path / "none")
  with pytest.raises(ValueError, match="prompts: a list has no field 'text'; give a file"):
    cache(texts, "qwen_image", tmp_path / "none", field="text")
  assert not (tmp_path / "none").exists()


def test_the_default_size_of_shards():
  count = program._shard_records(4096 * 512 * 2 + 768 * 4 + 100, 16)
  assert count % 16 == 0
  assert 3.8 < count * 4096 * 512 * 2 / 2**30 <= 4
  assert program._shard_records(1600, 7) % 7 == 0
  assert program._shard_records(2**33, 4) == 1


def test_the_command_from_folders_to_batches(tmp_path, monkeypatch, capsys):
  pytest.importorskip("transformers")
  pytest.importorskip("torch").set_num_threads(1)
  from pflow_jax.commands.cli import main
  from pflow_jax.families import text

  (tmp_path / "prompts.csv").write_text('prompt\n"a cat, red"\na dog\n')
  arguments = [f"--prompts={tmp_path}/prompts.csv", "--model=qwen_image", f"--out={tmp_path}/out"]
  folder = encoders.write_qwen_image(tmp_path / "Qwen-Image")
  main(["cache", *arguments, f"--encoders={folder}", "--dtype=float32", "--max_length=20"])
  dataset = data.load(f"prompts:{tmp_path}/out", model="qwen_image", shape=(8, 8, 16))
  batch = next(data.batches(dataset, 2, seed=0))
  prompts = [dataset.records.source.read(row)[0] for row in range(2)]
  assert prompts == ["a cat, red", "a dog"]
  want = text.encode_prompts("qwen_image", folder, prompts, dtype="float32")
  (row,) = np.flatnonzero(batch["cond"]["mask"].sum(1) == want["mask"][0].sum())
  length = want["mask"][0].sum()
  np.testing.assert_array_equal(batch["cond"]["text"][row, :length], want["text"][0, :length].astype("bfloat16"))
  index = read_index(f"{tmp_path}/out")
  assert (index.made["encoders"], index.made["template"]) == ("Qwen-Image", QwenImageEncoder.template)
  with pytest.raises(SystemExit) as exit_:
    main(["cache", *arguments])
  assert exit_.value.code == 2
  assert "qwen_image needs the folder of its text encoders" in capsys.readouterr().err


def test_the_keyboard_stops_it_and_the_command_says_how_to_go_on(prompts, tmp_path, monkeypatch, capsys):
  from pflow_jax.commands.cli import main

  def interrupt():
    raise KeyboardInterrupt

  encoder = StubEncoder(fail_at=3, fail=interrupt)
  monkeypatch.setattr(program, "load_encoder", lambda *args, **options: encoder)
  arguments = ["cache", f"--prompts={prompts}", "--model=qwen_image", f"--out={tmp_path}/out", "--shard_records=2"]
  with pytest.raises(SystemExit) as exit_:
    main(arguments)
  assert exit_.value.code == 130
  assert "stopped; the same command goes on where it was" in capsys.readouterr().err
  main(arguments)
  assert read_index(f"{tmp_path}/out").num_records == 11


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"prompts": "none.txt"}, "there is no such file"),
    ({"out": "gs://bucket/out"}, "written to a file system"),
    ({"batch_size": 0}, "batch_size and shard_records >= 1, got 0 and None"),
    ({"shard_records": 0}, "batch_size and shard_records >= 1, got 16 and 0"),
    ({"latents": "latents"}, "has no field 'latents'"),
    ({"images": "image"}, "^images: expected encoders, the pipeline with the autoencoder, and no latents"),
  ],
)
def test_mistakes_are_told_before_any_work(stub, prompts, tmp_path, arguments, message):
  with pytest.raises(ValueError, match=message):
    cache(**{"prompts": prompts, "model": "minilm", "out": tmp_path / "out", **arguments})
  assert not os.path.exists(tmp_path / "out")
