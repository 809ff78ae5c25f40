"""The origin of a model and its licence, as far as its own folder tells."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from pflow_jax.files import foreign
from pflow_jax.settings.tree import Settings
from pflow_jax.training.inputs import locate, read_inputs
from pflow_jax.training.workdir import load_settings

README = "README.md"
HUB = "https://huggingface.co"
FIELDS = ("repo", "license", "license_name", "license_link")
_LARGEST = 2**20
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.M | re.S)
_PLAIN = re.compile(r"[\w .:/+~%?=&@,()-]{1,200}")  # nothing that Markdown or YAML reads otherwise
_LONGEST_CHAIN = 16  # of students of students


@dataclasses.dataclass(frozen=True)
class Origin:
  """The model that a run's parameters began as.

  Attributes:
    name: of its folder, or of its data where it was trained here.
    told: what is known of it by `FIELDS`.
    converted: whether it was trained elsewhere.
  """

  name: str
  told: Mapping[str, str] = dataclasses.field(default_factory=dict)
  converted: bool = False


def told_by_folder(path: pathlib.Path) -> dict[str, str]:
  """Returns what a folder of the Hugging Face Hub tells of its model, by `FIELDS`; what it does not tell is absent.

  The licence is that of its card, or of the card of the pipeline around it. The repository is that of the Hub's cache.

  Args:
    path: folder or file of the model.
  """
  folder = (path if path.is_dir() else path.parent).absolute()
  told: dict[str, str] = {}
  if cached := [part for part in folder.parts if re.fullmatch(r"models--[\w.-]+?--[\w.-]+", part)]:
    told["repo"] = "/".join(cached[-1].removeprefix("models--").split("--", 1))
  around = [folder.parent] if (folder.parent / "model_index.json").is_file() else []
  for place in (folder, *around):
    found = front_matter(place / README)
    licence = {key: text for key in FIELDS[1:] if _PLAIN.fullmatch(text := str(found.get(key) or ""))}
    if "license" in licence:
      told |= licence
      break
  if "license_link" in told and "://" not in told["license_link"]:  # of a file in its repository
    link = told.pop("license_link")
    if "repo" in told:
      told["license_link"] = f"{HUB}/{told['repo']}/blob/main/{link}"
  return told


def front_matter(card: pathlib.Path) -> dict[str, Any]:
  """Returns what stands in YAML at the head of a card; nothing where there is none, or it cannot be read."""
  try:
    head = _FRONT.match(foreign.read_text(card, _LARGEST))
    values = yaml.safe_load(head[1]) if head else None
  except (ValueError, yaml.YAMLError, RecursionError):
    return {}
  return values if isinstance(values, dict) else {}


def origin_of(folder: str | os.PathLike, settings: Settings) -> Origin | None:
  """Returns the teacher of a run, the first of a chain of students; None where it is not at hand.

  Args:
    folder: of the run.
    settings: of the run.
  """
  for _ in range(_LONGEST_CHAIN):
    if settings.converted:
      source = settings.source or {}
      told = {key: str(source[key]) for key in FIELDS if _PLAIN.fullmatch(str(source.get(key, "")))}
      return Origin(told.get("repo") or plain(source.get("folder")), told, converted=True)
    teacher = settings.teacher and settings.teacher.workdir
    if not teacher:
      return Origin(data_name(settings.data.get("name")))
    try:
      inputs = read_inputs(folder)
      folder = teacher if inputs is None else locate("teacher", teacher, folder, inputs)
      settings = load_settings(folder)
    except (ValueError, OSError, ImportError):  # gone, or in a bucket that does not answer
      return None
  return None


def data_name(name: Any) -> str:
  """Returns the name of data for a card, which may be published: of a folder its last part alone.

  Args:
    name: as in the section `data` of a config.
  """
  kind, colon, place = str(name or "unknown").partition(":")
  return plain(f"{pathlib.PurePath(kind).name}{colon}{pathlib.PurePath(place).name}")


def plain(value: Any) -> str:
  """Returns a value as text that Markdown takes for nothing else.

  Args:
    value: of somebody else.
  """
  text = str(value or "unknown")
  return text if _PLAIN.fullmatch(text) else foreign.shown(text).replace("|", "/").replace("`", "'")
