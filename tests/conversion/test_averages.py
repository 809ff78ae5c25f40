"""`pflow ema`: averages that a training kept on the way, and the run that is made of them."""

import contextlib
import json
import logging
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pflow_jax.checkpoints import steps as checkpoint_steps
from pflow_jax.checkpoints.checkpoint import Checkpointer, load_params
from pflow_jax.checkpoints.steps import steps_of
from pflow_jax.commands.cli import main
from pflow_jax.conversion.averages import average
from pflow_jax.files.folders import absolute
from pflow_jax.training import workdir
from pflow_jax.training.keeping import WorkdirKeeper
from pflow_jax.training.train import train
from tests.programs import quick, write_random

pytestmark = pytest.mark.usefixtures("float32")
STEPS, EVERY, WIDTHS = 6, 2, (0.05, 0.10)


def config(variant="teacher", teacher=None, **ema):
  values = quick("checkerboard", variant, teacher, steps=STEPS)
  values.optimizer.schedule = "constant"  # whatever the length of the run is
  values.ema.update(dict(profiles=WIDTHS, snapshot_every=EVERY, snapshot_dtype="float32") | ema)
  return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("averages")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    values = config()
    values.train.steps = STEPS - 2
    train(values, folder / "run")  # is told to go on
    return folder, train(config(), folder / "run")


def difference(a, b):
  each = jax.tree.map(lambda a, b: np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(), a, b)
  return max(jax.tree.leaves(each))


def test_snapshots_are_the_profiles_at_their_steps(trained):
  folder, state = trained
  place = f"{folder}/run/{workdir.AVERAGES}"
  assert steps_of(absolute(place)) == [2, 4, 6]
  for i in range(2):
    assert difference(load_params(place, which=str(i), step=STEPS), state.profiles[i]) == 0
  # Of 6 steps, weights as (1 - 1/k)^(gamma + 1): all that the averages remember is of the end.
  moved = difference(load_params(place, which="0", step=2), state.params)
  assert difference(state.profiles[0], state.params) < difference(state.profiles[1], state.params) < moved


def test_a_run_is_made_that_is_sampled_like_any_other(trained, capsys):
  folder, state = trained
  main(["ema", "--workdir", f"{folder}/run", "--sigma_rel", "0.1"])
  out = folder / "run-ema-0.100"
  assert f"wrote {out}: the average of width 0.1 of {folder}/run at step 6" in capsys.readouterr().out
  made = load_params(out / workdir.CHECKPOINTS, which="ema")
  assert difference(made, state.profiles[1]) < 1e-6
  assert difference(load_params(out / workdir.CHECKPOINTS, which="params"), made) == 0
  assert jax.tree.leaves(made)[0].dtype == jnp.float32
  main(["sample", "--workdir", str(out), "--num=4", "--config.sample.nfe=(2,)", "--out", str(folder / "drawn")])
  with np.load(folder / "drawn.npz") as arrays:
    assert np.all(np.isfinite(arrays["x0_nfe2"]))


def test_other_widths_and_earlier_steps(trained, tmp_path):
  folder, state = trained
  average(folder / "run", tmp_path / "wide", sigma_rel=0.15)
  wide = load_params(tmp_path / "wide" / workdir.CHECKPOINTS)
  assert difference(wide, state.params) > difference(state.profiles[1], state.params)
  assert average(folder / "run", tmp_path / "early", sigma_rel=0.05, step=4) == 4
  early = load_params(tmp_path / "early" / workdir.CHECKPOINTS)
  kept = load_params(f"{folder}/run/{workdir.AVERAGES}", which="0", step=4)
  assert difference(early, kept) < 1e-6


def test_halves_are_kept_in_halves(tmp_path):
  state = train(config(snapshot_dtype="float16"), tmp_path / "run")
  kept = load_params(f"{tmp_path}/run/{workdir.AVERAGES}", which="1", step=STEPS)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"float16"}
  assert 0 < difference(kept, state.profiles[1]) < 1e-3
  average(tmp_path / "run", tmp_path / "made", sigma_rel=0.1)
  assert difference(load_params(tmp_path / "made" / workdir.CHECKPOINTS), kept) < 1e-6


@pytest.mark.parametrize("variant", ["ayf_emd_adversarial", "gmflow"])
def test_students_have_averages_too(tmp_path, variant):
  """The adversary stays behind; adapters are what is averaged, beside the layers that train in full."""
  teacher = write_random(quick("checkerboard", "flow_teacher" if "ayf" in variant else "teacher"), tmp_path / "teacher")
  values = config(variant, teacher)
  if variant == "gmflow":
    values.adapters.table = (("blocks_0/mlp_.*", 2),)
  state = train(values, tmp_path / "run")
  assert (state.opponent is None) == (variant == "gmflow")
  average(tmp_path / "run", tmp_path / "made", sigma_rel=0.05)
  made = load_params(tmp_path / "made" / workdir.CHECKPOINTS)
  assert difference(made, state.profiles[0]) < 1e-6
  main(["sample", "--workdir", f"{tmp_path}/made", "--num=4", "--out", f"{tmp_path}/drawn"])
  assert (tmp_path / "made" / "inputs.json").exists()


def test_what_cannot_be_made_is_refused(trained, tmp_path):
  folder, _ = trained
  with pytest.raises(ValueError, match=r"step: expected that of a snapshot, one of \[2, 4, 6\], got 3"):
    average(folder / "run", tmp_path / "out", sigma_rel=0.1, step=3)
  with pytest.raises(ValueError, match="sigma_rel: expected widths above 0"):
    average(folder / "run", tmp_path / "out", sigma_rel=0.4)
  assert not (tmp_path / "out").exists()
  average(folder / "run", tmp_path / "out", sigma_rel=0.1)
  with pytest.raises(ValueError, match="out holds a run already"):
    average(folder / "run", tmp_path / "out", sigma_rel=0.1)
  values = json.loads((folder / "run" / "config.json").read_text())
  values["ema"] = {"kind": "karras"}
  (tmp_path / "plain").mkdir()
  (tmp_path / "plain" / "config.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match=r"expected snapshots of averages, .* this one has none"):
    average(tmp_path / "plain", tmp_path / "out2", sigma_rel=0.1)


def copied(trained, tmp_path):
  """A copy of the run, and the folder of its snapshots."""
  shutil.copytree(trained[0] / "run", tmp_path / "run")
  return tmp_path / "run", tmp_path / "run" / workdir.AVERAGES


def spoil(snapshot):
  file = max((path for path in (snapshot / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def names(place):
  return sorted(path.name for path in place.iterdir())


def run_names(place):
  return {load_params(place, which=workdir.RUN, step=step).tobytes() for step in steps_of(absolute(place))}


def test_a_run_that_begins_anew_sets_the_snapshots_of_another_aside(trained, tmp_path, caplog):
  """The folder of checkpoints was removed to start over, or the other run ended before its first one."""
  run, place = copied(trained, tmp_path)
  (before,) = run_names(place)
  shutil.rmtree(run / workdir.CHECKPOINTS)
  values = config(snapshot_every=3, profiles=(0.06, 0.12))
  values.seed = 7
  with caplog.at_level(logging.WARNING):
    state = train(values, run)
  assert "starts from step 0: its snapshots of averages at [2, 4, 6] are set aside" in caplog.text
  assert names(place) == ["2.earlier", "3", "4.earlier", "6", "6.earlier"]
  assert difference(load_params(place, which="0", step=6), state.profiles[0]) == 0
  (now,) = run_names(place)
  assert len(now) == 16
  assert now != before
  average(run, tmp_path / "made", sigma_rel=0.12)
  assert difference(load_params(tmp_path / "made" / workdir.CHECKPOINTS), state.profiles[1]) < 1e-6


def test_a_run_that_goes_back_makes_its_later_snapshots_again(trained, tmp_path):
  run, place = copied(trained, tmp_path)
  assert steps_of(absolute(run / workdir.CHECKPOINTS)) == [4, 6]
  shutil.rmtree(run / workdir.CHECKPOINTS / "6")
  (before,) = run_names(place)
  with Checkpointer(place, max_to_keep=None) as longer:
    longer.save(9, {"0": np.zeros(3)})  # newer than all that the run comes to
  again = train(config(), run)
  assert names(place) == ["2", "4", "6"]
  assert run_names(place) == {before}
  assert difference(load_params(place, which="1", step=6), again.profiles[1]) == 0
  assert difference(again.profiles, trained[1].profiles) == 0


def test_a_damaged_snapshot_is_left_out(trained, tmp_path, caplog, monkeypatch):
  run, place = copied(trained, tmp_path)
  spoil(place / "4")
  looked = []
  damage = checkpoint_steps.damage
  monkeypatch.setattr(checkpoint_steps, "damage", lambda path: looked.append(path.name) or damage(path))
  assert average(run, tmp_path / "made", sigma_rel=0.10) == 6
  assert f"leaving out the damaged snapshot {place / '4'}: " in caplog.text
  assert sorted(looked) == ["2", "4", "6"]  # once each
  assert difference(load_params(tmp_path / "made" / workdir.CHECKPOINTS), trained[1].profiles[1]) < 1e-6
  with pytest.raises(
    ValueError, match=r"that of step 4 is damaged; ask for the step of one of \[2\], or bring it back"
  ):
    average(run, tmp_path / "out", sigma_rel=0.1, step=4)
  spoil(place / "6")
  assert average(run, tmp_path / "early", sigma_rel=0.05) == 2
  spoil(place / "2")
  with pytest.raises(ValueError, match="all of them is damaged; bring one back from a copy") as refusal:
    average(run, tmp_path / "out", sigma_rel=0.1)
  assert "remove" not in str(refusal.value)
  assert not (tmp_path / "out").exists()


def test_snapshots_of_two_runs_are_no_average(trained, tmp_path):
  run, place = copied(trained, tmp_path)
  values = config()
  values.train.steps = 2
  train(values, tmp_path / "other")
  shutil.rmtree(place / "2")
  shutil.copytree(tmp_path / "other" / workdir.AVERAGES / "2", place / "2")
  with pytest.raises(ValueError, match=r"those of steps \[2\] are of another than that of step 6"):
    average(run, tmp_path / "out", sigma_rel=0.1)
  shutil.rmtree(place / "2")
  assert average(run, tmp_path / "out", sigma_rel=0.1) == 6


def test_what_overflows_is_told_when_it_is_kept_and_no_average(trained, tmp_path, caplog):
  run, place = copied(trained, tmp_path)
  profiles = jax.tree.map(jnp.asarray, trained[1].profiles)
  *_, (last, _) = jax.tree_util.tree_leaves_with_path(profiles[0])
  name = jax.tree_util.keystr(last, simple=True, separator="/")
  raised = lambda keys, leaf: leaf * 0 + 7e4 if keys == last else leaf
  huge = [jax.tree_util.tree_map_with_path(raised, profile) for profile in profiles]
  with Checkpointer(place, max_to_keep=None) as checkpointer:
    keeper = types.SimpleNamespace(
      _settings=types.SimpleNamespace(ema=types.SimpleNamespace(snapshot_dtype="float16")),
      _averages=checkpointer,
      _lock=types.SimpleNamespace(writing=contextlib.nullcontext),
      _run=load_params(place, which=workdir.RUN, step=6),
    )
    WorkdirKeeper.snapshot(keeper, 8, huge)
  assert f"config.ema.snapshot_dtype='float16' cannot hold {name};" in caplog.text
  with pytest.raises(ValueError, match=f"{place / '8'}: expected finite numbers, {name} has others"):
    average(run, tmp_path / "out", sigma_rel=0.1)
  assert not (tmp_path / "out" / workdir.CHECKPOINTS).exists()
  assert average(run, tmp_path / "out", sigma_rel=0.1, step=6) == 6
