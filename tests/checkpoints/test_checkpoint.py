"""Exact round trips, every kind of damage, refusals, kills in the middle of a save."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pflow_jax.checkpoints.checkpoint import Checkpointer, load_params
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.checkpoints.stream import open_leaves, save_leaves
from pflow_jax.files.checksums import CHECKSUMS, checksums
from pflow_jax.mesh.sharding import make_mesh
from pflow_jax.settings.optimizer import OptimizerSettings
from pflow_jax.training.optim import make_optimizer
from pflow_jax.training.state import create_state

OPTIMIZER = make_optimizer(OptimizerSettings(learning_rate=0.1, warmup_steps=3, clip_norm=1.0))


def make_state(seed=0, dtype=jnp.float32, width=4):
  params = {
    "dense": {
      "kernel": jax.random.normal(jax.random.key(seed), (16, width), dtype),
      "bias": jnp.full((width,), seed, jnp.float32),
    },
    "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) + seed,
  }
  state = create_state(params, OPTIMIZER)
  return dataclasses.replace(state, step=jnp.int32(seed), ema=jax.tree.map(lambda x: x + 1, state.ema))


ABSTRACT = jax.eval_shape(make_state)


def saved(folder, steps=(100, 200), **settings):
  with Checkpointer(folder, **settings) as checkpointer:
    for step in steps:
      assert checkpointer.save(step, make_state(step))
  return folder


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def array_file(step_folder):
  """The file that holds the arrays: the largest one."""
  files = (f for f in (step_folder / "state").rglob("*") if f.is_file())
  return max(files, key=lambda f: f.stat().st_size)


def test_round_trip_is_exact(tmp_path):
  state = make_state(7)
  with Checkpointer(tmp_path / "run") as checkpointer:
    assert checkpointer.restore(ABSTRACT) is None
    assert checkpointer.latest_step() is None
    assert not (tmp_path / "run").exists()  # only saving makes it
    checkpointer.save(7, state)
    assert checkpointer.latest_step() == 7
  for target in (ABSTRACT, state):
    restored, step = Checkpointer(tmp_path / "run").restore(target)
    assert step == 7
    assert_same(restored, state)


ODD = "lr=[1e-3], a*b? {c} %41#&;'\"$HOME` ü-日本 \n!"


@pytest.mark.parametrize("name", ["lr=[1e-3]", "a*b", ODD])
def test_a_folder_of_any_name_is_read_back(tmp_path, name):
  for sibling in ("lr=1", "a-other-b"):  # which the names would match if they were patterns
    saved(tmp_path / sibling, [300])
  saved(tmp_path / name)
  assert_same(Checkpointer(tmp_path / name).restore(ABSTRACT)[0], make_state(200))
  assert_same(load_params(tmp_path / name), make_state(200).ema)
  assert newest_step(tmp_path / name) == 200
  assert len(list((tmp_path / name / "200" / "state").glob("ocdbt.process_*"))) == 1


@pytest.mark.parametrize("fault", ["parts not found", "another shape", "another leaf", "backslash"])
def test_what_cannot_be_read_back_is_no_checkpoint(tmp_path, monkeypatch, fault):
  """Every save is opened as a restore would before it gets its checksums and its name."""
  folder = tmp_path / ("a\\b" if fault == "backslash" else "run")
  if fault == "parts not found":
    monkeypatch.setattr("pflow_jax.files.folders._Folder.glob", lambda self, pattern: iter(()))
  checkpointer = Checkpointer(folder)
  checkpointer.save(1, make_state())
  if fault == "another shape":
    checkpointer._shapes = dataclasses.replace(checkpointer._shapes, step=jax.ShapeDtypeStruct((2,), jnp.int32))
  if fault == "another leaf":
    checkpointer._shapes = dataclasses.replace(checkpointer._shapes, params={})
  with pytest.raises(OSError, match="what was saved cannot be read back|cannot be opened") as error:
    checkpointer.wait()
  assert "tensorstore_spec" not in str(error.value)
  assert Checkpointer(folder).all_steps() == []
  assert not list(folder.rglob("checksums.json"))


@pytest.mark.parametrize("jump", [86400.0, 56 * 365 * 86400.0, -86400.0])
def test_a_save_is_not_cut_by_a_clock_that_is_set(tmp_path, monkeypatch, jump):
  clock, offset = time.time, [0.0]
  monkeypatch.setattr(time, "time", lambda: clock() + offset[0])

  class Slow:
    shape, dtype, stacked = (3,), np.dtype("f4"), False

    def layer(self, index):
      offset[0] = jump
      time.sleep(0.5)
      return np.arange(3, dtype="f4")

  save_leaves(tmp_path, {"params": {"w": Slow()}})
  np.testing.assert_array_equal(load_params(tmp_path, which="params")["w"], [0, 1, 2])


@pytest.mark.parametrize(("rows", "cut"), [(13 * 8, False), (2**15, True)])
def test_arrays_that_all_devices_hold_are_cut_where_they_are_large_alone(tmp_path, rows, cut):
  """What is cut is cut by a program of its shape, which is compiled here, and each device hands over a part."""
  array = np.arange(rows * 13, dtype=np.float32).reshape(rows, 13)
  held = jax.device_put({"x": array}, NamedSharding(make_mesh({"data": 8}), PartitionSpec()))
  compiled = []
  listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with Checkpointer(tmp_path) as checkpointer:
      checkpointer.save(1, held)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert bool(compiled) == cut
  assert_same(Checkpointer(tmp_path).restore(jax.eval_shape(lambda: held))[0], {"x": array})


def test_an_error_on_its_way_is_not_hidden_by_that_of_the_save(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(Checkpointer, "_write_checksums", lambda self: 1 / 0)
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, make_state())
  with pytest.raises(KeyError, match="first"), checkpointer:
    raise KeyError("first")
  assert "the last save has failed as well" in caplog.text


def test_state_may_be_donated_right_after_save(tmp_path):
  state = {"w": jnp.arange(500_000, dtype=jnp.float32)}
  expected = np.array(state["w"])
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
  jax.block_until_ready(overwrite({"w": jnp.copy(state["w"])}))
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    state = jax.block_until_ready(overwrite(state))
    restored, _ = checkpointer.restore(state)
  np.testing.assert_array_equal(restored["w"], expected)


def test_keeps_the_newest_and_every_period(tmp_path):
  saved(tmp_path, [10, 15, 20, 25, 30], max_to_keep=2, keep_period=20)
  assert Checkpointer(tmp_path).all_steps() == [20, 25, 30]
  restored, step = Checkpointer(tmp_path).restore(ABSTRACT, step=20)
  assert step == 20
  assert_same(restored, make_state(20))
  with pytest.raises(ValueError, match=r"step 15 .*\[20, 25, 30\]"):
    Checkpointer(tmp_path).restore(ABSTRACT, step=15)


def flip_bit(folder):
  file = array_file(folder)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def garble(folder):
  file = array_file(folder)
  file.write_bytes(bytes(len(file.read_bytes())))


def truncate(folder):
  file = array_file(folder)
  file.write_bytes(file.read_bytes()[:-10])


def replace(file, make):
  file.unlink()
  make(file)


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGES = {
  "bit flip": (flip_bit, "does not match its checksum"),
  "garbled": (garble, "does not match its checksum"),
  "truncated": (truncate, "bytes instead of"),
  "no metadata": (lambda f: (f / "state/_METADATA").unlink(), "state/_METADATA is missing"),
  "no state": (lambda f: shutil.rmtree(f / "state"), "is missing"),
  "no checksums": (lambda f: (f / "checksums.json").unlink(), "cannot be read"),
  "torn checksums": (lambda f: (f / "checksums.json").write_text('{"state'), "cannot be read"),
  "odd checksums": (lambda f: (f / "checksums.json").write_text("[1]"), "cannot be read"),
  "empty": (empty, "cannot be read"),
  "deep checksums": (lambda f: (f / "checksums.json").write_text("[" * 100_000), "cannot be read"),
  "a pipe": (lambda f: replace(f / "state/_METADATA", os.mkfifo), "state/_METADATA is missing"),
  "a device": (lambda f: replace(f / "state/_METADATA", lambda p: p.symlink_to("/dev/zero")), "is missing"),
  "a pipe of checksums": (lambda f: replace(f / "checksums.json", os.mkfifo), "cannot be read"),
  "elsewhere": (lambda f: (f / "checksums.json").write_text('{"../../../etc/passwd": [1, 2]}'), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_skipped_named_and_out_of_the_way(tmp_path, caplog, damage):
  saved(tmp_path)
  DAMAGES[damage][0](tmp_path / "200")
  with Checkpointer(tmp_path) as checkpointer, caplog.at_level(logging.WARNING):
    restored, step = checkpointer.restore(ABSTRACT)
    assert step == 100
    assert_same(restored, make_state(100))
    (message,) = [r.getMessage() for r in caplog.records if r.name == "pflow_jax.checkpoints.steps"]
    assert str(tmp_path / "200") in message
    assert DAMAGES[damage][1] in message
    assert checkpointer.all_steps() == [100]
    assert (tmp_path / "200").exists()  # restoring alone moves nothing
    assert checkpointer.save(150, make_state(150))
    assert checkpointer.save(200, make_state(201))
    restored, step = checkpointer.restore(ABSTRACT)
    assert step == 200
    assert_same(restored, make_state(201))
  assert {p.name for p in tmp_path.iterdir()} == {"150", "200", "200.damaged"}
  assert_same(load_params(tmp_path), make_state(201).ema)


def test_damaged_twice_keeps_both(tmp_path):
  saved(tmp_path)
  for seed in (1, 2):
    flip_bit(tmp_path / "200")
    with Checkpointer(tmp_path) as checkpointer:
      assert checkpointer.restore(ABSTRACT)[1] == 100
      assert checkpointer.save(200, make_state(seed))
  assert {p.name for p in tmp_path.iterdir()} == {"100", "200", "200.damaged", "200.damaged+"}


def test_a_run_that_goes_on_removes_what_comes_later(tmp_path):
  saved(tmp_path)
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.clear_after(200) == []
    assert checkpointer.clear_after(100) == [200]
    assert checkpointer.all_steps() == [100]
    assert checkpointer.save(150, make_state(150))
  assert {p.name for p in tmp_path.iterdir()} == {"100", "150"}


def test_a_run_that_begins_anew_sets_all_aside(tmp_path):
  for _ in range(2):
    saved(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
      assert checkpointer.clear_after(0) == [100, 200]
      assert checkpointer.latest_step() is None
  assert {p.name for p in tmp_path.iterdir()} == {"100.earlier", "100.earlier+", "200.earlier", "200.earlier+"}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b'{"metrics": 4}'])
def test_broken_notes_of_orbax_do_not_stop_a_run(tmp_path, content):
  """_CHECKPOINT_METADATA is not needed to restore, so breaking it must not break resuming."""
  saved(tmp_path)
  (tmp_path / "200/_CHECKPOINT_METADATA").write_bytes(content)
  with Checkpointer(tmp_path) as checkpointer:
    restored, step = checkpointer.restore(ABSTRACT)
    assert step == 200
    assert_same(restored, make_state(200))
    assert checkpointer.save(300, make_state(300))
  assert load_params(tmp_path)["dense"]["bias"][0] == 301


def test_all_damaged_is_an_error(tmp_path):
  saved(tmp_path)
  for step in (100, 200):
    truncate(tmp_path / str(step))
  with pytest.raises(ValueError, match=r"no intact checkpoint.*200: .*100: "):
    Checkpointer(tmp_path).restore(ABSTRACT)
  with pytest.raises(ValueError, match="no intact checkpoint"):
    load_params(tmp_path)


def test_damage_of_the_step_asked_for_is_an_error(tmp_path):
  saved(tmp_path)
  truncate(tmp_path / "200")
  with pytest.raises(ValueError, match="200: "):
    Checkpointer(tmp_path).restore(ABSTRACT, step=200)


def test_mismatch_names_every_leaf_and_is_not_damage(tmp_path):
  saved(tmp_path)
  params = {
    "dense": {
      "kernel": jax.ShapeDtypeStruct((16, 4), jnp.bfloat16),
      "bias": jax.ShapeDtypeStruct((5,), jnp.float32),
      "scale": jax.ShapeDtypeStruct((4,), jnp.float32),
    },
  }
  with pytest.raises(ValueError, match="4 leaves differ") as error:
    Checkpointer(tmp_path).restore(dataclasses.replace(ABSTRACT, params=params))
  message = str(error.value)
  assert "params/dense/kernel: expected bfloat16[16, 4], got float32[16, 4]" in message
  assert "params/dense/bias: expected float32[5], got float32[4]" in message
  assert "params/dense/scale: expected float32[4], got none" in message
  assert "params/half: expected no such leaf, got bfloat16[2, 3]" in message
  assert "opt_state" not in message
  wide = jax.eval_shape(lambda: make_state(width=5))
  with pytest.raises(ValueError, match=r"opt_state/1/inner_state/1/0/mu/dense/bias"):
    Checkpointer(tmp_path).restore(wide)


METADATA = ["", "{", "[]", "{}", "3", '{"tree_metadata": 3}', '{"tree_metadata": {"x": {}}}', "[" * 100_000]


@pytest.mark.parametrize("content", METADATA)
def test_a_checkpoint_of_somebody_else_is_refused_in_one_sentence(tmp_path, content):
  """Its checksums are right, and what they are of is not a checkpoint."""
  step = saved(tmp_path, [100]) / "100"
  (step / "state/_METADATA").write_text(content)
  (step / CHECKSUMS).write_text(json.dumps(checksums(step)))
  for read in (
    Checkpointer(tmp_path).restore,
    lambda _: load_params(tmp_path),
    lambda _: open_leaves(tmp_path),
  ):
    with pytest.raises((ValueError, OSError)) as error:
      read(ABSTRACT)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()[0]) < 600


def test_saving_an_existing_or_older_step(tmp_path):
  saved(tmp_path)
  with Checkpointer(tmp_path) as checkpointer:
    assert not checkpointer.save(200, make_state(1))
    assert not checkpointer.save(200, make_state(1), force=True)
    assert_same(checkpointer.restore(ABSTRACT)[0], make_state(200))
    with pytest.raises(ValueError, match="150 is older than the newest checkpoint, 200"):
      checkpointer.save(150, make_state(150))
    assert checkpointer.save(150, make_state(150), force=True)


def test_restores_onto_other_devices(tmp_path):
  def place(state, mesh):
    spread, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread if x.shape[:1] == (16,) else whole),
      state,
    )

  eight, two = (make_mesh(devices=jax.devices()[:n]) for n in (8, 2))
  state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), make_state(3), place(ABSTRACT, eight))
  assert len(state.params["dense"]["kernel"].addressable_shards) == 8
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, state)
  target = place(ABSTRACT, two)
  restored, _ = Checkpointer(tmp_path).restore(target)
  assert_same(restored, make_state(3))
  for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
    assert x.sharding == like.sharding
  assert [s.data.shape for s in restored.ema["dense"]["kernel"].addressable_shards] == [(8, 4)] * 2
  restored, _ = Checkpointer(tmp_path).restore(ABSTRACT)  # no shardings: the first device
  assert restored.params["dense"]["kernel"].devices() == {jax.devices()[0]}


def test_load_params(tmp_path):
  saved(tmp_path)
  for which in ("ema", "params"):
    got = load_params(tmp_path, which=which, step=100)
    assert_same(got, getattr(make_state(100), which))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
  with pytest.raises(ValueError, match=r"\['ema', 'opponent', 'opt_state', 'params', 'step'\], got 'teacher'"):
    load_params(tmp_path, which="teacher")
  for folder in (tmp_path / "nowhere", pathlib.Path(__file__).parent):
    with pytest.raises(ValueError, match="no checkpoint in"):
      load_params(folder)


def test_what_storage_refuses_is_no_mistake(tmp_path, monkeypatch):
  """Orbax and tensorstore raise a ValueError for it, which would say that another try is of no use."""

  def full(self, *args, **kwargs):
    raise ValueError("OUT_OF_RANGE: Failed writing")

  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  with pytest.raises(OSError, match="cannot be written or read: OUT_OF_RANGE"):
    Checkpointer(tmp_path).save(1, make_state())


def test_a_failed_save_is_reported(tmp_path, monkeypatch):
  def full(self):
    raise OSError("disk full")

  monkeypatch.setattr(Checkpointer, "_write_checksums", full)
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, make_state())
  with pytest.raises(Exception, match="disk full"):
    checkpointer.wait()
  assert Checkpointer(tmp_path).all_steps() == []


@pytest.mark.parametrize("moment", ["writing", "committing"])
def test_kill_during_a_save_leaves_a_usable_checkpoint(tmp_path, moment):
  """Killed with the files written but not renamed, and within milliseconds of starting to save."""
  code = f"""
    import time, jax.numpy as jnp
    from pflow_jax.checkpoints.checkpoint import Checkpointer
    if {moment == "committing"}:
      write = Checkpointer._write_checksums
      def hang(self):
        write(self)
        if self._writing == 2:
          print("now", flush=True)
          time.sleep(60)
      Checkpointer._write_checksums = hang
    checkpointer = Checkpointer({str(tmp_path)!r})
    for step in range(1, 40):
      checkpointer.save(step, {{"w": jnp.full((1000, 1000), step, jnp.float32)}})
      if step == 2:
        print("now", flush=True)
        if {moment == "committing"}:
          checkpointer.wait()
  """
  root = pathlib.Path(__file__).parents[2]
  with subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=root
  ) as child:
    wanted = 2 if moment == "committing" else 1
    assert [child.stdout.readline() for _ in range(wanted)] == ["now\n"] * wanted
    child.kill()
  assert child.returncode == -signal.SIGKILL
  target = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
  with Checkpointer(tmp_path) as checkpointer:
    restored, step = checkpointer.restore(target)
    assert step == 1 if moment == "committing" else step >= 1
    np.testing.assert_array_equal(restored["w"], np.full((1000, 1000), step))
    assert checkpointer.save(step + 2, {"w": restored["w"] + 2})
  assert not list(tmp_path.glob("*tmp*"))
  restored, last = Checkpointer(tmp_path).restore(target)
  assert last == step + 2
  np.testing.assert_array_equal(restored["w"], np.full((1000, 1000), last))
