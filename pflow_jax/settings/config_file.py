"""Config files: programs in Python whose `get_config` returns the config; they run with the rights of the user."""

from __future__ import annotations

import pathlib
import traceback
import types

from ml_collections import ConfigDict, FrozenConfigDict

from pflow_jax.files import foreign
from pflow_jax.settings import renamed

MAX_BYTES = 2**20
_PACKAGE = pathlib.Path(__file__).parents[1]
SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # places in an installation, and in a checkout


def read_config_file(config: str) -> ConfigDict:
  """Runs a config file and returns the config of its `get_config`.

  Args:
    config: "path/of/config.py" or "path/of/config.py:variant"; get_config takes the variant, if there is one. A name
      without ".py", such as "digits:gmflow", is a file of this package.

  Raises:
    ValueError: it is no Python file, or it fails; the message names the line.
  """
  path, _, variant = config.partition(":")
  expected = "expected a Python file, and perhaps a variant after a colon, such as configs/digits.py:teacher"
  if not path.endswith(".py"):
    known = shipped()
    if path not in known:
      raise ValueError(f"{foreign.shown(path)}: {expected}, or one of {', '.join(known)}")
    path = str(known[path])
  try:
    program = foreign.read_bytes(path, MAX_BYTES)
  except ValueError as error:
    raise ValueError(f"{error}; {expected}") from error
  module = types.ModuleType("pflow_config")
  module.__file__ = path
  try:
    # An import would leave compiled files beside it, and take those that lie there.
    exec(compile(program, path, "exec", dont_inherit=True), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
      raise TypeError("expected a function get_config")
    values = module.get_config(*([variant] if variant else []))
  except (Exception, SystemExit) as error:
    raise ValueError(f"{path}{_line(error, path)}: {_said(error)}") from error
  if not isinstance(values, ConfigDict):
    raise ValueError(f"{path}: expected a ConfigDict from get_config, got {foreign.shown(values)}")
  if not set(renamed.SECTIONS).isdisjoint(values):
    return ConfigDict(renamed.renewed(values))
  return ConfigDict(values) if isinstance(values, FrozenConfigDict) else values


def shipped() -> dict[str, pathlib.Path]:
  """The config files that come with this package, by name."""
  for folder in SHIPPED:
    if folder.is_dir():
      return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.py"))}
  return {}


def _line(error: BaseException, path: str) -> str:
  """Place of the error in the file: ", line 3"; empty for an error raised elsewhere."""
  if isinstance(error, SyntaxError) and error.filename == path:
    return f", line {error.lineno}"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
  """The error on one line; configs refuse a variant with a ValueError, whose name is left out."""
  text = error.msg if isinstance(error, SyntaxError) else str(error.args[0] if error.args else error)
  text = " ".join(text.split())
  if isinstance(error, ModuleNotFoundError) and error.name == "pflow_jax.defaults":
    text += "; default_config is in pflow_jax.settings.defaults now"
  return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
