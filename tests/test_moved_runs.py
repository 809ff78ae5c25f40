"""Runs that were moved away from their teacher and their data: what they do by themselves, and what they ask for."""

import shutil

import jax
import numpy as np
import pytest

from pflow_jax import data
from pflow_jax.commands.cli import main
from pflow_jax.conversion.merge import merge
from pflow_jax.conversion.program import convert
from pflow_jax.evaluation.evaluate import evaluate
from pflow_jax.evaluation.sample import sample
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.inputs import INPUTS
from pflow_jax.training.workdir import load_config
from tests.moved_runs import NAMES, write_student, write_tree

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
  """Teacher, student, adapters and data, and what the student and the adapters draw and are exported as."""
  root = tmp_path_factory.mktemp("there")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    write_tree(root)
    for name in ("student", "adapters"):
      draw(root / name, root / f"{name}_samples")
      convert(root / name, root / f"{name}_torch")
  return root


@pytest.fixture(scope="module")
def here(there, tmp_path_factory):
  """The same moved to another place, without its data; the teacher is elsewhere."""
  root = tmp_path_factory.mktemp("far") / "here"
  shutil.move(there, root)
  (root / "data.npz").rename(root.parent / "data.npz")
  (root / "teacher").rename(root.parent / "teacher")
  (root.parent / "stranger").mkdir()
  return root


def draw(folder, out, **options):
  config = load_config(folder)
  config.sample.nfe = (1,)
  with np.load(sample(config, folder, num=4, out=out, **options).with_suffix(".npz")) as arrays:
    return dict(arrays)


def same_files(one, other):
  names = sorted(path.name for path in one.iterdir())
  assert names == sorted(path.name for path in other.iterdir())
  assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names if name.endswith(".json"))
  from safetensors.numpy import load_file

  for name in (name for name in names if name.endswith(".safetensors")):
    jax.tree.map(np.testing.assert_array_equal, load_file(one / name), load_file(other / name))


def assert_same_samples(root, name, drawn):
  with np.load(root / f"{name}_samples.npz") as before:
    assert set(drawn) == set(before) == {"noise", "label", "x0_nfe1"}
    for key in drawn:
      np.testing.assert_array_equal(drawn[key], before[key])


def test_a_full_student_needs_neither(here, tmp_path):
  assert_same_samples(here, "student", draw(here / "student", tmp_path / "x"))
  convert(here / "student", tmp_path / "torch")
  same_files(tmp_path / "torch", here / "student_torch")
  experiment = build(load_config(here / "student"), run=here / "student")
  assert experiment.dataset.class_names == NAMES


def test_a_teachers_own_run_needs_no_data(here, tmp_path):
  config = load_config(here.parent / "teacher")
  config.sample.nfe = (4,)
  sample(config, here.parent / "teacher", num=2, labels=["red square"], out=tmp_path / "t")
  with np.load(tmp_path / "t.npz") as arrays:
    np.testing.assert_array_equal(arrays["label"], [1, 1])


def test_adapters_name_their_base_by_content_and_are_told_where_it_is(here, tmp_path):
  with pytest.raises(ValueError, match=r"the teacher of the run in .*adapters, dit \w{16}, is needed.*--teacher"):
    draw(here / "adapters", tmp_path / "x")
  assert_same_samples(here, "adapters", draw(here / "adapters", tmp_path / "x", teacher=here.parent / "teacher"))
  convert(here / "adapters", tmp_path / "torch")
  same_files(tmp_path / "torch", here / "adapters_torch")
  with pytest.raises(ValueError, match="is needed, and there is no run in"):
    merge(here / "adapters", tmp_path / "merged")
  merge(here / "adapters", tmp_path / "merged", teacher=here.parent / "teacher")
  assert (tmp_path / "merged" / INPUTS).exists()
  (here.parent / "teacher").rename(here.parent / "gone")
  try:
    merged = draw(tmp_path / "merged", tmp_path / "m")  # in full, and without its teacher
  finally:
    (here.parent / "gone").rename(here.parent / "teacher")
  with np.load(here / "adapters_samples.npz") as before:
    np.testing.assert_allclose(merged["x0_nfe1"], before["x0_nfe1"], atol=1e-5)


@pytest.mark.parametrize("command", ["sample", "evaluate", "merge", "convert"])
def test_another_model_is_no_teacher(command, here, tmp_path, capsys):
  """In every command, of a full student too, which would not need one."""
  stranger = str(here / "student")
  name = "adapters" if command == "merge" else "student"
  flags = {"sample": [], "evaluate": [], "merge": [f"--out={tmp_path / 'o'}"], "convert": [f"--out={tmp_path / 'o'}"]}
  folder = f"--{'source' if command == 'convert' else 'workdir'}={here / name}"
  more = [f"--config.data.name=npz:{here.parent / 'data.npz'}"] if command == "evaluate" else []
  with pytest.raises(SystemExit) as stopped:
    main([command, folder, f"--teacher={stranger}", *flags[command], *more])
  assert stopped.value.code == 2
  said = capsys.readouterr().err
  assert f"the teacher of the run in {here / name}, dit" in said
  assert "give its folder with --teacher" in said
  assert not (tmp_path / "o").exists()


def test_an_evaluation_wants_the_teacher_and_the_data(here, tmp_path):
  config = load_config(here / "student")
  with pytest.raises(ValueError, match=r"npz:.*data\.npz"):
    evaluate(config, here / "student", out=tmp_path / "e")
  config.data.name = f"npz:{here.parent / 'data.npz'}"
  with pytest.raises(ValueError, match=r"the teacher of the run in .*is needed.*give its folder with --teacher"):
    evaluate(config, here / "student", out=tmp_path / "e")
  config.sample.nfe = (1,)
  config.evaluate.update(num_samples=128)
  report = evaluate(config, here / "student", teacher=here.parent / "teacher", out=tmp_path / "e")
  assert [row["name"] for row in report["rows"]] == ["teacher, 4 steps", "teacher, 128 steps", "student, 1 NFE"]
  assert (here.parent / "teacher" / "evaluation" / "samples_128_steps.npz").exists()


def test_a_run_without_a_teacher_has_none_to_be_told_of(here, tmp_path):
  folder = here.parent / "teacher"
  with pytest.raises(ValueError, match="teacher: expected a student, 'flow_matching' has no teacher"):
    draw(folder, tmp_path / "x", teacher=here / "student")
  with pytest.raises(ValueError, match="teacher: expected the workdir of the teacher, got ''"):
    draw(here / "student", tmp_path / "x", teacher="")


def test_a_run_of_old_asks_for_its_teacher_where_it_needs_it(here, tmp_path):
  """Without inputs.json the data are needed as they were; the teacher's folder is only where adapters are."""
  shutil.copytree(here / "adapters", tmp_path / "adapters")
  (tmp_path / "adapters" / INPUTS).unlink()
  config = load_config(tmp_path / "adapters")
  config.data.name = f"npz:{here.parent / 'data.npz'}"
  with pytest.raises(ValueError, match=r"config\.teacher\.workdir: there is no run in .*; say where .* --teacher"):
    sample(config, tmp_path / "adapters", num=1)
  drawn = sample(config, tmp_path / "adapters", num=1, teacher=here.parent / "teacher", out=tmp_path / "x")
  assert drawn.exists()


def test_records_are_read_when_they_are_asked_for(here):
  experiment = build(load_config(here / "student"), run=here / "student")
  with pytest.raises(ValueError, match=r"data\.npz"):
    data.examples(experiment.dataset, 1)


def test_a_student_is_trained_of_a_teacher_whose_data_have_moved(here, tmp_path):
  """The same data at another place are the same; others are not."""
  shutil.copytree(here.parent / "teacher", tmp_path / "teacher")
  shutil.copy(here.parent / "data.npz", tmp_path / "data.npz")
  write_student(tmp_path / "student", tmp_path, "gmflow")
  assert workdir.has_checkpoint(tmp_path / "student")
  with np.load(tmp_path / "data.npz") as arrays:
    np.savez(tmp_path / "data.npz", **{**arrays, "x0": -arrays["x0"]})
  with pytest.raises(ValueError, match=r"trained on other data.*\n  data\.name: the teacher has"):
    write_student(tmp_path / "other", tmp_path, "gmflow")
