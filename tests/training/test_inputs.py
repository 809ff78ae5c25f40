"""What a run was made from: told by content, found where it moved to, and noticed when it was exchanged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from pflow_jax.checkpoints.checkpoint import Checkpointer
from pflow_jax.checkpoints.stream import save_leaves
from pflow_jax.conversion.merge import merge
from pflow_jax.mesh.sharding import make_layout
from pflow_jax.settings.tree import Settings
from pflow_jax.training import inputs as module
from pflow_jax.training import workdir
from pflow_jax.training.experiment import build
from pflow_jax.training.inputs import (
  INPUTS,
  digest_of_files,
  digest_of_parameters,
  joined,
  locate,
  read_inputs,
  relative_path,
)
from pflow_jax.training.origins import inputs_of
from pflow_jax.training.train import train
from tests.moved_runs import digest, write_data, write_student, write_tree
from tests.programs import quick

pytestmark = pytest.mark.usefixtures("float32")


@pytest.mark.parametrize(
  ("path", "start", "way"),
  [
    ("/a/runs/teacher", "/a/runs/student", "../teacher"),
    ("/a/teacher", "/b/c/student", "../../../a/teacher"),
    ("gs://bucket/runs/teacher", "gs://bucket/student", "../runs/teacher"),
    ("gs://bucket/teacher", "gs://other/student", None),
    ("gs://bucket/teacher", "s3://bucket/student", None),
    ("gs://bucket/teacher", "/a/student", None),
    ("/a/teacher", "gs://bucket/student", None),
  ],
)
def test_the_way_from_one_folder_to_another(path, start, way):
  assert relative_path(path, start) == way
  if way is not None:
    assert joined(start, way) == path


class Leaf:
  """An array, as `save_leaves` takes it."""

  stacked = True

  def __init__(self, array):
    self.array, self.shape, self.dtype = array, array.shape, array.dtype

  def layer(self, index):
    return self.array[index]

  def read(self, index):
    return self.array[index]


def test_parameters_are_told_whatever_their_storage(tmp_path):
  rng = np.random.default_rng(0)
  tree = {f"{i}": rng.normal(size=(2, 8, 16)).astype(np.float32) for i in range(3)}

  def written(name, tree, sizes=None):
    layout = sizes and make_layout({"data": -1} | sizes, ((".*", (None, "fsdp")),), 4, min_size=1)
    leaves = jax.tree.map(Leaf, tree)
    save_leaves(f"{tmp_path / name}/{workdir.CHECKPOINTS}", {"params": leaves}, layout=layout)
    return digest_of_parameters(str(tmp_path / name), 0, "params")

  first = written("a", tree)
  assert written("b", tree, dict(data=1, fsdp=4)) == first, "in other chunks"
  for name, changed in {
    "value": tree | {"1": tree["1"] + 1e-3},
    "type": jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree),
    "name": {"3" if k == "1" else k: v for k, v in tree.items()},
    "shape": tree | {"1": tree["1"].reshape(2, 16, 8)},
  }.items():
    assert written(name, changed) != first, name


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """Folders teacher, student, adapters and data.npz, as their trainings left them."""
  root = tmp_path_factory.mktemp("there")
  with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
    write_tree(root)
  return root


@pytest.fixture
def moved(tree, tmp_path):
  """The same in another place; the first one is out of the way."""
  here = tmp_path / "here"
  shutil.copytree(tree, here)
  aside = tree.with_name(tree.name + ".aside")
  tree.rename(aside)
  yield here
  aside.rename(tree)


def test_a_training_writes_what_it_was_made_from(teacher_run, student_run):
  kept = read_inputs(student_run)
  assert set(kept.models) == {"teacher"}
  teacher = kept.models["teacher"]
  assert (teacher.workdir, teacher.step, teacher.which) == (str(teacher_run), 3, "ema")
  assert joined(student_run, teacher.relative) == str(teacher_run)
  assert teacher.about["model"]["kind"] == "dit"
  assert teacher.parameters == digest_of_parameters(str(teacher_run), 3, "ema")
  assert kept.data.description.class_names == tuple("0123456789")
  assert kept.data.fingerprint["records"] == 1797
  assert kept.data.fingerprint == read_inputs(teacher_run).data.fingerprint


def resume(folder, root, variant="gmflow"):
  config = quick("digits", variant, None if variant == "teacher" else root / "teacher", steps=5)
  config.data = workdir.load_config(folder).data
  config.data.name = f"npz:{root / 'data.npz'}"
  return train(config, folder)


@pytest.fixture
def own(tree, tmp_path):
  """The tree where it was made, to be changed; it is brought back afterwards."""
  shutil.copytree(tree, tmp_path / "kept")
  yield tree
  shutil.rmtree(tree)
  (tmp_path / "kept").rename(tree)


@pytest.mark.parametrize("variant", ["teacher", "gmflow"])
def test_a_data_file_of_the_same_shape_that_was_exchanged_is_noticed(variant, own):
  folder = own / ("teacher" if variant == "teacher" else "student")
  write_data(own / "data.npz", seed=1)
  with pytest.raises(ValueError, match=rf"(?s)something else.*remove {folder / INPUTS}:\n  data, content: was \w+, is"):
    resume(folder, own, variant)


def test_a_teacher_that_was_exchanged_is_noticed(own):
  shutil.rmtree(own / "teacher")
  write_student(own / "teacher", own, "teacher", seed=7)
  with pytest.raises(ValueError, match=r"(?s)something else.*teacher, parameters: was \w+, is \w+ \(in .*teacher\)"):
    resume(own / "student", own)


def claim(folder, root):
  """What `train` does with a run before anything is compiled."""
  config = quick("digits", "gmflow", root / "teacher", steps=5)
  config.data = dict(name=f"npz:{root / 'data.npz'}")
  config = workdir.pinned(folder, Settings.of(config))
  experiment = build(config)
  workdir.claim(
    folder,
    Settings.of(config, converted=True),
    inputs_of(Settings.of(config), experiment.dataset, experiment.saved, folder),
  )
  return config


def test_a_run_goes_on_where_it_was_moved_with_all_it_needs(moved):
  before = read_inputs(moved / "student")
  config = claim(moved / "student", moved)
  kept = read_inputs(moved / "student")
  assert kept.models["teacher"].workdir == config.teacher.workdir == str(moved / "teacher")
  assert kept.data.description.options == {"name": f"npz:{moved / 'data.npz'}"}
  assert before.changes(kept) == []


def test_a_run_of_old_goes_on_and_says_from_now_on_what_it_was_made_from(own):
  before = read_inputs(own / "student")
  (own / "student" / INPUTS).unlink()
  write_data(own / "data.npz", seed=1)  # which nobody can notice
  claim(own / "student", own)
  kept = read_inputs(own / "student")
  assert kept.models == before.models
  assert kept.data.fingerprint != before.data.fingerprint


def test_fingerprints_of_another_version_are_not_compared(tree, tmp_path):
  shutil.copytree(tree / "student", tmp_path / "student")
  path = tmp_path / "student" / INPUTS
  path.write_text(json.dumps(json.loads(path.read_text()) | {"version": module.VERSION + 1}))
  assert read_inputs(tmp_path / "student") is None


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda kept: "[]", "inputs.json: input should be an object"),
    (lambda kept: "{}", "inputs.json: version"),
    (lambda kept: json.dumps(kept)[:-5], "inputs.json: cannot be read as JSON"),
    (lambda kept: json.dumps(kept | {"models": [1]}), "inputs.json: models"),
    (lambda kept: json.dumps(kept | {"data": 1}), "inputs.json: data"),
    (lambda kept: json.dumps(kept).replace('"num_classes": 3', '"num_classes": 1000000000'), "a name for each of"),
    (lambda kept: json.dumps(kept).replace('"shape": [8, 8, 1]', '"shape": [8, -8, 1]', 1), "sizes >= 1"),
  ],
)
def test_files_that_are_none_are_named(change, message, tree, tmp_path):
  shutil.copytree(tree / "student", tmp_path / "student")
  path = tmp_path / "student" / INPUTS
  path.write_text(change(json.loads(path.read_text())))
  with pytest.raises(ValueError, match=message):
    read_inputs(tmp_path / "student")


def test_a_teacher_is_found_where_it_moved_with_its_student(moved):
  kept = read_inputs(moved / "student")
  at = lambda folder, given=kept.models["teacher"].workdir: locate("teacher", given, folder, kept)
  assert at(moved / "student") == str(moved / "teacher")
  assert locate("weak", "anywhere", moved / "student", kept) == "anywhere", "of which nothing is known"
  (moved / "elsewhere").mkdir()
  student = shutil.copytree(moved / "student", moved / "elsewhere" / "student")
  with pytest.raises(
    ValueError, match=r"dit \w{16}, is needed, and there is no run in .*give its folder with --teacher"
  ):
    at(student)
  assert at(student, str(moved / "teacher")) == str(moved / "teacher")
  with pytest.raises(ValueError, match=r"is not what is in .*student \(.*\); give its folder with --teacher"):
    at(student, str(moved / "student"))
  assert digest(moved / "teacher") == kept.models["teacher"].parameters


def test_another_model_at_the_old_place_is_not_taken_for_the_teacher(moved, tree):
  """A run that is copied to a machine where something else is in that folder."""
  try:
    write_student(tree / "teacher", moved, "teacher", seed=9)
    kept = read_inputs(moved / "student")
    at = lambda: locate("teacher", kept.models["teacher"].workdir, moved / "student", kept)
    assert at() == str(moved / "teacher")
    shutil.rmtree(moved / "teacher")
    with pytest.raises(ValueError, match=r"is not what is in .*teacher \(its parameters are \w{16}\)"):
      at()
  finally:
    shutil.rmtree(tree)


def test_a_merged_run_says_the_same_of_itself(moved, tmp_path):
  """Its adapters' base is found beside it, and named from the new folder."""
  merge(moved / "adapters", tmp_path / "far" / "merged")
  before, kept = read_inputs(moved / "adapters"), read_inputs(tmp_path / "far" / "merged")
  assert kept.data == before.data
  assert kept.models["teacher"].workdir == str(moved / "teacher")
  assert joined(tmp_path / "far" / "merged", kept.models["teacher"].relative) == str(moved / "teacher")
  assert workdir.load_config(tmp_path / "far" / "merged").teacher.workdir == str(moved / "teacher")


def test_checkpoints_in_a_bucket_are_told_apart_by_names(bucket):
  root = epath.Path(bucket) / "checkpoints" / "3"
  assert digest_of_files(bucket, 3) == ""
  root.mkdir(parents=True)
  assert digest_of_files(bucket, 3) == ""
  (root / "state" / "d").mkdir(parents=True)
  (root / "state" / "d" / "0a1b").write_text("abc")
  first = digest_of_files(bucket, 3)
  assert first == digest_of_files(bucket, 3) != ""
  (root / "state" / "d" / "0a1b").unlink()
  (root / "state" / "ocdbt.process_0" / "d").mkdir(parents=True)
  (root / "state" / "ocdbt.process_0" / "d" / "2c3d").write_text("abc")
  assert digest_of_files(bucket, 3) not in (first, "")


def test_every_save_has_names_of_its_own_that_a_copy_keeps(tmp_path):
  for name in ("one", "two"):
    with Checkpointer(tmp_path / name) as checkpointer:
      checkpointer.save(3, {"w": jnp.ones((4, 4))})
  shutil.copytree(tmp_path / "one", tmp_path / "copy")
  one, two, copy = (module._digest_of_names(epath.Path(tmp_path / name / "3")) for name in ("one", "two", "copy"))
  assert one == copy != ""
  assert two not in (one, "")
