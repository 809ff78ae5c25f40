"""The trainer: what a step does, and that a run survives what happens to it."""

import json
import shutil
import signal
import subprocess
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest

from pflow_jax.checkpoints.checkpoint import Checkpointer, load_params
from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.evaluation.sample import preview_size, save_picture
from pflow_jax.files.lock import LOCK, Unwritable
from pflow_jax.files.progress import Progress, progress
from pflow_jax.settings.optimizer import EmaSettings, OptimizerSettings
from pflow_jax.settings.train import TrainSettings
from pflow_jax.settings.tree import Settings
from pflow_jax.training import optim
from pflow_jax.training.experiment import build
from pflow_jax.training.inputs import INPUTS
from pflow_jax.training.keeping import Keeper, WorkdirKeeper
from pflow_jax.training.loop import Interruption, Meter
from pflow_jax.training.rescue import Rescued, rescue
from pflow_jax.training.sample import picture_every
from pflow_jax.training.state import create_state
from pflow_jax.training.step import Step
from pflow_jax.training.train import train, train_run
from pflow_jax.training.usage import Usage
from pflow_jax.training.writer import MetricsWriter
from tests.programs import command, environment, pflow, quick

OPTIMIZER = dict(learning_rate=0.1)


def linear_loss(params, frozen, batch, key, step):
  """Squares of a linear fit; the metrics show the random numbers and the step that the loss was given."""
  error = batch["x"] @ params["w"] - batch["y"]
  noise = jax.random.normal(key, batch["y"].shape)
  return error**2 + frozen["offset"], {"noise": noise, "step": jnp.full_like(noise, step)}


def problem(rows=8):
  x = jax.random.normal(jax.random.key(0), (rows, 3))
  return {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}


def one_step(state, batch, accumulation=1, offset=0.0, **parts):
  ema_decay = optim.make_ema_decay(EmaSettings(kind="constant", decay=0.5))
  step = Step(linear_loss, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)), ema_decay, accumulation, **parts)
  return step(state, {"offset": jnp.array(offset)}, batch, jax.random.key(1))


def test_step_moves_parameters_average_and_counter():
  state = create_state({"w": jnp.zeros(3, jnp.float32)}, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)))
  batch = problem()
  first, metrics = one_step(state, batch)
  second, _ = one_step(first, batch)
  grad = jax.grad(lambda w: jnp.mean((batch["x"] @ w - batch["y"]) ** 2))(jnp.zeros(3))
  np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(grad))
  np.testing.assert_allclose(metrics["loss"], jnp.mean(batch["y"] ** 2))
  np.testing.assert_allclose(first.params["w"], -0.1 * jnp.sign(grad), rtol=1e-5)  # Adam's first step
  assert (int(first.step), int(second.step)) == (1, 2)
  np.testing.assert_array_equal(first.ema["w"], first.params["w"])  # step 0 copies
  np.testing.assert_allclose(second.ema["w"], (first.params["w"] + second.params["w"]) / 2, rtol=1e-6)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
  state = create_state({"w": jnp.zeros(3, jnp.float32)}, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)))
  whole, m1 = one_step(state, problem())
  parts, m4 = one_step(state, problem(), accumulation=4)
  np.testing.assert_allclose(m1["gradient_norm"], m4["gradient_norm"], rtol=1e-6)
  np.testing.assert_allclose(m1["loss"], m4["loss"], rtol=1e-6)
  np.testing.assert_allclose(whole.params["w"], parts.params["w"], rtol=1e-5)


def test_non_finite_gradients_are_skipped_and_counted():
  state = create_state({"w": jnp.zeros(3, jnp.float32)}, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)))
  bad = problem() | {"y": jnp.full(8, jnp.nan)}
  after, metrics = one_step(state, bad)
  np.testing.assert_array_equal(after.params["w"], state.params["w"])
  assert (int(metrics["skipped_in_a_row"]), int(metrics["skipped"])) == (1, 1)
  after, metrics = one_step(after, problem())
  assert jnp.all(after.params["w"] != 0)
  assert (int(metrics["skipped_in_a_row"]), int(metrics["skipped"])) == (0, 1)


def test_teacher_enters_the_loss_and_is_not_trained():
  state = create_state({"w": jnp.zeros(3, jnp.float32)}, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)))
  plain, metrics = one_step(state, problem())
  shifted, offset_metrics = one_step(state, problem(), offset=5.0)
  np.testing.assert_allclose(offset_metrics["loss"], metrics["loss"] + 5.0, rtol=1e-6)
  assert same(plain, shifted), "the teacher's numbers move nothing that is kept"


def test_every_step_and_micro_batch_has_its_own_random_numbers():
  state = create_state({"w": jnp.zeros(3, jnp.float32)}, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)))
  batch = problem(rows=4096)
  first, m0 = one_step(state, batch)
  _, m1 = one_step(first, batch)
  assert m0["noise"] != m1["noise"]
  assert (float(m0["step"]), float(m1["step"])) == (0.0, 1.0)
  # Means of 4,096 normal numbers: of independent quarters they differ from four times the same quarter.
  _, whole = one_step(state, batch, accumulation=4)
  quarter = jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 0), (1024,))
  assert abs(float(whole["noise"]) - float(jnp.mean(quarter))) > 1e-4


def test_meter_sees_a_streak_inside_an_interval(tmp_path):
  settings = TrainSettings(steps=100, batch_size=8, log_every=50, max_skipped=20)
  with MetricsWriter(tmp_path, tensorboard=False) as writer, progress(100, disable=True) as report:
    meter = Meter(settings, writer.write, report, Usage([]))
    for step in range(1, 51):
      bad = 10 < step <= 35
      loss = jnp.float32(np.nan if bad else 1)
      meter.add(
        step,
        {"loss": loss, "skipped_in_a_row": (step - 10) * bad, "skipped": 0, "learning_rate": 1.0},
        flops=step,
      )
    with pytest.raises(FloatingPointError, match="25 updates in a row"):
      meter.flush()
  row = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert row["loss"] == 1.0, "skipped steps do not blur the mean"


class Chip:
  """A device of a mesh, half full."""

  device_kind, process_index = "TPU v5 lite", 0

  def memory_stats(self):
    return {"bytes_in_use": 8 * 2**30, "peak_bytes_in_use": 12 * 2**30, "bytes_limit": 16 * 2**30}


class Device:
  """A clock, and a device that takes a tenth of a second for a step and one step after the other."""

  def __init__(self):
    self.now, self.ready, self.waits = 0.0, 0.0, 0

  def perf_counter(self):
    return self.now

  def dispatch(self, value):
    self.now += 0.001
    self.ready = max(self.now, self.ready) + 0.1
    return Pending(self, self.ready, value)


class Pending:
  def __init__(self, device, ready, value):
    self._device, self._ready, self._value = device, ready, value

  def is_ready(self):
    return self._device.now >= self._ready

  def block_until_ready(self):
    if self._device.now < self._ready:
      self._device.now, self._device.waits = self._ready, self._device.waits + 1
    return self

  def __array__(self, *args, **kwargs):
    return np.asarray(self.block_until_ready()._value)


@pytest.mark.parametrize(("save_every", "sample_every"), [(0, 0), (10, 0), (0, 3), (7, 6), (1, 0)])
def test_rates_and_pauses_add_up_to_the_clock(tmp_path, monkeypatch, save_every, sample_every):
  """Steps are on their way when a pause begins, and theirs is training time."""
  device = Device()
  monkeypatch.setattr("pflow_jax.training.loop.time", device)
  settings = TrainSettings(steps=42, batch_size=8, log_every=5)
  paused, waited = 0.0, []
  with MetricsWriter(tmp_path, tensorboard=False) as writer, progress(42, disable=True) as report:
    meter = Meter(settings, writer.write, report, Usage([Chip(), Chip()]))
    for step in range(1, 43):
      metrics = {"loss": device.dispatch(0.5), "skipped_in_a_row": 0, "skipped": 0, "learning_rate": 1.0}
      waits = device.waits
      meter.flush()
      meter.add(step, metrics, flops=10**12)
      waited += [step] if device.waits > waits else []
      for every, seconds in ((save_every, 0.3), (sample_every, 2.0)):
        if every and step % every == 0:
          with meter.paused():
            device.now += seconds
          paused += seconds
    meter.flush(final=True)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  steps = np.diff([0, *(row["step"] for row in rows)])
  seconds = [8 * count / row["images_per_second"] for count, row in zip(steps, rows, strict=True)]
  np.testing.assert_allclose(sum(row["pause_seconds"] for row in rows), paused, atol=1e-9)
  np.testing.assert_allclose(sum(seconds) + paused, device.now)
  np.testing.assert_allclose([row["tflops_per_second"] for row in rows], steps / seconds)
  np.testing.assert_allclose([row["peak_share"] for row in rows], steps / seconds / (2 * 197))
  assert {(row["device_gib"], row["device_peak_gib"]) for row in rows} == {(8.0, 12.0)}
  np.testing.assert_allclose([row["images_per_second"] for row in rows], 80, rtol=0.03)  # the device's own rate
  if not save_every and not sample_every:
    assert waited == list(range(6, 43, 5)), "without pauses nothing is waited for but a row, while the next step runs"


@pytest.mark.usefixtures("float32")
def test_logged_rates_are_those_of_the_clock(tmp_path):
  config = quick("checkerboard", "teacher", steps=40, log_every=4, checkpoint_every=6, sample_every=9)
  train(config, tmp_path, picture=(save_picture, preview_size))
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(4, 41, 4))
  batch_size = config.train.batch_size
  told = [4 * batch_size / row["images_per_second"] + row["pause_seconds"] for row in rows[1:]]
  clock = np.diff([row["time"] for row in rows])
  np.testing.assert_allclose(sum(told), sum(clock), rtol=0.03, atol=0.02)
  assert all((row["pause_seconds"] > 0) == (row["step"] in (8, 12, 20, 24, 28, 32, 36, 40)) for row in rows)


@pytest.mark.usefixtures("float32")
def test_run_stops_when_updates_stay_non_finite(tmp_path, monkeypatch):
  locked, close = [], Checkpointer.close
  monkeypatch.setattr(Checkpointer, "close", lambda self: locked.append((tmp_path / LOCK).exists()) or close(self))
  config = quick("digits", "teacher", steps=10, max_skipped=3)
  config.optimizer.learning_rate = 1e38  # parameters overflow at once
  config.optimizer.schedule = "constant"
  with pytest.raises(FloatingPointError, match="in a row"):
    train(config, tmp_path)
  assert set(locked) == {True}, "the folder is held until the last save has ended"
  assert not (tmp_path / LOCK).exists()


def same(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("objective", ["imitation", "imitation_data_free"])
def test_resumed_run_is_the_undisturbed_run_to_the_bit(tmp_path, teacher_run, objective):
  def run(steps, folder):
    config = quick("digits", "gmflow", teacher_run, steps=steps)
    config.optimizer.schedule = "constant"  # a cosine run keeps its number of steps
    config.objective.update(kind=objective, nfe=2)
    return train(config, tmp_path / folder)

  whole = run(4, "whole")
  assert int(run(2, "parts").step) == 2
  parts = run(4, "parts")
  assert int(parts.step) == 4
  assert same(whole, parts)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, teacher_run):
  """Flags of a run, and the folder in which it went to its end."""
  folder = tmp_path_factory.mktemp("undisturbed")
  flags = [
    "--config=configs/digits.py:gmflow,quicktest",
    f"--config.teacher.workdir={teacher_run}",
    "--config.train.steps=60",
    "--config.train.checkpoint_every=7",
    "--config.train.tensorboard=False",
    "--config.optimizer.schedule=constant",
  ]
  pflow("train", *flags, f"--workdir={folder}")
  return flags, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigkill", "sigterm"])
def test_killed_run_ends_in_the_same_bits(tmp_path, undisturbed, name):
  """A real process, killed in the middle of training, started again with the same command."""
  flags, folder = undisturbed
  victim = subprocess.Popen(
    command("train", *flags, f"--workdir={tmp_path}/killed"), env=environment(), stdout=subprocess.PIPE, text=True
  )
  log = tmp_path / "killed" / "metrics.jsonl"
  deadline = time.time() + 120
  while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 17):
    time.sleep(0.01)
  victim.send_signal(signal.SIGKILL if name == "sigkill" else signal.SIGTERM)
  victim.communicate(timeout=120)
  steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")]
  assert victim.returncode == (-signal.SIGKILL if name == "sigkill" else 130)
  assert 17 < max(steps) < 60, "the kill must fall inside the run"
  if name == "sigterm":
    saved = max(int(p.name) for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved >= max(steps)
  pflow("train", *flags, f"--workdir={tmp_path}/killed")
  for which in ("params", "ema"):
    whole, killed = (load_params(run / "checkpoints", which=which) for run in (folder, tmp_path / "killed"))
    assert same(whole, killed)
  steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
  assert steps == sorted(set(steps))


def test_a_hang_up_asks_to_stop_unless_it_is_ignored():
  before = signal.getsignal(signal.SIGHUP)
  for ignored in (False, True):
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
      with Interruption(Keeper()) as interruption:
        signal.raise_signal(signal.SIGHUP)
        assert interruption.requested(1) == (not ignored)
      assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
      signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("float32")
def test_a_state_that_its_workdir_takes_no_more_is_saved_elsewhere_and_goes_on_exactly(tmp_path, monkeypatch):
  config = quick("digits", "teacher", steps=6, log_every=1, checkpoint_every=2)
  config.optimizer.schedule = "constant"
  whole = train(config, tmp_path / "whole")
  monkeypatch.setenv("PFLOW_RESCUE_DIR", str(tmp_path / "rescue"))
  save = ocp.CheckpointManager.save

  def full(self, step, *args, **kwargs):
    if step == 4 and "rescue" not in str(self.directory):
      raise ValueError("OUT_OF_RANGE: Failed writing: No space left on device [tensorstore_spec='...']")
    return save(self, step, *args, **kwargs)

  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  with pytest.raises(Rescued, match="No space left on device; step 4 is saved in ") as error:
    train(config, tmp_path / "run [1]")
  (rescued,) = (tmp_path / "rescue").iterdir()
  assert f"go on with --workdir={rescued}, or copy that back to {tmp_path}/run [1]" in str(error.value)
  assert newest_step(tmp_path / "run [1]" / "checkpoints") == 2
  assert not (tmp_path / "run [1]" / LOCK).exists()
  monkeypatch.setattr(ocp.CheckpointManager, "save", save)
  assert newest_step(rescued / "checkpoints") == 4
  for name in ("metrics.jsonl", INPUTS):
    assert (rescued / name).read_bytes() == (tmp_path / "run [1]" / name).read_bytes() != b""
  assert same(whole, train(config, rescued))


@pytest.mark.parametrize("why", ["no room", "no folder", "several processes", "a library"])
def test_what_cannot_be_saved_elsewhere_either_is_said(tmp_path, monkeypatch, why):
  state = create_state({"w": jnp.zeros(3, jnp.float32)}, optim.make_optimizer(OptimizerSettings(**OPTIMIZER)))
  (tmp_path / "file").touch()
  monkeypatch.setenv("PFLOW_RESCUE_DIR", str(tmp_path / "file" / "x" if why == "no folder" else tmp_path / "rescue"))
  if why == "no room":
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1))
  if why == "several processes":
    monkeypatch.setattr(jax, "process_count", lambda: 2)
  if why == "a library":
    monkeypatch.setattr(ocp.CheckpointManager, "save", failing)
  error = rescue(
    tmp_path / "run", Settings.of(quick("checkerboard", "teacher")), None, state, Unwritable("the disk is full")
  )
  expected = {
    "no room": "has 0 MB left of 0",
    "no folder": "Not a directory",
    "several processes": "step 0 is lost",
    "a library": "could not be saved elsewhere either (of Orbax)",
  }
  assert (type(error), str(error).startswith("the disk is full; "), expected[why] in str(error)) == (
    OSError,
    True,
    True,
  )
  assert not list(tmp_path.rglob("config.json"))


def failing(*args, **kwargs):
  raise RuntimeError("of Orbax")


@pytest.mark.usefixtures("float32")
def test_damaged_checkpoint_is_skipped_by_name(tmp_path, caplog):
  config = quick("digits", "teacher", steps=4, checkpoint_every=2)
  config.optimizer.schedule = "constant"
  whole = train(config, tmp_path)
  newest = tmp_path / "checkpoints" / "4"
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:-7])
  again = train(config, tmp_path)
  assert str(newest) in caplog.text
  assert same(whole, again)


@pytest.mark.usefixtures("float32")
def test_resuming_with_another_model_names_the_keys(tmp_path):
  train(quick("digits", "teacher", steps=2), tmp_path)
  other = quick("digits", "teacher", steps=5)
  other.model.width = 32
  other.optimizer.learning_rate = 0.5
  with pytest.raises(ValueError, match=r"(?s)model\.width: the run has 16, now 32.*optimizer\.learning_rate"):
    train(other, tmp_path)


@pytest.mark.usefixtures("float32")
def test_batches_that_do_not_divide_are_refused_and_leave_no_trace(tmp_path):
  for changes in (dict(batch_size=12), dict(batch_size=16, accumulation=4)):
    with pytest.raises(ValueError, match=r"fsdp x accumulation = 8 x"):
      train(quick("digits", "teacher", **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("float32")
def test_profile_window_may_begin_before_a_resumed_run(tmp_path):
  config = quick("digits", "teacher", steps=2, profile=(2, 3))
  config.optimizer.schedule = "constant"
  train(config, tmp_path)
  config.train.steps = 4
  train(config, tmp_path)
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2


@pytest.mark.usefixtures("float32")
def test_metrics_are_logged_for_every_interval(tmp_path):
  train(quick("digits", "teacher", steps=5, log_every=2), tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [2, 4, 5]
  for key in ("loss", "gradient_norm", "learning_rate", "images_per_second", "tflops_per_second", "skipped"):
    assert rows[-1][key] is not None
  assert abs(rows[-1]["host_gib"] * 2**30 / psutil.Process().memory_info().rss - 1) < 0.2
  assert not {"peak_share", "device_gib", "t"} & set(rows[-1]), "a CPU tells neither its peak nor its memory"


@pytest.mark.usefixtures("float32")
def test_preview_pictures_and_profile_are_written(tmp_path, teacher_run):
  config = quick("digits", "gmflow", teacher_run, sample_every=3, profile=(2, 2), tensorboard=True)
  train(config, tmp_path, picture=(save_picture, preview_size))
  assert (tmp_path / "samples" / "0000003.png").stat().st_size > 1000
  assert list((tmp_path / "profile").rglob("*.pb"))
  assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.usefixtures("float32")
def test_a_picture_that_fails_is_warned_of_and_stops_no_training(tmp_path, caplog):
  tries = []

  def fails_once(dataset, rows, labels, path):
    tries.append(path)
    if len(tries) == 1:
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a page of buffers")
    save_picture(dataset, rows, labels, path)

  config = quick("digits", "teacher", steps=3, sample_every=1)
  config.sample.nfe = (1,)
  assert train(config, tmp_path, picture=(fails_once, preview_size)).step == 3
  assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["0000002.png", "0000003.png"]
  told = [record.message for record in caplog.records if "picture" in record.message]
  assert told == ["no picture of samples at step 1, the training goes on: RESOURCE_EXHAUSTED: out of memory"]


def test_a_program_of_several_processes_stops_where_one_of_them_could_not_sample(monkeypatch):
  """It would train while the others wait for it."""
  keeper = types.SimpleNamespace(name="run", _writer=MetricsWriter, _lock=types.SimpleNamespace(check=lambda: None))

  def draw(path):
    raise error

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
  with pytest.raises(jax.errors.JaxRuntimeError):
    WorkdirKeeper.picture(keeper, 1, draw)
  error = ValueError("a decoder that is gone")
  WorkdirKeeper.picture(keeper, 1, draw)


@pytest.mark.usefixtures("float32")
def test_a_bar_no_longer_says_that_it_compiles_while_steps_run(monkeypatch):
  told, update = [], Progress.update
  monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
  monkeypatch.setattr(Progress, "update", lambda self, *args: (update(self, *args), told.append(self.status)))
  train_run(Settings.of(quick("digits", "teacher", steps=3, log_every=3)))
  assert len(told) > 3
  assert not [status for status in told if "compiling" in status]


@pytest.mark.usefixtures("float32")
def test_checkpoints_of_multiples_are_kept_for_good(tmp_path):
  config = quick("checkerboard", "teacher", steps=5, checkpoint_every=1, keep_checkpoints=1, keep_every=2)
  train(config, tmp_path)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]


def test_a_long_run_draws_ten_pictures_unless_it_is_told_or_they_cost_much(teacher_run):
  """Ten of ten images by 128 steps are 12,800 evaluations, a hundredth of 3,334 steps of 128; a student's are few."""

  def every(variant, steps, batch_size, count=10, **given):
    config = quick("digits", variant, None if variant == "teacher" else teacher_run)
    config.train.update(steps=steps, batch_size=batch_size, **given)
    return picture_every(build(config), count)

  assert [every("teacher", steps, 128) for steps in (4999, 5000, 48_000)] == [0, 500, 4800]
  assert [every("teacher", 5000, size) for size in (85, 86)] == [0, 500]
  assert [every("gmflow", 5000, size) for size in (8, 64)] == [500, 500]
  assert every("teacher", 5000, 128, count=4096) == 0, "points, of which a picture needs thousands"
  assert [every("teacher", 5000, 128, sample_every=n) for n in (0, 3)] == [0, 3]


def test_settings_refuse_bad_values():
  good = dict(steps=1, batch_size=8)
  bads = [{name: 0} for name in ("steps", "batch_size", "accumulation", "log_every", "max_skipped")]
  for bad in (*bads, dict(profile=(3, 2)), dict(sample_every=-1), dict(wandb="a/b/c"), dict(wandb="a b")):
    with pytest.raises(ValueError, match=next(iter(bad))):
      TrainSettings(**(good | bad))
