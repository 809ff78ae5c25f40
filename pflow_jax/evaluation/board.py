"""An evaluation where its run is watched."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping

from pflow_jax.checkpoints.steps import newest_step
from pflow_jax.evaluation.measure import COLUMNS, Report
from pflow_jax.settings.tree import Settings
from pflow_jax.training.boards import Boards
from pflow_jax.training.inputs import CHECKPOINTS

PART = "evaluation"


def show(settings: Settings, folder: str, report: Report, pictures: Mapping[str, str | os.PathLike]) -> None:
  """Shows numbers, table and pictures on the run's boards, at the step of its newest checkpoint.

  A number is eval/<measure>/<sampler>. A folder that cannot be written is told of, and is no error.

  Args:
    settings: of the run, which say what its boards are; a model that was not trained here has none.
    folder: its workdir.
    report: the evaluation.
    pictures: files by name.
  """
  length = settings.train
  if length is None:
    return
  step = newest_step(f"{folder}/{CHECKPOINTS}") or 0
  numbers = {}
  for row in report.rows:
    sampler = re.sub(r"\W+", "_", row["name"]).strip("_").lower()
    for measure in (key for key in COLUMNS if key in row and key not in ("name", "nfe")):
      value = row[measure]
      numbers[f"eval/{measure}/{sampler}"] = value[0] if isinstance(value, tuple) else value
  try:
    own = Boards(folder, tensorboard=length.tensorboard, wandb=length.wandb, part=PART)
    with contextlib.closing(own) as boards:
      boards.scalars(step, numbers)
      boards.text(step, "eval/table", report.table)
      for name, path in pictures.items():
        boards.image(step, f"eval/{name}", path)
  except OSError as error:
    print(f"the evaluation is not shown in TensorBoard: {error}", flush=True)
