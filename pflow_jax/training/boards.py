"""Boards on which a run is watched: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from pflow_jax.files.folders import absolute
from pflow_jax.training.events import Events
from pflow_jax.training.weights_biases import WeightsBiases

FOLDER = "tensorboard"  # in a workdir
GROUPS = {
  **dict.fromkeys(("images_per_second", "tflops_per_second", "peak_share", "pause_seconds"), "speed"),
  **dict.fromkeys(("device_gib", "device_peak_gib", "host_gib"), "memory"),
}
"""Groups of metrics by name; others are of "train"."""


class Board(Protocol):
  """A place for scalars, pictures and texts, each with its step."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
  def image(self, step: int, name: str, image: np.ndarray) -> None: ...
  def text(self, step: int, name: str, markdown: str) -> None: ...
  def flush(self) -> None: ...
  def close(self) -> None: ...


class Boards:
  """The boards of a run.

  Args:
    workdir: the folder of the run.
    tensorboard: whether to write events, into <workdir>/tensorboard.
    wandb: project of Weights & Biases, "" for none.
    config: all settings of the run, which are shown as text.
    part: a part of the run that other processes log, such as its evaluation. It has a folder of its own: TensorBoard
      reads the newest file of a folder alone, and would leave that of a training in progress.
    resume_step: the last step whose values stay; None keeps all.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
    part: str = "",
    resume_step: int | None = None,
  ):
    folder = absolute(workdir)
    self.all: list[Board] = []
    if tensorboard:
      events = Events(folder / FOLDER / part, None if resume_step is None else resume_step + 1)
      self.all.append(events)
      if config is not None:
        lines = json.dumps(config, indent=2).split("\n")
        events.text(resume_step or 0, "config", "\n".join(f"    {line}" for line in lines))  # indented, it is code
    if wandb:
      self.all.append(WeightsBiases(folder, wandb, config, part))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs numbers, each under its group: "loss" as "train/loss"; a name with a slash has its group already."""
    named = {name if "/" in name else f"{GROUPS.get(name, 'train')}/{name}": value for name, value in values.items()}
    for board in self.all:
      board.scalars(step, named)

  def image(self, step: int, name: str, image: np.ndarray | str | os.PathLike) -> None:
    """Shows an image: uint8 (H, W, C), C = 1, 3 or 4, or the path of a picture."""
    if isinstance(image, (str, os.PathLike)):
      from PIL import Image

      image = np.asarray(Image.open(io.BytesIO(epath.Path(image).read_bytes()), formats=("PNG",)).convert("RGB"))
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
      raise ValueError(f"image {name!r}: expected uint8 (H, W, 1, 3 or 4), got {image.dtype} {image.shape}")
    for board in self.all:
      board.image(step, name, image)

  def text(self, step: int, name: str, markdown: str) -> None:
    """Shows a text."""
    for board in self.all:
      board.text(step, name, markdown)

  def flush(self) -> None:
    """Puts everything on disk."""
    for board in self.all:
      board.flush()

  def close(self) -> None:
    """Flushes and closes."""
    boards, self.all = self.all, []
    for board in boards:
      board.close()
