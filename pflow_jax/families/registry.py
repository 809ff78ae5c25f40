"""Published models by name; whoever asks for a network here finds theirs too."""

from __future__ import annotations

from pflow_jax.families.flux.network import Flux
from pflow_jax.families.qwen_image.network import QwenImage
from pflow_jax.networks import layers, mmdit
from pflow_jax.networks.registry import NETWORKS as NETWORKS
from pflow_jax.networks.registry import NetworkKind, register_network
from pflow_jax.networks.registry import network_kind as network_kind
from pflow_jax.networks.registry import sharding_rules as sharding_rules

_RULES = (*mmdit.SHARDING, *layers.SHARDING)

register_network("flux", NetworkKind(Flux, _RULES, ("text",), "flux"))
register_network("qwen_image", NetworkKind(QwenImage, _RULES, ("text",), "flux"))
