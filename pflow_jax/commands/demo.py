"""A page in the browser that shows runs beside each other."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from pflow_jax.commands.library import load
from pflow_jax.commands.run import Folder, Run
from pflow_jax.conversion.runs import is_run
from pflow_jax.core.solvers import fitting
from pflow_jax.files.folders import told_apart
from pflow_jax.files.foreign import is_there
from pflow_jax.page.drawing import Studio
from pflow_jax.page.rows import Row, row_of, row_of_teacher
from pflow_jax.settings.sample import YARDSTICK_STEPS

logger = logging.getLogger(__name__)


def demo(
  *runs: Run | Folder,
  base: Folder | None = None,
  pipeline: Folder | None = None,
  preview_autoencoder: Folder | None = None,
  batch_size: int = 8,
  host: str = "127.0.0.1",
  port: int | None = None,
  share: bool = False,
) -> Any:
  """Opens a page that shows runs beside each other: samples from the same noise, what they cost, and their ways.

  In a notebook the page is shown there. The teacher of the first student is among the rows if it is at hand, at 128
  and at 4 steps.

  Args:
    *runs: runs, workdirs, or folders of PyTorch as `load` takes them, of data of one shape.
    base: teacher of a student of PyTorch that is an adapter.
    pipeline: folder of a published model, for the text encoders and the autoencoder of a run on prompts.
    preview_autoencoder: folder of an autoencoder, a tiny one, say, that shows samples of latents as pictures; by
      default that of `pipeline`, or the one that made the latents.
    batch_size: samples at a time.
    host: address to listen on; whoever reaches it can use this machine.
    port: to listen on; by default the first free one from 7860 on.
    share: ask gradio's servers for a public address, as a notebook elsewhere may need.

  Returns:
    The page, gradio's Blocks, whose `close()` ends it.

  Raises:
    ImportError: gradio is not installed.
    ValueError: the runs cannot be loaded, or do not fit together.
  """
  where: dict[str, Any] = dict(host=host, port=port, share=share)
  return open_page(runs, base, pipeline, preview_autoencoder, batch_size, **where)[0]


def open_page(
  runs: Sequence[Run | Folder],
  base: Folder | None = None,
  pipeline: Folder | None = None,
  preview_autoencoder: Folder | None = None,
  batch_size: int = 8,
  **where: Any,
) -> tuple[Any, str]:
  """Opens a page, as `demo`; returns it and its address."""
  _keep_pictures_private()
  try:
    from pflow_jax.page import layout
  except ModuleNotFoundError as error:
    if error.name != "gradio":
      raise
    raise ImportError("the page is made with gradio: pip install 'pflow-jax[demo]'") from error
  layout.check_place(where["host"], where["port"])
  return layout.serve(studio_of(runs, base, pipeline, preview_autoencoder, batch_size), **where)


def _keep_pictures_private() -> None:
  """Gives gradio, before it is imported, a folder that this user alone may read, until the program ends.

  Its own, /tmp/gradio, is read by all users of a machine, and written by the first one alone.
  """
  if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="pflow_demo_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def studio_of(
  runs: Sequence[Run | Folder],
  base: Folder | None = None,
  pipeline: Folder | None = None,
  preview_autoencoder: Folder | None = None,
  batch_size: int = 8,
) -> Studio:
  """Loads what a page shows; arguments as of `demo`."""
  if not runs:
    raise ValueError("workdir: expected at least one run")
  if batch_size < 1:
    raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
  for one in runs:
    if not isinstance(one, Run) and not is_there(one):
      raise ValueError(f"workdir: there is no folder {one}")
  loaded = [one if isinstance(one, Run) else load(one, base=None if is_run(one) else base) for one in runs]
  places = [
    run.workdir or run.settings.kind if isinstance(one, Run) else os.fspath(one)
    for one, run in zip(runs, loaded, strict=True)
  ]
  names = told_apart(places)
  rows = [row_of(name, run._experiment, run.params, run._layout) for name, run in zip(names, loaded, strict=True)]
  students = [run for run, row in zip(loaded, rows, strict=True) if not row.is_teacher]
  if len(students) == len(rows) and (own := _teacher_of(students[0])):
    rows = [own, *rows]
  if students and (teacher := next((row for row in rows if row.is_teacher), None)):
    few = fitting(teacher.settings.sample.solver, YARDSTICK_STEPS)
    rows.append(dataclasses.replace(teacher, name=f"{teacher.name}, few steps", nfe=few))
  return Studio(rows, batch_size=batch_size, pipeline=pipeline, autoencoder=preview_autoencoder)


def _teacher_of(student: Run) -> Row | None:
  """Returns the row of a student's teacher; None, and says why, where there is none at hand."""
  experiment = student._experiment
  if experiment.teacher is None:
    return None
  try:
    return row_of_teacher("teacher", experiment, student._teachers_params(experiment.teacher), student._layout)
  except (OSError, ValueError) as error:
    logger.warning("the teacher is not shown: %s", str(error).splitlines()[0])
    return None
