"""Files of the authors of the tiny autoencoders: an encoder and a decoder, or both in one, without a config."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from pflow_jax.files.foreign import shown
from pflow_jax.torch_io.places import Place, Tensors
from pflow_jax.torch_io.tensors import PICKLED, open_tensors

Shapes = Mapping[str, tuple[int, ...]]

_ENDINGS = (".safetensors", *PICKLED)
_NAME = re.compile(r"(?:(?P<part>encoder|decoder)\.)?(?:layers\.)?(?P<number>\d{1,3})\.(?P<rest>.+)")


def find(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a tiny autoencoder: none, one with both parts, or the encoder's and the decoder's.

  Args:
    path: of a file with both; of a folder with one autoencoder; or without the ending of names, "taesd/taef2" for
      taesd/taef2_encoder.pth and taesd/taef2_decoder.pth.

  Raises:
    ValueError: a folder has several.
  """
  if path.is_file():
    return [path] if path.suffix in _ENDINGS else []
  stems = [path]
  if path.is_dir():
    encoders = [file for ending in _ENDINGS for file in path.glob(f"*_encoder{ending}")]
    stems = sorted({file.with_name(file.name.rpartition("_encoder")[0]) for file in encoders})
    if len(stems) > 1:
      raise ValueError(f"{path}: expected one autoencoder, got {shown([stem.name for stem in stems])}; give {stems[0]}")
    if not stems:
      whole = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
      return whole if len(whole) == 1 else []
  for stem in stems:
    for ending in _ENDINGS:
      pair = [stem.with_name(f"{stem.name}_{part}{ending}") for part in ("encoder", "decoder")]
      if all(file.is_file() for file in pair):
        return pair
  return []


def open_parts(files: list[pathlib.Path]) -> tuple[dict[str, Any], Tensors]:
  """Opens the files that `find` returned.

  Returns:
    Attributes of `TinyAutoencoder`, which the shapes tell, and the tensors by diffusers' names.

  Raises:
    ValueError: they hold something else.
  """
  parts = ("encoder", "decoder") if len(files) == 2 else ("",)
  places: dict[str, Place] = {}
  for part, file in zip(parts, files, strict=True):
    for name, place in open_tensors(file).places.items():
      found = _NAME.fullmatch(name)
      own = found and (found["part"] or part)
      if not found or not own:
        raise ValueError(
          f"{file}: expected a tiny autoencoder, layers such as encoder.1.conv.0.weight, got {shown(name)}"
        )
      places[f"{own}.layers.{int(found['number'])}.{found['rest']}"] = place
  shapes = {name: place.shape for name, place in places.items()}
  if "decoder.layers.0.weight" not in shapes:  # the authors' numbers, one more than diffusers'
    places = {_counted_down(name): place for name, place in places.items()}
    shapes = {name: place.shape for name, place in places.items()}
  try:
    return _attributes(shapes), Tensors(places)
  except (KeyError, IndexError, ValueError) as error:
    where = " and ".join(str(file) for file in files)
    raise ValueError(f"{where}: expected the layers of a tiny autoencoder, got {shown(sorted(shapes)[:3])}") from error


def _counted_down(name: str) -> str:
  part, layers, number, rest = name.split(".", 3)
  return f"{part}.{layers}.{int(number) - (part == 'decoder')}.{rest}"


def _attributes(shapes: Shapes) -> dict[str, Any]:
  """Returns the attributes of a module with tensors of these shapes."""
  encoder, decoder = _layers(shapes, "encoder"), _layers(shapes, "decoder")
  stem = []
  if "block" not in (kind for kind, _, _ in encoder[:2]):  # a convolution after the first: both halve the resolution
    while encoder[0][0] == "conv":
      stem.append(encoder.pop(0)[1][0])
  else:
    encoder.pop(0)
  widths, depths = _levels([*encoder[:-1]])
  out_widths, out_depths = _levels(decoder[1:-1])
  return {
    "channels": decoder[-1][1][0],
    "latent_channels": encoder[-1][1][0],
    "stem": tuple(stem),
    "encoder_widths": widths,
    "encoder_depths": depths,
    "decoder_widths": out_widths,
    "decoder_depths": out_depths,
    "pool": any(".pool." in name for name in shapes),
  }


def _layers(shapes: Shapes, part: str) -> list[tuple[str, tuple[int, ...], int]]:
  """Returns the layers with weights of a part in their order: "conv" or "block", shape of the first weight, number."""
  found: dict[int, tuple[str, tuple[int, ...], int]] = {}
  for name, shape in shapes.items():
    own, _, number, rest = name.split(".", 3)
    if own == part and rest in ("weight", "conv.0.weight"):
      found[int(number)] = "conv" if rest == "weight" else "block", shape, int(number)
  return [found[number] for number in sorted(found)]


def _levels(layers: list[tuple[str, tuple[int, ...], int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns widths and numbers of blocks of the levels, which convolutions part."""
  widths, depths = [layers[0][1][0]], [0]
  for kind, shape, _ in layers:
    if kind == "conv":
      widths.append(shape[0])
      depths.append(0)
    else:
      depths[-1] += 1
  return tuple(widths), tuple(depths)
