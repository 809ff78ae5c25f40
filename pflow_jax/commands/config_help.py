"""The text of `--help` on a config: every key with its value, its type and its words in its owner's docstring."""

from __future__ import annotations

import inspect
import re
import shlex
import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pflow_jax import data
from pflow_jax.commands.flags import words_of
from pflow_jax.core.objectives import OBJECTIVES, PRETRAINED, settings_of
from pflow_jax.families.registry import NETWORKS
from pflow_jax.files import foreign
from pflow_jax.networks.heads import HEADS
from pflow_jax.settings.tree import OWNERS, SECTIONS

# Owners of the sections in which the key `kind` (`name` in data) chooses one.
KINDS: dict[str, Mapping[str, Callable]] = {
  "data": data.sources(),
  "model": {name: kind.module for name, kind in NETWORKS.items()},
  "head": HEADS,
  "objective": {name: settings_of(name) for name in OBJECTIVES if name != PRETRAINED},
}
# Arguments that are no keys: the rest of a data set's name, and values that follow from other sections.
_HIDDEN = (
  *("parent", "name", "path", "head", "channels", "num_classes", "pooled_width", "layout", "use_bias", "total_steps"),
)


def describe(config: ConfigDict | None) -> str:
  """Lists the keys of a config with their values; without a config, the sections and the keys of their owners."""
  if config is None:
    lines = ["Keys of a config, --config.SECTION.KEY; with a config, --help gives values and explains them.", ""]
    for section in SECTIONS:
      if section in KINDS:
        lines.append(_wrapped(f"{section}: by its {'name' if section == 'data' else 'kind'}", 2))
        lines += [_wrapped(f"{kind}: {', '.join(_keys(owner))}", 4) for kind, owner in KINDS[section].items()]
      elif section in OWNERS:
        lines.append(_wrapped(f"{section}: {', '.join(key for key in _keys(OWNERS[section]))}", 2))
    return "\n".join(["", *lines])
  lines = []
  for section, values in config.items():
    if not isinstance(values, ConfigDict):
      lines += ["", _line(section, values, "", "")]
      continue
    owners = _owners(section, values)
    lines += ["", f"{section}, see {' and '.join(map(_place, owners))}" if owners else section]
    hints: dict[str, Any] = {}
    words: dict[str, str] = {}
    for owner in owners:
      hints |= typing.get_type_hints(owner)
      words = words_of(owner) | words
    for key, value in values.items():
      kind = re.sub(r"\b(typing|collections\.abc)\.", "", inspect.formatannotation(hints[key])) if key in hints else ""
      lines.append(_line(f"{section}.{key}", value, kind, words.get(key, "")))
  return "\n".join(["", "Keys of this config:", *lines])


def _owners(section: str, values: ConfigDict) -> tuple[Callable, ...]:
  """Owners of a section's values; () if there are none, as in a comparison."""
  if section not in KINDS:
    return (OWNERS[section],) if section in OWNERS else ()
  name = str(values.get("name" if section == "data" else "kind"))
  owner = KINDS[section].get(name.partition(":")[0])
  return (owner,) if owner else ()


def _keys(owner: Callable) -> list[str]:
  return [name for name in inspect.signature(owner).parameters if name not in _HIDDEN]


def _place(owner: Callable) -> str:
  return f"{owner.__module__}.{owner.__qualname__}"


def _line(key: str, value: Any, kind: str, words: str) -> str:
  text = f"--config.{key}" + (f"={value if isinstance(value, str) else foreign.shown(value, 100)}")
  flag = f'"{text}"' if "'" in text and not re.search(r'["$`!\\]', text) else shlex.quote(text)
  if value is None:
    flag = f"--config.{key}  (not set)"
  return _wrapped(f"{flag}{f'  {kind}' if kind else ''}{f': {words}' if words else ''}", 2)


def _wrapped(text: str, indent: int) -> str:
  return textwrap.fill(
    text, 120, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4), break_long_words=False
  )
