"""Text encoders of families.

A published one takes a prompt the way of the model's pipeline in diffusers: tokens, template, padding and all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pydantic

from pflow_jax.data.dataset import TEXT_DTYPE
from pflow_jax.data.prompts.records import INDEX, Fields
from pflow_jax.families.encoder_checks import check_network, using
from pflow_jax.files.foreign import check_type, decoding, in_bytes, read_bytes, read_json, regular_file

DTYPES = ("bfloat16", "float32")
MAX_SETTINGS = 2**28  # bytes of a file beside the weights
_LAST = 2**12  # bytes at the end of a file, where other weights of the same sizes differ


class Encoder:
  """One model's way from prompts to arrays.

  A subclass has at least `model`, `length`, the widths of what it gives, and `arrays`.

  Args:
    folder: of the encoders.
    max_length: tokens of a text.
    dtype: that it is computed in, "bfloat16" or "float32".
    device: of PyTorch; by default the best that there is.

  Attributes:
    folder: of the encoders.
    fields: what `encode` gives.
    max_length: tokens of a text, at most, or of every one where `fields.masked` is False.
  """

  model: ClassVar[str] = ""
  """Name of its family."""

  default_dtype: ClassVar[str] = "float32"
  """Type that it is computed in, "bfloat16" or "float32"."""

  length: ClassVar[int] = 0
  """Tokens of a text unless told otherwise; 0 of an encoder that gives one vector."""

  limit: ClassVar[int | None] = None
  """Tokens of a text, at most."""

  text_width: ClassVar[int] = 0
  """Width of "text" at the published size; 0 without it."""

  pooled_width: ClassVar[int] = 0
  """Width of "pooled" at the published size; 0 without it."""

  masked: ClassVar[bool] = False
  """Whether the network is told which tokens are padding; else all texts have one length."""

  template: ClassVar[str | None] = None
  """Text around a prompt."""

  fields: Fields

  def __init__(self, folder: str | os.PathLike, max_length: int, dtype: str, device: str | None = None):
    self.folder, self.max_length, self.dtype = pathlib.Path(folder), max_length, dtype
    if dtype not in DTYPES:
      raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}.")
    if bool(self.length) != (max_length > 0) or (self.limit and max_length > self.limit):
      expected = f"1 to {self.limit or 'any number of'} tokens" if self.length else "no length of text"
      raise ValueError(f"max_length: {self.model} takes {expected}, got {max_length}.")
    self.open(device)
    self.fields = self._fields()

  @classmethod
  def find(cls) -> str:
    """Returns the folder of the encoders where none is given.

    Raises:
      ValueError: one must be given.
    """
    return "."

  def open(self, device: str | None) -> None:
    """Reads what the encoder needs before its first prompt; by default nothing.

    Args:
      device: of PyTorch; None for the best that there is.

    Raises:
      ValueError: the folder does not hold this encoder.
    """

  def text_lengths(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns the tokens of each prompt's text, (n,) int32.

    Args:
      prompts: texts.
    """
    return np.full(len(prompts), self.max_length, np.int32)

  def arrays(self, prompts: list[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of prompts, see `encode`.

    Args:
      prompts: texts.
    """
    raise NotImplementedError

  def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of prompts, as far as the model has them.

    Args:
      prompts: texts.

    Returns:
      "text" (n, L, D), padded with zeros to the longest where there is a mask; "mask" (n, L) bool; "pooled" (n, P)
      float32.

    Raises:
      ValueError: weights do not fit, or a prompt's arrays are not finite.
    """
    arrays = self.arrays(list(prompts))
    for prompt, *rows in zip(prompts, *arrays.values(), strict=True):
      if not all(np.isfinite(row.astype(np.float32)).all() for row in rows):
        raise ValueError(f"{self.folder}: the encoders give values that are not finite for the prompt {prompt!r}.")
    return arrays

  def digest(self) -> str:
    """Returns a text that tells an encoder from others.

    By default it is of the name of its class, and of the names, sizes and last bytes of the files in its folder. Those
    of the network, the autoencoder and prompts do not count. Where no folder is given, it is the name alone.
    """
    name = type(self).__qualname__
    if self.folder == pathlib.Path(Encoder.find()):
      return name
    state = hashlib.blake2b(name.encode(), digest_size=16)
    for file in _files_of_encoder(self.folder):
      state.update(f"{file.relative_to(self.folder)} {file.stat().st_size}\n".encode(errors="surrogatepass"))
      with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - _LAST, 0))
        state.update(stream.read(_LAST))
    return state.hexdigest()

  def _fields(self) -> Fields:
    return Fields(self.text_width, self.masked, self.pooled_width)


class TorchEncoder(Encoder):
  """An encoder of transformers. Settings and tokenizers are read at once, weights at the first `encode`."""

  default_dtype = "bfloat16"

  networks: ClassVar[tuple[tuple[str, str], ...]] = ()
  """Folders of its networks, and their classes in transformers."""

  tokenizers: ClassVar[tuple[tuple[str, str], ...]] = ()
  """Folders of its tokenizers, and their classes in transformers."""

  @classmethod
  def find(cls) -> str:
    raise ValueError(f"{cls.model} needs the folder of its text encoders, that of the pipeline: --encoders.")

  def open(self, device: str | None) -> None:
    self._check_folder()
    torch, transformers = imported("torch"), imported("transformers")
    self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    self._tokenizers = [_from_folder(getattr(transformers, kind), self.folder / name) for name, kind in self.tokenizers]

  def arrays(self, prompts: list[str]) -> dict[str, np.ndarray]:
    with using(self.folder), imported("torch").inference_mode():
      return self._encode(prompts)

  def digest(self) -> str:
    """Returns a hash of its settings, its tokenizers, and the names and sizes of its weights."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted({name for name, _ in (*self.networks, *self.tokenizers)}):
      for file in sorted(p for p in (self.folder / name).iterdir() if p.is_file() and not p.name.startswith(".")):
        weights = file.suffix in (".safetensors", ".bin")
        state.update(f"{name}/{file.name} {file.stat().st_size}\n".encode())
        state.update(b"" if weights or file.suffix == ".md" else read_bytes(file, MAX_SETTINGS))
    return state.hexdigest()

  def _encode(self, prompts: list[str]) -> dict[str, np.ndarray]:
    raise NotImplementedError

  def _width(self, name: str, key: str) -> int:
    """Returns a width in the config.json of a network."""
    path = self.folder / name / "config.json"
    config = read_json(path)
    config = check_type(config.get("text_config", config), dict[str, Any], where=f"{path}: text_config")
    return check_type(config.get(key), pydantic.PositiveInt, where=f"{path}: {key}")

  @functools.cached_property
  def _networks(self) -> list[Any]:
    torch, transformers = imported("torch"), imported("transformers")
    options = {"dtype": getattr(torch, self.dtype), "output_loading_info": True}
    networks = []
    for name, kind in self.networks:
      check_network(getattr(transformers, kind), self.folder / name)
      network, info = _from_folder(getattr(transformers, kind), self.folder / name, **options)
      if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
          f"{self.folder / name}: {len(wrong)} weights of {kind} are missing or of another shape, such as {wrong[0]}; "
          "is this the folder of another model?"
        )
      networks.append(network.to(self.device).eval())
    return networks

  def _check_folder(self) -> None:
    problems = []
    for name, kind in self.networks:
      path = self.folder / name
      if not (path / "config.json").is_file():
        problems.append(f"{path}/config.json ({kind})")
      elif not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        problems.append(f"{path}/*.safetensors ({kind})")
    problems += [
      f"{self.folder / name} ({kind})" for name, kind in self.tokenizers if not (self.folder / name).is_dir()
    ]
    if problems:
      raise ValueError(
        f"{self.folder}: expected the encoders of {self.model} as in the folder of its diffusers pipeline, got no "
        f"{', no '.join(problems)}."
      )
    for name, _ in (*self.networks, *self.tokenizers):
      for file in (self.folder / name).iterdir():
        if file.exists() and not file.is_dir():
          regular_file(file)  # PyTorch's libraries would wait for what a pipe gives them
          if file.suffix not in (".safetensors", ".bin") and (size := file.stat().st_size) > MAX_SETTINGS:
            raise ValueError(f"{file}: expected at most {in_bytes(MAX_SETTINGS)}, got {in_bytes(size)}")


def _files_of_encoder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Regular files in a pipeline's folder that may be its encoder's, in the order of their names."""
  for place, folders, names in os.walk(folder):
    top = place == str(folder)
    folders[:] = sorted(
      name
      for name in folders
      if not name.startswith(".")
      and not (top and name in ("transformer", "vae"))
      and not any(pathlib.Path(place, name).glob(f"{INDEX}*"))
    )
    files = (pathlib.Path(place, name) for name in sorted(names) if not name.startswith("."))
    yield from (file for file in files if file.is_file())


def imported(name: str) -> Any:
  """Imports a package of the encoders.

  Args:
    name: of the package.

  Raises:
    ImportError: it is not there; the message tells how to install it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(f"text encoders need {name}, which is not there; pip install 'pflow-jax[text]'") from error


def _from_folder(kind: Any, path: pathlib.Path, **options: Any) -> Any:
  with decoding(f"{path}: cannot be read as {kind.__name__}"):
    return kind.from_pretrained(path, local_files_only=True, **options)


def to_numpy(tensor: Any) -> np.ndarray:
  """Copies a tensor of PyTorch to the host; of bfloat16 as that of ml_dtypes."""
  tensor = tensor.cpu()
  if str(tensor.dtype) == "torch.bfloat16":
    return tensor.view(imported("torch").int16).numpy().view(TEXT_DTYPE)
  return tensor.numpy()
