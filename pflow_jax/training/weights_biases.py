"""A run's page on Weights & Biases, whose failures never stop a training."""

from __future__ import annotations

import functools
import html
import importlib.util
import logging
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from pflow_jax.files.atomic import write_atomically
from pflow_jax.files.folders import is_remote

logger = logging.getLogger(__name__)

IDENTITY = "wandb_id.txt"  # in a workdir: a run that is resumed goes on with its page
PATIENCE = 30.0  # seconds that the start of a run waits for the service, and its end for what is still to be sent


def check_installed(project: str) -> None:
  """Raises ImportError where a project is named and the package is missing."""
  if project and importlib.util.find_spec("wandb") is None:
    raise ImportError("config.train.wandb: Weights & Biases is not there; pip install 'pflow-jax[wandb]'")


class WeightsBiases:
  """A page of metrics and pictures in a project.

  Where the service cannot be reached, or nobody is signed in, the records stay in the workdir, for `wandb sync`.
  Any later failure is logged once, and the page gets nothing more.

  Args:
    folder: the workdir.
    project: PROJECT or ENTITY/PROJECT.
    config: all settings of the run, for the page.
    part: a page of its own for a part of the run, in the same group.
  """

  def __init__(self, folder: epath.Path, project: str, config: Mapping[str, Any] | None = None, part: str = ""):
    self._run: Any = None
    self._client: Any = None  # the package, which a machine that evaluates may lack
    identity = _identity(folder)
    entity, _, name = project.rpartition("/")
    options: dict[str, Any] = dict(
      entity=entity or None,
      project=name,
      group=identity,
      id=f"{identity}-{part}" if part else identity,
      name=f"{folder.name}-{part}" if part else folder.name,
      job_type=part or "training",
      config=config,
      resume="allow",
      dir=tempfile.gettempdir() if is_remote(folder) else str(folder),
    )
    for mode in (None, "offline"):
      if self._run is None:
        self._attempt(functools.partial(self._open, mode=mode, **options))

  def _open(self, mode: Any, **options: Any) -> None:
    import wandb

    self._client = wandb
    if mode is not None:
      wandb.teardown()  # its service still holds the run that could not be opened
    limits = wandb.Settings(console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE)
    self._run = wandb.init(**options, mode=mode, reinit="create_new", settings=limits)
    # The step is a value like others: the service's own one never goes back, as that of a resumed run may.
    self._run.define_metric("*", step_metric="step")

  def _attempt(self, act: Callable[[], Any]) -> None:
    try:
      act()
    except Exception as error:  # its own errors, those of the network, and those of the folder
      self._run = None
      logger.warning("Weights & Biases: %s; the training goes on", str(error).strip() or type(error).__name__)

  def _log(self, step: int, make: Callable[[], Mapping[str, Any]]) -> None:
    if self._run is not None:
      self._attempt(lambda: self._run.log({"step": step, **make()}))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._log(step, lambda: values)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self._log(step, lambda: {name: self._client.Image(image)})

  def text(self, step: int, name: str, markdown: str) -> None:
    self._log(step, lambda: {name: self._client.Html(f"<pre>{html.escape(markdown)}</pre>")})

  def flush(self) -> None:
    """Does nothing: the client sends by itself."""

  def close(self) -> None:
    if self._run is not None:
      self._attempt(self._run.finish)


def _identity(folder: epath.Path) -> str:
  """Identity of a workdir's page, kept in the workdir."""
  path = folder / IDENTITY
  found = path.read_text().strip() if path.exists() else ""
  if not re.fullmatch(r"[\w-]{1,64}", found):
    found = secrets.token_hex(4)
    write_atomically(path, found + "\n")
  return found
