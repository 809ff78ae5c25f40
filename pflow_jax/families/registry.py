"""Published models by name; whoever asks for a network here finds theirs too."""

from __future__ import annotations

from typing import Any

from pflow_jax.data.prompts.records import MAX_LENGTHS, MODELS, Fields, read_index
from pflow_jax.families import kl_names
from pflow_jax.families.dit import authors as dit_authors
from pflow_jax.families.dit import names as dit_names
from pflow_jax.families.edm2 import names as edm2_names
from pflow_jax.families.family import Family
from pflow_jax.families.flux import names as flux_names
from pflow_jax.families.flux.encoder import FluxEncoder
from pflow_jax.families.flux.network import Flux
from pflow_jax.families.minilm.encoder import MiniLMEncoder
from pflow_jax.families.qwen_image import names as qwen_image_names
from pflow_jax.families.qwen_image import vae_names as qwen_vae_names
from pflow_jax.families.qwen_image.encoder import QwenImageEncoder
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.families.taesd import names as tiny_names
from pflow_jax.files.registering import replaces
from pflow_jax.networks import layers, mmdit
from pflow_jax.networks.heads import ArcHead, DXHead, GMFlowHead, Head
from pflow_jax.networks.registry import NETWORKS as NETWORKS
from pflow_jax.networks.registry import NetworkKind, register_network
from pflow_jax.networks.registry import network_kind as network_kind
from pflow_jax.networks.registry import sharding_rules as sharding_rules

_RULES = (*mmdit.SHARDING, *layers.SHARDING)
_SHIFT = 3.2  # of the text-to-image students, and of how their teachers are walked
# The releases' recipes.
_OF_TEXTS: dict[type[Head], dict[str, Any]] = {
  GMFlowHead: {"nfe": 4, "final_scale": 0.5, "shift": _SHIFT, "temperature": "auto"},
  DXHead: {"nfe": 4, "final_scale": 0.5, "shift": _SHIFT},
  ArcHead: {"nfe": 2, "final_scale": 1.0, "shift": _SHIFT},
}
_OF_CLASSES: dict[type[Head], dict[str, Any]] = {
  head: {"nfe": 1, "final_scale": 1.0, "shift": 1.0} for head in _OF_TEXTS
}
_WALK = {"shift": _SHIFT, "nfe": (50,), "batch_size": 16}

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
  """Makes a family known: its network to configs, its files to `pflow convert`, its encoder to `pflow cache`.

  Args:
    family: with a name of its own.

  Raises:
    ValueError: another family, or another network, has that name; its encoder has another one.
  """
  other = FAMILIES.get(family.name, family)
  if not replaces(family, _key(family), other, _key(other)):
    raise ValueError(f"there is a family {family.name!r} already; take another name")
  encoder = family.encoder
  if encoder is not None and encoder.model != family.name:
    raise ValueError(f"{encoder.__name__}.model: expected {family.name!r}, its family, got {encoder.model!r}")
  if family.network is not None:
    register_network(family.name, family.network)
  if encoder is not None:
    MODELS[family.name] = Fields(encoder.text_width, encoder.masked, encoder.pooled_width)
    MAX_LENGTHS[family.name] = encoder.length
  FAMILIES[family.name] = family


def family_of_embeddings(folder: str) -> Family:
  """Returns the family, an encoder alone, that the embeddings in place of classes were written for.

  Args:
    folder: of the embeddings. Where it is gone, the only such family is taken.

  Raises:
    ValueError: they are of another family, or it is not known of which.
  """
  alone = [name for name, family in FAMILIES.items() if family.network is None and family.encoder is not None]
  index = read_index(folder)
  model = index.model if index is not None else alone[0] if len(alone) == 1 else None
  if model in alone:
    return FAMILIES[model]
  got = "none" if model is None else f"those of {model!r}"
  raise ValueError(f"{folder}: expected the run's embeddings, by an encoder of one of {alone}, got {got}")


def _key(family: Family) -> type | None:
  return family.network.module if family.network is not None else family.encoder


register_family(
  Family("dit", NETWORKS["dit"], dit_names.NAMES, students=_OF_CLASSES, formats={"timm": dit_authors.NAMES})
)
# The release samples with 32 of its steps.
register_family(
  Family("edm2", NETWORKS["edm2"], edm2_names.NAMES, teacher={"solver": "edm", "nfe": (63,)}, knows_empty=False)
)
register_family(
  Family(
    "flux",
    NetworkKind(Flux, _RULES, ("text",), "flux"),
    flux_names.NAMES,
    FluxEncoder,
    kl_names.NAMES,
    teacher=_WALK,
    students=_OF_TEXTS,
  )
)
register_family(
  Family(
    "qwen_image",
    NetworkKind(QwenImage, _RULES, ("text",), "flux"),
    qwen_image_names.NAMES,
    QwenImageEncoder,
    qwen_vae_names.NAMES,
    teacher=_WALK,
    students=_OF_TEXTS,
  )
)
register_family(Family("minilm", encoder=MiniLMEncoder))
register_family(Family("taesd", autoencoder=tiny_names.NAMES))


def knows_empty(kind: str) -> bool:
  """Returns whether the released models of a network were trained with the empty condition too."""
  return kind not in FAMILIES or FAMILIES[kind].knows_empty
