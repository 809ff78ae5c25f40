"""Looks at files of EDM2: what a snapshot says of its network, and what the shapes of tensors tell of one.

References:
  training_loop.py and networks_edm2.py of github.com/NVlabs/edm2, commit 4bf8162.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pflow_jax.families.edm2 import latents
from pflow_jax.families.names import Source
from pflow_jax.files.foreign import parse_json, shown
from pflow_jax.networks.edm2 import EDM2_SIZES
from pflow_jax.torch_io.persistent import PERSISTENT

PRECOND = "Precond"  # NVIDIA's class
LOGVAR_CHANNELS = 128
LICENCE = "cc-by-nc-sa-4.0"  # of NVIDIA's snapshots

_FIRST = re.compile(r"unet\.enc\.(\d{1,5})x\1_conv\.weight")
_BLOCK = re.compile(r"unet\.enc\.(\d{1,5})x\1_block(\d{1,3})\.(conv_res1|attn_proj)\.weight")
_PUBLISHED = re.compile(r"edm2-img(64|512)-.+")
_LOGVAR = "logvar_"


def recognise(source: Source) -> Source | None:
  """Returns a source of an EDM2 with a whole config.json and without the estimate of its loss; None for another model.

  Args:
    source: files of any model.

  Raises:
    ValueError: it is an EDM2, and does not tell enough of itself.
  """
  if source.convention is not None and source.config.get("_class_name") == PRECOND:
    raise ValueError(f"convention: only the files of a DiT leave it open, this is a {PRECOND}; leave it out")
  first = [match for name in source.tensors.places if (match := _FIRST.fullmatch(name))]
  told = _told_by_pickle(source)
  if told is None and "_class_name" not in source.config:
    if len(first) != 1:
      return None
    told = _told_by_shapes(source, int(first[0][1]))
    source = source.noted(
      "taken to be an EDM2 with 64 channels a head and sigma_data 0.5, which its tensors do not tell"
    )
  if told is None and "_class_name" not in source.config:
    return None
  config = {**(told or {}), **source.config}
  if _PUBLISHED.fullmatch(source.published):
    config |= {"_file": source.published, "_license": LICENCE}
  aside = [name for name in source.tensors.places if name.startswith(_LOGVAR)]
  source = dataclasses.replace(source, tensors=source.tensors.without(aside), config=config)
  if aside:
    source = source.noted(f"left out: {', '.join(sorted(aside))}, which estimate EDM2's loss in training alone")
  return source


def _told_by_pickle(source: Source) -> dict[str, Any] | None:
  """Returns the config.json that a snapshot tells; None where the file is none of EDM2's."""
  if PERSISTENT not in source.tensors.metadata:
    return None
  about = parse_json(source.tensors.metadata[PERSISTENT], where=f"{source.file}, its network")
  if about["class"] != PRECOND or "unet.out_gain" not in source.tensors.places:
    return None
  if about["positional"]:
    raise ValueError(f"{source.file}: expected the arguments of its network by name, got {about['positional']} without")
  config = {"_class_name": PRECOND, **{key: v for key, v in about["arguments"].items() if not key.startswith("_")}}
  encoder = about["others"].get("encoder")
  config |= {"_encoder": encoder["class"]} if encoder else {}
  if encoder and encoder["class"] == latents.ENCODER and (scaling := latents.scaling_of(encoder["arguments"])):
    config |= {"_latent_shift": list(scaling.shift), "_latent_scale": list(scaling.scale)}
  return config


def _told_by_shapes(source: Source, side: int) -> dict[str, Any]:
  """Returns the config.json that the tensors of a state dict tell.

  Args:
    source: its files.
    side: resolution of the network.

  Raises:
    ValueError: tensors are missing.
  """
  shapes = source.tensors.shapes
  blocks = {(int(m[1]), int(m[2]), m[3]): shapes[m[0]][0] for m in map(_BLOCK.fullmatch, shapes) if m and shapes[m[0]]}
  first = shapes[f"unet.enc.{side}x{side}_conv.weight"]
  out = shapes.get("unet.out_conv.weight", ())
  sides = sorted({at for at, _, _ in blocks}, reverse=True)
  if len(first) != 4 or len(out) != 4 or not first[0] or not sides:
    raise ValueError(f"{source.file}: expected the tensors of an EDM2; it is damaged, or another network")
  widths = [blocks.get((at, 0, "conv_res1"), 0) for at in sides]
  if any(width % first[0] or not width for width in widths):
    raise ValueError(f"{source.file}: expected widths that are multiples of {first[0]}, got {shown(widths)}")
  label = shapes.get("unet.emb_label.weight", (0, 0))
  return {
    "_class_name": PRECOND,
    "img_resolution": side,
    "img_channels": out[0],
    "label_dim": label[-1] if label else 0,
    "model_channels": first[0],
    "channel_mult": [width // first[0] for width in widths],
    "num_blocks": 1 + max(i for _, i, _ in blocks),
    "attn_resolutions": sorted({at for at, _, layer in blocks if layer == "attn_proj"}, reverse=True),
  }


def check_depth(source: Source, levels: int, blocks: int) -> None:
  """Raises ValueError for more blocks than the tensors are; each has several."""
  if levels * blocks > len(source.tensors.places):
    raise ValueError(
      f"{source.file}: channel_mult, num_blocks: {levels} levels of {blocks} blocks cannot be in "
      f"{len(source.tensors.places)} tensors"
    )


def described(fields: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  """Returns a sentence on a network.

  Args:
    fields: of config.json, those that it leaves unsaid too.
    config: with what begins with an underscore.
  """
  names = [name for name, size in EDM2_SIZES.items() if size["model_channels"] == fields["model_channels"]]
  side, labels = fields["img_resolution"], fields["label_dim"]
  told = [
    f"{side} x {side} x {fields['img_channels']}",
    f"{labels} classes" if labels else "no classes",
    f"sigma_data {fields['sigma_data']:g}",
  ]
  encoder = config.get("_encoder")
  told += [f"encoder {shown(encoder).strip(chr(39))}"] if encoder else []
  return f"teacher: edm2 {names[0] if names else fields['model_channels']}, {', '.join(told)}"
