"""Every cell of the notebooks runs: shrunk, or with PFLOW_FULL=1 as it is written. `make notebooks`

With PFLOW_FULL=1 the executed notebooks are kept in build/notebooks, from where `make docs` takes their outputs.
"""

import os
import sys
import time

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, ROOT, SMALL, execute, read, with_settings

FULL = bool(os.environ.get("PFLOW_FULL"))
# Those that need weights or a TPU run shrunk alone.
ANYWHERE = {"quickstart", "your_images", "your_teacher", "which_method"}


def flux(folder):
  """A tiny model of FLUX.1's classes with its encoders, and a student of it as published."""
  from pflow_jax.conversion.cache import cache
  from pflow_jax.conversion.program import convert
  from pflow_jax.training.train import train
  from tests.evaluation.test_text_to_image import PROMPTS, student_config, write_pipeline

  pipeline = write_pipeline("flux", folder / "FLUX.1-dev")
  convert(pipeline / "transformer", folder / "teacher")
  (folder / "prompts.txt").write_text("\n".join(PROMPTS))
  cache(str(folder / "prompts.txt"), "flux", str(folder / "prompts"), encoders=str(pipeline), max_length=12)
  train(student_config("flux", folder / "teacher", folder / "prompts"), folder / "trained")
  convert(folder / "trained", folder / "published")
  return dict(published="published", prompts=["a red cat", "the dog"]), {}


def tpu_pod(folder):
  """A checkout, a pretended gcloud, and in place of a bucket a folder with a run."""
  from pflow_jax.training.train import train
  from tests.programs import quick
  from tests.test_launch import Stage

  train(quick("digits", "teacher"), folder / "bucket")
  stage = Stage(folder)
  stage.write("workers", "1")
  stage.commit()
  path = f"{os.path.dirname(sys.executable)}:{stage.env['PATH']}"  # whose pflow plans; the workers have the stage's
  return dict(checkout=str(stage.project), workdir=str(folder / "bucket")), stage.env | {"PATH": path}


PREPARED = {"flux": flux, "tpu_pod": tpu_pod}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path, float32, capsys):
  name = path.stem
  if FULL and name not in ANYWHERE:
    pytest.skip("needs weights or a TPU")
  more, env = PREPARED[name](tmp_path) if name in PREPARED else ({}, {})
  start = time.monotonic()
  notebook = execute(with_settings(read(path), {} if FULL else SMALL[name] | more), tmp_path, env)
  with capsys.disabled():
    print(f"\n{name}: {time.monotonic() - start:.0f} s")
  if FULL:
    (ROOT / "build" / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, ROOT / "build" / "notebooks" / path.name)


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
  from nbclient.exceptions import CellExecutionError

  for source in ("1 / 0", "!exit 3", "!test {x} = 1"):
    notebook = nbformat.v4.new_notebook(
      cells=[nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["settings"]}), nbformat.v4.new_code_cell(source)]
    )
    with pytest.raises(CellExecutionError):
      execute(with_settings(notebook, {"x": 2}), tmp_path)
