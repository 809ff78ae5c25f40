"""The folder of a run."""

import json
import os

import pytest
from ml_collections import ConfigDict

from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from tests.programs import quick


def config(**changes):
  values = {
    "seed": 0,
    "data": {"name": "digits"},
    "model": {"kind": "mlp", "width": 8, "depth": 1},
    "head": {"kind": "velocity"},
    "objective": {"kind": "flow_matching"},
    "train": {"steps": 10, "batch_size": 4},
    "sample": {"nfe": (1, 2)},
  }
  return Settings.of(ConfigDict(values | changes))


def model(**changes):
  return {"kind": "mlp", "width": 8, "depth": 1} | changes


def test_settings_come_back(tmp_path):
  workdir.claim(tmp_path / "run", config())
  assert workdir.load_settings(tmp_path / "run") == config()
  assert Settings.of(workdir.load_config(tmp_path / "run")) == config()
  assert not list((tmp_path / "run").glob("*.partial"))


def save(folder, step=1):
  (folder / "checkpoints" / str(step)).mkdir(parents=True)


def test_only_what_may_change_changes(tmp_path):
  workdir.claim(tmp_path, config())
  save(tmp_path)
  workdir.claim(tmp_path, config(train={"steps": 20, "batch_size": 4}, sample={"nfe": (4,)}))
  assert workdir.load_config(tmp_path).train.steps == 20
  with pytest.raises(ValueError, match=r"(?s)model\.width: the run has 8, now 9.*train\.batch_size"):
    workdir.claim(tmp_path, config(model=model(width=9), train={"steps": 20, "batch_size": 8}))
  with pytest.raises(ValueError, match=r"model\.mlp_ratio: the run has '\(absent\)', now 1"):
    workdir.claim(tmp_path, config(model=model(mlp_ratio=1)))
  assert workdir.load_config(tmp_path).model.width == 8


def test_a_run_without_a_checkpoint_takes_any_config(tmp_path):
  workdir.claim(tmp_path, config())
  workdir.claim(tmp_path, config(model=model(width=9)))
  assert workdir.load_config(tmp_path).model.width == 9


def test_a_cosine_run_keeps_its_length(tmp_path):
  cosine = {"optimizer": {"schedule": "cosine", "learning_rate": 0.1}}
  workdir.claim(tmp_path, config(**cosine))
  save(tmp_path)
  with pytest.raises(ValueError, match=r"train\.steps: the run has 10, now 20"):
    workdir.claim(tmp_path, config(**cosine, train={"steps": 20, "batch_size": 4}))


def test_a_student_keeps_the_teacher_it_started_with(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(workdir, "newest_step", lambda folder: 7)
  of_teacher = config(teacher={"workdir": "teacher", "step": None})
  student = workdir.pinned("run", of_teacher)
  assert (student.teacher.workdir, student.teacher.step) == (str(tmp_path / "teacher"), 7)
  workdir.claim("run", student)
  save(tmp_path / "run")
  monkeypatch.setattr(workdir, "newest_step", lambda folder: 9)  # the teacher has trained on
  again = workdir.pinned("run", of_teacher)
  assert again.teacher.step == 7
  fresh = workdir.pinned("other", of_teacher)
  assert fresh.teacher.step == 9


def test_missing_and_damaged_configs_are_named(tmp_path):
  with pytest.raises(ValueError, match="pflow train"):
    workdir.load_config(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"seed": 0})[:-2])
  with pytest.raises(ValueError, match="cannot be read as JSON.*expected the config of a run"):
    workdir.load_config(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"train": 3}', r"config\.json\.train: expected a section, keys with their values, got 3"),
    ('{"train": [1, 2]}', r"config\.json\.train: expected a section"),
    ('{"train": null}', r"config\.json\.train: expected a section"),
    ('{"policy": {"kind": 3}}', r"config\.json\.head\.kind: input should be a valid string, got 3"),
    ('{"seed": "0"}', r"config\.json\.seed: input should be a valid integer"),
    ('{"seed": -1}', r"config\.json\.seed: input should be greater"),
    ('{"train": {"steps": 1e400}}', "expected a finite number, got '1e400'"),
    ('{"train": {"a.b": 1}}', r"the sections \['data'"),
    ("[]", "got \\[\\]"),
    ("[" * 100_000, "cannot be read as JSON"),
    ('{"a":' * 500 + "1" + "}" * 500, "config.json"),
    ('{"_class_name": "FluxTransformer2DModel", "num_layers": 1}', "is of a model for PyTorch; `pflow convert"),
  ],
)
def test_a_config_of_somebody_else_has_sections(text, message, tmp_path):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message) as caught:
    workdir.load_config(tmp_path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "long", "NUL"])
def test_a_config_that_is_no_file_is_not_opened(kind, tmp_path):
  path = tmp_path / "config.json"
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  given = {"long": "x" * 5000, "NUL": "a\0b"}.get(kind, tmp_path)
  with pytest.raises(ValueError, match=r"config\.json"):
    workdir.load_config(given)


def test_checking_alone_writes_nothing(tmp_path):
  workdir.claim(tmp_path / "run", config(), write=False)
  assert not (tmp_path / "run").exists()


def test_a_save_that_was_cut_short_is_no_checkpoint(tmp_path):
  for name, saved in (("1.orbax-checkpoint-tmp", False), ("1.damaged", True), ("2", True)):
    (tmp_path / name / "checkpoints" / name).mkdir(parents=True)
    assert workdir.has_checkpoint(tmp_path / name) == saved


def test_unset_keys_keep_their_type(tmp_path):
  """A flag of a finished run can set them: --config.sample.guidance=1.5."""
  workdir.claim(tmp_path, Settings.of(quick("digits", "ayf_emd")))
  loaded = workdir.load_config(tmp_path)
  for section, key, kind in (("sample", "guidance", float), ("teacher", "step", int), ("start", "workdir", str)):
    assert loaded[section][key] is None
    assert loaded[section].get_type(key) is kind
