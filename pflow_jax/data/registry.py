"""`load`: from a name in a config to a data set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from pflow_jax.data.arrays import npz
from pflow_jax.data.dataset import IN_MEMORY, Dataset
from pflow_jax.data.emoji import emoji
from pflow_jax.data.folder import folder
from pflow_jax.data.images import digits, mnist5k, synthetic
from pflow_jax.data.latents import latents
from pflow_jax.data.parquet_source import parquet
from pflow_jax.data.points import checkerboard
from pflow_jax.data.prompts.dataset import prompts, synthetic_prompts
from pflow_jax.data.tar_source import webdataset
from pflow_jax.data.tfds_source import tfds_images
from pflow_jax.files.foreign import check_arguments
from pflow_jax.files.nearest import did_you_mean
from pflow_jax.files.registering import enter

_SOURCES: dict[str, Callable[..., Dataset]] = {
  "digits": digits,
  "mnist5k": mnist5k,
  "emoji": emoji,
  "checkerboard": checkerboard,
  "synthetic": synthetic,
  "synthetic_prompts": synthetic_prompts,
}
# Each is called with the text after the colon.
_OPEN_SOURCES: dict[str, Callable[..., Dataset]] = {
  "tfds:<name>": tfds_images,
  "folder:<path>": folder,
  "parquet:<path>": parquet,
  "webdataset:<path>": webdataset,
  "npz:<path>": npz,
  "latents:<path>": latents,
  "prompts:<path>": prompts,
}


def load(name: str, *, split: str = "train", **options: Any) -> Dataset:
  """The data set called `name`.

  Args:
    name: "digits", "mnist5k", "emoji", "checkerboard", "synthetic", "synthetic_prompts", `tfds:<name>`,
      `folder:<path>`, `parquet:<path>`, `webdataset:<path>`, `npz:<path>`, `latents:<path>` or `prompts:<path>`.
    split: "train" or "test"; for tfds any split that it understands. See `held_out` of the sources.
    **options: keyword arguments of the source's function in this package.

  Raises:
    ValueError: for an unknown name or option, with the nearest one and the list, or an option of another type.
  """
  source, arguments = _find(name)
  parameters = inspect.signature(source).parameters.values()
  known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "split"]
  for option in options:
    if option not in known:
      raise ValueError(_unknown(f"{name} has no option {option!r}", option, known, "options"))
  made = source(*arguments, **check_arguments(source, {"split": split, **options}, where=name))
  given = {"name": name, **options} | ({} if split == "train" else {"split": split})
  return dataclasses.replace(made, options=given)


def register_source(name: str, source: Callable[..., Dataset]) -> None:
  """Makes a data set known to `load` and to configs.

  Args:
    name: value of config.data.name; for `name:<path>` the source is called with the text after the colon.
    source: returns the data set; its keyword arguments are the keys of config.data, `split` among them.

  Raises:
    ValueError: another data set has that name.
  """
  enter(_OPEN_SOURCES if ":" in name else _SOURCES, name, source, f"there is a data set {name!r} already")


def sources() -> dict[str, Callable[..., Dataset]]:
  """The functions behind the names, by the part of the name before a colon."""
  return {name.partition(":")[0]: source for name, source in {**_SOURCES, **_OPEN_SOURCES}.items()}


def _find(name: str) -> tuple[Callable[..., Dataset], list[str]]:
  if name in _SOURCES:
    return _SOURCES[name], []
  kind, colon, rest = name.partition(":")
  for pattern, source in _OPEN_SOURCES.items():
    if kind == pattern.partition(":")[0]:
      if not rest:
        raise ValueError(f"expected {pattern}, got {name!r}.")
      return source, [rest]
  if name == IN_MEMORY:
    raise ValueError("the data of this run were arrays in memory; save them with np.savez, and name them npz:<path>.")
  names = [*_SOURCES, *_OPEN_SOURCES]
  message = f"there is no data set {name!r}"
  raise ValueError(_unknown(message, kind + colon, names, "data sets"))


def _unknown(message: str, got: str, known: Iterable[str], what: str) -> str:
  known = list(known)
  return f"{message}{did_you_mean(got, known, '.')} The {what} are: {', '.join(known) or 'none'}."
