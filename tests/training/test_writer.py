"""Logs that stay valid and clean over kills and resumes, and the two progress reports."""

import contextlib
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from pflow_jax import data
from pflow_jax.evaluation import sample
from pflow_jax.settings.tree import Settings
from pflow_jax.training import workdir
from pflow_jax.training.writer import MetricsWriter, parameter_table
from tests.events import events
from tests.programs import quick


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scalars_reach_both_files(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(3, {"loss": jnp.float32(0.5), "count": np.int64(7), "half": jnp.bfloat16(0.25)})
  (line,) = lines(tmp_path)
  assert line.pop("time") > 1e9
  assert line == {"step": 3, "loss": 0.5, "count": 7, "half": 0.25}
  scalars = {v.tag: v.simple_value for e in events(tmp_path / "tensorboard") for v in e.summary.value}
  assert scalars == {"train/loss": 0.5, "train/count": 7, "train/half": 0.25}


def test_scalars_have_groups_on_boards(tmp_path):
  """In metrics.jsonl names stay as they were."""
  values = {
    "loss": 1.0,
    "loss_t0.00-0.25": 2.0,
    "images_per_second": 3.0,
    "peak_share": 0.5,
    "host_gib": 4.0,
    "a/b": 5.0,
  }
  with MetricsWriter(tmp_path) as writer:
    writer.write(3, values)
  found = {v.tag: v.simple_value for e in events(tmp_path / "tensorboard") for v in e.summary.value}
  groups = ("train", "train", "speed", "speed", "memory")
  named = [f"{group}/{name}" for group, name in zip(groups, values, strict=False)]
  assert found == dict(zip([*named, "a/b"], values.values(), strict=True))
  assert lines(tmp_path)[0].keys() - {"step", "time"} == values.keys()


def test_the_config_is_a_text_on_boards(tmp_path):
  config = {"seed": 1, "train": {"steps": 5}}
  with MetricsWriter(tmp_path, config=config, resume_step=7):
    pass
  (event,) = (e for e in events(tmp_path / "tensorboard") if e.summary.value)
  (value,) = event.summary.value
  assert (event.step, value.tag, value.metadata.plugin_data.plugin_name) == (7, "config/text_summary", "text")
  shown = value.tensor.string_val[0].decode().split("\n")
  assert all(line.startswith("    ") for line in shown), "Markdown takes it for code"
  assert json.loads("".join(shown)) == config


@pytest.mark.parametrize("value", [math.nan, math.inf, jnp.float32(-math.inf)])
def test_non_finite_is_null(tmp_path, value):
  with MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {"loss": value})
  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["loss"] is None
  assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("value", [np.ones(2), "text", None, 1j])
def test_refuses_what_is_not_one_number(tmp_path, value):
  with (
    MetricsWriter(tmp_path, tensorboard=False) as writer,
    pytest.raises(ValueError, match="'loss'"),
  ):
    writer.write(0, {"loss": value})


def test_lines_are_on_disk_before_closing(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"loss": 1.0})
  assert len(lines(tmp_path)) == 1
  writer.close()


@pytest.mark.parametrize(("resume_step", "expected"), [(None, [1, 2, 3, 9]), (2, [1, 2, 9]), (0, [9])])
def test_resume_drops_later_lines_and_a_torn_one(tmp_path, resume_step, expected):
  with MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in (1, 2, 3):
      writer.write(step, {"loss": step})
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"step": 2, "lo')
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=resume_step) as writer:
    writer.write(9, {"loss": 9})
  assert [line["step"] for line in lines(tmp_path)] == expected
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


STRANGE = [
  *('{"step": "2"}', '{"step": null}', '{"step": [1]}', '{"step": 1.5}', '{"step": true}', '{"step": 1e999}', "{}"),
  *("[]", "3", "null", '"step"', "\\0", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\udcff", "x" * 100_000),
]


def test_lines_that_are_no_metrics_are_left_out_and_counted(tmp_path, caplog):
  good = '{"step": 1, "loss": 0.5, "note": "a\\u2028b"}'
  text = "\n".join([STRANGE[0], good, *STRANGE[1:]])
  (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=5):
    pass
  assert (tmp_path / "metrics.jsonl").read_text() == good + "\n"
  assert f"{len(STRANGE)} lines are no metrics" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_metrics_that_are_no_file_are_refused(tmp_path, make):
  make(tmp_path / "metrics.jsonl")
  with pytest.raises(ValueError, match="is no file, expected the metrics of an earlier run"):
    MetricsWriter(tmp_path, tensorboard=False, resume_step=5)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_an_error_where_it_is_written_and_nothing_waits(tmp_path, name):
  """tensorboardX's own thread died of it, and the eleventh row after that waited for ever."""
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  file = writer._log._file if name == "metrics.jsonl" else writer._boards.all[0]._file._py_recordio_writer._writer
  with open("/dev/full", "wb", buffering=0) as full:
    os.dup2(full.fileno(), file.fileno())
  with pytest.raises(OSError, match="No space left"), writer:
    writer.write(2, {"loss": 1.0})


def test_all_that_is_written_is_written_in_the_context_that_was_given(tmp_path):
  seen = []

  @contextlib.contextmanager
  def writing():
    seen.append(sorted(path.name for path in tmp_path.iterdir()))
    yield

  with MetricsWriter(tmp_path, writing=writing) as writer:
    assert seen.pop() == []
    for write in (lambda: writer.write(1, {"x": 1}), lambda: writer.image(1, "x", np.zeros((1, 1, 3), np.uint8))):
      write()
      assert len(seen) == 1
      seen.clear()
  assert len(seen) == 1


def test_resume_purges_tensorboard(tmp_path):
  for resume_step in (None, 2):
    with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
      writer.write(3, {"loss": 1.0})
  starts = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == 1]
  assert starts == [3]


def test_images(tmp_path):
  from PIL import Image

  picture = np.zeros((4, 5, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / "grid.png")
  with MetricsWriter(tmp_path) as writer:
    writer.image(1, "array", picture)
    writer.image(2, "path", tmp_path / "grid.png")
    with pytest.raises(ValueError, match=r"'float'.*uint8.*float64 \(4, 5, 3\)"):
      writer.image(3, "float", picture / 2)
  shapes = {v.tag: (v.image.height, v.image.width) for e in events(tmp_path / "tensorboard") for v in e.summary.value}
  assert shapes == {"array": (4, 5), "path": (4, 5)}


def test_inactive_writes_nothing(tmp_path):
  with MetricsWriter(tmp_path / "run", active=False) as writer:
    writer.write(1, {"loss": 1.0})
    writer.image(1, "x", np.zeros((1, 1, 3), np.uint8))
    writer.flush()
  assert not (tmp_path / "run").exists()


def test_parameter_table():
  table = parameter_table({"dense": {"kernel": jnp.ones((20, 3)), "bias": jnp.ones(3)}})
  assert "dense/kernel" in table
  assert "Total: 63" in table


def test_a_log_in_an_object_store_is_stored_whole_and_resumed(bucket):
  with MetricsWriter(bucket, tensorboard=False) as writer:
    for step in (1, 2, 3):
      writer.write(step, {"loss": 1.0 / step})
  with MetricsWriter(bucket, tensorboard=False, resume_step=2) as writer:
    writer.write(3, {"loss": 9.0})
  rows = [json.loads(line) for line in (epath.Path(bucket) / "metrics.jsonl").read_text().splitlines()]
  assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_log_in_an_object_store_is_stored_at_most_every_half_minute(bucket, monkeypatch):
  stored = []
  monkeypatch.setattr(epath.Path(bucket).__class__, "write_text", lambda self, text: stored.append(text))
  with MetricsWriter(bucket, tensorboard=False) as writer:
    for step in range(100):
      writer.write(step, {"loss": 1.0})
    assert len(stored) == 1
  assert len(stored) == 2
  assert stored[-1].count("\n") == 100


def test_pictures_and_configs_in_an_object_store(bucket):
  rows = {"1 NFE": np.zeros((4, 2), np.float32)}
  points = data.load("checkerboard")
  sample.save_picture(points, rows, np.zeros(4, int), f"{bucket}/samples/1.png")
  assert (epath.Path(bucket) / "samples" / "1.png").read_bytes().startswith(b"\x89PNG")
  with MetricsWriter(bucket, tensorboard=False) as writer:
    writer.image(1, "samples", f"{bucket}/samples/1.png")
  config = quick("digits", "teacher")
  workdir.claim(bucket, Settings.of(config, converted=True))
  assert workdir.load_config(bucket).model.width == config.model.width
  with pytest.raises(ValueError, match="out: expected a folder of this machine"):
    sample.check_local(None, bucket)
