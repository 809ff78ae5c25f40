"""Weights & Biases: what its own client records offline is read back, and its failures stop nothing."""

import importlib.util
import json
import struct
import sys
import time
import types

import numpy as np
import pytest

from pflow_jax.training import weights_biases
from pflow_jax.training.boards import Boards
from pflow_jax.training.train import train
from pflow_jax.training.weights_biases import IDENTITY
from pflow_jax.training.writer import MetricsWriter
from tests.events import events
from tests.programs import quick


def messages(path):
  """Messages in a client's file: a head of 7 bytes, and LevelDB's log: blocks of 32 KiB of parts, each with its
  checksum (4 bytes), size (2) and kind (1): whole, first, middle or last."""
  content, place, parts = path.read_bytes(), 7, b""
  while place + 7 <= len(content):
    if (left := 2**15 - place % 2**15) < 7:
      place += left
      continue
    _, size, kind = struct.unpack_from("<IHB", content, place)
    parts += content[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):
      yield parts
      parts = b""


def records(folder):
  """Runs that the client has recorded, in the order of their start: (run, rows of history)."""
  from wandb.proto.wandb_internal_pb2 import Record

  found = []
  for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    told, end = [], time.monotonic() + 20
    while not told or told[-1].WhichOneof("record_type") != "exit":  # its service writes a moment later
      assert time.monotonic() < end, f"{path} has no end"
      time.sleep(0.05)
      told = [Record.FromString(message) for message in messages(path)]
    (run,) = {one.run.run_id: one.run for one in told if one.WhichOneof("record_type") == "run"}.values()
    rows = [one.history.item for one in told if one.WhichOneof("record_type") == "history"]
    named = lambda items: {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    found.append((run, [named(items) for items in rows]))
  return found


def test_what_the_client_records_is_what_was_logged_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  monkeypatch.setenv("WANDB_SILENT", "true")
  folder = tmp_path / "mine"
  for start in (0, 2):
    time.sleep(1.1 * bool(start))  # the client names its folders by the second
    with MetricsWriter(folder, wandb="team/flows", config={"seed": 7}, resume_step=start, tensorboard=False) as writer:
      writer.write(start + 1, {"loss": 0.5, "images_per_second": 8.0})
      writer.write(start + 2, {"loss": 0.25 / (start + 1)})
      writer.image(start + 2, "train/samples", np.zeros((4, 5, 3), np.uint8))
  (first, before), (second, after) = records(folder)
  assert first.run_id == second.run_id == (folder / IDENTITY).read_text().strip()
  assert (first.entity, first.project, first.display_name, first.job_type) == ("team", "flows", "mine", "training")
  assert {item.key: json.loads(item.value_json) for item in first.config.update}["seed"] == 7
  assert [(row["step"], row.get("train/loss")) for row in before] == [(1, 0.5), (2, 0.25), (2, None)]
  assert before[0]["speed/images_per_second"] == 8.0
  assert (before[2]["train/samples.width"], before[2]["train/samples.height"]) == (5, 4)
  assert [row["step"] for row in after] == [3, 4, 4]


class StandIn(types.ModuleType):
  """A client some of whose calls fail: init in a mode, log, or finish."""

  def __init__(self, fails=()):
    super().__init__("wandb")
    self.fails, self.calls, self.logged = fails, [], []

  def Settings(self, **options):
    return options

  def teardown(self):
    self.calls.append("teardown")

  def init(self, mode, **options):
    self._call(f"init {mode}")
    self.options = options
    return self

  def define_metric(self, name, step_metric):
    assert (name, step_metric) == ("*", "step")

  def log(self, values):
    self._call("log")
    self.logged.append(values)

  def finish(self):
    self._call("finish")

  def _call(self, name):
    self.calls.append(name)
    if name in self.fails:
      raise ConnectionError(f"{name}: no network")


@pytest.fixture
def client(monkeypatch):
  def use(*fails):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails))
    return sys.modules["wandb"]

  return use


def write(folder, **options):
  with MetricsWriter(folder, wandb="flows", tensorboard=False, **options) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1.0})


@pytest.mark.parametrize(
  ("fails", "calls"),
  [
    ((), ["init None", "log", "log", "finish"]),
    (("init None",), ["init None", "teardown", "init offline", "log", "log", "finish"]),
    (("init None", "init offline"), ["init None", "teardown", "init offline"]),
    (("log",), ["init None", "log"]),
    (("finish",), ["init None", "log", "log", "finish"]),
  ],
)
def test_its_failures_stop_nothing(fails, calls, client, tmp_path, caplog):
  fake = client(*fails)
  write(tmp_path)
  assert fake.calls == calls
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
  assert [record.message for record in caplog.records] == [
    f"Weights & Biases: {name}: no network; the training goes on" for name in fails
  ]


def test_an_evaluation_where_the_client_is_missing_shows_the_rest(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "wandb", None)
  boards = Boards(tmp_path, wandb="flows", part="evaluation")
  boards.scalars(1, {"eval/fd": 0.5})
  boards.text(1, "eval/table", "| a |")
  boards.image(1, "eval/samples", np.zeros((4, 5, 3), np.uint8))
  boards.close()
  assert {value.tag for event in events(tmp_path / "tensorboard/evaluation") for value in event.summary.value} == {
    *("eval/fd", "eval/table/text_summary", "eval/samples")
  }
  assert "Weights & Biases" in caplog.text


def test_only_the_first_process_writes(client, tmp_path):
  fake = client()
  write(tmp_path / "x", active=False)
  assert fake.calls == []
  assert not (tmp_path / "x").exists()


def test_a_strange_identity_is_replaced_and_a_part_has_its_own(client, tmp_path):
  fake = client()
  (tmp_path / IDENTITY).write_text("../../x\n")
  write(tmp_path)
  own = fake.options["id"]
  assert own.isalnum()
  assert (tmp_path / IDENTITY).read_text() == own + "\n"
  Boards(tmp_path, tensorboard=False, wandb="flows", part="evaluation").close()
  assert (fake.options["id"], fake.options["group"]) == (f"{own}-evaluation", own)
  assert fake.options["job_type"] == "evaluation"


def test_a_run_on_an_object_store_keeps_its_identity_there(client, bucket):
  fake = client()
  write(bucket)
  first = fake.options
  write(bucket)
  assert fake.options["id"] == first["id"]
  assert "://" not in fake.options["dir"]


@pytest.mark.usefixtures("float32")
def test_a_run_that_names_a_project_without_the_client_is_refused_before_it_begins(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(weights_biases.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
  with pytest.raises(ImportError, match=r"config.train.wandb: .* pip install 'pflow-jax\[wandb\]'"):
    train(quick("checkerboard", "teacher", wandb="flows"), tmp_path / "run")
  assert not (tmp_path / "run").exists()
