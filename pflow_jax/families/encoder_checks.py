"""Text encoders of transformers, looked at before they are built: their settings are somebody else's."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from pflow_jax.files.foreign import in_bytes, may_pass, read_json, regular_file, shown

MAX_LAYERS = 1024
_WEIGHTS = (".safetensors", ".bin")


def check_network(kind: Any, folder: pathlib.Path) -> None:
  """Refuses a config.json of more layers than any network has, or of more numbers than the weights beside it hold.

  transformers builds what a config says, and makes up what the weights lack, before it tells of either.

  Args:
    kind: the network's class.
    folder: of the network.

  Raises:
    ValueError: the config describes another network.
  """
  import torch

  path = folder / "config.json"
  for name, value in _layers(read_json(path)):
    if value > MAX_LAYERS:
      raise ValueError(f"{path}: {name}: expected up to {MAX_LAYERS} layers, got {shown(value)}")
  with using(folder):
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
      count = sum(parameter.numel() for parameter in kind(config).parameters())
  held = sum(regular_file(file).stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
  if count > held:
    raise ValueError(
      f"{path}: describes a {kind.__name__} of {shown(count)} parameters, which weights of {in_bytes(held)} cannot be"
    )


def _layers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
  """Names and values of whole numbers that count layers or heads, in a config and in those within it."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _layers(value)
    elif isinstance(value, int) and ("layers" in name or "heads" in name or name == "depth"):
      yield name, value


@contextlib.contextmanager
def using(folder: pathlib.Path) -> Iterator[None]:
  """Turns what encoders raise that do not fit together, of a dozen types, into a ValueError; not a lack of memory."""
  try:
    yield
  except (ValueError, ImportError, MemoryError):
    raise
  except Exception as error:
    # What the system or a device of PyTorch lacks is no mistake; transformers raises OSErrors of its own.
    if may_pass(error) or type(error).__name__ == "OutOfMemoryError":
      raise
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"{folder}: its encoders and tokenizers do not work together: {shown(reason, 200)}") from error
